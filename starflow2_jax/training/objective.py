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

Counts = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the terms; a term of weight 0 is not in the gradient."""

    image: float = 1.0
    text: float = 1.0
    latent_norm: float = 1e-4
    z_loss: float = 0.0


def _mean(total: jax.Array, count: jax.Array) -> jax.Array:
    return total / jnp.maximum(count, 1)


def row_counts(rows: Rows) -> Counts:
    """What the means are over, scalars.

    Returns:
        `images`: whose likelihood is trained; `present`: all; `text`: tokens that are trained;
        `tokens`: positions that are no padding.
    """
    present = rows.image_start >= 0
    return {
        "images": (rows.image_loss_mask & present).sum(),
        "present": present.sum(),
        "text": rows.text_loss_mask.sum(),
        "tokens": (rows.segments > 0).sum(),
    }


def image_loss(rows: Rows, likelihood: Likelihood, counts: Counts | None = None) -> jax.Array:
    """L_image: mean over dims of z^2/2 + sum over all blocks of log sigma; nats per dim, scalar.

    Over the images of `image_loss_mask`; log(2 pi)/2 is left out. `counts` as for `objective`.
    """
    counts = counts or row_counts(rows)
    b, i, n, c = likelihood.shallow_outputs[-1].shape
    counted = rows.image_loss_mask & (rows.image_start >= 0)  # [B, I]
    offset = jnp.arange(rows.tokens.shape[1]) - rows.image_start[..., None]
    inside = (counted[..., None] & (offset >= 0) & (offset < n)).any(1)  # [B, T]
    deep = (0.5 * jnp.square(likelihood.z) - likelihood.deep_log_det) * inside[..., None]
    shallow = sum(d for d in likelihood.shallow_log_dets) * counted[..., None, None]
    return _mean(deep.sum() - shallow.sum(), counts["images"] * (n * c))


def _over_text(rows: Rows, values: jax.Array, counts: Counts | None) -> jax.Array:
    mask = rows.text_loss_mask
    return _mean(jnp.where(mask, values, 0.0).sum(), (counts or row_counts(rows))["text"])


def text_loss(rows: Rows, likelihood: Likelihood, counts: Counts | None = None) -> jax.Array:
    """L_text: mean of -log p over `text_loss_mask`; nats per token, scalar."""
    return _over_text(rows, -likelihood.text_log_prob, counts)


def z_loss(rows: Rows, likelihood: Likelihood, counts: Counts | None = None) -> jax.Array:
    """Mean square of the log partition over `text_loss_mask`, scalar (PaLM, arXiv 2204.02311)."""
    return _over_text(rows, jnp.square(likelihood.text_log_partition), counts)


def latent_norm(
    rows: Rows, x: jax.Array, likelihood: Likelihood, counts: Counts | None = None
) -> jax.Array:
    """Sum over x and the shallow blocks' outputs of their mean square; scalar."""
    present = rows.image_start >= 0
    dims = (counts or row_counts(rows))["present"] * (x.shape[2] * x.shape[3])
    return sum(
        _mean((jnp.square(o) * present[..., None, None]).sum(), dims)
        for o in [x, *likelihood.shallow_outputs]
    )


def objective(
    model: Pretzel,
    rows: Rows,
    x: jax.Array,
    parts: Parts,
    weights: ObjectiveConfig,
    counts: Counts | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and its terms.

    Args:
        model: both streams.
        rows: see `Rows`.
        x: [B, I, N, C] noised latents.
        parts: what the stage computes.
        weights: of the terms.
        counts: `row_counts` of the whole whose part the rows are; default: of the rows.

    Returns:
        Scalar loss; metrics `loss_image` (nats per dim), `loss_text` (nats per token),
        `latent_norm`, `z_loss`, as far as the parts compute them and they have a weight.
    """
    likelihood = model.log_prob(rows, x, parts)
    counts = counts or row_counts(rows)
    metrics = {}
    total = jnp.zeros((), jnp.float32)
    if weights.image:
        metrics["loss_image"] = image_loss(rows, likelihood, counts)
        metrics["latent_norm"] = latent_norm(rows, x, likelihood, counts)
        total += weights.image * metrics["loss_image"]
        total += weights.latent_norm * metrics["latent_norm"]
    if weights.text:
        metrics["loss_text"] = text_loss(rows, likelihood, counts)
        total += weights.text * metrics["loss_text"]
        if weights.z_loss:
            metrics["z_loss"] = z_loss(rows, likelihood, counts)
            total += weights.z_loss * metrics["z_loss"]
    return total, metrics


@dataclasses.dataclass(frozen=True)
class PretzelLoss:
    """The objective on packed batches, as a `training.step.Loss`; the constants are the codec."""

    parts: Parts
    weights: ObjectiveConfig

    def counts(self, batch: HostBatch) -> Counts:
        """See `row_counts`."""
        return row_counts(to_rows(batch))

    def __call__(
        self,
        model: Pretzel,
        constants: Codec,
        batch: HostBatch,
        seed: jax.Array,
        noise_std: jax.Array,
        counts: Counts | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `training.step.Loss`."""
        x = noisy_latents(constants, batch["images"], seed, batch["image_seeds"], noise_std)
        x = partition.constrain(x, ("batch", None, None, None))
        loss, metrics = objective(model, to_rows(batch), x, self.parts, self.weights, counts)
        return loss, {"loss": loss, **metrics}
