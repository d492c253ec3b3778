"""The training objective: L_image + lambda L_text + 1e-4 latent_norm.

All means are global sums over global counts; a count of zero gives 0.
"""

import dataclasses

import jax
import jax.numpy as jnp

from starflow2_jax.data.pipeline import HostBatch, to_rows
from starflow2_jax.models.codec import Codec
from starflow2_jax.models.patches import noisy_latents
from starflow2_jax.models.pretzel import Likelihood, Parts, Pretzel, Rows
from starflow2_jax.nn import partition


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the terms; a term of weight 0 is not in the gradient."""

    image: float = 1.0
    text: float = 1.0
    latent_norm: float = 1e-4


def _mean(total: jax.Array, count: jax.Array) -> jax.Array:
    return total / jnp.maximum(count, 1)


def image_loss(rows: Rows, likelihood: Likelihood) -> jax.Array:
    """L_image: mean over dims of z^2/2 + sum over all blocks of log sigma; nats per dim, scalar.

    Over the images of `image_loss_mask`; log(2 pi)/2 is left out.
    """
    b, i, n, c = likelihood.shallow_outputs[-1].shape
    counted = rows.image_loss_mask & (rows.image_start >= 0)  # [B, I]
    offset = jnp.arange(rows.tokens.shape[1]) - rows.image_start[..., None]
    inside = (counted[..., None] & (offset >= 0) & (offset < n)).any(1)  # [B, T]
    deep = (0.5 * jnp.square(likelihood.z) - likelihood.deep_log_det) * inside[..., None]
    shallow = sum(d for d in likelihood.shallow_log_dets) * counted[..., None, None]
    return _mean(deep.sum() - shallow.sum(), counted.sum() * (n * c))


def text_loss(rows: Rows, likelihood: Likelihood) -> jax.Array:
    """L_text: mean of -log p over `text_loss_mask`; nats per token, scalar."""
    mask = rows.text_loss_mask
    return _mean(-jnp.where(mask, likelihood.text_log_prob, 0.0).sum(), mask.sum())


def latent_norm(rows: Rows, x: jax.Array, likelihood: Likelihood) -> jax.Array:
    """Sum over x and the shallow blocks' outputs of their mean square; scalar."""
    present = rows.image_start >= 0
    dims = present.sum() * (x.shape[2] * x.shape[3])
    return sum(
        _mean((jnp.square(o) * present[..., None, None]).sum(), dims)
        for o in [x, *likelihood.shallow_outputs]
    )


def objective(
    model: Pretzel, rows: Rows, x: jax.Array, parts: Parts, weights: ObjectiveConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and its terms.

    Args:
        model: both streams.
        rows: see `Rows`.
        x: [B, I, N, C] noised latents.
        parts: what the stage computes.
        weights: of the terms.

    Returns:
        Scalar loss; metrics `loss_image` (nats per dim), `loss_text` (nats per token),
        `latent_norm`, as far as the parts compute them.
    """
    likelihood = model.log_prob(rows, x, parts)
    metrics = {}
    total = jnp.zeros((), jnp.float32)
    if weights.image:
        metrics["loss_image"] = image_loss(rows, likelihood)
        metrics["latent_norm"] = latent_norm(rows, x, likelihood)
        total += weights.image * metrics["loss_image"]
        total += weights.latent_norm * metrics["latent_norm"]
    if weights.text:
        metrics["loss_text"] = text_loss(rows, likelihood)
        total += weights.text * metrics["loss_text"]
    return total, metrics


@dataclasses.dataclass(frozen=True)
class PretzelLoss:
    """The objective on packed batches, as a `training.step.Loss`; the constants are the codec."""

    parts: Parts
    weights: ObjectiveConfig

    def __call__(
        self,
        model: Pretzel,
        constants: Codec,
        batch: HostBatch,
        seed: jax.Array,
        noise_std: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `training.step.Loss`."""
        x = noisy_latents(constants, batch["images"], seed, batch["image_seeds"], noise_std)
        x = partition.constrain(x, ("batch", None, None, None))
        loss, metrics = objective(model, to_rows(batch), x, self.parts, self.weights)
        return loss, {"loss": loss, **metrics}
