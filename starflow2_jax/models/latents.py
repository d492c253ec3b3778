"""Cached latents of a frozen autoencoder, as the flow takes them.

Letters: B images, N = side^2 tokens, C channels.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCodec:
    """A diagonal posterior for each token, normalised by statistics of the whole data.

    Attributes:
        mean, std: [C], of the latents.
        side: tokens along each side.
    """

    mean: jax.Array
    std: jax.Array
    side: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the noise that an image takes."""
        return (self.side, self.side, len(self.mean))

    @property
    def stored(self) -> jax.ShapeDtypeStruct:
        """One image as batches hold it: means, then log-variances."""
        return jax.ShapeDtypeStruct((self.side, self.side, 2 * len(self.mean)), jnp.bfloat16)

    def encode(self, images: jax.Array, uniform: jax.Array) -> jax.Array:
        """A sample of the posterior, normalised.

        Args:
            images: [B, side, side, 2 C], means, then log-variances.
            uniform: U[0, 1) [B, side, side, C], which the sample is made of.

        Returns:
            x [B, N, C], float32.
        """
        mean, log_variance = jnp.split(images.astype(jnp.float32), 2, axis=-1)
        tiny = jnp.finfo(uniform.dtype).tiny
        normal = jax.scipy.special.ndtri(jnp.maximum(uniform, tiny))
        x = (mean + jnp.exp(0.5 * log_variance) * normal - self.mean) / self.std
        return x.reshape(len(x), self.side**2, -1)
