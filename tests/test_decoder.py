"""Two forms of a cache, one function: stacked under a scan, and apart for unrolled layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from starflow2_jax.nn import decoder, layers
from starflow2_jax.nn.attention import AttentionSpec, Slots

CONFIG = decoder.DecoderConfig(
    layers=2,
    width=12,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp_width=16,
    norm="rms",
    mlp="swiglu",
    qkv_bias=True,
    out_bias=False,
    mlp_bias=False,
    norm_epsilon=1e-6,
    final_norm="rms",
)
SLOTS = 9
# How many positions each of three rows takes in each call: a prompt, a waiting row among them, more
# of a prompt, single steps; the last row has used all of its slots in the end.
CALLS = ([3, 1, 4], [2, 0, 3], [1, 1, 1], [0, 1, 1])


def run(stack, calls, dtype):
    rng = np.random.default_rng(0)
    cache = decoder.empty_cache(CONFIG, 3, 0, dtype)
    outputs = []
    for taken in calls:
        size = max(taken)
        x = jnp.asarray(rng.normal(size=(3, size, CONFIG.width)), dtype)
        angles = jnp.asarray(rng.normal(size=(3, size, CONFIG.head_dim // 2)), dtype)
        y, cache = stack(x, angles, AttentionSpec(lengths=jnp.asarray(taken)), cache)
        cache = stack.held(cache, SLOTS)
        outputs += [y[row, :count] for row, count in enumerate(taken)]
    return outputs, cache


@pytest.mark.parametrize("by_rows", [True, False])
def test_slots_apart_are_the_stacked_cache(monkeypatch, by_rows):
    monkeypatch.setattr(layers, "BY_ROWS_BYTES", 0 if by_rows else 2**30)
    with jax.enable_x64(True):
        stack = decoder.Decoder(CONFIG, rngs=nnx.Rngs(0))
        stack = jax.tree.map(lambda a: a.astype(jnp.float64), stack)
        apart = stack.unrolled()
        out = apart.layers[0].attention.out
        assert isinstance(out, layers.LinearByRows if by_rows else layers.Linear)
        expected, stacked = run(stack, CALLS, jnp.float64)
        found, slots = run(apart, CALLS, jnp.float64)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
        lengths = np.sum(CALLS, 0)
        np.testing.assert_array_equal(slots["length"], lengths)
        np.testing.assert_array_equal(stacked["length"], lengths)
        assert lengths.max() == SLOTS == decoder.slots_of(slots) == decoder.slots_of(stacked)
        for layer in range(CONFIG.layers):
            k, v = slots["k"][layer].swapaxes(2, 3), slots["v"][layer]
            for row, length in enumerate(lengths):
                for a, b in ((k, stacked["k"][layer]), (v, stacked["v"][layer])):
                    np.testing.assert_allclose(a[row, :, :length], b[row, :, :length], atol=1e-10)


def test_a_row_without_room_writes_nothing():
    """As `empty_cache`'s stacked form: what does not fit is dropped, and no other slot changes."""
    k, v = jnp.ones((2, 1, 3, 4)), jnp.ones((2, 1, 4, 3))
    new = jnp.full((2, 2, 1, 3), 5.0)
    slots = Slots(k, v, jnp.array([3, 1]))
    grown = slots.extended(new, new, jnp.array([2, 1]))
    np.testing.assert_array_equal(grown.k[:, 0, 0], [[1, 1, 1, 5], [1, 5, 1, 1]])
    np.testing.assert_array_equal(grown.v[:, 0, :, 0], [[1, 1, 1, 5], [1, 5, 1, 1]])
    with pytest.raises(ValueError, match="grow by as much"):
        Slots(k, v, jnp.array(1)).extended(new, new, jnp.array([1, 1]))


def products_of(jaxpr):
    """How many products of matrices a program writes, those of its loops' bodies once."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general"
        count += sum(products_of(inner) for inner in jaxprs_in_params(equation.params))
    return count


@pytest.mark.parametrize("qk_norm", [False, True])
def test_of_kept_products_only_attention_is_computed_again(qk_norm):
    def found(remat):
        config = dataclasses.replace(CONFIG, remat=remat, qk_norm=qk_norm)
        stack = decoder.Decoder(config, rngs=nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(1), (2, 5, CONFIG.width))
        angles = jax.random.normal(jax.random.key(2), (1, 5, CONFIG.head_dim // 2))
        loss = lambda stack, x: jnp.sin(stack(x, angles, AttentionSpec())[0]).sum()
        gradient = jax.grad(loss, (0, 1))
        leaves = jax.tree.leaves(gradient(stack, x))
        return leaves, products_of(jax.make_jaxpr(gradient)(stack, x).jaxpr)

    (plain, count), (kept, count_kept), (again, count_again) = map(
        found, ("none", "products", "full")
    )
    for other in (kept, again):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, other
        )
    # Scores and mixture, of attention without a kernel; of "full" all products but the last.
    assert (count_kept - count, count_again - count) == (2, 6)


def test_gelu_of_narrow_types_has_an_exact_derivative():
    wide = jnp.linspace(-6.0, 6.0, 4001)
    x = wide.astype(jnp.bfloat16)
    plain = lambda x: jax.nn.gelu(x, approximate=False)
    np.testing.assert_array_equal(layers.gelu(x), plain(x))
    slope = jax.grad(lambda x: layers.gelu(x).astype(jnp.float32).sum())(x)
    expected = jax.grad(lambda x: plain(x).sum())(x.astype(jnp.float32))
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(slope.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)
    # Of float32 it is JAX's own.
    program = lambda f: str(jax.make_jaxpr(jax.grad(lambda x: f(x).sum()))(wide))
    assert program(layers.gelu) == program(plain)
