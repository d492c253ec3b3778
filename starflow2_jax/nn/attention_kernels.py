"""Attention by the accelerators' own kernels, which never hold the scores of a long row.

`nn.attention` chooses them. Letters: B rows, T positions, K kv heads, G query heads per kv head, d.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import layout
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from starflow2_jax.nn import partition

SPLASH_LANES = 128
"""Splash wants lengths that this divides; shorter ones are padded."""
SPLASH_BLOCK = 512
"""Positions of a block of scores, at most."""
SPLASH_HEAD_DIMS = (64, 128)
# Positions last: they fill the 128 places that TPUs store a last axis in, where a head of 64 would
# leave half of them empty, and the halves that a rotation takes are then whole rows.
_LAYOUT = splash_attention_kernel.QKVLayout.SEQ_MINOR
CUDNN_DTYPES = (jnp.float16, jnp.bfloat16)
"""What cuDNN computes in."""
CUDNN_SEGMENTS = 32
"""Segments of a row, at most, that cuDNN is told of."""
QKV = "qkv"
"""Name of what attention takes, for rematerialisation policies."""
RESIDUALS = "attention"
"""Name of what a kernel's backward pass needs, for rematerialisation policies."""


def splash_block(length: int) -> int:
    """The block size for a padded length: the largest that divides it."""
    return next(b for b in (512, 384, 256, 128) if b <= SPLASH_BLOCK and length % b == 0)


def _splash_kernel(
    heads: int, length: int, causal: bool, interpret: bool
) -> splash_attention_kernel.SplashAttentionKernel:
    shape = (length, length)
    mask = (
        splash_attention_mask.CausalMask(shape) if causal else splash_attention_mask.FullMask(shape)
    )
    block = splash_block(length)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
        q_layout=_LAYOUT,
        k_layout=_LAYOUT,
        v_layout=_LAYOUT,
    )
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """TPU's splash attention, on each device for its own rows and heads.

    Args:
        q: [B, T, K, G, d], scaled.
        k, v: [B, T, K, d].
        segments: int32 [B, T]; a position sees its own segment. None: one segment.
        causal: position q sees k <= q only.
        interpret: run the kernel's program without a TPU; slow.

    Returns:
        [B, T, K, G, d] in q's dtype.
    """
    size = q.shape[1]
    more = -size % SPLASH_LANES
    if more or segments is not None:
        own = jnp.ones(q.shape[:2], jnp.int32) if segments is None else segments
        segments = jnp.pad(own, ((0, 0), (0, more)), constant_values=-1)
        pad = lambda a: jnp.pad(a, ((0, 0), (0, more)) + ((0, 0),) * (a.ndim - 2))
        q, k, v = pad(q), pad(k), pad(v)

    def here(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        rows, length, kv_heads, groups, d = q.shape
        kernel = _splash_kernel(kv_heads * groups, length, causal, interpret)
        ids = splash_attention_kernel.SegmentIds
        own = None if segments is None else ids(segments, segments)
        mixed = jax.vmap(kernel)(*(_kept_for_splash(a) for a in (q, k, v)), own)
        return jnp.moveaxis(mixed, 1, 2).reshape(q.shape)

    names = ("batch", None, "heads", None, None)
    mixed = partition.on_each_device(
        here,
        (q, k, v, segments),
        (names, names[:4], names[:4], names[:2]),
        names,
    )
    return mixed[:, :size]


def _kept_for_splash(a: jax.Array) -> jax.Array:
    """[B, T, ..., d] -> [B, H, T, d], named as it is stored for the kernel: positions last."""
    stored = jnp.moveaxis(a.reshape(*a.shape[:2], -1, a.shape[-1]), 1, 3)
    # The gradient has this order as well: the kernel gives it with the channels last, and there a
    # rotation would be undone on arrays of which three quarters are padding.
    stored = layout.with_layout_constraint(stored, layout.Layout((0, 1, 2, 3)))
    return checkpoint_name(stored, QKV).swapaxes(2, 3)


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None,
    segments: jax.Array | None,
    causal: bool,
) -> jax.Array:
    """cuDNN's fused attention, on each device for its own rows and heads.

    Args:
        q: [B, T, K, G, d], not scaled.
        k, v: [B, T, K, d].
        lengths: int32 [B], real positions of each row, or None.
        segments: int32 [B, T]; a position sees its own segment. None: one. Not together with
            lengths. Where attention is causal they ascend, then come zeros: a row in which they do
            not, and any row with more than `CUDNN_SEGMENTS`, is NaN: cuDNN would see something
            else.
        causal: position q sees k <= q only.

    Returns:
        [B, T, K, G, d] in q's dtype.
    """

    def here(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        lengths: jax.Array | None,
        segments: jax.Array | None,
    ) -> jax.Array:
        b, t, kv_heads, groups, d = q.shape
        heads = q.reshape(b, t, kv_heads * groups, d)
        if segments is not None:
            return _cudnn_packed(heads, k, v, segments, causal).reshape(q.shape)
        mixed = jax.nn.dot_product_attention(
            heads,
            k,
            v,
            is_causal=causal,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
        return mixed.reshape(q.shape)

    names = ("batch", None, "heads", None, None)
    mixed = partition.on_each_device(
        here,
        (q, k, v, lengths, segments),
        (names, names[:4], names[:4], names[:1], names[:2]),
        names,
    )
    return checkpoint_name(mixed, RESIDUALS)


def packed_offsets(segments: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the runs of equal ids of each row begin, and how long they are.

    Args:
        segments: int32 [B, T].
        most: runs that there is room for, M.

    Returns:
        int32 [B, M + 1] first positions and int32 [B, M] lengths, -1 behind the last run; bool [B],
        whether there is room, and the ids ascend up to the zeros at the end.
    """
    size = segments.shape[1]
    index = jnp.arange(size, dtype=jnp.int32)
    before = jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    new = segments != before
    first = jnp.sort(jnp.where(new, index, size), axis=1)
    first = jnp.pad(first, ((0, 0), (0, max(0, most + 1 - size))), constant_values=size)
    first = first[:, : most + 1]
    lengths = jnp.where(first[:, :-1] < size, first[:, 1:] - first[:, :-1], -1)
    ordered = ((segments >= before) | (segments == 0)).all(1)
    padding_last = ~((before[:, 1:] == 0) & (segments[:, 1:] != 0)).any(1)
    good = (first[:, -1] == size) & ordered & padding_last
    return jnp.where(first < size, first, -1), lengths, good


def by_segment(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order in which each row's segments ascend, padding last, and the way back.

    Args:
        segments: int32 [B, T], 0 padding.

    Returns:
        int32 [B, T] twice: the position that goes to each place, and the place of each position.
    """
    last = jnp.iinfo(segments.dtype).max
    order = jnp.argsort(jnp.where(segments == 0, last, segments), axis=1, stable=True)
    return order, jnp.argsort(order, axis=1)


def _cudnn_packed(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, causal: bool
) -> jax.Array:
    """Rows of several segments [B, T, H, d], by the offsets of the segments."""
    if not causal:
        # Without an order in time a segment's positions may stand anywhere: pictures whose windows
        # are filled up have padding inside. cuDNN wants each segment in one piece.
        order, back = by_segment(segments)
        move = lambda a, to: jnp.take_along_axis(a, to[:, :, None, None], axis=1)
        segments = jnp.take_along_axis(segments, order, axis=1)
        pieces = (move(a, order) for a in (q, k, v))
        return move(_cudnn_runs(*pieces, segments, causal), back)
    return _cudnn_runs(q, k, v, segments, causal)


def _cudnn_runs(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, causal: bool
) -> jax.Array:
    """`_cudnn_packed` with the segments in order."""
    # jax.nn has no argument for them.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    offsets, lengths, good = packed_offsets(segments, CUDNN_SEGMENTS)
    mixed = dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=1.0 / math.sqrt(q.shape[-1]),
        mask_type=MaskType.PADDING_CAUSAL if causal else MaskType.PADDING,
    )
    return jnp.where(good[:, None, None, None], mixed, jnp.nan)
