"""Accelerators' attention: splash in interpret mode against plain products, folded caches, cuDNN's
offsets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from starflow2_jax.data import views
from starflow2_jax.models import qwen2_5_vision
from starflow2_jax.models.pretzel import Kind
from starflow2_jax.nn import attention, attention_kernels, partition
from starflow2_jax.nn.attention import AttentionSpec, Past
from starflow2_jax.parallel import mesh as meshes
from starflow2_jax.parallel import rules


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


@pytest.mark.parametrize(
    "platform, dtype, d, kernel",
    [
        ("tpu", "float32", 128, "splash"),
        ("tpu", "bfloat16", 256, None),
        ("cuda", "bfloat16", 256, "cudnn"),
        ("cuda", "float16", 64, "cudnn"),
        ("cuda", "float32", 64, None),
        ("cuda", "float64", 64, None),
        ("cpu", "bfloat16", 64, None),
    ],
)
def test_a_kernel_gets_only_what_it_takes(monkeypatch, platform, dtype, d, kernel):
    ran = []
    note = lambda name: lambda q, *rest: ran.append(name) or q
    monkeypatch.setattr(partition, "platform", lambda: platform)
    monkeypatch.setattr(attention, "_attend_by_splash", note("splash"))
    monkeypatch.setattr(attention, "_attend_by_cudnn", note("cudnn"))
    monkeypatch.setattr(attention, "_attend_in_parts", note(None))
    q = jax.ShapeDtypeStruct((1, attention.KERNEL_SIZE, 2, 1, d), dtype)
    k = jax.ShapeDtypeStruct((1, attention.KERNEL_SIZE, 2, d), dtype)
    with jax.enable_x64(dtype == "float64"):
        jax.eval_shape(lambda q, k: attention.attend(q, k, k, AttentionSpec()), q, k)
    assert ran == [kernel]


def test_long_rows_that_no_kernel_takes_are_an_error(monkeypatch):
    size = attention.PLAIN_SIZE + 1
    for platform, d, message in (("tpu", 256, "at most 128 dims"), ("cuda", 64, "not float32")):
        monkeypatch.setattr(partition, "platform", lambda name=platform: name)
        q = jax.ShapeDtypeStruct((1, size, 1, 1, d), jnp.float32)
        k = jax.ShapeDtypeStruct((1, size, 1, d), jnp.float32)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda q, k: attention.attend(q, k, k, AttentionSpec()), q, k)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_rows_that_are_cut_take_plain_products(monkeypatch, platform):
    mesh = meshes.make_mesh(meshes.MeshConfig(fsdp=2, tensor=2, sequence=2))
    q, k, v = (a.astype(jnp.bfloat16) for a in queries_keys_values(2, 128, 2, 1, 16))
    segments = jnp.asarray(np.repeat([1, 2, 0], [50, 60, 18])[None].repeat(2, 0), jnp.int32)
    spec = AttentionSpec(segments=segments)
    expected = attention.attend(q, k, v, spec)
    monkeypatch.setattr(partition, "platform", lambda: platform)
    with rules.use(mesh):
        attend = jax.jit(attention.attend)
        tiny.close(attend(q, k, v, spec), expected, 2e-2)
        size = attention.PLAIN_SIZE
        attention.check_length(size)
        with pytest.raises(ValueError, match=f"over {size + 1} positions wants whole rows"):
            attention.check_length(size + 1)
    attention.check_length(size + 1)


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


def by_offsets(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    """What cuDNN makes of packed rows: each run sees itself; what is in none is 0."""
    del kv_seqlen, kv_offsets, mask_type
    at = jnp.arange(q.shape[1])
    first, end = q_offsets[:, :-1, None], q_offsets[:, :-1, None] + q_seqlen[..., None]
    inside = (q_seqlen[..., None] > 0) & (at >= first) & (at < end)  # [B, M, T]
    seen = (inside[:, :, :, None] & inside[:, :, None]).any(1)[:, None]
    scores = jnp.where(seen, jnp.einsum("bthd,bshd->bhts", q, k) * scale, -1e30)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)
    return jnp.where(inside.any(1)[..., None, None], mixed, 0.0)


def test_padding_between_windows_is_no_obstacle_for_cudnn(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", by_offsets)
    tower = qwen2_5_vision.published_tower(64, 64)
    rng = np.random.default_rng(0)
    limits = views.Limits(min_pixels=1)
    sizes = ((56, 84), (140, 112), (112, 112), (84, 168))
    row = [
        views.view(rng.integers(0, 256, (*size, 3)).astype(np.uint8), tower, limits)
        for size in sizes
    ]
    kinds = np.full((1, sum(one.tokens[0] * one.tokens[1] for one in row)), Kind.VIT)
    shape = views.ViewShape(tower_rows=1, places=8 * tower.window_places)
    segments = jnp.asarray(views.pack_views([row], kinds, tower, shape).segments[0])
    most = attention_kernels.CUDNN_SEGMENTS
    assert not attention_kernels.packed_offsets(segments, most)[2].any()
    order, back = attention_kernels.by_segment(segments)
    in_order = jnp.take_along_axis(segments, order, axis=1)
    assert attention_kernels.packed_offsets(in_order, most)[2].all()
    np.testing.assert_array_equal(jnp.take_along_axis(in_order, back, axis=1), segments)

    q, k, v = queries_keys_values(1, segments.shape[1], 2, 1, 8)
    spec = AttentionSpec(causal=False, segments=segments)
    exists = (segments > 0)[..., None, None, None]
    expected = jnp.where(exists, attention.attend(q, k, v, spec), 0.0)
    ours = attention_kernels.cudnn(q, k, v, None, segments, causal=False)
    tiny.close(jnp.where(exists, ours, 0.0), expected, 1e-5)


def test_the_platform_is_that_of_the_mesh():
    assert partition.platform() == jax.default_backend() == "cpu"
    assert attention.cache_fold(4, 64) == 1
