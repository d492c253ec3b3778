"""Two forms of a cache, one function: stacked under a scan, and apart for unrolled layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from starflow2_jax.nn import decoder
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


def test_slots_apart_are_the_stacked_cache():
    with jax.enable_x64(True):
        stack = decoder.Decoder(CONFIG, rngs=nnx.Rngs(0))
        stack = jax.tree.map(lambda a: a.astype(jnp.float64), stack)
        apart = stack.unrolled()
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
