"""Accelerators' attention: splash in interpret mode against plain products, folded caches, cuDNN's
offsets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from starflow2_jax.nn import attention, attention_kernels, partition
from starflow2_jax.nn.attention import AttentionSpec, Past


def queries_keys_values(rows, size, kv_heads, groups, d, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    heads = (rows, size, kv_heads)
    return draw(*heads, groups, d), draw(*heads, d), draw(*heads, d)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kv_heads, groups, d, size, kind",
    [
        (2, 1, 64, 256, "segments"),
        (4, 7, 128, 128, "segments"),
        (1, 1, 64, 256, "plain"),
        (2, 2, 80, 200, "lengths"),
        (1, 2, 16, 130, "not causal"),
    ],
)
def test_splash_is_equal_to_plain_products(kv_heads, groups, d, size, kind):
    rows = 2
    arrays = queries_keys_values(rows, size, kv_heads, groups, d)
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.normal(size=arrays[0].shape), jnp.float32)
    spec = AttentionSpec(temperature=jnp.float32(1.5))
    if kind == "segments":
        # Two or three documents, and padding behind them.
        ids = np.sort(rng.integers(1, 4, (rows, size)), axis=1)
        ids[:, -20:] = 0
        spec = AttentionSpec(segments=jnp.asarray(ids, jnp.int32))
    elif kind == "lengths":
        lengths = jnp.asarray([size - 30, size], jnp.int32)
        spec = AttentionSpec(lengths=lengths)
        weight *= (jnp.arange(size) < lengths[:, None])[..., None, None, None]
    elif kind == "not causal":
        spec = AttentionSpec(causal=False)

    def run(function):
        loss = lambda *a: (function(*a) * weight).sum()
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)

    plain = run(lambda q, k, v: attention.attend(q, k, v, spec))
    ours = run(lambda q, k, v: attention._attend_by_splash(q, k, v, spec, interpret=True))
    tiny.close(ours[0], plain[0], 1e-5)
    for a, b in zip(ours[1], plain[1], strict=True):
        tiny.close(a, b, 1e-4)


def test_a_folded_cache_gives_what_the_plain_one_does():
    rows, slots, kv_heads, groups, d = 3, 12, 4, 2, 64
    q, k, v = queries_keys_values(rows, 2, kv_heads, groups, d)
    _, past_k, past_v = queries_keys_values(rows, slots, kv_heads, 1, d, seed=1)
    length = jnp.asarray([5, 0, 12], jnp.int32)
    fold = 2
    narrow = lambda a: a.swapaxes(1, 2)
    wide = lambda a: a.reshape(rows, slots, kv_heads // fold, fold * d).swapaxes(1, 2)
    spec = AttentionSpec(lengths=jnp.asarray([2, 1, 2], jnp.int32))
    plain = attention.attend(q, k, v, spec, Past(narrow(past_k), narrow(past_v), length))
    ours = attention.attend(q, k, v, spec, Past(wide(past_k), wide(past_v), length))
    tiny.close(ours, plain, 1e-5)


def test_what_a_kernel_cannot_do_is_an_error():
    q, k, v = queries_keys_values(1, 128, 1, 1, 256)
    with pytest.raises(ValueError, match="at most 128 dims, not 256"):
        attention._attend_by_splash(q, k, v, AttentionSpec())
    ones = jnp.ones((1, 128), jnp.int32)
    with pytest.raises(ValueError, match="segments or lengths, not both"):
        attention._attend_by_cudnn(q, k, v, AttentionSpec(segments=ones, lengths=ones[:, 0]))


def test_offsets_of_packed_rows():
    segments = jnp.asarray(
        [
            [1, 1, 2, 2, 2, 0, 0, 0],
            [1, 1, 1, 1, 1, 1, 1, 1],
            [1, 2, 3, 4, 4, 4, 4, 4],  # one more than there is room for
            [1, 2, 1, 1, 1, 1, 1, 1],  # not in order
            [1, 0, 2, 2, 2, 2, 2, 2],  # padding in between
        ],
        jnp.int32,
    )
    offsets, lengths, good = attention_kernels.packed_offsets(segments, 3)
    np.testing.assert_array_equal(offsets[:2], [[0, 2, 5, -1], [0, -1, -1, -1]])
    np.testing.assert_array_equal(lengths[:2], [[2, 3, 3], [8, -1, -1]])
    np.testing.assert_array_equal(good, [True, True, False, False, False])


def test_the_platform_is_that_of_the_mesh():
    assert partition.platform() == jax.default_backend() == "cpu"
    assert attention.cache_fold(4, 64) == 1
