"""A stage's losses on a few fixed held-out batches, without training noise."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from starflow2_jax.data.pipeline import HostBatch
from starflow2_jax.training.step import Counts, Loss

BEST_BY = "held_out_loss"
"""The metric by which a checkpoint is the best one: the less, the better."""


def held_out_losses(
    loss: Loss,
    graphdef: nnx.GraphDef,
    batches: Sequence[HostBatch],
    place: Callable[[HostBatch], Any],
    frozen: nnx.State,
    constants: Any,
) -> Callable[[nnx.State], dict[str, float]]:
    """A function of the trained parameters.

    Args:
        loss: not for training, see `Stage.loss`.
        graphdef: of the model.
        batches: this process's rows of each.
        place: puts a batch on the devices.
        frozen: the parameters that the stage does not train.
        constants: see `Task.constants`.

    Returns:
        A function to the means over all batches together, `held_out_NAME` for each of the loss's
        metrics; where L_image is one of them also `held_out_bits_per_latent_dim`, of noisy
        normalised latents.
    """
    counting = jax.jit(loss.counts)

    @jax.jit
    def losses(
        trainable: nnx.State, frozen: nnx.State, constants: Any, batch: HostBatch, counts: Counts
    ) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, trainable, frozen)
        return loss(model, constants, batch, jnp.uint32(0), jnp.float32(0.0), counts)[1]

    def evaluate(trainable: nnx.State) -> dict[str, float]:
        placed = [place(batch) for batch in batches]
        each = [jax.device_get(counting(batch)) for batch in placed]
        whole = {name: jnp.asarray(sum(one[name] for one in each)) for name in each[0]}
        found = [losses(trainable, frozen, constants, batch, whole) for batch in placed]
        total = {f"held_out_{name}": sum(float(f[name]) for f in found) for name in found[0]}
        if "held_out_loss_image" in total:
            nats = total["held_out_loss_image"] + 0.5 * math.log(2.0 * math.pi)
            total["held_out_bits_per_latent_dim"] = nats / math.log(2.0)
        return total

    return evaluate
