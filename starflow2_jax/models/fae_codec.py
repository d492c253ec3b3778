"""FAE latents as what the flow sees of images: normalised posterior samples with a fixed noise.

Letters: B images, N tokens, C latent channels, H, W pixels.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from starflow2_jax.models.fae import FeatureFAE
from starflow2_jax.models.latents import LatentCodec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FAECodec:
    """An FAE with its ViT, frozen, in the place of `patches.PatchCodec`.

    Attributes:
        model: the FAE.
        shape: (H, W, channels) of the images.
        noise_std: of the noise on the normalised latents, always there: the flow models them so.
        dtype: that the FAE computes in.
    """

    model: FeatureFAE
    shape: tuple[int, int, int] = dataclasses.field(metadata={"static": True})
    noise_std: float = dataclasses.field(default=0.3, metadata={"static": True})
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    def __post_init__(self) -> None:
        height, width, _ = self.shape
        size = self.model.config.image_size
        if (height, width) != (size, size):
            raise ValueError(f"the FAE decodes {size}x{size} pixels, not {height}x{width}")

    @property
    def of_pixels(self) -> bool:
        """See `codec.Codec`."""
        return False

    def latents(
        self,
        images: jax.Array,
        seed: jax.Array | int,
        image_seeds: jax.Array,
        noise_std: jax.Array | float = 0.0,
        reading: bool = False,
    ) -> jax.Array:
        """Normalised latents of images with their noise, the same whatever batch they are in.

        Args:
            images: uint8 [B, H, W, channels]; or cached, [B, N, 2C]: means, then log-variances.
            seed: of the run, or of one draw; scalar.
            image_seeds: uint32 [B].
            noise_std: of more noise, on top of the codec's own.
            reading: the posterior's mean in place of a sample.

        Returns:
            x [B, N, C], float32.
        """
        images = self.moments(images) if images.ndim == 4 else images
        return self._of_latents().latents(images, seed, image_seeds, noise_std, reading)

    def moments(self, images: jax.Array) -> jax.Array:
        """uint8 [B, H, W, channels] -> what may be cached of them, [B, N, 2C]; see `latents`."""
        posterior = self.model.encode(images, jnp.dtype(self.dtype))
        return jnp.concatenate([posterior.mean, posterior.logvar], -1)

    def log_posterior(self, x: jax.Array, moments: jax.Array) -> jax.Array:
        """log q(x | image), nats: [..., N, C] and [..., N, 2C] -> [...]; see `LatentCodec`."""
        return self._of_latents().log_posterior(x, moments)

    def _of_latents(self) -> LatentCodec:
        statistics, tokens = self.model.fae.latents, self.model.config.tokens
        return LatentCodec(statistics.mean[...], statistics.std[...], tokens, self.noise_std)

    def decode(self, x: jax.Array) -> jax.Array:
        """x [B, N, C] -> pixels [B, H, W, channels] on the [-1, 1] scale, not clipped.

        The noise is still in x, unless it was removed, or the decoders were tuned to it.
        """
        fae = self.model.fae
        pixels = fae.decode(fae.latents.denormalise(x).astype(self.dtype))
        return 2.0 * pixels - 1.0

    def decoder(self) -> "FAECodec":
        """The same arrays without what only encodes pictures; of latents it gives what this does.

        The ViT is several times as large as all the rest.
        """
        model = nnx.clone(self.model, variables=False)
        model.vit = nnx.data(None)
        del model.fae.encoder
        return dataclasses.replace(self, model=model)

    def to_uint8(self, x: jax.Array) -> jax.Array:
        """x [B, N, C] -> 8-bit images."""
        level = jnp.round((self.decode(x) + 1.0) * 127.5)
        return jnp.clip(level, 0, 255).astype(jnp.uint8)

    def bits_per_dim(self, log_prob: jax.Array) -> jax.Array:
        """log p(x) in nats of a whole image -> bits per noisy normalised latent dim.

        No bound on anything of the pixels.
        """
        return self._of_latents().bits_per_dim(log_prob)
