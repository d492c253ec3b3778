"""One optimiser step, as a pure function of the state, the frozen parameters and a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from starflow2_jax.data.pipeline import HostBatch
from starflow2_jax.nn import partition
from starflow2_jax.training.guard import chosen, judge, new_guard
from starflow2_jax.training.schedules import warmup_cosine

State = dict[str, Any]
Counts = dict[str, jax.Array]


class Loss(Protocol):
    """What a stage minimises; hashable, so that it is static under jit."""

    def counts(self, batch: HostBatch) -> Counts:
        """What the means of the loss are over, by name; `images` and `tokens` among them."""

    def __call__(
        self,
        model: Any,
        constants: Any,
        batch: HostBatch,
        seed: jax.Array,
        noise_std: jax.Array,
        counts: Counts | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss on a batch; its randomness is a function of seed and batch.

        Args:
            model: whole.
            constants: arrays that are no parameters: `Task.constants`.
            batch: of `Task.batches`.
            seed: uint32 scalar.
            noise_std: of the noise on the latents, scalar.
            counts: of the whole of which the batch is a part, whose means are the sums of what this
                gives for its parts; default: of the batch.

        Returns:
            Scalar, and scalars by name, `loss` among them.
        """


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Hyperparameters of a stage's steps.

    Attributes:
        steps: optimiser steps of the stage.
        learning_rate: peak; linear warm-up from `first_rate` of it over `warmup` steps, then
            cosine to `final_rate` of it.
        accumulate: parts of equally many rows that a batch is run in, one after another; the step
            is that of the whole batch.
        clip: of the gradient's global norm; 0: none.
        spike: a gradient's norm of more than this many times the average is one, and the update
            is left out, as it always is where loss or gradient are no numbers; 0: none is one.
        most_skipped: updates left out in a row, at which the run stops.
        ema: decay of the average of the parameters; 0: the parameters themselves.
        text_weight, latent_norm: of L_text and of the regulariser.
        z_loss: weight of the mean square of the text's log partition.
        noise_start, noise_end: standard deviation of the noise on the latents: the first for
            `noise_hold` of the steps, then geometrically to the second until `noise_share` of them;
            afterwards `noise_final`.
    """

    steps: int
    learning_rate: float
    warmup: int
    first_rate: float = 0.0
    final_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 1e-4
    accumulate: int = 1
    clip: float = 1.0
    spike: float = 0.0
    most_skipped: int = 10
    ema: float = 0.995
    text_weight: float = 1.0
    latent_norm: float = 1e-4
    z_loss: float = 0.0
    noise_start: float = 0.0
    noise_end: float = 0.0
    noise_hold: float = 0.0
    noise_share: float = 0.0
    noise_final: float = 0.0

    def optimizer(self) -> optax.GradientTransformation:
        """Clipped AdamW with warm-up and cosine."""
        peak = self.learning_rate
        schedule = warmup_cosine(
            self.warmup, self.steps, peak * self.final_rate, peak, peak * self.first_rate
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip) if self.clip else optax.identity(),
            optax.adamw(schedule, b1=self.beta1, b2=self.beta2, weight_decay=self.weight_decay),
        )

    def noise_std(self, step: jax.Array) -> jax.Array:
        """Noise on the latents at a step."""
        if not self.noise_share:
            return jnp.float32(self.noise_final)
        done = step / self.steps
        decayed = (done - self.noise_hold) / (self.noise_share - self.noise_hold)
        annealed = self.noise_start * (self.noise_end / self.noise_start) ** jnp.maximum(
            decayed, 0.0
        )
        return jnp.where(done < self.noise_share, annealed, self.noise_final).astype(jnp.float32)


def init_state(trainable: nnx.State, config: StepConfig, seed: int) -> State:
    """The state before the first step: step, trainable, optimiser state, EMA, guard, seed."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "trainable": trainable,
        "opt_state": config.optimizer().init(trainable),
        "ema": jax.tree.map(jnp.copy, trainable),
        "guard": new_guard(),
        "seed": jnp.asarray(seed, jnp.uint32),
    }


def _summed(
    gradient: Callable[..., Any], trainable: nnx.State, batch: HostBatch, parts: int
) -> Any:
    """The sum of what `gradient(trainable, part)` gives for parts of the batch's rows."""

    def cut(leaf: jax.Array) -> jax.Array:
        # Every n-th row, so that each device runs the same share of the rows that it has.
        leaf = jnp.asarray(leaf)
        leaf = leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1)
        return partition.constrain(leaf, (None, "batch", *(None,) * (leaf.ndim - 2)))

    def add(total: Any, part: HostBatch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(trainable, part)), None

    pieces = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(gradient, trainable, jax.tree.map(lambda leaf: leaf[0], pieces))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, pieces)[0]


def train_step(
    graphdef: nnx.GraphDef,
    state: State,
    frozen: nnx.State,
    constants: Any,
    batch: HostBatch,
    loss: Loss,
    config: StepConfig,
) -> tuple[State, dict[str, jax.Array]]:
    """One step. Jit it with `loss`, `config` and `graphdef` static and only `state` donated.

    Returns:
        The next state; scalars `loss`, its terms (nats), `grad_norm`, `noise_std`, the updates left
        out so far, `skipped`, and the last ones of them in a row, `skipped_in_a_row`, and the
        batch's `images` and `tokens`.
    """
    noise_std = config.noise_std(state["step"])
    counts = loss.counts(batch)

    def of_trainable(
        trainable: nnx.State, batch: HostBatch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graphdef, trainable, frozen)
        return loss(model, constants, batch, state["seed"], noise_std, counts)

    gradient = jax.grad(of_trainable, has_aux=True)
    if config.accumulate == 1:
        gradients, metrics = gradient(state["trainable"], batch)
    else:
        gradients, metrics = _summed(gradient, state["trainable"], batch, config.accumulate)
    updates, opt_state = config.optimizer().update(
        gradients, state["opt_state"], state["trainable"]
    )
    trainable = optax.apply_updates(state["trainable"], updates)
    ema = optax.incremental_update(trainable, state["ema"], 1.0 - config.ema)
    norm = optax.tree.norm(gradients)
    good, guard = judge(state["guard"], metrics["loss"], norm, config.spike)
    kept = {name: state[name] for name in ("trainable", "opt_state", "ema")}
    updated = chosen(good, {"trainable": trainable, "opt_state": opt_state, "ema": ema}, kept)
    metrics |= {"grad_norm": norm, "noise_std": noise_std}
    metrics |= {"skipped": guard["skipped"], "skipped_in_a_row": guard["in_a_row"]}
    metrics |= {name: counts[name] for name in ("images", "tokens")}
    return updated | {"step": state["step"] + 1, "guard": guard, "seed": state["seed"]}, metrics


def jitted(shardings: State, metrics: jax.sharding.Sharding | None = None) -> Callable[..., Any]:
    """`train_step` as it runs: compiled once for each stage, its state donated.

    Args:
        shardings: of the state's arrays.
        metrics: of the scalars; None: as the compiler likes.
    """
    return jax.jit(
        train_step,
        static_argnames=("graphdef", "loss", "config"),
        donate_argnames=("state",),
        out_shardings=(shardings, metrics),
    )
