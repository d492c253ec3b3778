"""Accumulated gradients, and updates that are left out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from starflow2_jax.training.guard import judge, new_guard
from starflow2_jax.training.stages import JOINT
from starflow2_jax.training.step import StepConfig, init_state, train_step

STATIC = ("graphdef", "loss", "config")


@pytest.fixture(scope="module")
def setting():
    return tiny.digits_case(rows=4)


@pytest.mark.slow
def test_accumulated_is_the_large_batch(setting):
    model, codec, batch = setting
    batch["text_loss"][0] = False  # parts with other numbers of tokens and images
    batch["image_start"][1, 1:] = -1
    graphdef, trainable, frozen = nnx.split(model, JOINT.trainable, ...)
    # Plain descent: Adam's first step would hide the gradient's size.
    config = StepConfig(10, 1e-2, 0, beta1=0.0, beta2=0.0, clip=0.0, z_loss=1e-2, noise_final=0.1)
    found = {}
    for parts in (1, 2, 4):
        one = dataclasses.replace(config, accumulate=parts)
        loss = JOINT.loss(one, training=True)
        step = tiny.jit(train_step, static_argnames=STATIC)
        state = init_state(trainable, one, seed=0)
        found[parts] = step(graphdef, state, frozen, codec, batch, loss, one)
    for parts in (2, 4):
        for name, value in found[1][1].items():
            tiny.close(found[parts][1][name], value, 1e-5, name)
    # The second moment of decay 0 is the gradient's square.
    nu = lambda state: jnp.sqrt(jax.tree.leaves(state["opt_state"][1][0].nu)[0])
    tiny.close(nu(found[4][0]), nu(found[1][0]), 1e-4)
    squares = lambda state: jax.tree.map(jnp.sqrt, state["opt_state"][1][0].nu)
    tiny.close_trees(squares(found[2][0]), squares(found[1][0]), 1e-4)


@dataclasses.dataclass(frozen=True)
class Poisoned:
    """A loss that is what the batch says it is."""

    def counts(self, batch):
        return {"images": jnp.int32(0), "tokens": jnp.int32(len(batch["factor"]))}

    def __call__(self, model, constants, batch, seed, noise_std, counts=None):
        loss = (batch["factor"] * (model.kernel[...] ** 2).sum()).mean()
        return loss, {"loss": loss}


def test_bad_updates_are_left_out_and_counted():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    graphdef, trainable, frozen = nnx.split(model, nnx.Param, ...)
    config = StepConfig(10, 1e-2, 0, spike=10.0, ema=0.5)
    step = jax.jit(train_step, static_argnames=STATIC)
    state = init_state(trainable, config, 0)

    def run(state, factor):
        batch = {"factor": jnp.full(2, factor, jnp.float32)}
        return step(graphdef, state, frozen, None, batch, Poisoned(), config)

    state, _ = run(state, 1.0)
    kept = ("trainable", "opt_state", "ema")
    for number, factor in enumerate((jnp.nan, jnp.inf, 1e4), start=1):
        after, metrics = run(state, factor)
        for name in kept:
            assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), after[name], state[name]))
        assert int(after["step"]) == int(state["step"]) + 1
        assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == number
        state = after
    after, metrics = run(state, 2.0)
    assert int(metrics["skipped"]) == 3 and int(metrics["skipped_in_a_row"]) == 0
    assert not (after["trainable"]["kernel"][...] == state["trainable"]["kernel"][...]).all()


def test_the_average_norm_forgets_and_ignores_what_is_left_out():
    guard = new_guard()
    good, guard = judge(guard, jnp.float32(1), jnp.float32(2), spike=3.0)
    assert good and float(guard["norm"]) == 2.0
    good, guard = judge(guard, jnp.float32(1), jnp.float32(6.5), spike=3.0)
    assert not good and float(guard["norm"]) == 2.0 and int(guard["in_a_row"]) == 1
    good, guard = judge(guard, jnp.float32(1), jnp.float32(5), spike=3.0)
    assert good and np.isclose(float(guard["norm"]), 2.03) and int(guard["in_a_row"]) == 0
    good, _ = judge(guard, jnp.float32(1), jnp.float32(1e9), spike=0.0)
    assert good
