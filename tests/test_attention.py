"""Attention by plain products, also where rows are done one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow2_jax.nn import attention
from starflow2_jax.nn.attention import AttentionSpec

KINDS = ("plain", "segments", "lengths", "temperature", "not causal")


def spec_of(kind, rows, size):
    rng = np.random.default_rng(1)
    if kind == "segments":
        ids = np.sort(rng.integers(1, 4, (rows, size)), axis=1)
        ids[:, -size // 8 :] = 0
        return AttentionSpec(segments=jnp.asarray(ids, jnp.int32))
    if kind == "lengths":
        return AttentionSpec(lengths=jnp.asarray(rng.integers(1, size, rows), jnp.int32))
    if kind == "temperature":
        return AttentionSpec(temperature=jnp.linspace(0.5, 2.0, rows))
    return AttentionSpec(causal=kind == "plain")


@pytest.mark.parametrize("size", [96, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_softmax_of_all_scores(kind, size):
    rows, kv_heads, groups, d = 3, 2, 3, 16
    apart = rows * kv_heads * groups * size**2 * 4 > attention.APART_BYTES
    assert apart == (size == 512)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, weight = (draw(rows, size, kv_heads, groups, d) for _ in range(2))
    k, v = (draw(rows, size, kv_heads, d) for _ in range(2))
    spec = spec_of(kind, rows, size)

    def plain(q, k, v, spec):
        return jnp.einsum("bkgts,bskd->btkgd", attention.weights(q, k, spec), v)

    def both(function):
        value = lambda q, k, v: (function(q, k, v, spec) * weight).sum()
        gradients = jax.grad(value, argnums=(0, 1, 2))
        return jax.jit(lambda *a: (function(*a, spec), *gradients(*a)))(q, k, v)

    with jax.default_matmul_precision("highest"):
        for ours, expected in zip(both(attention.attend), both(plain), strict=True):
            np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=1e-5)
