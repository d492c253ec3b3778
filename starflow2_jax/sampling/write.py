"""Writing by a VLM alone: prompts read into a cache, then a compiled loop of one token a step.

A session keeps its cache from turn to turn: what a new prompt shares with what was read and written
before is not read again. Every token of a row has been fed, an end token too.

Letters: B rows, T positions, M cache slots, N tokens of a reply, V vocabulary, D width.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from starflow2_jax.data.views import pack_views
from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Kind
from starflow2_jax.models.qwen2_5_vision import Views
from starflow2_jax.models.qwen2_5_vl import Qwen25VL
from starflow2_jax.nn.attention import AttentionSpec
from starflow2_jax.nn.decoder import Cache, empty_cache, slots_of
from starflow2_jax.sampling.generate import (
    SHORTEST_CACHE,
    SHORTEST_PROMPT,
    DoneEvent,
    Reason,
    TextEvent,
    bucket,
)
from starflow2_jax.sampling.prompts import Row, rest, shared
from starflow2_jax.sampling.state import check_number, check_seed, fitted
from starflow2_jax.sampling.step import choose_token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WriteSettings:
    """How each row writes; see `write_settings`.

    Attributes:
        seed: uint32 [B]; a row's random stream depends on nothing else.
        temperature, top_p: [B]; temperature 0 takes the likeliest token, top_p 1 keeps all.
        max_new_tokens: int32 [B], an end token among them.
        ends: int32 [E], tokens that end a reply.
    """

    seed: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    max_new_tokens: jax.Array
    ends: jax.Array


def write_settings(
    rows: int,
    ends: Sequence[int],
    *,
    seed: Any = 0,
    temperature: Any = 0.0,
    top_p: Any = 1.0,
    max_new_tokens: Any = 256,
) -> WriteSettings:
    """Settings of B rows; each argument is one value or B of them.

    One `seed` gives row b the seed `seed + b`.

    Raises:
        UserError: a number out of range.
    """
    given = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    for name, value in given.items():
        check_number(name, value)
    check_seed(seed)
    if np.ndim(seed) == 0:
        seed = fitted("seed", seed, np.uint32) + np.arange(rows, dtype=np.uint32)

    def spread(name: str, value: Any, dtype: np.dtype) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(fitted(name, value, dtype)), (rows,))

    wide = jnp.result_type(float)
    return WriteSettings(
        seed=spread("seed", seed, np.uint32),
        temperature=spread("temperature", temperature, wide),
        top_p=spread("top_p", top_p, wide),
        max_new_tokens=spread("max_new_tokens", max_new_tokens, np.int32),
        ends=jnp.asarray(ends, jnp.int32),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WriteState:
    """Where the rows are in their replies.

    Attributes:
        cache: of everything read and written.
        position: int32 [B], the id of the next token, on all three axes.
        y: [B, D], what the model said at the last position.
        tokens: int32 [B, N], the reply so far.
        written: int32 [B], how much of it there is.
        done: bool [B]; such a row waits.
    """

    cache: Cache
    position: jax.Array
    y: jax.Array
    tokens: jax.Array
    written: jax.Array
    done: jax.Array


def for_decoding(model: Qwen25VL) -> Qwen25VL:
    """The model as this device decodes fastest; on a CPU with its layers apart."""
    if jax.default_backend() != "cpu":
        return model
    graphdef, state = nnx.split(model)
    apart = nnx.merge(graphdef, state)
    apart.decoder = model.decoder.unrolled()
    return apart


@jax.jit(static_argnames=("slots",))
def read(
    model: Qwen25VL,
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    views: Views | None = None,
    *,
    slots: int,
) -> tuple[Cache, jax.Array]:
    """Feeds the next positions of each row.

    Args:
        model: the model.
        cache: of what came before; of no slots (`empty_cache`) at the start.
        tokens: int32 [B, T].
        positions: int32 [3, B, T], M-RoPE ids.
        lengths: int32 [B], at least 1: how many of the T there are.
        views: what stands at some of the T; None if nothing does.
        slots: M of the result.

    Returns:
        The cache, and y [B, D] at each row's last position.
    """
    dtype = cache["k"][0].dtype
    e = model.embed(tokens, dtype)
    if views is not None:
        e = jnp.where((views.index >= 0)[..., None], model.see(views, dtype), e)
    if slots_of(cache):
        cache = model.decoder.held(cache, slots)
    y, cache = model.decode(e, positions, AttentionSpec(lengths=lengths), cache)
    return model.decoder.held(cache, slots), y[jnp.arange(len(lengths)), lengths - 1]


def _step(model: Qwen25VL, state: WriteState, settings: WriteSettings) -> WriteState:
    logits = model.logits(state.y)
    keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(
        settings.seed, state.written
    )
    alive = ~state.done
    token = choose_token(
        logits, jnp.ones((1, 1), bool), keys, settings.temperature, settings.top_p, alive
    )
    e = model.embed(token[:, None], state.y.dtype)
    positions = jnp.broadcast_to(state.position[None, :, None], (3, len(token), 1))
    spec = AttentionSpec(lengths=alive.astype(jnp.int32))
    y, cache = model.decode(e, positions, spec, state.cache)
    place = jnp.arange(state.tokens.shape[1])[None] == state.written[:, None]
    written = state.written + alive
    ended = (token[:, None] == settings.ends[None]).any(1)
    return WriteState(
        cache=cache,
        position=state.position + alive,
        y=jnp.where(alive[:, None], y[:, 0], state.y),
        tokens=jnp.where(place & alive[:, None], token[:, None], state.tokens),
        written=written,
        done=state.done | ended | (written >= settings.max_new_tokens),
    )


@jax.jit(donate_argnames=("state",))
def advance(
    model: Qwen25VL, state: WriteState, settings: WriteSettings, steps: jax.Array
) -> WriteState:
    """Up to `steps` tokens for every row that is not done; any number is one compilation.

    The given state is donated: its arrays may not be used again.
    """

    def goes_on(carry: tuple[WriteState, jax.Array]) -> jax.Array:
        return (carry[1] > 0) & jnp.any(~carry[0].done)

    def body(carry: tuple[WriteState, jax.Array]) -> tuple[WriteState, jax.Array]:
        return _step(model, carry[0], settings), carry[1] - 1

    return jax.lax.while_loop(goes_on, body, (state, steps))[0]


class Session:
    """B rows that are continued turn after turn with one cache."""

    def __init__(self, model: Qwen25VL, context: int | None = None) -> None:
        """`model`: see `for_decoding`; `context`: most positions of a row, default: any number."""
        self._model = model
        self._context = np.iinfo(np.int32).max if context is None else context
        self._rows: list[Row] = []
        self._cache: Cache | None = None
        self.fed = 0
        """Positions of prompts that were read so far, over all rows."""

    def stream(
        self, rows: Sequence[Row], settings: WriteSettings, every: int = 8
    ) -> Iterator[TextEvent | DoneEvent]:
        """Writes a reply to each row.

        Args:
            rows: whole conversations up to the reply. What they share with the last call's rows and
                replies is not read again.
            settings: of as many rows.
            every: tokens between two looks at the rows.

        Yields:
            Events, in order within each row; a row's last one is a `DoneEvent`.

        Raises:
            UserError: a row that the context does not hold; names it.
        """
        most = np.asarray(settings.max_new_tokens)
        for b, row in enumerate(rows):
            if not 0 < len(row) < self._context:
                raise UserError(
                    f"prompt {b} has {len(row)} positions, the context holds {self._context} with "
                    "at least one for the reply; shorten the text or give fewer or smaller images"
                )
        room = np.array([self._context - len(row) for row in rows])
        limited = np.minimum(most, room).astype(np.int32)
        settings = dataclasses.replace(settings, max_new_tokens=jnp.asarray(limited))
        state = self._begin(rows, limited)
        seen = np.zeros(len(rows), int)
        ended = np.zeros(len(rows), bool)
        ends = np.asarray(settings.ends)
        while not ended.all():
            # The arrays of the state are given away: nothing may be reused until they are back.
            self._cache, self._rows = None, []
            state = advance(self._model, state, settings, jnp.asarray(every, jnp.int32))
            tokens, written, done = jax.device_get((state.tokens, state.written, state.done))
            self._keep(rows, state, tokens, written)
            for b in np.flatnonzero(~ended):
                new = tuple(int(t) for t in tokens[b, seen[b] : written[b]])
                seen[b] = written[b]
                if new:
                    yield TextEvent(int(b), new)
                if done[b]:
                    ended[b] = True
                    yield DoneEvent(int(b), _reason(tokens[b, : written[b]], ends, most[b]))

    def _begin(self, rows: Sequence[Row], new: np.ndarray) -> WriteState:
        """Reads what is new of the rows."""
        config = self._model.config
        dtype = self._model.embedding[...].dtype
        count = len(rows)
        if self._cache is None or len(self._rows) != count:
            self._cache, self._rows = None, []
        old = self._rows or [None] * count
        # The last position is read again at least: it says what comes next.
        kept = [
            0 if a is None else min(shared(a, b), len(b) - 1)
            for a, b in zip(old, rows, strict=True)
        ]
        if not any(kept):
            self._cache = None
        new_part = [rest(row, start) for row, start in zip(rows, kept, strict=True)]
        length = bucket(max(SHORTEST_PROMPT, *map(len, new_part)), parts=4)
        tokens, kinds = (np.zeros((count, length), np.int32) for _ in range(2))
        positions = np.zeros((3, count, length), np.int32)
        for b, row in enumerate(new_part):
            tokens[b, : len(row)], kinds[b, : len(row)] = row.tokens, row.kinds
            positions[:, b, : len(row)] = row.positions.T
        views = None
        if any(row.views for row in new_part):
            if config.vision is None:
                raise ValueError("the rows have views, but the model has no vision tower")
            packed = pack_views([row.views for row in new_part], kinds, config.vision)
            views = jax.tree.map(jnp.asarray, packed)
        slots = max(len(row) + int(n) for row, n in zip(rows, new, strict=True))
        slots = bucket(max(slots, SHORTEST_CACHE, length), parts=4)
        if self._cache is None:
            cache = empty_cache(config.decoder(), count, 0, dtype)
        else:
            slots = max(slots, slots_of(self._cache))
            # Slots behind the length are never seen: what was there is overwritten.
            cache = self._cache | {"length": jnp.asarray(kept, jnp.int32)}
        lengths = jnp.asarray([len(row) for row in new_part], jnp.int32)
        cache, y = read(self._model, cache, tokens, positions, lengths, views, slots=slots)
        self.fed += int(sum(len(row) for row in new_part))
        # Behind an image the ids and the count of positions differ.
        position = jnp.asarray([row.positions[-1].max() + 1 for row in rows], jnp.int32)
        size = bucket(max(1, int(new.max())), parts=4)
        return WriteState(
            cache=cache,
            position=position,
            y=y,
            tokens=jnp.zeros((count, size), jnp.int32),
            written=jnp.zeros((count,), jnp.int32),
            done=jnp.asarray(new <= 0),
        )

    def _keep(
        self, rows: Sequence[Row], state: WriteState, tokens: np.ndarray, written: np.ndarray
    ) -> None:
        """Remembers what the cache holds now."""
        self._cache = state.cache
        self._rows = []
        for row, reply, count in zip(rows, tokens, written, strict=True):
            ids = np.concatenate([row.tokens, reply[:count]])
            kinds = np.concatenate([row.kinds, np.full(count, Kind.TEXT, np.int32)])
            self._rows.append(dataclasses.replace(row, tokens=ids, kinds=kinds))


def _reason(reply: np.ndarray, ends: np.ndarray, most: int) -> Reason:
    if len(reply) and reply[-1] in ends:
        return "end"
    return "tokens" if len(reply) >= most else "context"
