"""Jacobi sampling: exact where it may run long enough, of every kind of block."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from sampling_cases import (
    PROMPTS,
    SPECIAL,
    TOLERANCE,
    UNCONDITIONAL,
    N,
    mixed,
    prefilled,
    random_model,
    row_of,
)

from starflow2_jax.models.af_block import AFBlock, BlockConfig, Given
from starflow2_jax.models.guidance import LogScaleGuidance
from starflow2_jax.sampling import display, jacobi, step
from starflow2_jax.sampling.state import Mode

F64 = jnp.float64
TOKENS = 6


def block(**changes):
    shape = {"channels": 3, "width": 32, "head_dim": 16, "layers": 2}
    config = BlockConfig(**shape | changes)
    return tiny.randomised(lambda: AFBlock(config, rngs=nnx.Rngs(0)), dtype=np.float64)


KINDS = {
    "start": {},
    "shifted": {
        "start": False,
        "scale": "exp",
        "soft_clip": None,
        "final_norm": False,
        "positions": TOKENS,
        "classes": 4,
        "flip": True,
    },
    "text": {"text_width": 5},
}


def inputs(kind, rows=2, guided=False):
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(rows, TOKENS, 3)))
    text = jnp.asarray(rng.normal(size=(rows, 2, 5))) if kind == "text" else None
    labels = jnp.arange(rows) if kind == "shifted" else None
    length = 2 if kind == "text" else 0
    angles = jnp.asarray(rng.normal(size=(1, length + TOKENS, 8)))
    given = Given(text, labels)
    if guided:
        other = Given(None if text is None else text + 1.0, temperature=0.8)
        given = given.beside(other, rows)
    return z, None if kind == "shifted" else angles, given


sequential = tiny.jit(lambda m, z, *rest: m.inverse(z, rest[0], F64, *rest[1:]))


def solver(config):
    return tiny.jit(
        lambda m, z, *rest: jacobi.inverse(m, z, rest[0], F64, *rest[1:], config=config)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guided", [False, True])
def test_enough_passes_are_exact(x64, kind, guided):
    model = block(**KINDS[kind])
    z, angles, given = inputs(kind, guided=guided)
    rule = LogScaleGuidance(0.5, annealed=True) if guided else None
    config = jacobi.JacobiConfig(chunk=4, threshold=0.0, max_passes=None)
    u, passes = solver(config)(model, z, angles, given, rule)
    tiny.close(u, sequential(model, z, angles, given, rule), 1e-10)
    # 6 tokens, or 5 where the first one passes unchanged: a whole chunk and a rest.
    assert passes.tolist() == [4, 1 if kind == "shifted" else 2]
    if not guided:
        back, _ = model.forward(u, angles, F64, given)
        tiny.close(back, z, 1e-10)


def test_a_threshold_stops_early_and_changes_little(x64):
    model = block()
    z, angles, given = inputs("start")
    u, passes = solver(jacobi.JacobiConfig(6, 1e-2, 32))(model, z, angles, given)
    assert 1 < int(passes[0]) < 7
    exact = sequential(model, z, angles, given)
    assert 0 < np.square(u - exact).mean() < 0.1 * np.square(exact).mean()
    _, passes = solver(jacobi.JacobiConfig(6, 1e30, 32))(model, z, angles, given)
    assert passes.tolist() == [1]
    _, passes = solver(jacobi.JacobiConfig(6, 0.0, 3))(model, z, angles, given)
    assert passes.tolist() == [3]


def test_a_change_that_is_no_number_goes_on(x64):
    z, angles, given = inputs("start")
    _, passes = solver(jacobi.JacobiConfig(6, 1.0, 4))(block(), z * np.nan, angles, given)
    assert passes.tolist() == [4]


def test_the_shallow_flow_of_the_pretzel(x64):
    cfg = tiny.config("float64", side=3)
    model = tiny.pretzel(cfg)
    u = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 9, cfg.flow.channels)))
    x, passes = jacobi.to_x(model, u, jacobi.JacobiConfig(chunk=4, threshold=0.0, max_passes=5))
    tiny.close(x, display.to_x(model, u), 1e-10)
    # 9 tokens: the last chunk is one token, and two passes would do.
    assert [p.tolist() for p in passes] == [[5, 5, 5]] * 2


@functools.cache
def shifted():
    return block(**KINDS["shifted"])


def test_absent_labels_are_the_mean_class(x64):
    model = shifted()
    z, _, _ = inputs("shifted")
    forward = tiny.jit(lambda m, z, given: m.forward(z, None, F64, given)[0])
    absent = forward(model, z, Given())
    tiny.close(forward(model, z, Given(labels=jnp.array([-1, -1]))), absent, 1e-12)
    labelled = forward(model, z, Given(labels=jnp.array([-1, 2])))
    tiny.close(labelled[0], absent[0], 1e-12)
    assert np.abs(labelled[1] - absent[1]).max() > 1e-3


def test_wrong_inputs_are_refused(x64):
    z, angles, _ = inputs("start")
    with pytest.raises(ValueError, match="5 tokens, but learned positions for 6"):
        shifted().forward(z[:, :5], None, F64)
    with pytest.raises(ValueError, match="text"):
        block(text_width=5).forward(z, angles, F64)
    with pytest.raises(ValueError, match="chunk"):
        jacobi.JacobiConfig(chunk=0)


def test_volume_preserving_blocks_have_no_scale(x64):
    model = block(scale="none", soft_clip=None)
    z, angles, given = inputs("start")
    u = sequential(model, z, angles, given)
    assert np.abs(u - z).max() > 0.01
    back, log_det = model.forward(u, angles, F64, given)
    tiny.close(back, z, 1e-10)
    assert not log_det.any()


ROWS = [row_of(*pieces) for pieces in PROMPTS]
EXACT = jacobi.JacobiConfig(chunk=64, threshold=0.0, max_passes=None, measure="largest")


@pytest.mark.parametrize(("guided", "chunk"), [(False, 64), (False, 2), (True, 64)])
def test_the_deep_block_under_the_vlm_is_drawn_exactly(x64, guided, chunk):
    """Rows that write, read, or draw at once; images that the model starts by itself."""
    model, settings = random_model(), mixed(range(4), guided)
    start = prefilled(model, ROWS, settings, UNCONDITIONAL if guided else None)
    start = dataclasses.replace(start, record=None)
    config = dataclasses.replace(EXACT, chunk=chunk)
    theirs = step.advance(model, jax.tree.map(jnp.copy, start), settings, 10**6)
    ours = jacobi.advance(model, start, settings, 10**6, config)
    assert int(ours.images.sum()) > 2
    for name in ("tokens", "kinds", "mode", "draws", "texts", "images", "position"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
    assert (ours.mode == Mode.DONE).all()
    drawn = np.arange(ours.u.shape[1]) < np.asarray(ours.images)[:, None]
    tiny.close(ours.u[drawn], theirs.u[drawn], TOLERANCE)
    for stream in ("vlm", "deep"):
        cache, other = ours.caches[stream], theirs.caches[stream]
        np.testing.assert_array_equal(cache["length"], other["length"])
        real = np.arange(cache["k"].shape[3]) < np.asarray(cache["length"])[:, None]
        for name in ("k", "v"):
            a, b = (c[name].swapaxes(2, 3)[:, real] for c in (cache, other))
            tiny.close(a, b, TOLERANCE)


def test_drawing_stops_early_and_waits_for_no_row(x64):
    model, settings = random_model(), mixed(range(4), False)
    start = dataclasses.replace(prefilled(model, ROWS, settings), record=None)
    draw = jax.jit(jacobi.draw)
    exact, passes = draw(model, start, settings, config=EXACT)
    assert passes.shape == (1,) and int(passes[0]) <= N - 1
    # Row 1 alone starts with an image: all but its last latent.
    assert exact.drawn.tolist() == [0, N - 1, 0, 0]
    assert exact.length.tolist() == (start.length + jnp.array([0, N - 1, 0, 0])).tolist()
    rest = np.array([0, 2, 3])
    np.testing.assert_array_equal(exact.y[rest], start.y[rest])
    np.testing.assert_array_equal(exact.tokens[rest], start.tokens[rest])
    assert (exact.tokens[1] == SPECIAL.image_pad).sum() == N - 1
    rough, passes = draw(model, start, settings, config=dataclasses.replace(EXACT, threshold=1e30))
    assert passes.tolist() == [1]
    # The first two latents are exact after one pass, the others are not.
    tiny.close(rough.u[1, 0, :2], exact.u[1, 0, :2], TOLERANCE)
    assert np.abs(rough.u[1, 0, 2] - exact.u[1, 0, 2]).max() > 1e-6
    recorded = prefilled(model, ROWS, settings)
    with pytest.raises(ValueError, match="record"):
        jacobi.draw(model, recorded, settings, EXACT)
