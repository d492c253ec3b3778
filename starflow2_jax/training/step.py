"""One optimiser step, as a pure function of the state, the frozen parameters and a batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from starflow2_jax.data.pipeline import HostBatch, to_rows
from starflow2_jax.models.patches import PatchCodec
from starflow2_jax.nn import partition
from starflow2_jax.training.objective import ObjectiveConfig, objective
from starflow2_jax.training.stages import Stage

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Hyperparameters of a stage's steps.

    Attributes:
        steps: optimiser steps of the stage.
        learning_rate: peak; linear warm-up over `warmup` steps, then cosine to `final_rate` of it.
        noise_start, noise_end: standard deviation of the noise on the latents: the first for
            `noise_hold` of the steps, then geometrically to the second until `noise_share` of them;
            afterwards `noise_final`.
    """

    steps: int
    learning_rate: float
    warmup: int
    final_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.995
    text_weight: float = 1.0
    latent_norm: float = 1e-4
    noise_start: float = 0.0
    noise_end: float = 0.0
    noise_hold: float = 0.0
    noise_share: float = 0.0
    noise_final: float = 0.0

    def optimizer(self) -> optax.GradientTransformation:
        """Clipped AdamW with warm-up and cosine."""
        schedule = optax.warmup_cosine_decay_schedule(
            0.0,
            self.learning_rate,
            self.warmup,
            self.steps,
            self.learning_rate * self.final_rate,
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
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


def noisy_latents(
    codec: PatchCodec, batch: HostBatch, seed: jax.Array, noise_std: jax.Array
) -> jax.Array:
    """Dequantised, noised latents [B, I, N, C]; each image's noise depends on its own seed only."""
    images, seeds = batch["images"], batch["image_seeds"]
    b, i = seeds.shape
    base = jax.random.key(seed)

    def draw(image_seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(base, image_seed)
        uniform_key, normal_key = jax.random.split(key)
        shape = images.shape[2:]
        dims = shape[0] * shape[1] * shape[2]
        return jax.random.uniform(uniform_key, shape), jax.random.normal(normal_key, (dims,))

    uniform, normal = jax.vmap(draw)(jnp.asarray(seeds).reshape(-1))
    x = codec.encode(jnp.asarray(images).reshape(b * i, *images.shape[2:]), uniform)
    x = x + noise_std * normal.reshape(x.shape)
    x = x.reshape(b, i, *x.shape[1:])
    return partition.constrain(x, ("batch", None, None, None))


def init_state(trainable: nnx.State, config: StepConfig, seed: int) -> State:
    """The state before the first step: step, trainable, optimiser state, EMA, seed."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "trainable": trainable,
        "opt_state": config.optimizer().init(trainable),
        "ema": jax.tree.map(jnp.copy, trainable),
        "seed": jnp.asarray(seed, jnp.uint32),
    }


def loss_and_metrics(
    graphdef: nnx.GraphDef,
    trainable: nnx.State,
    frozen: nnx.State,
    codec: PatchCodec,
    batch: HostBatch,
    seed: jax.Array,
    noise_std: jax.Array,
    stage: Stage,
    weights: ObjectiveConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The stage's loss on a batch; its noise is a function of seed and batch."""
    model = nnx.merge(graphdef, trainable, frozen)
    x = noisy_latents(codec, batch, seed, noise_std)
    loss, metrics = objective(model, to_rows(batch), x, stage.parts, weights)
    return loss, {"loss": loss, **metrics}


def train_step(
    graphdef: nnx.GraphDef,
    state: State,
    frozen: nnx.State,
    codec: PatchCodec,
    batch: HostBatch,
    stage: Stage,
    config: StepConfig,
) -> tuple[State, dict[str, jax.Array]]:
    """One step. Jit it with `stage`, `config` and `graphdef` static and only `state` donated.

    Returns:
        The next state; scalars `loss`, its terms (nats), `grad_norm`, `noise_std`.
    """
    noise_std = config.noise_std(state["step"])
    weights = stage.weights(config.text_weight, config.latent_norm)

    def loss(trainable: nnx.State) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss_and_metrics(
            graphdef, trainable, frozen, codec, batch, state["seed"], noise_std, stage, weights
        )

    gradients, metrics = jax.grad(loss, has_aux=True)(state["trainable"])
    updates, opt_state = config.optimizer().update(
        gradients, state["opt_state"], state["trainable"]
    )
    trainable = optax.apply_updates(state["trainable"], updates)
    ema = optax.incremental_update(trainable, state["ema"], 1.0 - config.ema)
    metrics |= {"grad_norm": optax.tree.norm(gradients), "noise_std": noise_std}
    return {
        "step": state["step"] + 1,
        "trainable": trainable,
        "opt_state": opt_state,
        "ema": ema,
        "seed": state["seed"],
    }, metrics
