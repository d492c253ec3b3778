"""The optimiser step: schedules, what each stage trains, and the noise of each image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from starflow2_jax.models.patches import noisy_latents
from starflow2_jax.training.stages import IMAGE_TO_TEXT, JOINT, PRETRAIN_LM, TEXT_TO_IMAGE
from starflow2_jax.training.step import StepConfig, init_state, train_step

TRAINED = {
    "pretrain_lm": {"vlm"},
    "text_to_image": {"shallow", "deep"},
    "image_to_text": {"adapter"},
    "joint": {"shallow", "deep", "adapter", "skip_vlm", "skip_flow"},
}


def test_noise_is_held_then_decays_then_ends():
    config = StepConfig(
        steps=100,
        learning_rate=1.0,
        warmup=1,
        noise_start=0.4,
        noise_end=0.1,
        noise_hold=0.2,
        noise_share=0.6,
        noise_final=0.0,
    )
    found = [float(config.noise_std(jnp.asarray(step))) for step in (0, 20, 40, 59, 60, 99)]
    np.testing.assert_allclose(found[:3], [0.4, 0.4, 0.2], rtol=1e-6)
    assert 0.1 < found[3] < 0.11 and found[4:] == [0.0, 0.0]
    plain = StepConfig(steps=100, learning_rate=1.0, warmup=1, noise_final=0.3)
    assert float(plain.noise_std(jnp.asarray(0))) == pytest.approx(0.3)


@pytest.fixture(scope="module")
def setting():
    return tiny.digits_case(rows=2)


@pytest.mark.parametrize(
    "stage", [PRETRAIN_LM, TEXT_TO_IMAGE, IMAGE_TO_TEXT, JOINT], ids=lambda s: s.name
)
def test_a_stage_moves_what_it_trains_and_nothing_else(setting, stage):
    model, codec, batch = setting
    graphdef, trainable, frozen = nnx.split(model, stage.trainable, ...)
    assert {path[0] for path, _ in nnx.to_flat_state(trainable)} == TRAINED[stage.name]
    config = StepConfig(steps=10, learning_rate=1e-2, warmup=0, ema=0.5)
    state = init_state(trainable, config, seed=0)
    step = jax.jit(
        train_step,
        static_argnames=("graphdef", "loss", "config"),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    loss = stage.loss(config, training=True)
    after, metrics = step(graphdef, state, frozen, codec, batch, loss, config)
    assert {k for k in metrics if k.startswith("loss_")} == (
        ({"loss_image"} if stage.image else set()) | ({"loss_text"} if stage.text else set())
    )
    assert all(np.isfinite(float(v)) for v in metrics.values())
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state["trainable"], after["trainable"])
    assert all(jax.tree.leaves(moved)), moved
    # The EMA of decay 1/2 is half-way between before and after.
    jax.tree.map(
        lambda e, a, b: np.testing.assert_allclose(e, (a + b) / 2, atol=1e-6),
        after["ema"],
        state["trainable"],
        after["trainable"],
    )


def test_the_noise_of_an_image_depends_on_its_own_seed(setting):
    _, codec, batch = setting

    def latents(seed, images, seeds, std):
        return noisy_latents(codec, images, jnp.uint32(seed), seeds, jnp.float32(std))

    images, seeds = batch["images"], batch["image_seeds"]
    x = latents(0, images, seeds, 0.1)
    assert x.shape == (*seeds.shape, 4, 196)
    np.testing.assert_allclose(x[::-1], latents(0, images[::-1], seeds[::-1], 0.1), atol=1e-6)
    np.testing.assert_allclose(x[1], latents(0, images[1], seeds[1], 0.1), atol=1e-6)
    assert np.abs(np.asarray(x - latents(1, images, seeds, 0.1))).max() > 0.01
    assert np.abs(np.asarray(x - latents(0, images, seeds + 1, 0.1))).max() > 0.01
    # The dequantisation is the same with and without noise on the latents.
    dequantised = latents(0, images, seeds, 0.0)
    half = latents(0, images, seeds, 0.05)
    np.testing.assert_allclose(half - dequantised, 0.5 * (x - dequantised), atol=1e-5)
