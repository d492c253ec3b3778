"""Cached latents of a frozen autoencoder, as a run trains on them: without the autoencoder.

Letters: B images, N tokens, C latent channels.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


def posterior_draws(
    mean: jax.Array,
    logvar: jax.Array,
    seed: jax.Array | int,
    image_seeds: jax.Array,
    reading: bool,
) -> tuple[jax.Array, jax.Array]:
    """A latent of each image and a noise for it, the same whatever batch they are in.

    Args:
        mean, logvar: float32 [B, N, C], of the posterior.
        seed: of the run, or of one draw; scalar.
        image_seeds: uint32 [B].
        reading: the posterior's mean in place of a sample.

    Returns:
        z and standard normals, [B, N, C] each.
    """
    base, shape = jax.random.key(seed), mean.shape[1:]

    def draw(image_seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        sample, noise = jax.random.split(jax.random.fold_in(base, image_seed))
        return jax.random.normal(sample, shape), jax.random.normal(noise, shape)

    normal, noise = jax.vmap(draw)(jnp.asarray(image_seeds))
    return mean if reading else mean + jnp.exp(0.5 * logvar) * normal, noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCodec:
    """A diagonal posterior for each token, normalised by statistics of the whole data.

    Attributes:
        mean, std: [C], of the latents.
        tokens: N.
        noise_std: of the noise on the normalised latents, always there: the flow models them so.
    """

    mean: jax.Array
    std: jax.Array
    tokens: int = dataclasses.field(metadata={"static": True})
    noise_std: float = dataclasses.field(default=0.3, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """[N, 2 C] of one image as batches hold it: means, then log-variances."""
        return (self.tokens, 2 * len(self.mean))

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
        """See `codec.Codec`; images are [B, N, 2 C], and `reading` takes the posterior's mean."""
        mean, log_variance = jnp.split(images.astype(jnp.float32), 2, axis=-1)
        z, noise = posterior_draws(mean, log_variance, seed, image_seeds, reading)
        return (z - self.mean) / self.std + jnp.hypot(self.noise_std, noise_std) * noise

    def log_posterior(self, x: jax.Array, images: jax.Array) -> jax.Array:
        """log q(x | image) of the density that `latents` draws x from, without more noise.

        A normal distribution, independent in tokens and channels: with the posterior's mean m and
        variance v, x has the mean (m - mean) / std and the variance v / std^2 + noise_std^2.

        Args:
            x: [..., N, C].
            images: [..., N, 2 C], see `latents`.

        Returns:
            [...], nats, of all N C numbers together.
        """
        wide = jnp.promote_types(x.dtype, jnp.float32)
        mean, log_variance = jnp.split(images.astype(wide), 2, axis=-1)
        variance = jnp.exp(log_variance) / self.std**2 + self.noise_std**2
        far = jnp.square(x.astype(wide) - (mean - self.mean) / self.std) / variance
        return -0.5 * (far + jnp.log(2.0 * math.pi * variance)).sum((-2, -1))

    def bits_per_dim(self, log_prob: jax.Array) -> jax.Array:
        """log p(x) in nats of a whole image -> bits per noisy normalised latent dim."""
        return -log_prob / (self.tokens * len(self.mean) * math.log(2.0))
