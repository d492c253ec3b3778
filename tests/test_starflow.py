"""Whole image models: they invert, their likelihoods are exact, in every configuration."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny
from flax import nnx

from starflow2_jax.models import starflow
from starflow2_jax.models.af_block import Given
from starflow2_jax.models.guidance import GaussianGuidance, LogScaleGuidance
from starflow2_jax.sampling import jacobi

STARFLOW = starflow.StarFlowConfig(
    channels=2,
    side=2,
    width=32,
    deep_width=64,
    depths=(1, 1, 2),
    head_dim=32,
    text_length=4,
    text_width=5,
    dtype="float64",
)
TARFLOW = starflow.TarFlowConfig(
    channels=1, size=4, patch=2, width=32, count=2, depth=1, classes=3, head_dim=16, dtype="float64"
)
CONFIGS = {
    "starflow": STARFLOW,
    "no text": dataclasses.replace(STARFLOW, text_width=0, text_length=0, first_order="keep"),
    "text everywhere": dataclasses.replace(STARFLOW, text_everywhere=True, patch=2, channels=1),
    "shifted": dataclasses.replace(
        STARFLOW, start=False, scale="exp", soft_clip=None, final_norm=False
    ),
    "tarflow": TARFLOW,
    "volume preserving": dataclasses.replace(TARFLOW, scale="none"),
}


def model_of(config, dtype=np.float64):
    return tiny.randomised(lambda: starflow.ImageFlow(config, rngs=nnx.Rngs(0)), dtype=dtype)


def images(config, rows=2, shape=None, seed=0):
    h, w = shape or (config.side, config.side)
    size = (rows, h * config.patch, w * config.patch, config.channels)
    return jnp.asarray(np.random.default_rng(seed).normal(size=size))


def given(config, rows=2, length=4, seed=1):
    if isinstance(config, starflow.TarFlowConfig):
        return Given(labels=jnp.arange(rows) - 1)
    if not config.text_width:
        return Given()
    text = np.random.default_rng(seed).normal(size=(rows, length, config.text_width))
    return Given(text=jnp.asarray(text))


forward = tiny.jit(lambda model, *args: model.forward(*args))
reverse = tiny.jit(lambda model, *args: model.reverse(*args)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_it_inverts_and_the_log_det_is_exact(x64, name):
    config = CONFIGS[name]
    model, x, side = model_of(config), images(config), given(config)
    if model.prior_variance is not None:
        model.prior_variance[...] = jnp.ones_like(model.prior_variance[...])
    passed = forward(model, x, side)
    sequence = reverse(model, passed.z, side)
    for there, back in zip(passed.outputs, reversed(sequence), strict=True):
        tiny.close(back, there, 1e-10)
    tiny.close(config.unpatchify(sequence[-1]), x, 1e-10)
    z_of = lambda m, x, side: m.forward(x[None], side).z.ravel()
    one = jax.tree.map(lambda a: a[:1], side)
    jacobian = tiny.jit(jax.jacfwd(z_of, argnums=1))(model, x[0], one).reshape(x[0].size, -1)
    log_det = np.linalg.slogdet(jacobian)[1]
    z = np.asarray(passed.z[0])
    normal = -0.5 * (np.square(z) + math.log(2 * math.pi)).sum()
    tiny.close(passed.log_prob[0], normal + log_det, 1e-10)
    loss = -(passed.log_prob / x[0].size).mean() - 0.5 * math.log(2 * math.pi)
    tiny.close(passed.loss, loss, 1e-10)


def test_patch_layouts(x64):
    image = jnp.arange(4 * 4 * 3).reshape(1, 4, 4, 3)  # value = (row * 4 + column) * 3 + channel
    channels_last = dataclasses.replace(STARFLOW, channels=3, patch=2).patchify(image)
    channels_first = dataclasses.replace(TARFLOW, channels=3).patchify(image)
    assert channels_last[0, 0, 1].tolist() == [6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23]
    assert channels_first[0, 0, 1].tolist() == [6, 9, 18, 21, 7, 10, 19, 22, 8, 11, 20, 23]
    with pytest.raises(ValueError, match="patches of 2"):
        TARFLOW.patchify(jnp.zeros((1, 5, 4, 1)))


def test_other_shapes_and_text_lengths(x64):
    model, x = model_of(STARFLOW), images(STARFLOW, shape=(1, 3))
    side = given(STARFLOW, length=2)
    passed = forward(model, x, side)
    tiny.close(reverse(model, passed.z, side)[-1], x, 1e-10)
    tarflow = model_of(TARFLOW)
    with pytest.raises(ValueError, match="learned positions"):
        tarflow.forward(images(TARFLOW, shape=(1, 3)), given(TARFLOW))
    with pytest.raises(ValueError, match="text"):
        model.forward(x)
    narrow = dataclasses.replace(STARFLOW, head_dim=16)
    with pytest.raises(ValueError, match="head width 16"):
        narrow.angles(2, 2, 4, jnp.float64)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="patches that divide"):
        dataclasses.replace(TARFLOW, size=5)
    with pytest.raises(ValueError, match="at least one block"):
        dataclasses.replace(STARFLOW, depths=())
    with pytest.raises(ValueError, match="at least one layer"):
        dataclasses.replace(STARFLOW, depths=(1, 0))
    with pytest.raises(ValueError, match="multiple of head_dim"):
        dataclasses.replace(STARFLOW, width=40)


def test_orders_alternate_from_the_first():
    flips = lambda config: [block.flip for block in config.blocks()]
    assert flips(starflow.starflow_3b_t2i_256()) == [True, False] * 3
    assert flips(dataclasses.replace(STARFLOW, first_order="keep")) == [False, True, False]
    assert flips(starflow.tarflow_imagenet64()) == [False, True] * 4
    deep = [block.text_width > 0 for block in starflow.starflow_3b_t2i_256().blocks()]
    assert deep == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("starflow", GaussianGuidance(2.0)),
        ("text everywhere", GaussianGuidance(2.0)),
        ("tarflow", LogScaleGuidance(0.5)),
    ],
)
def test_guided_samples_invert_under_the_same_guidance(x64, name, rule):
    config = CONFIGS[name]
    model, side = model_of(config), given(config)
    other = Given() if isinstance(config, starflow.TarFlowConfig) else given(config, seed=2)
    noise = config.patchify(images(config))
    sample = config.unpatchify(reverse(model, noise, side, rule, other)[-1])
    assert np.abs(sample - config.unpatchify(reverse(model, noise, side)[-1])).max() > 1e-3
    tiny.close(forward(model, sample, side, rule, other).z, noise, 1e-9)
    none = dataclasses.replace(rule, weight=0.0)
    tiny.close(reverse(model, noise, side, none, other)[-1], reverse(model, noise, side)[-1], 1e-12)


def test_parts_of_the_log_scale_rule(x64):
    rng = np.random.default_rng(0)
    mu, sigma = jnp.asarray(rng.normal(size=(2, 3, 1))), jnp.asarray(rng.uniform(1, 2, (2, 3, 1)))
    index = jnp.arange(1, 4)
    only_mu = LogScaleGuidance(0.5, sigma=False)(mu, sigma, index, 5)
    tiny.close(only_mu[0], mu[:1] + 0.5 * (mu[:1] - mu[1:]), 1e-12)
    np.testing.assert_array_equal(only_mu[1], sigma[:1])
    only_sigma = LogScaleGuidance(0.5, mu=False)(mu, sigma, index, 5)
    np.testing.assert_array_equal(only_sigma[0], mu[:1])
    tiny.close(np.log(only_sigma[1]), np.log(sigma[:1]) * 1.5 - 0.5 * np.log(sigma[1:]), 1e-12)
    annealed = LogScaleGuidance(0.5, annealed=True)(mu, sigma, index, 5)
    weight = 0.5 * np.array([1, 2, 3])[:, None] / 4
    tiny.close(annealed[0], mu[:1] + weight * (mu[:1] - mu[1:]), 1e-12)


def test_guidance_needs_text_on_both_sides():
    with pytest.raises(ValueError, match="one half"):
        given(STARFLOW).beside(Given(), 2)


def test_the_learned_prior(x64):
    model = model_of(CONFIGS["volume preserving"])
    variance = jnp.asarray(np.random.default_rng(3).uniform(0.5, 2.0, (4, 4)))
    model.prior_variance[...] = variance
    config, side = model.config, given(model.config)
    noise = config.patchify(images(config))
    sample = config.unpatchify(reverse(model, noise, side)[-1])
    passed = forward(model, sample, side)
    z = passed.z
    # The likelihood is that of what `reverse` samples: N(0, variance), nowhere stretched.
    density = scipy.stats.norm.logpdf(z, scale=jnp.sqrt(variance).reshape(2, 2, 4))
    tiny.close(passed.log_prob, density.sum((1, 2, 3)), 1e-10)
    tiny.close(passed.loss, np.square(z).mean() / 2, 1e-12)  # which the variance does not enter
    tiny.close(z, noise * jnp.sqrt(variance).reshape(2, 2, 4), 1e-10)
    after = starflow.tracked_variance(variance, z)
    tiny.close(after, 0.9 * variance + 0.1 * np.square(z).mean(0).reshape(4, 4), 1e-12)
    # A statistic: no gradient, no optimiser.
    params = nnx.state(model, nnx.Param)
    assert "prior_variance" not in params
    assert "prior_variance" in nnx.state(model)


def test_bits_per_dim_is_a_bound_on_the_discrete_likelihood(x64):
    """A flow that is the identity: bits of the standard normal's cells, within what noise costs."""
    model = starflow.ImageFlow(TARFLOW, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (2, 4, 4, 1)).astype(np.uint8)
    uniform = jnp.asarray(rng.random(levels.shape))
    bits = tiny.jit(starflow.bits_per_dim)(model, levels, uniform)
    at = 2 * (levels + np.asarray(uniform)) / 256 - 1
    log_prob = -0.5 * (at**2 + np.log(2 * np.pi))
    tiny.close(bits, (-log_prob / np.log(2) + 7).mean((1, 2, 3)), 1e-10)


def test_denoising_is_one_score_step(x64):
    model, x, side = model_of(TARFLOW), images(TARFLOW), given(TARFLOW)
    clean = tiny.jit(starflow.denoise)(model, x, 0.3, side)
    step = 1e-5
    direction = jnp.asarray(np.random.default_rng(5).normal(size=x.shape))
    log_prob = lambda t: forward(model, x + t * direction, side).log_prob.sum()
    slope = (log_prob(step) - log_prob(-step)) / (2 * step)
    tiny.close(((clean - x) * direction).sum() / 0.09, slope, 1e-6)


def test_compute_in_bfloat16_keeps_the_affine_maps_in_float32():
    config = dataclasses.replace(STARFLOW, dtype="bfloat16")
    # Random weights of the usual size magnify every rounding, and the two directions round apart.
    calm = lambda config: jax.tree.map(lambda a: 0.5 * a, model_of(config, np.float32))
    model, x, side = calm(config), images(config), given(config)
    x, side = x.astype(jnp.float32), jax.tree.map(lambda a: a.astype(jnp.float32), side)
    passed = forward(model, x, side)
    assert passed.z.dtype == passed.log_prob.dtype == jnp.float32
    exact = forward(calm(dataclasses.replace(STARFLOW, dtype="float32")), x, side)
    assert np.abs(passed.z - exact.z).max() < 0.1 * np.abs(exact.z).max()
    assert np.abs(passed.z - exact.z).max() > 0
    # Of what bfloat16 can hold, most elements are not.
    assert np.mean(passed.z != passed.z.astype(jnp.bfloat16)) > 0.9
    sample = reverse(model, passed.z, side)[-1]
    assert sample.dtype == jnp.float32
    assert np.abs(sample - x).mean() < 0.02 * np.abs(x).mean()


def test_jacobi_samples_any_image_model(x64):
    config = jacobi.JacobiConfig(chunk=3, threshold=0.0, max_passes=4)
    for name in ("starflow", "tarflow"):
        shape = CONFIGS[name]
        model, side, noise = model_of(shape), given(shape), shape.patchify(images(shape))
        solve = tiny.jit(lambda m, z, g: m.reverse(z, g, invert=jacobi.inverter(config)))
        sequence, passes = solve(model, noise, side)
        tiny.close(sequence[-1], reverse(model, noise, side)[-1], 1e-10)
        chunks = 2 if name == "starflow" else 1  # a TarFlow's first token is no unknown
        assert [p.tolist() for p in passes] == [[4] * chunks] * len(shape.blocks())


def test_a_fresh_model_is_the_identity():
    config = dataclasses.replace(STARFLOW, dtype="float32")
    model = starflow.ImageFlow(config, rngs=nnx.Rngs(0))
    x, text = images(config).astype(jnp.float32), given(config).text.astype(jnp.float32)
    passed = forward(model, x, Given(text))
    np.testing.assert_allclose(passed.z, x, atol=1e-6)
    np.testing.assert_allclose(sum(passed.log_dets), 0.0, atol=1e-6)
