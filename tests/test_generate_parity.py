"""Greedy text of our Qwen2.5-VL and of `transformers`: 64 tokens, identical."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import qwen_reference as qwen  # noqa: E402

from starflow2_jax.models.pretzel import Kind  # noqa: E402
from starflow2_jax.nn.attention import AttentionSpec  # noqa: E402
from starflow2_jax.nn.decoder import empty_cache  # noqa: E402

pytestmark = pytest.mark.parity

NEW = 64
# Neither writes what only a picture may hold.
SUPPRESSED = [qwen.SPECIAL.vision_start, qwen.SPECIAL.vision_end, qwen.SPECIAL.image_pad]
DOCUMENTS = {
    "text": [9],
    "one picture": [3, (140, 168), 4],
    "several pictures": [1, (28, 140), 2, (84, 84), (28, 28), 3],
}


def greedy(logits):
    return jnp.argmax(logits.at[:, jnp.array(SUPPRESSED)].set(-jnp.inf), -1).astype(jnp.int32)


def embedded(model, rows):
    e = model.embed(rows["tokens"], jnp.float32)
    is_view = (rows["kinds"] == Kind.VIT)[..., None]
    return jnp.where(is_view, model.see(rows["views"], jnp.float32), e)


@tiny.jit
def with_cache(model, rows):
    """Prefill, then one position after the other: int32 [B, NEW]."""
    count, length = rows["tokens"].shape
    lengths = (rows["segments"] > 0).sum(1).astype(jnp.int32)
    cache = empty_cache(model.config.decoder(), count, length + NEW, jnp.float32)
    y, cache = model.decode(
        embedded(model, rows), rows["positions"], AttentionSpec(lengths=lengths), cache
    )
    last = jnp.arange(count), lengths - 1

    def step(carry, _):
        y, position, cache = carry
        token = greedy(model.logits(y))
        y, cache = model.decode(
            model.embed(token[:, None], jnp.float32),
            jnp.broadcast_to(position[:, None], (3, count, 1)),
            AttentionSpec(lengths=jnp.ones(count, jnp.int32)),
            cache,
        )
        return (y[:, 0], position + 1, cache), token

    begin = (y[last], rows["positions"].max(0)[last] + 1, cache)
    return jax.lax.scan(step, begin, length=NEW)[1].T


@tiny.jit
def without_cache(model, rows):
    """The whole row again for each token: int32 [B, NEW]."""
    e, positions = embedded(model, rows), rows["positions"]
    row = jnp.arange(len(e))
    start = (rows["segments"] > 0).sum(1)

    def step(carry, _):
        e, positions, lengths = carry
        y, _ = model.decode(e, positions, AttentionSpec(lengths=lengths))
        token = greedy(model.logits(y[row, lengths - 1]))
        e = e.at[row, lengths].set(model.embed(token[:, None], jnp.float32)[:, 0])
        following = positions[:, row, lengths - 1].max(0) + 1
        return (e, positions.at[:, row, lengths].set(following), lengths + 1), token

    grown = jnp.pad(e, ((0, 0), (0, NEW), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, 0), (0, NEW)))
    begin = (grown, positions, start.astype(jnp.int32))
    return jax.lax.scan(step, begin, length=NEW)[1].T


@functools.cache
def models():
    return qwen.pair(qwen.config_of(), np.float32)


def documents():
    config = qwen.config_of()
    return [qwen.document(config, parts, 7 * i) for i, parts in enumerate(DOCUMENTS.values())]


def ours(generate, docs):
    batch = qwen.batch(qwen.config_of(), [[d] for d in docs])
    return np.asarray(generate(models()[0], vars(batch) | {"places": None}))[: len(docs)]


def theirs(docs, use_cache):
    """Left padding, as `generate` wants it."""
    inputs = qwen.their_inputs(qwen.config_of(), docs, left=True)
    with torch.no_grad():
        out = models()[1].generate(
            **inputs,
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            suppress_tokens=SUPPRESSED,
            pad_token_id=20,
            use_cache=use_cache,
        )
    return out[:, -NEW:].numpy()


@functools.cache
def expected():
    """Their text for all documents at once, with a cache."""
    found = theirs(documents(), use_cache=True)
    assert len({tuple(row) for row in found}) == len(DOCUMENTS)
    assert min(len(set(row)) for row in found) > 3, "rows that repeat one token show little"
    return found


@pytest.mark.parametrize("generate", [with_cache, without_cache], ids=["cached", "uncached"])
def test_batch(generate):
    np.testing.assert_array_equal(ours(generate, documents()), expected())


def test_their_batch_without_a_cache():
    np.testing.assert_array_equal(theirs(documents(), use_cache=False), expected())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_single(name):
    one = [documents()[list(DOCUMENTS).index(name)]]
    theirs_alone = theirs(one, use_cache=True)
    for generate in (with_cache, without_cache):
        np.testing.assert_array_equal(ours(generate, one), theirs_alone)
    np.testing.assert_array_equal(theirs(one, use_cache=False), theirs_alone)
