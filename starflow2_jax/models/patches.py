"""Pixels as latents: an exact linear change of variables of dequantised 8-bit patches.

The pixels p = 2 (k + U[0, 1)) / 256 - 1 are dealt out to tokens, and each token becomes
x = (p basis) / divisors. The log-determinant is a constant, so a density of x is a density of the
8-bit image. Letters: B images, H, W pixels, N tokens, C = H * W * channels / N.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


def image_noise(
    seed: jax.Array | int, image_seeds: jax.Array, shape: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
    """The noise of images, the same in training and evaluation, whatever batch they are in.

    Args:
        seed: of the run, or of one draw of the dequantisation; scalar.
        image_seeds: uint32 [B], of each image's record and of its place there.
        shape: (H, W, channels).

    Returns:
        U[0, 1) for the dequantisation, and standard normal, both [B, H, W, channels].
    """
    base = jax.random.key(seed)

    def draw(image_seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        uniform, normal = jax.random.split(jax.random.fold_in(base, image_seed))
        return jax.random.uniform(uniform, shape), jax.random.normal(normal, shape)

    return jax.vmap(draw)(jnp.asarray(image_seeds))


def dequantised(images: jax.Array, uniform: jax.Array) -> jax.Array:
    """8-bit values and U[0, 1) noise of their shape -> [-1, 1), uniform inside a grey level."""
    return 2.0 * (images + uniform) / 256.0 - 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatchCodec:
    """An orthonormal basis of the tokens' pixels, with a divisor for each coordinate.

    Attributes:
        order: int32 [N * C], the pixel (of the flattened image) that each place of a token holds.
        basis: [C, C], orthonormal columns.
        divisors: [C], positive.
        shape: (H, W, channels).
    """

    order: jax.Array
    basis: jax.Array
    divisors: jax.Array
    shape: tuple[int, int, int] = dataclasses.field(metadata={"static": True})

    def encode(self, images: jax.Array, uniform: jax.Array) -> jax.Array:
        """uint8 [B, H, W, channels] and U[0, 1) noise of that shape -> x [B, N, C]."""
        pixels = dequantised(images, uniform).reshape(images.shape[0], -1)
        tokens = pixels[:, self.order].reshape(images.shape[0], -1, len(self.divisors))
        return tokens @ self.basis / self.divisors

    def decode(self, x: jax.Array) -> jax.Array:
        """x [B, N, C] -> real pixels [B, H, W, channels] on the [-1, 1) scale."""
        tokens = (x * self.divisors) @ self.basis.T
        pixels = tokens.reshape(len(x), -1)[:, jnp.argsort(self.order)]
        return pixels.reshape(len(x), *self.shape)

    def to_uint8(self, x: jax.Array) -> jax.Array:
        """x [B, N, C] -> the 8-bit images whose cells hold it, clipped to the range."""
        level = jnp.floor((self.decode(x) + 1.0) * 128.0)
        return jnp.clip(level, 0, 255).astype(jnp.uint8)

    def bits_per_dim(self, log_prob: jax.Array) -> jax.Array:
        """log p(x) in nats of a whole image -> bits per dim of the 8-bit image (upper bound).

        -log2 p(x) / dims + 7 + mean log2 divisors: a grey level is 2/256 wide.
        """
        bits = -log_prob / (math.prod(self.shape) * math.log(2.0))
        return bits + 7.0 + jnp.log2(self.divisors).mean()


def noisy_latents(
    codec: PatchCodec,
    images: jax.Array,
    seed: jax.Array | int,
    image_seeds: jax.Array,
    noise_std: jax.Array | float = 0.0,
) -> jax.Array:
    """Latents of images with their noise, see `image_noise`.

    Args:
        codec: of the images.
        images: uint8 [..., H, W, channels].
        seed: of the run, or of one draw; scalar.
        image_seeds: uint32 [...], one for each image.
        noise_std: of the noise on the latents.

    Returns:
        [..., N, C].
    """
    images, leading = jnp.asarray(images), image_seeds.shape
    flat = images.reshape(-1, *images.shape[len(leading) :])
    uniform, normal = image_noise(seed, jnp.asarray(image_seeds).reshape(-1), flat.shape[1:])
    x = codec.encode(flat, uniform)
    x = x + noise_std * normal.reshape(x.shape)
    return x.reshape(*leading, *x.shape[1:])


def patch_order(height: int, width: int, channels: int, patch: int, frame: int = 0) -> np.ndarray:
    """Which pixel each place of a token holds: square patches inside a frame, in raster order.

    The frame's pixels are dealt out in raster order, equally many to each token behind those of its
    patch. Where a picture's margin is empty, patches of its inside alone share the content of the
    picture more evenly than patches of the whole.

    Args:
        height, width, channels: of the image.
        patch: side of a patch in pixels.
        frame: pixels left out on each side.

    Returns:
        int32 [height * width * channels], a permutation.

    Raises:
        ValueError: patches do not fill the inside, or the frame does not divide among them.
    """
    rows, columns = (height - 2 * frame) // patch, (width - 2 * frame) // patch
    if rows * patch + 2 * frame != height or columns * patch + 2 * frame != width:
        raise ValueError(
            f"{patch}x{patch} patches do not fill {height}x{width} within a frame of {frame}"
        )
    index = np.arange(height * width * channels, dtype=np.int32).reshape(height, width, channels)
    inside = index[frame : height - frame, frame : width - frame]
    grid = inside.reshape(rows, patch, columns, patch, channels).transpose(0, 2, 1, 3, 4)
    tokens = grid.reshape(rows * columns, -1)
    margin = np.setdiff1d(index, inside)
    if len(margin) % len(tokens):
        raise ValueError(f"a frame of {len(margin)} values does not divide by {len(tokens)} tokens")
    return np.concatenate([tokens, margin.reshape(len(tokens), -1)], axis=1).ravel()


def fit_patch_codec(images: np.ndarray, order: np.ndarray, tokens: int, seed: int) -> PatchCodec:
    """Principal axes of the tokens' dequantised pixels, with root mean squares as divisors.

    The axes are those of the images and their negatives taken together, so that the mean is zero
    and an inverted image is the negative of its latents, but for the dequantisation noise.

    Args:
        images: uint8 [B, H, W, channels].
        order: see `patch_order`.
        tokens: N.
        seed: of the dequantisation.
    """
    dims = len(order) // tokens
    plain = PatchCodec(jnp.asarray(order), jnp.eye(dims), jnp.ones(dims), images.shape[1:])
    uniform = np.random.default_rng(seed).random(images.shape, np.float32)
    flat = np.asarray(plain.encode(jnp.asarray(images), uniform), np.float64).reshape(-1, dims)
    variances, axes = np.linalg.eigh(flat.T @ flat / len(flat))
    return dataclasses.replace(
        plain,
        basis=jnp.asarray(axes[:, ::-1], jnp.float32),
        divisors=jnp.asarray(np.sqrt(variances[::-1]), jnp.float32),
    )
