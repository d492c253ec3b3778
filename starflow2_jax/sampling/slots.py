"""The device's side of the engine: a fixed set of rows that requests join and leave.

Two programs, each compiled once for a shape: `read` feeds pieces of the prompts of a few rows and
lets those begin that are read, and `advance` steps all rows. A row's numbers depend on the number
of rows and twins alone, not on which row it is or on what the others do.

Letters: B rows, P twins, R = B + P cache rows, G rows that are read together, T positions of a
piece, M cache slots, I images, N tokens per image, C latent channels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.models.qwen2_5_vision import Views
from starflow2_jax.nn import partition
from starflow2_jax.nn.attention import AttentionSpec
from starflow2_jax.nn.layers import at_least_float32
from starflow2_jax.sampling import step
from starflow2_jax.sampling.state import Mode, RowSettings, SampleState, row_settings


def for_decoding(model: Pretzel) -> Pretzel:
    """The model as this device decodes fastest; on a CPU with the layers of small stacks apart."""
    if jax.default_backend() != "cpu":
        return model
    graphdef, state = nnx.split(model)
    apart = nnx.merge(graphdef, state)
    if model.vlm.decoder.small:
        apart.vlm.decoder = model.vlm.decoder.unrolled()
    if model.deep.decoder.small:
        apart.deep.decoder = model.deep.decoder.unrolled()
    return apart


def _placed(tree: Any) -> Any:
    """The state or settings with the rows cut over the mesh in context, if there is one."""

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        if any(getattr(key, "name", None) == "prefix" for key in path) or not leaf.ndim:
            return leaf
        if leaf.ndim == 5:  # keys and values [L, R, K, M, d]
            return partition.constrain(leaf, (None, "batch", "heads", None, None))
        if leaf.ndim == 4 and any(getattr(key, "name", None) == "caches" for key in path):
            return partition.constrain(leaf, ("batch", "heads", None, None))  # [R, K, d, M]
        return partition.constrain(leaf, ("batch", *(None,) * (leaf.ndim - 1)))

    return jax.tree_util.tree_map_with_path(one, tree)


@jax.jit(static_argnames=("rows", "twins", "slots", "images"))
def empty(
    model: Pretzel,
    unconditional: jax.Array | None,
    *,
    rows: int,
    twins: int,
    slots: int,
    images: int,
) -> tuple[SampleState, RowSettings]:
    """Rows that wait, and settings that mean nothing.

    Args:
        model: the model.
        unconditional: int32 [Tu], see `step.prefill`; None: no row is guided.
        rows: B.
        twins: P, images that are drawn with guidance at a time; ignored without guidance.
        slots: M.
        images: I, of a reply.
    """
    config = model.config
    flow, wide = config.flow, at_least_float32(jnp.dtype(config.dtype))
    caches = model.empty_caches(rows, slots)
    prefix, lanes = None, rows
    if unconditional is not None:
        lanes = rows + twins
        prefix, twin = step.prefill_unconditional(model, unconditional, slots)
        caches = jax.tree.map(lambda a, b: step.with_twins(a, b, twins), caches, twin)
    # As the layers of small stacks are apart, so are their caches: written to in place.
    stacks = {"vlm": model.vlm.decoder, "deep": model.deep.decoder}
    caches = {name: stacks[name].held(cache, slots) for name, cache in caches.items()}
    count = lambda: jnp.zeros((rows,), jnp.int32)
    dtype = jnp.dtype(config.dtype)
    state = SampleState(
        caches=caches,
        position=jnp.zeros((lanes,), jnp.int32),
        y=jnp.zeros((lanes, config.vlm.width), dtype),
        g=jnp.zeros((lanes, flow.width), dtype),
        mode=count() + jnp.int32(Mode.DONE),
        drawn=count(),
        draws=count(),
        texts=count(),
        images=count(),
        tokens=jnp.zeros((rows, slots), jnp.int32),
        kinds=jnp.zeros((rows, slots), jnp.int32),
        u=jnp.zeros((rows, images, flow.tokens, flow.channels), wide),
        prefix=prefix,
        twins=None if prefix is None else jnp.full((twins,), -1, jnp.int32),
        waited=None if prefix is None else count(),
    )
    return _placed(state), _placed(row_settings(rows))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Pieces of the prompts of G rows, one each.

    Attributes:
        rows: int32 [G], whose they are, none of them twice; B: there is none.
        tokens, kinds: int32 [G, T].
        positions: int32 [3, G, T].
        u: [G, T, C], at LATENT positions.
        start: int32 [G], positions of the row before it; what is cached behind is forgotten.
        count: int32 [G], at least 1 where there is a piece: how many of the T there are.
        begins: bool [G], it is the last piece: the row begins to sample.
        settings: of G rows, as those sample that begin.
        views: what stands at VIT positions; None if nothing does.
    """

    rows: jax.Array
    tokens: jax.Array
    kinds: jax.Array
    positions: jax.Array
    u: jax.Array
    start: jax.Array
    count: jax.Array
    begins: jax.Array
    settings: RowSettings
    views: Views | None = None


def _rows_of(stored: jax.Array, rows: jax.Array) -> jax.Array:
    """Some rows, int32 [G], of a cache's leaf; what a row beyond the last gives has no meaning."""
    axis = step.row_axis(stored)

    def one(row: jax.Array) -> jax.Array:
        if partition.axis_extent("batch") == 1:
            return jax.lax.dynamic_slice_in_dim(stored, row, 1, axis)
        # Where rows lie apart, a slice would gather all of them; of a sum, one row travels.
        mine = jnp.where(_is_row(stored, row), stored, 0)
        return mine.sum(axis, keepdims=True, dtype=stored.dtype)

    return jnp.concatenate([one(rows[n]) for n in range(len(rows))], axis)


def _is_row(stored: jax.Array, row: jax.Array) -> jax.Array:
    """Where a cache's leaf holds one row: bool, of one axis that is longer than 1."""
    axis = step.row_axis(stored)
    here = jnp.arange(stored.shape[axis]) == row
    return jnp.expand_dims(here, [n for n in range(stored.ndim) if n != axis])


def _with_rows(stored: jax.Array, new: jax.Array, rows: jax.Array, there: jax.Array) -> jax.Array:
    """A cache's leaf with new rows, those that a bool mask [G] says are there."""
    axis = step.row_axis(stored)
    new = new.astype(stored.dtype)
    # Whole rows one after another are copies of memory; a scatter goes number by number on a CPU.
    for n in range(len(rows)):
        if partition.axis_extent("batch") > 1:
            here = _is_row(stored, rows[n]) & there[n]
            stored = jnp.where(here, jax.lax.slice_in_dim(new, n, n + 1, axis=axis), stored)
            continue
        old = jax.lax.dynamic_slice_in_dim(stored, rows[n], 1, axis)
        mine = jnp.where(there[n], jax.lax.slice_in_dim(new, n, n + 1, axis=axis), old)
        stored = jax.lax.dynamic_update_slice_in_dim(stored, mine, rows[n], axis)
    return stored


@jax.jit(donate_argnames=("state", "settings"))
def read(
    model: Pretzel, state: SampleState, settings: RowSettings, chunk: Chunk
) -> tuple[SampleState, RowSettings]:
    """Feeds pieces of prompts to rows that do not sample yet; lets those begin that are read.

    A row that may not begin (no room, no tokens) stays DONE. What a row gets depends on G and T,
    not on which of the G it is or on what the others are.
    """
    config = model.config
    group, length = chunk.tokens.shape
    (rows,) = state.mode.shape
    there = chunk.rows < rows
    # Beyond the rows lie the twins: nothing of them is read or written here.
    near = jnp.minimum(chunk.rows, rows - 1)
    mine = {
        name: jax.tree.map(lambda a: _rows_of(a, near), cache) | {"length": chunk.start}
        for name, cache in state.caches.items()
    }
    spec = AttentionSpec(lengths=chunk.count)
    streams = model.run(
        chunk.tokens, chunk.kinds, chunk.positions, chunk.u, spec, caches=mine, views=chunk.views
    )
    lane = jnp.arange(group)
    at = jnp.maximum(chunk.count - 1, 0)
    # Text: its id + 1. An image's last token: the image's first id + side.
    position = chunk.positions[:, lane, at].max(0) + 1
    # Where the row is none of theirs, the write is dropped: behind the last there are twins.
    put = lambda old, new, which: old.at[jnp.where(which, chunk.rows, len(old))].set(
        new.astype(old.dtype), mode="drop"
    )
    slot = jnp.arange(state.tokens.shape[1]) - chunk.start[:, None]  # [G, M]
    new = (slot >= 0) & (slot < chunk.count[:, None])

    def written(old: jax.Array, values: jax.Array) -> jax.Array:
        spread = jnp.take_along_axis(values, jnp.clip(slot, 0, length - 1), 1)
        return put(old, jnp.where(new, spread, old[near]), there)

    state = dataclasses.replace(
        state,
        caches=jax.tree.map(
            lambda old, new: _with_rows(old, new, near, there), state.caches, streams.caches
        ),
        position=put(state.position, position, there),
        y=put(state.y, streams.y[lane, at], there),
        g=put(state.g, streams.g[lane, at], there),
        tokens=written(state.tokens, chunk.tokens),
        kinds=written(state.kinds, chunk.kinds),
    )
    begins = chunk.begins & there
    mode = step.mode_behind(chunk.tokens[lane, at], chunk.kinds[lane, at], config.special)
    settings = jax.tree.map(lambda old, new: put(old, new, begins), settings, chunk.settings)
    zero = lambda old: put(old, jnp.zeros_like(chunk.rows), begins)
    state = dataclasses.replace(
        state,
        mode=put(state.mode, mode, begins),
        drawn=zero(state.drawn),
        draws=zero(state.draws),
        texts=zero(state.texts),
        images=zero(state.images),
    )
    if state.prefix is not None:
        again = (state.twins[:, None] == jnp.where(begins, chunk.rows, rows)[None]).any(1)
        state = dataclasses.replace(
            state,
            # A request that was ended inside an image still held one.
            twins=jnp.where(again, -1, state.twins),
            waited=zero(state.waited),
        )
    return _placed(step.settled(state, settings, config.flow.tokens)), _placed(settings)


@jax.jit(donate_argnames=("state",))
def advance(
    model: Pretzel,
    state: SampleState,
    settings: RowSettings,
    halted: jax.Array,
    steps: jax.Array,
    enough: jax.Array,
) -> SampleState:
    """Ends the rows of a mask bool [B], then steps the others; see `step.step`.

    Up to `steps` steps, fewer once `enough` more rows are DONE: both int32 [].
    """
    mode = jnp.where(halted, Mode.DONE, state.mode).astype(jnp.int32)
    state = dataclasses.replace(state, mode=mode)
    return _placed(step.steps_of(model, state, settings, steps, enough))
