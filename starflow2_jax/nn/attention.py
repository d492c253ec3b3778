"""Grouped-query attention behind one function and one description of who sees whom.

Letters: B rows, T queries of this call, M cache slots, K kv heads, G query heads per kv head, d.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from starflow2_jax.nn import attention_kernels, partition
from starflow2_jax.nn.layers import at_least_float32

# Causal attention of at least this many positions is done for parts of the queries, each with the
# keys up to its end: parts of so many queries, but so few and so many of them.
CAUSAL_SIZE = 64
CAUSAL_PART = 64
CAUSAL_PARTS = (4, 8)
# On CPU, rows whose scores are more than so many bytes together are done one after another: what a
# processor's cache holds is not written to memory and read again.
APART_BYTES = 2**24
# Rows of a cache that several positions are written to one after another: prompts read together.
FEW_ROWS = 8
# On an accelerator, attention of at least this many positions is its own kernel's.
KERNEL_SIZE = 128
# Up to so many positions, plain products do what the kernel has no form for.
PLAIN_SIZE = 4096
TPU_LANES = 128
_KERNELS = {"tpu": "splash", "cuda": "cudnn"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Who sees whom among the T positions of one call.

    Attributes:
        causal: position q sees k <= q only.
        segments: int32 [B, T] or None; a position sees its own segment only. 0 is padding, which
            nothing but padding sees.
        lengths: int32 [B] or None; only the first `lengths` positions of a row exist. The others
            are seen by none and are not written to a cache; 0 makes a row wait.
        temperature: [B] or scalar, or None for 1; divides the scores.
        window: positions come in windows of this many and see their own window only; 0: all of
            them. With `segments` or alone.
        whole: bool [] or None; where true, `window` is as if 0.
    """

    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int = dataclasses.field(default=0, metadata={"static": True})
    segments: jax.Array | None = None
    lengths: jax.Array | None = None
    temperature: jax.Array | None = None
    whole: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
    """One layer's cached keys and values [B, K, M, d]; the first length, [B], are real.

    Or folded, see `cache_fold`: [B, K / F, M, F d].
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """One layer's cache that is written before it is read: `extended`, then `attend_written`.

    Attributes:
        k: keys [B, K, d, M], as their product with the queries reads them.
        v: values [B, K, M, d], as their product with the weights does.
        length: int32 [] or, one for each row, [B]: so many slots are real.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array

    def extended(self, k: jax.Array, v: jax.Array, lengths: jax.Array | None = None) -> "Slots":
        """With the first `lengths`, [B], of k, v [B, T, K, d] behind the length; None: all of them.

        `length` stays. Beyond the last slot nothing is written where rows have lengths of their
        own; where they have one, the caller has seen to it that there is room.
        """
        k = k.transpose(0, 2, 3, 1).astype(self.k.dtype)  # [B, K, d, T]
        v = as_stored(v.transpose(0, 2, 1, 3), self.v.dtype)  # [B, K, T, d]
        rows, size = len(k), k.shape[3]
        if self.length.ndim == 0:
            if lengths is not None:
                raise ValueError("rows of one length all grow by as much")
            put = jax.lax.dynamic_update_slice_in_dim
            return Slots(
                put(self.k, k, self.length, 3), put(self.v, v, self.length, 2), self.length
            )
        if 1 < size <= self.k.shape[3] and rows <= FEW_ROWS:
            put = functools.partial(_put_by_rows, start=self.length, lengths=lengths)
            return Slots(put(self.k, k, axis=3), put(self.v, v, axis=2), self.length)
        step = jnp.arange(size)
        slot = self.length[:, None] + step  # [B, T]
        if lengths is not None:
            slot = jnp.where(step < lengths[:, None], slot, self.k.shape[3])
        row = jnp.arange(rows)[:, None]
        return Slots(
            self.k.at[row, :, :, slot].set(k.transpose(0, 3, 1, 2), mode="drop"),
            self.v.at[row, :, slot].set(v.transpose(0, 2, 1, 3), mode="drop"),
            self.length,
        )


def _put_by_rows(
    stored: jax.Array, new: jax.Array, start: jax.Array, lengths: jax.Array | None, axis: int
) -> jax.Array:
    """The first `lengths`, [B], of `new` put behind `start`, [B], along an axis, row after row.

    What lies beyond the end of `stored` is dropped. A few copies, where a scatter of several places
    goes number by number on a CPU.
    """
    size, slots = new.shape[axis], stored.shape[axis]
    for n in range(len(new)):
        begin = jnp.minimum(start[n], slots - size)
        late = start[n] - begin  # only where not all of it fits
        mine = jnp.roll(new[n : n + 1], late, axis)
        place = jnp.arange(size) - late
        kept = (place >= 0) & (place < (size if lengths is None else lengths[n]))
        kept = kept.reshape([-1 if a == axis else 1 for a in range(new.ndim)])
        at = {0: np.int32(n), axis: begin}
        where = [at.get(a, np.int32(0)) for a in range(new.ndim)]
        old = jax.lax.dynamic_slice(stored, where, mine.shape)
        stored = jax.lax.dynamic_update_slice(stored, jnp.where(kept, mine, old), where)
    return stored


def as_stored(v: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Values as a cache keeps them: finite ones, 0 in place of the others.

    A slot that is not seen has the weight 0, and 0 times what is not finite would still be seen: by
    whoever has the row next. Those that do see the slot have the key's score to tell.
    """
    v = v.astype(dtype)
    return jnp.where(jnp.isfinite(v), v, 0)


def cache_fold(kv_heads: int, head_dim: int) -> int:
    """F, kv heads that lie side by side in a cache: TPUs keep last axes of 128, and fill up others.

    Narrow heads would take twice the memory, and twice the time to read.
    """
    fold = TPU_LANES // head_dim if TPU_LANES % head_dim == 0 else 1
    return fold if partition.platform() == "tpu" and kv_heads % fold == 0 else 1


def _folded(
    q: jax.Array, k: jax.Array, v: jax.Array, fold: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same attention with F kv heads as one: each of its queries is zero beside its own head.

    Args:
        q: [B, T, K, G, d].
        k, v: [B, T, K, d].
        fold: F.

    Returns:
        [B, T, K / F, F G, F d] and twice [B, T, K / F, F d].
    """
    b, t, kv_heads, groups, d = q.shape
    own = jnp.eye(fold, dtype=q.dtype)
    q = q.reshape(b, t, kv_heads // fold, fold, groups, 1, d) * own[:, None, :, None]
    wide = lambda a: a.reshape(*a.shape[:2], kv_heads // fold, fold * d)
    return q.reshape(b, t, kv_heads // fold, fold * groups, fold * d), wide(k), wide(v)


def _unfolded(mixed: jax.Array, fold: int) -> jax.Array:
    """[B, T, K / F, F G, F d] of folded heads -> [B, T, K, G, d]."""
    b, t, kv_heads, groups, d = mixed.shape
    apart = mixed.reshape(b, t, kv_heads, fold, groups // fold, fold, d // fold)
    own = jnp.stack([apart[:, :, :, n, :, n] for n in range(fold)], axis=3)
    return own.reshape(b, t, kv_heads * fold, groups // fold, d // fold)


def _visible(spec: AttentionSpec, rows: int, size: int) -> jax.Array:
    """Mask [B or 1, T, T] of the spec: query, key."""
    index = jnp.arange(size)
    mask = jnp.ones((1, size, size), bool)
    if spec.causal:
        mask = index[:, None] >= index[None, :]
        mask = mask[None]
    if spec.segments is not None:
        mask = mask & (spec.segments[:, :, None] == spec.segments[:, None, :])
    if spec.lengths is not None:
        # A position that does not exist still sees itself: its softmax stays finite.
        exists = index[None, :] < spec.lengths[:, None]
        mask = mask & (exists[:, None, :] | (index[:, None] == index[None, :])[None])
    return mask


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, past: Past | None = None
) -> jax.Array:
    """softmax(q k^T / (sqrt(d) temperature)) v over the past, then over this call's own positions.

    Args:
        q: [B, T, K, G, d].
        k, v: [B, T, K, d].
        spec: visibility among the T positions; every position also sees the whole past.
        past: cached keys and values, or None.

    Returns:
        [B, T, K, G, d] in q's dtype. Scores and softmax are in at least float32.

    Raises:
        ValueError: segments or windows together with a past, which holds one segment by
            construction; windows together with lengths or a temperature, or that T does not fill.
    """
    if spec.window:
        return _attend_in_windows(q, k, v, spec, past)
    if past is not None and spec.segments is not None:
        raise ValueError("a cached row is one segment: pass lengths, not segments, with a cache")
    kernel = None if past is not None else _kernel(q)
    if kernel == "splash":
        return _attend_by_splash(q, k, v, spec)
    q, k, v = (checkpoint_name(a, attention_kernels.QKV) for a in (q, k, v))
    if kernel == "cudnn":
        return _attend_by_cudnn(q, k, v, spec)
    # Of folded heads, the scores are those of the narrow ones: scale first.
    q, fold = _scaled(q, spec), 1 if past is None else past.k.shape[-1] // q.shape[-1]
    if fold > 1:
        q, k, v = _folded(q, k, v, fold)
    if past is None:
        mixed = _attend_in_parts(q, k, v, spec)
    else:
        mixed = _attend_with_past(q, k, v, spec, past)
    mixed = mixed if fold == 1 else _unfolded(mixed, fold)
    return partition.constrain(mixed, ("batch", "length", "heads", None, None))


def _kernel(q: jax.Array) -> str | None:
    """The kernel for queries without a past: "splash" or "cudnn"; None: plain products.

    A kernel with no form for these queries is chosen for long rows all the same, and says so.
    """
    size, platform = q.shape[1], partition.platform()
    if size < KERNEL_SIZE or platform not in _KERNELS:
        return None
    if platform == "tpu":
        fits = q.shape[-1] <= max(attention_kernels.SPLASH_HEAD_DIMS)
    else:
        fits = q.dtype in attention_kernels.CUDNN_DTYPES
    fits = fits and partition.axis_extent("length") == 1
    return _KERNELS[platform] if fits or size > PLAIN_SIZE else None


def check_length(size: int) -> None:
    """Checks that rows of this many positions can be cut as mesh and rules in context cut them.

    Raises:
        ValueError: they are too long for that.
    """
    shards = partition.axis_extent("length")
    if size > PLAIN_SIZE and shards > 1 and partition.platform() in _KERNELS:
        raise ValueError(
            f"attention over {size} positions wants whole rows on a device, not {shards} parts of "
            f"them: sequence=1, or rows of at most {PLAIN_SIZE}"
        )


def weights(q: jax.Array, k: jax.Array, spec: AttentionSpec) -> jax.Array:
    """What `attend` mixes the values with, to be looked at: [B, K, G, T, T], query, key.

    In at least float32, and all of them at once. Arguments as of `attend`; no windows.
    """
    wide = at_least_float32(q.dtype)
    scores = jnp.einsum("btkgd,bskd->bkgts", _scaled(q, spec), k, preferred_element_type=wide)
    visible = _visible(spec, *q.shape[:2])[:, None, None]
    return jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(wide).min), axis=-1)


def _attend_with_past(
    q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, past: Past
) -> jax.Array:
    """`attend` with a past, by plain products, with all scores at once; q is scaled."""
    rows, size = q.shape[:2]
    wide = at_least_float32(q.dtype)
    smallest = jnp.finfo(wide).min
    visible = _visible(spec, rows, size)[:, None, None]
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=wide)
    own = jnp.where(visible, scores, smallest)
    slots = past.k.shape[2]
    filled = jnp.arange(slots)[None, :] < past.length[:, None]  # [B, M]
    product = jnp.einsum(
        "btkgd,bksd->bkgts", q, past.k.astype(q.dtype), preferred_element_type=wide
    )
    before = jnp.where(filled[:, None, None, None], product, smallest)
    weights = jax.nn.softmax(jnp.concatenate([before, own], axis=-1), axis=-1).astype(v.dtype)
    seen_before = jnp.einsum("bkgts,bksd->btkgd", weights[..., :slots], past.v.astype(v.dtype))
    return seen_before + jnp.einsum("bkgts,bskd->btkgd", weights[..., slots:], v)


def _attend_in_parts(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> jax.Array:
    """`attend` without a past by plain products; q is scaled."""
    rows, size, kv_heads, groups = q.shape[:4]
    wide = at_least_float32(q.dtype)
    if rows > 1 and _held_apart(rows * kv_heads * groups * size**2 * jnp.dtype(wide).itemsize):

        def alone(row: tuple) -> jax.Array:
            q, k, v, segments, lengths = jax.tree.map(lambda a: a[None], row)
            own = AttentionSpec(causal=spec.causal, segments=segments, lengths=lengths)
            return _attend_in_parts(q, k, v, own)[0]

        return jax.lax.map(alone, (q, k, v, spec.segments, spec.lengths))
    visible = _visible(spec, rows, size)[:, None, None]
    # In the order of the products, once for all parts.
    q = q.transpose(0, 2, 3, 1, 4)  # [B, K, G, T, d]
    k = k.transpose(0, 2, 3, 1)  # [B, K, d, T]
    v = v.transpose(0, 2, 1, 3)  # [B, K, T, d]

    def queries(first: int, end: int, keys: int) -> jax.Array:
        scores = jnp.einsum(
            "bkgtd,bkds->bkgts", q[:, :, :, first:end], k[..., :keys], preferred_element_type=wide
        )
        scores = jnp.where(visible[..., first:end, :keys], scores, jnp.finfo(wide).min)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        mixed = jnp.einsum(
            "bkgts,bksd->bkgtd",
            weights.astype(v.dtype),
            v[:, :, :keys],
            preferred_element_type=wide,
        )
        # Normalised last: d numbers a query in place of one for each key.
        return (mixed / weights.sum(-1, keepdims=True)).astype(v.dtype)

    if not spec.causal or size < CAUSAL_SIZE or partition.axis_extent("length") > 1:
        mixed = queries(0, size, size)
    else:
        # A part of the queries needs no key behind it: with four parts, 5/8 of the work.
        least, most = CAUSAL_PARTS
        count = min(max(size // CAUSAL_PART, least), most)
        edges = [size * part // count for part in range(count + 1)]
        parts = [queries(first, end, end) for first, end in itertools.pairwise(edges)]
        mixed = jnp.concatenate(parts, axis=3)
    return mixed.transpose(0, 3, 1, 2, 4)


def _held_apart(score_bytes: int) -> bool:
    """Whether rows with so many scores together are better done one after another."""
    cut = partition.axis_extent("batch") > 1
    return partition.platform() == "cpu" and not cut and score_bytes > APART_BYTES


def _attend_by_splash(
    q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, interpret: bool = False
) -> jax.Array:
    """`attend` without a past by TPU's splash kernel."""
    kernels = attention_kernels
    # Narrower heads are filled up with zeros, which change no score and give zeros.
    wide = next((d for d in kernels.SPLASH_HEAD_DIMS if d >= q.shape[-1]), None)
    if wide is None:
        raise ValueError(
            f"TPU attention of more than {PLAIN_SIZE} positions has heads of at most 128 dims, not "
            f"{q.shape[-1]}"
        )
    check_length(q.shape[1])
    fill = lambda a: jnp.pad(a, ((0, 0),) * (a.ndim - 1) + ((0, wide - a.shape[-1]),))
    segments = spec.segments
    if spec.lengths is not None:
        # What does not exist is a segment of its own: it is seen by none that does.
        exists = jnp.arange(q.shape[1])[None] < spec.lengths[:, None]
        segments = jnp.where(exists, 1 if segments is None else segments, -2)
    mixed = kernels.splash(
        fill(_scaled(q, spec)), fill(k), fill(v), segments, spec.causal, interpret
    )
    return mixed[..., : q.shape[-1]]


def _attend_by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> jax.Array:
    """`attend` without a past by cuDNN."""
    if spec.segments is not None and spec.lengths is not None:
        raise ValueError("cuDNN attention takes segments or lengths, not both")
    if q.dtype not in attention_kernels.CUDNN_DTYPES:
        raise ValueError(
            f"cuDNN attention of more than {PLAIN_SIZE} positions is in bfloat16 or float16, not "
            f"{q.dtype}"
        )
    check_length(q.shape[1])
    q = q if spec.temperature is None else _scaled(q, spec) * math.sqrt(q.shape[-1])
    return attention_kernels.cudnn(q, k, v, spec.lengths, spec.segments, spec.causal)


def _scaled(q: jax.Array, spec: AttentionSpec) -> jax.Array:
    q = q * (1.0 / math.sqrt(q.shape[-1]))
    if spec.temperature is None:
        return q
    temperature = jnp.asarray(spec.temperature, at_least_float32(q.dtype)).reshape(-1, 1, 1, 1, 1)
    return (q / temperature).astype(q.dtype)


def attend_written(q: jax.Array, slots: Slots, spec: AttentionSpec) -> jax.Array:
    """`attend` for T positions whose own keys and values are in the slots behind the length.

    Args:
        q: [B, T, K, G, d].
        slots: see `Slots.extended`.
        spec: causal, without segments.

    Returns:
        [B, T, K, G, d] in q's dtype.

    Raises:
        ValueError: another spec.
    """
    if not spec.causal or spec.segments is not None:
        raise ValueError("rows with a cache are causal, without segments")
    wide = at_least_float32(q.dtype)
    q = _scaled(q, spec)
    last = slots.length[..., None] + jnp.arange(q.shape[1])  # [T] or [B, T]
    seen = jnp.arange(slots.k.shape[3]) <= last[..., None]  # [T, M] or [B, T, M]
    if seen.ndim == 3:
        seen = seen[:, None, None]
    k, v = slots.k.astype(q.dtype), slots.v.astype(q.dtype)

    def mixed(q: jax.Array) -> jax.Array:
        scores = jnp.einsum("btkgd,bkds->bkgts", q, k, preferred_element_type=wide)
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(wide).min), axis=-1)
        return jnp.einsum("bkgts,bksd->btkgd", weights.astype(q.dtype), v)

    groups = q.shape[3]
    if q.shape[1] > 1 or groups == 1:
        return mixed(q)
    # On a CPU several products with a vector are faster than one with a matrix of a few columns.
    return jnp.concatenate([mixed(q[:, :, :, g : g + 1]) for g in range(groups)], axis=3)


def _attend_in_windows(
    q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, past: Past | None
) -> jax.Array:
    """`attend` with every window a row of its own: its cost grows with T, not with T^2."""
    size, window = q.shape[1], spec.window
    if past is not None or spec.lengths is not None or spec.temperature is not None:
        raise ValueError("windows go without a cache, lengths and a temperature")
    if size % window:
        raise ValueError(f"{size} positions are not whole windows of {window}")
    unlimited = dataclasses.replace(spec, window=0, whole=None)

    def split(a: jax.Array) -> jax.Array:
        return a.reshape(-1, window, *a.shape[2:])

    def inside() -> jax.Array:
        own = None if spec.segments is None else split(spec.segments)
        limited = dataclasses.replace(unlimited, segments=own)
        return attend(split(q), split(k), split(v), limited).reshape(q.shape)

    if spec.whole is None:
        return inside()
    return jax.lax.cond(spec.whole, lambda: attend(q, k, v, unlimited), inside)
