"""Sampling: the cached step against the whole row, rows together against rows alone, the rules."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from sampling_cases import (
    END_OF_IMAGE,
    IMAGES,
    PROMPT_IMAGES,
    PROMPTS,
    SIDE,
    SLOTS,
    SPECIAL,
    START,
    TOLERANCE,
    UNCONDITIONAL,
    WEIGHTS,
    C,
    N,
    batch,
    image,
    mixed,
    prefilled,
    random_model,
    row_of,
    sampled,
    steered_model,
)

from starflow2_jax.models.flow import guide
from starflow2_jax.models.pretzel import Kind, Pretzel, starflow2_3_6b
from starflow2_jax.nn.attention import AttentionSpec
from starflow2_jax.sampling import display, generate, step
from starflow2_jax.sampling.prompts import Image, Text, padded, scored
from starflow2_jax.sampling.state import Mode, Prompt, row_settings

pytestmark = pytest.mark.usefixtures("x64")


def piece_rows(state, row):
    """Tokens and kinds of one row of the state, as far as it goes."""
    length = int(state.length[row])
    return np.asarray(state.tokens[row, :length]), np.asarray(state.kinds[row, :length])


def rebuilt(state, b, prompt_images):
    """Row b of a state as a `Row`, positions counted anew."""
    tokens, kinds = piece_rows(state, b)
    drawn = [np.asarray(u) for u in state.u[b, : int(state.images[b])]]
    pending, pieces, text, t = [*prompt_images, *drawn], [], [], 0
    while t < len(tokens):
        if kinds[t] == Kind.LATENT:
            pieces += [Text(tuple(text)), Image(pending.pop(0))]
            text, t = [], t + N + 1  # and its <|vision_end|>
        else:
            text.append(int(tokens[t]))
            t += 1
    row = row_of(*pieces, Text(tuple(text)))
    np.testing.assert_array_equal(row.tokens, tokens)
    np.testing.assert_array_equal(row.kinds, kinds)
    return row


@jax.jit
def whole(model, prompt):
    u = step.spread_images(prompt.u, prompt.image_start, prompt.tokens.shape[1])
    spec = AttentionSpec(lengths=prompt.lengths)
    s = model.run(prompt.tokens, prompt.kinds, prompt.positions, u, spec)
    return s.y, s.g, model.logits(s.y, s.g), *model.deep.head(s.g)


def test_cached_decode_is_the_full_forward_at_every_position():
    model = random_model()
    row = row_of(Text((1, 2, 3)), image(0), Text((4, 5)), image(1), Text((6, 7)))
    full = whole(model, padded([row]))
    feed = jax.jit(step.feed)
    settings = row_settings(1)
    # From one token on, and from right behind an image and its end.
    for first in (1, 3 + 1 + N + 1):
        images = row.u[: int(first > 1)]
        start = dataclasses.replace(
            row, tokens=row.tokens[:first], kinds=row.kinds[:first],
            positions=row.positions[:first], u=images,
        )  # fmt: skip
        state = prefilled(model, [start], settings)
        latents = iter(row.u.reshape(-1, C)[len(images) * N :])
        for t in range(first, len(row) + 1):
            here = state.y, state.g, model.logits(state.y, state.g), *model.deep.head(state.g)
            for ours, theirs in zip(here, full, strict=True):
                tiny.close(ours[0], theirs[0, t - 1], TOLERANCE, t)
            if t == len(row):
                break
            kind = row.kinds[t]
            positions = step.element_positions(state, jnp.asarray([kind]), SIDE)
            np.testing.assert_array_equal(positions[:, 0], row.positions[t])
            u = next(latents) if kind == Kind.LATENT else np.full(C, np.nan)
            state = feed(
                model, state,
                step.Element(jnp.asarray(row.tokens[t : t + 1]), jnp.asarray([kind]), u[None]),
            )  # fmt: skip
        tokens, kinds = piece_rows(state, 0)
        np.testing.assert_array_equal(tokens, row.tokens)
        np.testing.assert_array_equal(kinds, row.kinds)


@functools.cache
def mixed_batch(guided):
    rows = [row_of(*pieces) for pieces in PROMPTS]
    unconditional = UNCONDITIONAL if guided else None
    return sampled(random_model(), rows, mixed(range(4), guided), unconditional)


@pytest.mark.parametrize("guided", [False, True])
def test_rows_together_are_rows_alone(guided):
    together = mixed_batch(guided)
    assert (together.mode == Mode.DONE).all()
    # Some wrote and then drew of their own will, one drew twice, one never.
    assert together.images.tolist()[1] == 2 and together.images.tolist()[3] == 0, together.images
    assert (np.asarray(together.tokens) == START).sum() > 3
    for b, pieces in enumerate(PROMPTS):
        settings = mixed([b], guided)
        alone = sampled(
            random_model(), [row_of(*pieces)], settings, UNCONDITIONAL if guided else None
        )
        for name in ("tokens", "kinds", "length", "texts", "images", "draws", "mode"):
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(together, name)[b], name)
        tiny.close(alone.u[0], together.u[b], TOLERANCE)
        tiny.close(alone.y[0], together.y[b], TOLERANCE)
        mine = jax.tree.map(operator.itemgetter(0), alone.record)
        tiny.close_trees(mine, jax.tree.map(operator.itemgetter(b), together.record), TOLERANCE)


@jax.jit
def log_probs(model, rows, x):
    """Of the images by the deep block alone [B, I], and of the text [B, T]."""
    likelihood = model.log_prob(rows, x)
    shallow = sum(d.sum((-1, -2)) for d in likelihood.shallow_log_dets)
    deep = likelihood.image_log_prob - shallow
    return jnp.where(rows.image_start >= 0, deep, 0.0), likelihood.text_log_prob


@pytest.mark.parametrize("guided", [False, True])
def test_the_record_is_what_one_parallel_pass_says(guided):
    model, state = random_model(), mixed_batch(guided)
    rows = [rebuilt(state, b, [image(s).u for s in seeds]) for b, seeds in enumerate(PROMPT_IMAGES)]
    prompt = batch(rows, SLOTS, 3)
    # As if every image were data: x is what the shallow flow makes u of.
    deep, text = log_probs(model, scored(prompt), display.to_x(model, prompt.u))
    *_, mu, sigma = whole(model, prompt)
    for b, seeds in enumerate(PROMPT_IMAGES):
        row, given, drawn = rows[b], len(seeds), int(state.images[b])
        tiny.close(
            state.record.latent_log_prob[b, :drawn], deep[b, given : given + drawn], TOLERANCE
        )
        chosen = np.arange(len(row)) >= len(row_of(*PROMPTS[b]))
        chosen &= (row.kinds == Kind.TEXT) & (row.tokens != END_OF_IMAGE)
        assert chosen.sum() == state.texts[b]
        tiny.close(state.record.text_log_prob[b], text[b, : len(row)][chosen].sum(), TOLERANCE)
        # The heads that were used: both rows run whole, then guided.
        twins = [
            row_of(Text(UNCONDITIONAL), Image(u)) for u in (*state.u[b], image(0).u, image(0).u)
        ]
        *_, mu_u, sigma_u = whole(model, batch(twins, SLOTS, 3))
        without = slice(len(UNCONDITIONAL) - 1, len(UNCONDITIONAL) + N - 1)
        for i in range(drawn):
            first = int(prompt.image_start[b, given + i])
            at = slice(first - 1, first + N - 1)
            used = mu[b, at], sigma[b, at]
            if guided:
                used = guide(*used, mu_u[i, without], sigma_u[i, without], WEIGHTS[b])
            tiny.close(state.record.mu[b, i], used[0], TOLERANCE)
            tiny.close(state.record.sigma[b, i], used[1], TOLERANCE)


def test_no_weight_is_no_guidance():
    rows = [row_of(*pieces) for pieces in PROMPTS]
    settings = mixed(range(4), guidance=False)
    ours = sampled(random_model(), rows, settings, UNCONDITIONAL)
    plain = mixed_batch(False)
    np.testing.assert_array_equal(ours.tokens, plain.tokens)
    tiny.close(ours.u, plain.u, TOLERANCE)
    assert np.abs(mixed_batch(True).u - plain.u).max() > 1e-2


def test_a_waiting_row_does_not_change():
    rows = [row_of(*pieces) for pieces in PROMPTS]
    settings = mixed(range(4), guidance=True)
    state = prefilled(random_model(), rows, settings, UNCONDITIONAL)
    frozen = jnp.asarray([True, False, False, True])
    state = step.stopped(state, frozen)
    before = jax.device_get(state)
    after = jax.device_get(step.advance(random_model(), state, settings, 5))
    np.testing.assert_array_equal(after.length - before.length, [0, 5, 5, 0])
    assert (after.draws > before.draws).tolist() == [False, True, True, False]

    def row_of_leaf(leaf, b):
        # k, v [L, R, M, K, d]; the rest has the row first.
        return np.take(leaf, b, 1 if leaf.ndim == 5 else 0)

    assert not np.isin(after.twins, [0, 3]).any()
    per_row = [dataclasses.replace(s, prefix=None, twins=None) for s in (before, after)]
    for b in (0, 3):
        for ours, theirs in zip(*map(jax.tree.leaves, per_row), strict=True):
            np.testing.assert_array_equal(row_of_leaf(ours, b), row_of_leaf(theirs, b))


def test_nothing_looks_ahead():
    rows = [row_of(*pieces) for pieces in PROMPTS]
    noise = np.random.default_rng(0).normal(size=(4, IMAGES, N, C))

    def run(noise):
        settings = dataclasses.replace(mixed(range(4), False), noise=jnp.asarray(noise))
        return jax.device_get(sampled(random_model(), rows, settings))

    base = run(noise)
    for k in range(N):
        other = noise.copy()
        other[1, 0, k] += 0.5
        changed = run(other)
        np.testing.assert_array_equal(changed.u[1, 0, :k], base.u[1, 0, :k])
        assert (changed.u[1, 0, k:] != base.u[1, 0, k:]).any(-1).all()
        assert (changed.u[1, 1] != base.u[1, 1]).any() or changed.images[1] < 2
        for b in (0, 2, 3):
            np.testing.assert_array_equal(changed.u[b], base.u[b])
            np.testing.assert_array_equal(changed.tokens[b], base.tokens[b])


def test_given_noise_and_image_temperature():
    rows = [row_of(*pieces) for pieces in PROMPTS]
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(4, IMAGES, N, C)))
    settings = dataclasses.replace(mixed(range(4), False), noise=noise)
    state = sampled(random_model(), rows, settings)
    r = state.record
    for i in range(int(state.images[1])):
        tiny.close(state.u[1, i], r.mu[1, i] + 0.8 * r.sigma[1, i] * noise[1, i], TOLERANCE)


FORBIDDEN = (SPECIAL.image_pad, SPECIAL.vision_end, SPECIAL.video_pad)


def written_tokens(state, rows):
    """What the rows chose themselves: all new TEXT but the ends of images."""
    chosen = []
    for b, row in enumerate(rows):
        tokens, kinds = piece_rows(state, b)
        starts = np.flatnonzero(tokens == START)
        for s in starts:
            if s + 1 < len(tokens):  # a start is always an image
                assert (kinds[s + 1 : s + 1 + N] == Kind.LATENT).all()
                assert tokens[s + N + 1] == END_OF_IMAGE
        ends = starts + N + 1
        new = np.arange(len(row), len(tokens))
        chosen += tokens[new[(kinds[new] == Kind.TEXT) & ~np.isin(new, ends)]].tolist()
    return chosen


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_image_tokens_are_never_written(temperature):
    everything = tuple((t, (*FORBIDDEN, 1 + t % 7)) for t in range(64))
    model = steered_model(*everything)
    rows = [row_of(Text((b + 1,))) for b in range(4)]
    settings = row_settings(4, temperature=temperature, max_new_tokens=30, max_images=1)
    chosen = written_tokens(sampled(model, rows, settings), rows)
    assert len(chosen) > 30 and not set(chosen) & set(FORBIDDEN)
    if temperature == 0:
        assert set(chosen) <= set(range(1, 8))


def test_a_drawing_that_does_not_fit_is_refused():
    model = steered_model((1, (START, 2)), (2, (2,)), (END_OF_IMAGE, (START, 3)), (3, (4,)))
    rows = [row_of(Text((2,) * n + (1,))) for n in (33, 34, 35, 35)]
    # Of 40 slots the shortest row leaves 6: the start, N latents and the end.
    settings = row_settings(4, temperature=0, max_new_tokens=50, max_images=2)
    state = sampled(model, rows, settings, length=SLOTS)
    assert state.images.tolist() == [1, 0, 0, 0]
    assert state.length.tolist() == [SLOTS] * 4 and (state.mode == Mode.DONE).all()
    assert state.tokens[1, 35:].tolist() == [2] * 5
    # The prompt itself asks for a drawing.
    rows = [row_of(Text((2,) * n + (START,))) for n in (32, 33, 34, 35)]
    state = prefilled(model, rows, settings, length=SLOTS)
    assert state.mode.tolist() == [Mode.DRAW, Mode.DRAW, Mode.DRAW, Mode.DONE]
    with pytest.raises(ValueError, match="does not fit a cache"):
        prefilled(model, rows, settings, length=SLOTS + 1)


def test_one_compilation_for_any_number_of_steps():
    model = random_model()
    rows = [row_of(*pieces) for pieces in PROMPTS]
    mixed_batch(False)
    size, prefills = step.run_steps._cache_size(), step.prefill._cache_size()
    state = prefilled(model, rows, mixed(range(4), False))
    for steps in (1, 2, np.int64(5), jnp.int32(3), 10**6):
        state = step.advance(model, state, mixed(range(4), True), steps)
    other = [row_of(Text((9, 9, START)))] * 2 + [row_of(image(3))] * 2
    sampled(model, other, row_settings(4, temperature=0.3, top_p=0.1, guidance=1.0))
    assert step.run_steps._cache_size() == size
    assert step.prefill._cache_size() == prefills
    for n, new in ((2, 20), (6, 16)):
        prompts = [row_of(Text(range(n)))] * 4
        generate.generate(model, prompts, row_settings(4, max_new_tokens=new, max_images=2))
    assert step.run_steps._cache_size() <= size + 1


@jax.jit
def choose_token(*arguments):
    return step.choose_token(*arguments)


def choices(logits, temperature, top_p, count=4000, allowed=None):
    keys = jax.random.split(jax.random.key(0), count)
    spread = lambda a: jnp.broadcast_to(jnp.asarray(a, jnp.float64), (count,))
    wide = jnp.broadcast_to(jnp.asarray(logits), (count, len(logits)))
    allowed = jnp.broadcast_to(True if allowed is None else allowed, wide.shape)
    return np.asarray(
        choose_token(wide, allowed, keys, spread(temperature), spread(top_p), jnp.ones(count, bool))
    )


def test_temperature_and_top_p():
    probs = np.array([0.1, 0.4, 0.2, 0.25, 0.05])
    logits = np.log(probs)

    def check(tokens, expected):
        frequency = np.bincount(tokens, minlength=5) / len(tokens)
        assert np.abs(frequency - expected).max() < 0.03
        assert (frequency[expected == 0] == 0).all()

    check(choices(logits, 1.0, 1.0), probs)
    check(choices(logits, 2.0, 1.0), np.sqrt(probs) / np.sqrt(probs).sum())
    check(choices(logits, 1.0, 0.6), np.array([0, 0.4, 0, 0.25, 0]) / 0.65)
    check(choices(logits, 1.0, 0.7), np.array([0, 0.4, 0.2, 0.25, 0]) / 0.85)
    check(choices(logits, 1.0, 1e-9), np.eye(5)[1])
    check(choices(logits, 1e-3, 1.0), np.eye(5)[1])
    check(choices(logits, 0.0, 1.0), np.eye(5)[1])
    allowed = jnp.asarray([True, False, True, False, True])
    check(choices(logits, 1.0, 1.0, allowed=allowed), np.array([0.1, 0, 0.2, 0, 0.05]) / 0.35)
    check(choices(logits, 0.0, 1.0, allowed=allowed), np.eye(5)[2])
    keys = jax.random.split(jax.random.key(0), 4000)
    categorical = jax.vmap(lambda key: jax.random.categorical(key, jnp.asarray(logits)))(keys)
    np.testing.assert_array_equal(choices(logits, 1.0, 1.0), categorical)
    # Of equal ones the first.
    check(choices(np.array([0.0, 2.0, 1.0, 2.0, 2.0]), 0.0, 1.0), np.eye(5)[1])
    # A row that keeps all draws the same beside one that does not.
    top_p = np.where(np.arange(4000) % 2, 0.6, 1.0)
    beside = choices(logits, 1.0, top_p)
    np.testing.assert_array_equal(beside[::2], choices(logits, 1.0, 1.0)[::2])
    np.testing.assert_array_equal(beside[1::2], choices(logits, 1.0, 0.6)[1::2])


def test_full_size_shapes():
    with jax.enable_x64(False):
        config = starflow2_3_6b()
        n, c = config.flow.tokens, config.flow.channels
        model = nnx.eval_shape(lambda: Pretzel(config, rngs=nnx.Rngs(0)))
        ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
        u = jax.ShapeDtypeStruct((3, 1, n, c), jnp.float32)
        prompt = Prompt(ints(3, 300), ints(3, 300), ints(3, 3, 300), ints(3), ints(3, 1), u)
        settings = row_settings(3)
        prefill = functools.partial(step.prefill, slots=1024, images=2, record=True)
        state = jax.eval_shape(prefill, model, prompt, settings, unconditional=ints(20))
        assert state.caches["deep"]["k"].shape == (24, 6, 48, 1024, 64)
        assert state.caches["vlm"]["k"].shape == (28, 6, 4, 1024, 128)
        after = jax.eval_shape(step.step, model, state, settings)
        shapes = lambda tree: [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]
        assert shapes(after) == shapes(state)
