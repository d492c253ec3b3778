"""Pixels as latents: an exact linear change of variables of dequantised 8-bit patches.

The pixels p = 2 (k + U[0, 1)) / 256 - 1 of each patch become coefficients p basis, and coefficient
n of every patch makes token n: a picture comes from coarse to fine, and its first token shows the
whole of it. The maps of the coarsest coefficients are written as waves over the picture. The
log-determinant is a constant, so a density of x is a density of the 8-bit image.
Letters: B images, H, W pixels, P patches of K values; N = K tokens of C = P channels.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

from starflow2_jax.models.codec import Codec
from starflow2_jax.nn.layers import full_precision


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
    """An orthonormal basis of the patches, coarse to fine, and a divisor for each number.

    Attributes:
        order: int32 [P * K], the pixel (of the flattened image) at each place of each patch.
        basis: [K, K], orthonormal columns.
        waves: [K, P, P], orthonormal columns, in which the map of coefficient n over the patches is
            written; the identity leaves it as it is.
        divisors: [K, P], positive.
        shape: (H, W, channels).
    """

    order: jax.Array
    basis: jax.Array
    waves: jax.Array
    divisors: jax.Array
    shape: tuple[int, int, int] = dataclasses.field(metadata={"static": True})

    @property
    def of_pixels(self) -> bool:
        """See `codec.Codec`."""
        return True

    def encode(self, images: jax.Array, uniform: jax.Array) -> jax.Array:
        """uint8 [B, H, W, channels] and U[0, 1) noise of that shape -> x [B, N, C]."""
        pixels = dequantised(images, uniform).reshape(images.shape[0], -1)
        patches = pixels[:, self.order].reshape(images.shape[0], -1, len(self.basis))
        with full_precision():
            x = jnp.einsum("bpk,kpc->bkc", patches @ self.basis, self.waves)
        return x / self.divisors

    def latents(
        self,
        images: jax.Array,
        seed: jax.Array | int,
        image_seeds: jax.Array,
        noise_std: jax.Array | float = 0.0,
        reading: bool = False,
    ) -> jax.Array:
        """See `codec.Codec`; pixels are dequantised where they are only read, too."""
        del reading
        uniform, normal = image_noise(seed, image_seeds, images.shape[1:])
        x = self.encode(images, uniform)
        return x + noise_std * normal.reshape(x.shape)

    def decode(self, x: jax.Array) -> jax.Array:
        """x [B, N, C] -> real pixels [B, H, W, channels] on the [-1, 1) scale."""
        with full_precision():
            coefficients = jnp.einsum("bkc,kpc->bpk", x * self.divisors, self.waves)
            patches = coefficients @ self.basis.T  # [B, P, K]
        pixels = patches.reshape(len(x), -1)[:, jnp.argsort(self.order)]
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
    codec: Codec,
    images: jax.Array,
    seed: jax.Array | int,
    image_seeds: jax.Array,
    noise_std: jax.Array | float = 0.0,
    reading: bool = False,
) -> jax.Array:
    """Latents of images with their noise, see `codec.Codec.latents`.

    Args:
        codec: of the images.
        images: uint8 [..., H, W, channels], or what else the codec takes.
        seed: of the run, or of one draw; scalar.
        image_seeds: uint32 [...], one for each image.
        noise_std: of the noise on the latents.
        reading: the images are only looked at.

    Returns:
        [..., N, C].
    """
    images, leading = jnp.asarray(images), image_seeds.shape
    flat = images.reshape(-1, *images.shape[len(leading) :])
    x = codec.latents(flat, seed, jnp.asarray(image_seeds).reshape(-1), noise_std, reading)
    return x.reshape(*leading, *x.shape[1:])


def patch_order(height: int, width: int, channels: int, patch: int) -> np.ndarray:
    """Which pixel each place of each patch holds: square patches in raster order.

    Args:
        height, width, channels: of the image.
        patch: side of a patch in pixels.

    Returns:
        int32 [P, K], each pixel once.

    Raises:
        ValueError: the patches do not fill the image.
    """
    rows, columns = height // patch, width // patch
    if rows * patch != height or columns * patch != width:
        raise ValueError(f"{patch}x{patch} patches do not fill {height}x{width}")
    index = np.arange(height * width * channels, dtype=np.int32)
    grid = index.reshape(rows, patch, columns, patch, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * columns, -1)


def cosine_waves(height: int, width: int) -> np.ndarray:
    """The two-dimensional DCT-II of a map of this size: orthonormal columns [P, P], P = h * w."""
    rows, columns = (scipy.fft.dct(np.eye(n), axis=0, norm="ortho") for n in (height, width))
    return np.kron(rows, columns).T


def fit_patch_codec(images: np.ndarray, patch: int, seed: int, smooth: int = 0) -> PatchCodec:
    """Principal axes of the dequantised patches, with root mean squares as divisors.

    The axes are those of the images and their negatives taken together, so that the mean is zero
    and an inverted image is the negative of its latents, but for the dequantisation noise.

    Args:
        images: uint8 [B, H, W, channels].
        patch: side of a patch in pixels.
        seed: of the dequantisation.
        smooth: how many of the coarsest coefficients' maps are written in cosines. Neighbours on a
            coarse map go together, which a Gaussian that is diagonal in a token cannot say; in
            cosines they hardly do. Empty places of a fine map are better left where they are.

    Raises:
        ValueError: the patches do not fill the images.
    """
    order = patch_order(*images.shape[1:], patch)
    uniform = np.random.default_rng(seed).random(images.shape, np.float32)
    pixels = np.asarray(dequantised(images, uniform), np.float64).reshape(len(images), -1)
    patches = pixels[:, order]  # [B, P, K]
    flat = patches.reshape(-1, order.shape[1])
    variances, axes = np.linalg.eigh(flat.T @ flat / len(flat))
    basis = axes[:, np.argsort(-variances)]
    places, values = order.shape
    waves = np.tile(np.eye(places), (values, 1, 1))
    waves[:smooth] = cosine_waves(images.shape[1] // patch, images.shape[2] // patch)
    tokens = np.einsum("bpk,kpc->bkc", patches @ basis, waves, optimize=True)
    return PatchCodec(
        order=jnp.asarray(order.ravel()),
        basis=jnp.asarray(basis, jnp.float32),
        waves=jnp.asarray(waves, jnp.float32),
        divisors=jnp.asarray(np.sqrt(np.square(tokens).mean(0)), jnp.float32),
        shape=images.shape[1:],
    )
