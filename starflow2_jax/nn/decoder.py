"""The one transformer stack: scanned layers, with or without a key/value cache.

The language model, the deep flow block and every shallow block are configurations of it.
Letters: B rows, T positions, D width, H heads, K kv heads, G = H / K, d head width, L layers,
M cache slots.
"""

import dataclasses
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
PRODUCTS = ("qkv", attention_kernels.RESIDUALS, "attended", *layers.MLP_PRODUCTS)

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
        mlp: "gelu" (exact, two matrices) or "swiglu" (three).
        final_norm: none, "rms" (gain = weight) or "rms_unit_offset" (gain = 1 + weight).
        remat: what the backward pass recomputes: "none"; "dots", all but matrix products;
            "products", all but the matrix products and the attention that it needs (weights are
            gathered again, too); "full", each layer from its input.
        window: positions per window of local attention; 0: no layer has any.
        whole_layers: layers that see past the windows.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm: Literal["layer", "rms"]
    mlp: Literal["gelu", "swiglu"]
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    norm_epsilon: float
    final_norm: Literal["none", "rms", "rms_unit_offset"] = "none"
    final_norm_epsilon: float = 1e-6
    remat: Remat = "none"
    window: int = 0
    whole_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} kv heads evenly")


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

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array] | None,
        spec: attention.AttentionSpec,
        past: attention.Past | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """[B, T, D] -> [B, T, D], and this call's rotated keys and values [B, T, K, d].

        Where rows are in step (`in_step`): all keys and values, [B, M, K, d].
        """
        c = self.config
        groups = c.heads // c.kv_heads
        qkv = checkpoint_name(self.qkv(x), "qkv").reshape(
            *x.shape[:2], c.kv_heads, groups + 2, c.head_dim
        )
        qkv = partition.constrain(qkv, ("batch", "length", "heads", None, None))
        q, k, v = qkv[..., :groups, :], qkv[..., groups, :], qkv[..., groups + 1, :]
        if rotation is not None:
            q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
        # Under a sharded length every query needs every key of its row.
        k = partition.constrain(k, ("batch", None, "heads", None))
        v = partition.constrain(v, ("batch", None, "heads", None))
        if past is not None and past.length.ndim == 0:
            past = past.extended(k, v)
            k, v = past.k, past.v
            mixed = attention.attend_written(q, past, spec)
        else:
            mixed = attention.attend(q, k, v, spec, past)  # [B, T, K, G, d]
        return self.out(mixed.reshape(*x.shape[:2], -1)), (k, v)


class DecoderLayer(nnx.Module):
    """h += Attention(norm(h)); h += MLP(norm(h))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, stack: tuple[int, ...]) -> None:
        norm = layers.LayerNorm if config.norm == "layer" else layers.RMSNorm
        mlp = layers.GeluMLP if config.mlp == "gelu" else layers.SwiGLU
        norm_args: dict[str, Any] = {
            "rngs": rngs,
            "epsilon": config.norm_epsilon,
            "stack": stack,
        }
        self.attention_norm = norm(config.width, **norm_args)
        self.attention = Attention(config, rngs=rngs, stack=stack)
        self.mlp_norm = norm(config.width, **norm_args)
        self.mlp = mlp(config.width, config.mlp_width, rngs=rngs, bias=config.mlp_bias, stack=stack)

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array] | None,
        spec: attention.AttentionSpec,
        past: attention.Past | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """[B, T, D] -> [B, T, D], and this call's rotated keys and values [B, T, K, d].

        Where rows are in step (`in_step`): all keys and values, [B, M, K, d].
        """
        mixed, kv = self.attention(self.attention_norm(x), rotation, spec, past)
        x = checkpoint_name(x + mixed, "attended")
        x = x + self.mlp(self.mlp_norm(x))
        return partition.constrain(x, ("batch", "length", "embed_activation")), kv


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache of `slots` positions: k, v [L, B, M, K, d] and length int32 [B].

    One of no slots is the start of a prompt: the call it is given to attends to nothing but its own
    T positions, and returns a cache of T slots. On TPUs, narrow heads are folded: see
    `attention.cache_fold`.
    """
    fold = attention.cache_fold(config.kv_heads, config.head_dim)
    shape = (config.layers, rows, slots, config.kv_heads // fold, config.head_dim * fold)
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
    slots = cache["k"].shape[2]
    taken = jnp.full((rows,), size, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    k, v = (new.reshape(*new.shape[:3], *cache["k"].shape[3:]) for new in (k, v))
    if not slots:
        dtype = cache["k"].dtype
        return {"k": k.astype(dtype), "v": v.astype(dtype), "length": taken}
    offset = jnp.arange(size, dtype=jnp.int32)
    slot = jnp.where(
        offset[None] < taken[:, None], cache["length"][:, None] + offset[None], slots
    )  # [B, T]
    row = jnp.arange(rows)[:, None]

    def write(store: jax.Array, new: jax.Array) -> jax.Array:
        return store.at[:, row, slot].set(new.astype(store.dtype), mode="drop")

    return {
        "k": write(cache["k"], k),
        "v": write(cache["v"], v),
        "length": cache["length"] + taken,
    }


def with_slots(cache: Cache, slots: int) -> Cache:
    """The cache, grown to `slots` slots per row."""
    more = max(0, slots - cache["k"].shape[2])
    grow = lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0)))
    return {"k": grow(cache["k"]), "v": grow(cache["v"]), "length": cache["length"]}


def in_step(cache: Cache, slots: int) -> Cache:
    """The form of a cache for a sampler whose rows all have the same length.

    One array [B, M, K, d] for each layer in place of a stacked one, and one length, int32 []: each
    layer writes its own in place and then reads it. For `Decoder.unrolled`.

    Args:
        cache: of either form; its rows have the same length.
        slots: M of the result, at least the length.
    """

    def resized(store: jax.Array) -> jax.Array:
        if slots <= store.shape[1]:
            return store[:, :slots]
        return jnp.pad(store, ((0, 0), (0, slots - store.shape[1]), (0, 0), (0, 0)))

    layers_of = lambda stores: tuple(resized(stores[n]) for n in range(len(stores)))
    length = cache["length"]
    return {
        "k": layers_of(cache["k"]),
        "v": layers_of(cache["v"]),
        "length": length if length.ndim == 0 else length[0],
    }


def _looped(body: Callable, x: jax.Array, xs: tuple) -> tuple[jax.Array, list]:
    """`jax.lax.scan`, written out, over a list of layers; what it gives is not stacked."""
    layer_list, *stacks = xs
    outputs = []
    for n, layer in enumerate(layer_list):
        x, y = body(x, (layer, *(None if s is None else s[n] for s in stacks)))
        outputs.append(y)
    return x, outputs


class Decoder(nnx.Module):
    """L pre-norm layers as one scan, then the final norm if there is one."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.layers = DecoderLayer(config, rngs=rngs, stack=(config.layers,))
        self.final_norm = nnx.data(
            None
            if config.final_norm == "none"
            else layers.RMSNorm(
                config.width,
                rngs=rngs,
                epsilon=config.final_norm_epsilon,
                unit_offset=config.final_norm == "rms_unit_offset",
            )
        )

    def unrolled(self) -> "Decoder":
        """The same stack, its layers one after another in place of a scan; not to be trained.

        A scan copies each layer's weights before it uses them, in every step of a sampler. Taken
        out of the stack before the sampler's loop they are read where they lie.
        """
        graphdef, state = nnx.split(self)
        stack = nnx.merge(graphdef, state)
        layer = lambda n: jax.tree.map(lambda leaf: leaf[n], self.layers)
        stack.layers = nnx.List([layer(n) for n in range(self.config.layers)])
        return stack

    @property
    def small(self) -> bool:
        """Whether the stack may be unrolled."""
        leaves = jax.tree.leaves(self.layers)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) <= UNROLLED_BYTES

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
                appended once after it.

        Returns:
            [B, T, D] and the grown cache (None if none was given).
        """
        rotation = None if angles is None else (jnp.cos(angles), jnp.sin(angles))
        x = partition.constrain(x, ("batch", "length", "embed_activation"))

        in_place = cache is not None and cache["length"].ndim == 0

        def body(x: jax.Array, layer_and_past: tuple) -> tuple:
            layer, k, v, whole = layer_and_past
            fresh = cache is None or (not in_place and not cache["k"].shape[2])
            past = None if fresh else attention.Past(k, v, cache["length"])
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
            return x, {"k": new[0], "v": new[1], "length": cache["length"] + x.shape[1]}
        return x, _append(cache, *new, spec.lengths)
