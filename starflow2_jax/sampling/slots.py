"""The device's side of the engine: a fixed set of rows that requests join and leave.

Three programs, each compiled once: `read` feeds a chunk of one row's prompt, `seat` lets the row
begin, and `advance` steps all rows. A row's numbers depend on the number of rows and twins alone,
not on which row it is or on what the others do.

Letters: B rows, P twins, R = B + P cache rows, T positions of a chunk, M cache slots, I images,
N tokens per image, C latent channels.
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
    """A piece of one row's prompt.

    Attributes:
        tokens, kinds: int32 [1, T].
        positions: int32 [3, 1, T].
        u: [1, T, C], at LATENT positions.
        start: int32 [], positions of the row before it; what is cached behind is forgotten.
        count: int32 [], at least 1: how many of the T there are.
        views: what stands at VIT positions; None if nothing does.
    """

    tokens: jax.Array
    kinds: jax.Array
    positions: jax.Array
    u: jax.Array
    start: jax.Array
    count: jax.Array
    views: Views | None = None


def _rows_of(caches: Any, row: jax.Array) -> Any:
    """One row of the caches, as caches of one row."""
    take = lambda a: jax.lax.dynamic_slice_in_dim(a, row, 1, axis=step.row_axis(a))
    return jax.tree.map(take, caches)


@jax.jit(donate_argnames=("state",))
def read(model: Pretzel, state: SampleState, row: jax.Array, chunk: Chunk) -> SampleState:
    """Feeds a chunk to one row, int32 [], which does not sample yet."""
    length = chunk.tokens.shape[1]
    mine = {
        name: cache | {"length": chunk.start[None]}
        for name, cache in _rows_of(state.caches, row).items()
    }
    spec = AttentionSpec(lengths=chunk.count[None])
    streams = model.run(
        chunk.tokens, chunk.kinds, chunk.positions, chunk.u, spec, caches=mine, views=chunk.views
    )
    put = lambda a, b: jax.lax.dynamic_update_slice_in_dim(
        a, b.astype(a.dtype), row, axis=step.row_axis(a)
    )
    at = chunk.count - 1
    # Text: its id + 1. An image's last token: the image's first id + side.
    position = chunk.positions[:, 0, at].max() + 1
    slot = jnp.arange(state.tokens.shape[1])
    new = (slot >= chunk.start) & (slot < chunk.start + chunk.count)

    def written(old: jax.Array, values: jax.Array) -> jax.Array:
        spread = values[0, jnp.clip(slot - chunk.start, 0, length - 1)]
        return old.at[row].set(jnp.where(new, spread, old[row]))

    state = dataclasses.replace(
        state,
        caches=jax.tree.map(put, state.caches, streams.caches),
        position=state.position.at[row].set(position),
        y=state.y.at[row].set(streams.y[0, at]),
        g=state.g.at[row].set(streams.g[0, at]),
        tokens=written(state.tokens, chunk.tokens),
        kinds=written(state.kinds, chunk.kinds),
    )
    return _placed(state)


@jax.jit(donate_argnames=("state", "settings"))
def seat(
    model: Pretzel, state: SampleState, settings: RowSettings, row: jax.Array, mine: RowSettings
) -> tuple[SampleState, RowSettings]:
    """The row, int32 [], whose prompt has been read begins to sample as `mine`, of one row, says.

    A row that may not begin (no room, no tokens) stays DONE.
    """
    config = model.config
    last = state.length[row] - 1
    mode = step.mode_behind(state.tokens[row, last], state.kinds[row, last], config.special)
    settings = jax.tree.map(lambda a, b: a.at[row].set(b[0]), settings, mine)
    zero = lambda a: a.at[row].set(0)
    state = dataclasses.replace(
        state,
        mode=state.mode.at[row].set(mode),
        drawn=zero(state.drawn),
        draws=zero(state.draws),
        texts=zero(state.texts),
        images=zero(state.images),
    )
    if state.prefix is not None:
        state = dataclasses.replace(
            state,
            # A request that was ended inside an image still held one.
            twins=jnp.where(state.twins == row, -1, state.twins),
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
) -> SampleState:
    """Ends the rows of a mask bool [B], then up to `steps` steps of the others; see `step.step`."""
    mode = jnp.where(halted, Mode.DONE, state.mode).astype(jnp.int32)
    state = dataclasses.replace(state, mode=mode)
    return _placed(step.steps_of(model, state, settings, steps))
