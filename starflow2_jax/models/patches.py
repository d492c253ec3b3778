"""Pixels as latents: an exact linear change of variables of dequantised 8-bit patches.

x = ((2 (k + U[0, 1)) / 256 - 1) - mean) basis / divisors, patch by patch. Its log-determinant is a
constant, so a density of x is a density of the 8-bit image.
Letters: B images, H, W pixels, P patch side, N patches, C = P * P * channels.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


def dequantised(images: jax.Array, uniform: jax.Array) -> jax.Array:
    """8-bit values and U[0, 1) noise of their shape -> [-1, 1), uniform inside a grey level."""
    return 2.0 * (images + uniform) / 256.0 - 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatchCodec:
    """An orthonormal basis of the patch, centred, with a divisor for each coordinate.

    Attributes:
        mean: [C], in units of the [-1, 1) scale.
        basis: [C, C], orthonormal columns.
        divisors: [C], positive.
        patch: P.
        channels: colour channels.
    """

    mean: jax.Array
    basis: jax.Array
    divisors: jax.Array
    patch: int = dataclasses.field(metadata={"static": True})
    channels: int = dataclasses.field(metadata={"static": True})

    def encode(self, images: jax.Array, uniform: jax.Array) -> jax.Array:
        """uint8 [B, H, W, channels] and U[0, 1) noise of that shape -> x [B, N, C]."""
        return (self._split(dequantised(images, uniform)) - self.mean) @ self.basis / self.divisors

    def decode(self, x: jax.Array) -> jax.Array:
        """x [B, N, C] -> real pixels [B, H, W, channels] on the [-1, 1) scale (square images)."""
        flat = (x * self.divisors) @ self.basis.T + self.mean
        side, p, c = math.isqrt(x.shape[1]), self.patch, self.channels
        grid = flat.reshape(-1, side, side, p, p, c).transpose(0, 1, 3, 2, 4, 5)
        return grid.reshape(-1, side * p, side * p, c)

    def to_uint8(self, x: jax.Array) -> jax.Array:
        """x [B, N, C] -> the 8-bit images whose cells hold it, clipped to the range."""
        level = jnp.floor((self.decode(x) + 1.0) * 128.0)
        return jnp.clip(level, 0, 255).astype(jnp.uint8)

    def bits_per_dim(self, log_prob: jax.Array, dims: int) -> jax.Array:
        """log p(x) in nats of a whole image -> bits per dim of the 8-bit image (upper bound).

        -log2 p(x) / dims + 7 + mean log2 divisors: a grey level is 2/256 wide.
        """
        return -log_prob / (dims * math.log(2.0)) + 7.0 + jnp.log2(self.divisors).mean()

    def _split(self, pixels: jax.Array) -> jax.Array:
        b, h, w, c = pixels.shape
        p = self.patch
        grid = pixels.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        return grid.reshape(b, (h // p) * (w // p), p * p * c)


def fit_patch_codec(images: np.ndarray, patch: int, seed: int) -> PatchCodec:
    """Principal axes of the dequantised patches, with their standard deviations as divisors.

    The images and their negatives are taken together, so that the mean is zero and an inverted
    image is the negative of its latents, but for one grey level.

    Args:
        images: uint8 [B, H, W, channels].
        patch: P, dividing H and W.
        seed: of the dequantisation.
    """
    channels = images.shape[-1]
    dims = patch * patch * channels
    plain = PatchCodec(jnp.zeros(dims), jnp.eye(dims), jnp.ones(dims), patch, channels)
    uniform = np.random.default_rng(seed).random(images.shape, np.float32)
    flat = np.asarray(plain.encode(images, uniform), np.float64).reshape(-1, dims)
    variances, axes = np.linalg.eigh(flat.T @ flat / len(flat))
    return PatchCodec(
        mean=jnp.zeros(dims, jnp.float32),
        basis=jnp.asarray(axes[:, ::-1], jnp.float32),
        divisors=jnp.asarray(np.sqrt(variances[::-1]), jnp.float32),
        patch=patch,
        channels=channels,
    )
