"""The one transformer stack: scanned layers, with or without a key/value cache.

The language model and its vision tower, the deep flow block and every shallow block, DINOv2 and
the FAE's decoders are configurations of it.
Letters: B rows, T positions, D width, H heads, K kv heads, G = H / K, d head width, L layers,
M cache slots.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from starflow2_jax.nn import attention, attention_kernels, layers, partition, rope

Cache = dict[str, Any]

# Stacks of at most this size are unrolled to sample from them: their weights are then there twice.
UNROLLED_BYTES = 2**30

# What the backward pass needs of a layer besides its input, but for what is elementwise.
PRODUCTS = (attention_kernels.QKV, attention_kernels.RESIDUALS, "attended", *layers.MLP_PRODUCTS)

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "products": jax.checkpoint_policies.save_only_these_names(*PRODUCTS),
}
Remat = Literal["none", "dots", "products", "full"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and kind of a stack.

    Attributes:
        norm: "layer" (LayerNorm), "rms" (gain = weight).
        mlp: "gelu" (exact, two matrices), "quick_gelu" (x sigmoid(1.702 x) in its place), "swiglu"
            (three).
        final_norm: none, "layer", "rms" (gain = weight) or "rms_unit_offset" (gain = 1 + weight).
        remat: what the backward pass recomputes: "none"; "dots", all but matrix products;
            "products", all but the matrix products and the attention that it needs (weights are
            gathered again, too); "full", each layer from its input.
        window: positions per window of local attention; 0: no layer has any.
        whole_layers: layers that see past the windows.
        qk_norm: queries and keys have an RMSNorm over each head, before the rotation.
        layer_scale: start of a gain on what each sublayer adds; 0: there is none.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm: Literal["layer", "rms"]
    mlp: Literal["gelu", "quick_gelu", "swiglu"]
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    norm_epsilon: float
    final_norm: Literal["none", "layer", "rms", "rms_unit_offset"] = "none"
    final_norm_epsilon: float = 1e-6
    remat: Remat = "none"
    window: int = 0
    whole_layers: tuple[int, ...] = ()
    qk_norm: bool = False
    layer_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} kv heads evenly")


_MLPS: dict[str, Callable[..., nnx.Module]] = {
    "gelu": layers.GeluMLP,
    "quick_gelu": functools.partial(layers.GeluMLP, quick=True),
    "swiglu": layers.SwiGLU,
}


class Attention(nnx.Module):
    """Self-attention; `qkv` channels are grouped by kv head: its G queries, its k, its v."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, stack: tuple[int, ...]) -> None:
        self.config = config
        groups = config.heads // config.kv_heads
        self.qkv = layers.Linear(
            config.width,
            config.kv_heads * (groups + 2) * config.head_dim,
            rngs=rngs,
            logical=("embed", "heads"),
            bias=config.qkv_bias,
            stack=stack,
        )
        self.out = layers.Linear(
            config.heads * config.head_dim,
            config.width,
            rngs=rngs,
            logical=("heads", "embed"),
            bias=config.out_bias,
            stack=stack,
        )
        self.q_norm, self.k_norm = (
            nnx.data(_head_norm(config, rngs, stack) if config.qk_norm else None) for _ in "qk"
        )

    def project(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, T, D] -> rotated queries [B, T, K, G, d] and keys, and values, [B, T, K, d]."""
        c = self.config
        groups = c.heads // c.kv_heads
        qkv = self.qkv(x).reshape(*x.shape[:2], c.kv_heads, groups + 2, c.head_dim)
        qkv = partition.constrain(qkv, ("batch", "length", "heads", None, None))
        q, k, v = qkv[..., :groups, :], qkv[..., groups, :], qkv[..., groups + 1, :]
        if self.q_norm is not None:
            # What the norms' gradients need; without norms, attention has named all there is.
            q, k = (checkpoint_name(a, attention_kernels.QKV) for a in (q, k))
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
        return q, k, v

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array] | None,
        spec: attention.AttentionSpec,
        past: attention.Past | attention.Slots | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """[B, T, D] -> [B, T, D], and this call's rotated keys and values [B, T, K, d].

        With `Slots`: theirs, the new ones among them.
        """
        q, k, v = self.project(x, rotation)
        # Under a sharded length every query needs every key of its row.
        k = partition.constrain(k, ("batch", None, "heads", None))
        v = partition.constrain(v, ("batch", None, "heads", None))
        if isinstance(past, attention.Slots):
            past = past.extended(k, v, spec.lengths)
            k, v = past.k, past.v
            mixed = attention.attend_written(q, past, spec)
        else:
            mixed = attention.attend(q, k, v, spec, past)  # [B, T, K, G, d]
        return self.out(mixed.reshape(*x.shape[:2], -1)), (k, v)


def _head_norm(config: DecoderConfig, rngs: nnx.Rngs, stack: tuple[int, ...]) -> layers.RMSNorm:
    return layers.RMSNorm(
        config.head_dim, rngs=rngs, epsilon=config.norm_epsilon, stack=stack, logical=(None,)
    )


class DecoderLayer(nnx.Module):
    """h += Attention(norm(h)); h += MLP(norm(h)); with `layer_scale` times a gain each."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, stack: tuple[int, ...]) -> None:
        norm = layers.LayerNorm if config.norm == "layer" else layers.RMSNorm
        mlp = _MLPS[config.mlp]
        norm_args: dict[str, Any] = {
            "rngs": rngs,
            "epsilon": config.norm_epsilon,
            "stack": stack,
        }
        self.attention_norm = norm(config.width, **norm_args)
        self.attention = Attention(config, rngs=rngs, stack=stack)
        self.mlp_norm = norm(config.width, **norm_args)
        self.mlp = mlp(config.width, config.mlp_width, rngs=rngs, bias=config.mlp_bias, stack=stack)
        self.attention_scale, self.mlp_scale = (
            nnx.data(
                layers.LayerScale(config.width, start=config.layer_scale, stack=stack)
                if config.layer_scale
                else None
            )
            for _ in range(2)
        )

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array] | None,
        spec: attention.AttentionSpec,
        past: attention.Past | attention.Slots | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """[B, T, D] -> [B, T, D], and this call's rotated keys and values [B, T, K, d].

        With `Slots`: theirs, the new ones among them.
        """
        mixed, kv = self.attention(self.attention_norm(x), rotation, spec, past)
        mixed = mixed if self.attention_scale is None else self.attention_scale(mixed)
        x = checkpoint_name(x + mixed, "attended")
        hidden = self.mlp(self.mlp_norm(x))
        x = x + (hidden if self.mlp_scale is None else self.mlp_scale(hidden))
        return partition.constrain(x, ("batch", "length", "embed_activation")), kv


def _by_rows(layer: DecoderLayer) -> DecoderLayer:
    for part in (layer.attention, layer.mlp):
        for name, child in list(vars(part).items()):
            if isinstance(child, layers.Linear) and child.kernel.nbytes >= layers.BY_ROWS_BYTES:
                setattr(part, name, layers.LinearByRows(child))
    return layer


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache of `slots` positions: k, v [L, B, K, M, d] and length int32 [B].

    The order in which attention's products read it: in another, TPUs copy a layer's slots first.

    One of no slots is the start of a prompt: the call it is given to attends to nothing but its own
    T positions, and returns a cache of T slots. On TPUs, narrow heads are folded: see
    `attention.cache_fold`.
    """
    fold = attention.cache_fold(config.kv_heads, config.head_dim)
    shape = (config.layers, rows, config.kv_heads // fold, slots, config.head_dim * fold)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "length": jnp.zeros((rows,), jnp.int32),
    }


def _append(cache: Cache, k: jax.Array, v: jax.Array, lengths: jax.Array | None) -> Cache:
    """Writes k, v [L, B, T, K, d] behind each row's own length, but for missing positions.

    A write beyond the last slot is dropped as well: callers refuse rows that outgrow their cache.
    """
    rows, size = k.shape[1], k.shape[2]
    slots = slots_of(cache)
    taken = jnp.full((rows,), size, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    heads, width = cache["k"].shape[2], cache["k"].shape[4]  # folded, maybe
    k, v = (new.reshape(*new.shape[:3], heads, width).swapaxes(2, 3) for new in (k, v))
    v = attention.as_stored(v, cache["v"].dtype)
    if not slots:
        return {"k": k.astype(cache["k"].dtype), "v": v, "length": taken}
    offset = jnp.arange(size, dtype=jnp.int32)
    slot = jnp.where(
        offset[None] < taken[:, None], cache["length"][:, None] + offset[None], slots
    )  # [B, T]
    layer, row, head = jnp.ogrid[: len(k), :rows, :heads]
    # Every index is given, even where it is all of an axis: TPUs would store a piece that spans
    # other axes than the last with these innermost, and copy the whole cache to read it.
    place = (layer[..., None], row[..., None], head[..., None], slot[None, :, None])

    def write(store: jax.Array, new: jax.Array) -> jax.Array:
        return store.at[place].set(new.astype(store.dtype), mode="drop")

    return {
        "k": write(cache["k"], k),
        "v": write(cache["v"], v),
        "length": cache["length"] + taken,
    }


def slots_of(cache: Cache) -> int:
    """M, of a cache of either form."""
    return (cache["k"][0] if isinstance(cache["k"], tuple) else cache["k"]).shape[3]


def with_slots(cache: Cache, slots: int) -> Cache:
    """The cache, grown to `slots` slots per row."""
    more = max(0, slots - slots_of(cache))
    grow = lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, more), (0, 0)))
    return {"k": grow(cache["k"]), "v": grow(cache["v"]), "length": cache["length"]}


def apart(cache: Cache, slots: int, head_dim: int) -> Cache:
    """The form of a cache for `Decoder.unrolled`: arrays of its own for each layer.

    k: [B, K, d, M] and v: [B, K, M, d] of each. A layer writes its own in place and then reads them
    (`attention.Slots`).

    Args:
        cache: of either form.
        slots: M of the result, at least every row's length.
        head_dim: d; the given cache may be folded, see `attention.cache_fold`.
    """

    def resized(store: jax.Array, axis: int) -> jax.Array:
        size = store.shape[axis]
        if slots <= size:
            return jax.lax.slice_in_dim(store, 0, slots, axis=axis)
        return jnp.pad(store, [(0, slots - size if n == axis else 0) for n in range(4)])

    k, v = cache["k"], cache["v"]
    if not isinstance(k, tuple):

        def single(a: jax.Array) -> jax.Array:
            a = a.reshape(*a.shape[:4], -1, head_dim).swapaxes(3, 4)
            return a.reshape(*a.shape[:2], -1, *a.shape[4:])  # [L, B, K, M, d]

        k, v = tuple(single(k).swapaxes(3, 4)), tuple(single(v))
    return {
        "k": tuple(resized(store, 3) for store in k),
        "v": tuple(resized(store, 2) for store in v),
        "length": cache["length"],
    }


def in_step(cache: Cache, slots: int, head_dim: int) -> Cache:
    """`apart`, for rows that have the same length and keep it: one length, int32 []."""
    length = cache["length"]
    return apart(cache, slots, head_dim) | {"length": length if length.ndim == 0 else length[0]}


def _looped(body: Callable, x: jax.Array, xs: tuple) -> tuple[jax.Array, list]:
    """`jax.lax.scan`, written out, over a list of layers; what it gives is not stacked."""
    layer_list, *stacks = xs
    outputs = []
    for n, layer in enumerate(layer_list):
        x, y = body(x, (layer, *(None if s is None else s[n] for s in stacks)))
        outputs.append(y)
    return x, outputs


def _final_norm(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Module | None:
    if config.final_norm == "none":
        return None
    width, epsilon = config.width, config.final_norm_epsilon
    if config.final_norm == "layer":
        return layers.LayerNorm(width, rngs=rngs, epsilon=epsilon)
    unit_offset = config.final_norm == "rms_unit_offset"
    return layers.RMSNorm(width, rngs=rngs, epsilon=epsilon, unit_offset=unit_offset)


class Decoder(nnx.Module):
    """L pre-norm layers as one scan, then the final norm if there is one."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.layers = DecoderLayer(config, rngs=rngs, stack=(config.layers,))
        self.final_norm = nnx.data(_final_norm(config, rngs))

    def unrolled(self) -> "Decoder":
        """The same stack, its layers one after another in place of a scan; not to be trained.

        A scan copies each layer's weights before it uses them, in every step of a sampler. Taken
        out of the stack before the sampler's loop they are read where they lie; on CPU large ones
        are laid out for products with few vectors, too.
        """
        graphdef, state = nnx.split(self)
        stack = nnx.merge(graphdef, state)

        def layer(n: int) -> DecoderLayer:
            apart = jax.tree.map(lambda leaf: leaf[n], self.layers)
            return _by_rows(apart) if layers.rows_are_faster() else apart

        stack.layers = nnx.List([layer(n) for n in range(self.config.layers)])
        return stack

    def held(self, cache: Cache, slots: int) -> Cache:
        """The cache with at least `slots` slots, in the form in which this stack samples fastest.

        Unrolled layers have their slots `apart`; a scan reads the stacked ones and is written to
        once, after it.
        """
        if not isinstance(self.layers, nnx.List):
            return with_slots(cache, slots)
        return apart(cache, max(slots, slots_of(cache)), self.config.head_dim)

    @property
    def small(self) -> bool:
        """Whether the stack may be unrolled."""
        leaves = jax.tree.leaves(self.layers)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) <= UNROLLED_BYTES

    def attention_weights(
        self, x: jax.Array, angles: jax.Array | None, spec: attention.AttentionSpec
    ) -> jax.Array:
        """Who attends to whom, mean over heads: [L, B, T, T], query, key; at least float32.

        Args:
            x, angles, spec: see `__call__`; no windows. All scores of a layer are held at once.
        """
        rotation = None if angles is None else (jnp.cos(angles), jnp.sin(angles))

        def body(x: jax.Array, layer: DecoderLayer) -> tuple[jax.Array, jax.Array]:
            q, k, _ = layer.attention.project(layer.attention_norm(x), rotation)
            weights = attention.weights(q, k, spec).mean((1, 2))
            return layer(x, rotation, spec, None)[0], weights

        return jax.lax.scan(body, x, self.layers)[1]

    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array | None,
        spec: attention.AttentionSpec,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the stack over T positions, after those in the cache if one is given.

        Args:
            x: [B, T, D]; its dtype is the compute dtype.
            angles: rotary angles [B or 1, T, d/2] in at least float32, or None.
            spec: who sees whom among the T positions.
            cache: see `empty_cache`; the layer scan only reads it, the new keys and values are
                appended once after it. Or, for `unrolled` layers, see `apart`.

        Returns:
            [B, T, D] and the grown cache (None if none was given).
        """
        rotation = None if angles is None else (jnp.cos(angles), jnp.sin(angles))
        x = partition.constrain(x, ("batch", "length", "embed_activation"))

        in_place = cache is not None and isinstance(cache["k"], tuple)

        def body(x: jax.Array, layer_and_past: tuple) -> tuple:
            layer, k, v, whole = layer_and_past
            fresh = cache is None or (not in_place and not slots_of(cache))
            form = attention.Slots if in_place else attention.Past
            past = None if fresh else form(k, v, cache["length"])
            here = spec
            if whole is not None:
                here = dataclasses.replace(spec, window=self.config.window, whole=whole)
            x, kv = layer(x, rotation, here, past)
            return x, None if cache is None else kv

        if self.config.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        k, v = (None, None) if cache is None else (cache["k"], cache["v"])
        whole = None
        if self.config.window:
            whole = jnp.array([i in self.config.whole_layers for i in range(self.config.layers)])
        xs = (self.layers, k, v, whole)
        if isinstance(self.layers, nnx.List):
            x, each = _looped(body, x, xs)
            gather = (lambda *ys: ys) if in_place else (lambda *ys: jnp.stack(ys))
            new = jax.tree.map(gather, *each)
        else:
            x, new = jax.lax.scan(body, x, xs)
        if self.final_norm is not None:
            x = self.final_norm(x)
        if cache is None:
            return x, None
        if in_place:
            grown = x.shape[1] if spec.lengths is None else spec.lengths
            return x, {"k": new[0], "v": new[1], "length": cache["length"] + grown}
        return x, _append(cache, *new, spec.lengths)
