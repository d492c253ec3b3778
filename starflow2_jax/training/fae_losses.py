"""Losses of the FAE: on features, and on pixels with a perceptual and an adversarial part.

Letters: B images, N tokens, D features, C latent channels, H, W pixels.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from starflow2_jax.data.pipeline import HostBatch
from starflow2_jax.models.discriminator import Discriminator
from starflow2_jax.models.fae import FeatureFAE, Posterior
from starflow2_jax.models.lpips import LPIPS
from starflow2_jax.nn import partition
from starflow2_jax.training.images import Metrics, image_counts, share


class FAETraining(nnx.Module):
    """An FAE with what its training needs: a discriminator, and a frozen perceptual network."""

    def __init__(
        self, model: FeatureFAE, discriminator: Discriminator | None, perceptual: LPIPS | None
    ) -> None:
        self.model = model
        self.discriminator = nnx.data(discriminator)
        self.perceptual = nnx.data(perceptual)


def image_normals(seed: jax.Array, image_seeds: jax.Array, *shapes: tuple[int, ...]) -> list:
    """For each shape standard normals [B, *shape], a function of seed and image alone."""
    base = jax.random.key(seed)

    def draw(image_seed: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(jax.random.fold_in(base, image_seed), len(shapes))
        return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]

    return jax.vmap(draw)(image_seeds)


def deviation_ratio(posterior: Posterior) -> jax.Array:
    """Posterior deviation over the deviation of the means, mean over channels; scalar.

    Both over the places and images of a batch: what share of a channel is noise.
    """
    axes = (0, 1)
    noise = jnp.sqrt(jnp.exp(posterior.logvar).mean(axes))
    return (noise / jnp.maximum(posterior.mean.std(axes), 1e-12)).mean()


def psnr(pixels: jax.Array, target: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of each image, dB: [B]; pixels 0 black to 1 white, clipped."""
    error = jnp.square(jnp.clip(pixels, 0.0, 1.0) - target).mean((1, 2, 3))
    return -10.0 * jnp.log10(jnp.maximum(error, 1e-10))


@dataclasses.dataclass(frozen=True)
class FeatureLoss:
    """Stage Ia: mean square error of normalised features + beta KL; see `training.step.Loss`.

    Attributes:
        beta: weight of the KL, nats of a whole image.
        training: the latent is a sample; or else the mean.
        tokens: N.
        dtype: of the computation.
    """

    beta: float
    training: bool
    tokens: int
    dtype: str = "float32"

    def counts(self, batch: HostBatch) -> Metrics:
        """Images and tokens of a batch."""
        return image_counts(batch, self.tokens)

    def __call__(
        self,
        model: FAETraining,
        constants: None,
        batch: HostBatch,
        seed: jax.Array,
        noise_std: jax.Array,
        counts: Metrics | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """See `training.step.Loss`; `noise_std` is not used."""
        fae = model.model.fae
        features = model.model.features_of(jnp.asarray(batch["images"]), jnp.dtype(self.dtype))
        features = partition.constrain(features, ("batch", None, None))
        posterior = fae.encode(features)
        [normal] = image_normals(seed, jnp.asarray(batch["image_seeds"]), posterior.mean.shape[1:])
        z = posterior.sample(normal) if self.training else posterior.mean
        decoded = fae.feature_decoder(z.astype(features.dtype)).astype(jnp.float32)
        target = fae.features.normalise(features).astype(jnp.float32)
        error = jnp.square(decoded - target).mean()
        kl = posterior.kl().mean()
        metrics = {
            "loss": error + self.beta * kl,
            "loss_features": error,
            "kl": kl,
            "deviation_ratio": deviation_ratio(posterior),
        }
        metrics = share(metrics, batch, counts)
        return metrics["loss"], metrics


@dataclasses.dataclass(frozen=True)
class PixelWeights:
    """Weights of the terms of a loss on pixels; a term of weight 0 is not computed.

    Attributes:
        kind: of the reconstruction: mean square or mean absolute error.
        adaptive: the adversarial weight is multiplied by the ratio of the other terms' and its own
            gradient at the last layer.
        lecam: of the regulariser of the discriminator (arXiv 2104.03310).
    """

    kind: Literal["l1", "l2"] = "l2"
    reconstruction: float = 1.0
    perceptual: float = 1.1
    adversarial: float = 0.1
    adaptive: bool = False
    lecam: float = 0.001


def hinge(real: jax.Array, made: jax.Array) -> jax.Array:
    """The discriminator's loss on logits of real and of made pictures; scalar."""
    return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + made).mean())


def lecam(real: jax.Array, made: jax.Array, averages: jax.Array) -> jax.Array:
    """How far logits are on the right side of the others' running mean, squared; scalar.

    Args:
        real, made: logits.
        averages: [2], running means of the logits of real and of made pictures.
    """
    beyond_made = jnp.square(jax.nn.relu(real - averages[1])).mean()
    return beyond_made + jnp.square(jax.nn.relu(averages[0] - made)).mean()


@dataclasses.dataclass(frozen=True)
class PixelLoss:
    """The stages of the pixel decoder; see `training.step.Loss`.

    Attributes:
        source: of the decoder's input: "features", the ViT's with noise (stage Ib); "decoded", from
            a sample of the latent; "noisy", from a normalised latent with noise, which trains the
            feature decoder too.
        noise: standard deviation in normalised units.
        noise_by: "channel": so in each; "token": times the root mean square of each token.
        weights: of the terms.
        training: noise on features, samples of latents, and the adversarial part; or else none of
            them. The noise on latents ("noisy") is what is to be removed, and always there.
        tokens: N.
        dtype: of the computation.
    """

    source: Literal["features", "decoded", "noisy"]
    noise: float
    weights: PixelWeights
    training: bool
    tokens: int
    noise_by: Literal["channel", "token"] = "channel"
    dtype: str = "float32"

    def counts(self, batch: HostBatch) -> Metrics:
        """Images and tokens of a batch."""
        return image_counts(batch, self.tokens)

    def _features(self, model: FeatureFAE, batch: HostBatch, seed: jax.Array) -> jax.Array:
        """The pixel decoder's input: normalised features [B, N, D]."""
        fae, config = model.fae, model.config
        features = model.features_of(jnp.asarray(batch["images"]), jnp.dtype(self.dtype))
        features = partition.constrain(features, ("batch", None, None))
        seeds = jnp.asarray(batch["image_seeds"])
        if self.source == "features":
            normed = fae.features.normalise(features)
            if not self.training:
                return normed
            [normal] = image_normals(seed, seeds, (config.tokens, config.features))
            size = jnp.sqrt(jnp.square(normed.astype(jnp.float32)).mean(-1, keepdims=True))
            noise = self.noise * normal * (size if self.noise_by == "token" else 1.0)
            return normed + noise.astype(normed.dtype)
        posterior = fae.encode(features)
        sample, normal = image_normals(seed, seeds, *2 * [posterior.mean.shape[1:]])
        z = posterior.sample(sample) if self.training else posterior.mean
        z = jax.lax.stop_gradient(z)
        if self.source == "noisy":
            z = fae.latents.denormalise(fae.latents.normalise(z) + self.noise * normal)
        return fae.feature_decoder(z.astype(features.dtype))

    def _distances(
        self, perceptual: LPIPS | None, pixels: jax.Array, target: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Reconstruction and perceptual terms, weighted, and each alone."""
        error = pixels - target
        error = jnp.abs(error) if self.weights.kind == "l1" else jnp.square(error)
        metrics = {"loss_pixels": error.mean()}
        total = self.weights.reconstruction * metrics["loss_pixels"]
        if self.weights.perceptual and perceptual is not None:
            metrics["loss_perceptual"] = perceptual(pixels, target).mean()
            total += self.weights.perceptual * metrics["loss_perceptual"]
        return total, metrics

    def __call__(
        self,
        model: FAETraining,
        constants: None,
        batch: HostBatch,
        seed: jax.Array,
        noise_std: jax.Array,
        counts: Metrics | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """See `training.step.Loss`; `noise_std` is not used."""
        decoder = model.model.fae.pixel_decoder
        hidden = decoder.hidden(self._features(model.model, batch, seed))
        pixels = decoder.to_pixels(hidden)
        target = jnp.asarray(batch["images"]).astype(jnp.float32) / 255.0
        loss, metrics = self._distances(model.perceptual, pixels, target)
        metrics["psnr"] = psnr(pixels, target).mean()
        if self.training and self.weights.adversarial and model.discriminator is not None:
            more, terms = self._adversarial(model, hidden, pixels, target)
            loss, metrics = loss + more, metrics | terms
        metrics = share({"loss": loss, **metrics}, batch, counts)
        return metrics["loss"], metrics

    def _adversarial(
        self, model: FAETraining, hidden: jax.Array, pixels: jax.Array, target: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The decoder's adversarial term, with the discriminator's own loss.

        One gradient serves both: the decoder's term sees the discriminator as a constant, the
        discriminator's loss sees the pictures so.
        """
        critic, weights = model.discriminator, self.weights
        constant: Discriminator = jax.tree.map(jax.lax.stop_gradient, critic)
        decoder = model.model.fae.pixel_decoder
        fool = lambda pixels: -constant(pixels).mean()
        fooling = fool(pixels)
        weight = jnp.float32(weights.adversarial)
        if weights.adaptive:
            still = jax.lax.stop_gradient(hidden)

            def size(loss: Any) -> jax.Array:
                gradient = jax.grad(lambda head: loss(decoder.to_pixels(still, head)))(
                    jax.tree.map(jax.lax.stop_gradient, decoder.head)
                )
                return jnp.linalg.norm(gradient.kernel[...])

            others = size(lambda p: self._distances(model.perceptual, p, target)[0])
            weight *= jnp.clip(others / (size(fool) + 1e-4), 0.0, 1e4)
        real, made = critic(target), critic(jax.lax.stop_gradient(pixels))
        averages = critic.averages[...]
        own = hinge(real, made)
        regular = lecam(real, made, jax.lax.stop_gradient(averages))
        means = jax.lax.stop_gradient(jnp.stack([real.mean(), made.mean()]))
        # Its gradient is how far the running means are from this batch's: see `fae_step`.
        tracking = 0.5 * jnp.square(averages - means).sum()
        metrics = {
            "loss_adversarial": fooling,
            "adversarial_weight": weight,
            "loss_discriminator": own,
            "logit_real": means[0],
            "logit_made": means[1],
        }
        if weights.lecam:
            metrics["lecam"] = regular
            own = own + weights.lecam * regular
        return weight * fooling + own + tracking, metrics
