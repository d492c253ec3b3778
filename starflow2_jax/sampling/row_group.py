"""Rows that one compiled step advances: the host's side of `sampling.slots`.

Letters: B rows, T positions, G rows that are read together, C latent channels.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.views import pack_views
from starflow2_jax.models.pretzel import Kind, Pretzel
from starflow2_jax.parallel.distributed import fetch
from starflow2_jax.sampling import slots
from starflow2_jax.sampling.generate import (
    SHORTEST_PROMPT,
    DoneEvent,
    Event,
    Reader,
    Reason,
    bucket,
    collect,
    reason_of,
)
from starflow2_jax.sampling.prompts import Piece, Row, extended, rest, shared
from starflow2_jax.sampling.request import EngineConfig, Request
from starflow2_jax.sampling.state import Mode, SampleState

SHORT_PIECES = (8, 16)
"""Positions that prompts, or what is new of them, are filled up to; longer ones to `chunk`."""

READ_TOGETHER = 64
"""Positions of one call that reads several prompts: a lone short one costs as much as that."""


@dataclasses.dataclass
class _Seat:
    """One row, as the host knows it.

    Attributes:
        number: of the request; None while there is none.
        read: positions of its prompt that are cached.
        reader: follows it once it samples; None before.
        pieces: of the reply so far.
        cached: positions that lie in the caches.
        kept: the row that they are of, for a request that goes on from it.
        used: when it was last used, a count.
    """

    number: int | None = None
    request: Request | None = None
    read: int = 0
    reader: Reader | None = None
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    cached: int = 0
    kept: Row | None = None
    used: int = 0


class Place(NamedTuple):
    """A row that a request may have.

    Attributes:
        worth: of two places the one with more of it is better.
        cached: positions of the prompt that lie there.
        index: which row.
    """

    worth: tuple[int, bool, int, int]
    cached: int
    index: int


class RowGroup:
    """Some rows with their caches. Used by one thread at a time."""

    def __init__(
        self,
        model: Pretzel,
        config: EngineConfig,
        unconditional: Sequence[int] | None,
        clock: Iterator[int],
        keep_places: bool,
    ) -> None:
        """Allocates the caches.

        Args:
            model: as the device decodes it.
            config: sizes, of these rows alone.
            unconditional: token ids; see `engine.Engine`.
            clock: counts when rows are used.
            keep_places: the arrays lie on a mesh, and stay there.
        """
        self.config = config
        self._shape = model.config
        self._model = model
        self._state, self._settings = slots.empty(
            model,
            None if unconditional is None else jnp.asarray(unconditional, jnp.int32),
            rows=config.rows,
            twins=config.twins,
            slots=config.context,
            images=config.images,
        )
        self._places = None
        if keep_places:
            self._places = jax.tree.map(lambda leaf: leaf.sharding, self._state)
        self._seats = [_Seat() for _ in range(config.rows)]
        self._halted = np.zeros(config.rows, bool)
        self._clock = clock
        self.fed = self.reads = self.steps = 0

    @property
    def taken(self) -> bool:
        """Whether anybody has one of the rows."""
        return any(seat.number is not None for seat in self._seats)

    def place_for(self, request: Request) -> Place | None:
        """The best row for a request; None if all are taken."""
        free = [i for i, seat in enumerate(self._seats) if seat.number is None]
        if not free:
            return None
        if request.reuse:
            same = {
                i: min(shared(self._seats[i].kept, request.row), self._seats[i].cached)
                for i in free
                if self._seats[i].kept is not None
            }
            best = max(same, key=lambda i: same[i], default=None)
            if best is not None and 2 * same[best] >= len(self._seats[best].kept):
                # The last position is read again at least: it says what comes next.
                return self._place(best, min(same[best], len(request.row) - 1), len(free))
        return max((self._place(i, 0, len(free)) for i in free), key=lambda place: place.worth)

    def _place(self, index: int, cached: int, free: int) -> Place:
        """Rows that keep nothing first, of the group with most free ones, the longest unused."""
        seat = self._seats[index]
        return Place((cached, seat.kept is None, free, -seat.used), cached, index)

    def take(self, place: Place, number: int, request: Request) -> int:
        """Gives one of the rows to a request; returns how much of its prompt lies there."""
        start = place.cached
        if request.row.views and np.any(request.row.kinds[:start] == Kind.VIT):
            start = 0
        self._seats[place.index] = _Seat(number, request, start)
        return start

    def leave(self, cancelled: Collection[int]) -> list[Event]:
        """Ends what was cancelled."""
        return [
            self._end(index, "cancelled")
            for index, seat in enumerate(self._seats)
            if seat.number is not None and seat.number in cancelled
        ]

    def round(self, waiting: bool) -> list[Event]:
        """Reads pieces of prompts, and steps the rows that sample.

        Args:
            waiting: others wait for a row.

        Returns:
            What is new.
        """
        self._read()
        return self._step(waiting) if any(seat.reader for seat in self._seats) else []

    def _in_place(self, state: SampleState) -> SampleState:
        """On a mesh, with every array named as lying where it lay at the start: nothing moves.

        The partitioner names the same place otherwise in every program, and each name of an
        argument's place is a compilation.
        """
        return state if self._places is None else jax.device_put(state, self._places)

    def _end(self, index: int, reason: Reason) -> DoneEvent:
        """Frees a row."""
        seat = self._seats[index]
        done = DoneEvent(seat.number, reason)
        if seat.request.keep and seat.reader is not None:
            seat.kept = extended(seat.request.row, seat.pieces, self._shape)
        seat.number, seat.request, seat.reader, seat.pieces = None, None, None, []
        seat.used = next(self._clock)
        self._halted[index] = True
        return done

    def _read(self) -> None:
        """Reads a few pieces of prompts, oldest request first; lets those begin that are read."""
        for _ in range(self.config.chunks):
            waiting = [
                (seat.number, index)
                for index, seat in enumerate(self._seats)
                if seat.number is not None and seat.reader is None
            ]
            if not waiting:
                return
            order = [index for _, index in sorted(waiting)]
            size = self._piece(order[0])
            group = order[:1]
            if not self._seats[group[0]].request.row.views:
                alike = [
                    index
                    for index in order
                    if self._piece(index) == size and not self._seats[index].request.row.views
                ]
                group = alike[: self._lanes(size)]
            chunk = self._chunk(group, size)
            state, self._settings = slots.read(self._model, self._state, self._settings, chunk)
            self._state = self._in_place(state)
            self.reads += 1
            for lane, index in enumerate(group):
                seat = self._seats[index]
                seat.read += int(chunk.count[lane])
                self.fed += int(chunk.count[lane])
                if chunk.begins[lane]:
                    self._halted[index] = False
                    seat.reader = Reader(seat.number, seat.read, self._shape, seat.request.stop)

    def _piece(self, index: int) -> int:
        """T of the call that reads a row's next piece; of nothing but the row and where it is.

        A row with views is one piece, of a length that is compiled for it.
        """
        seat = self._seats[index]
        left = len(seat.request.row) - seat.read
        if seat.request.row.views:
            return min(bucket(max(SHORTEST_PROMPT, left), 4), self.config.context)
        sizes = self.pieces()
        return next((size for size in sizes if size >= left), sizes[-1])

    def pieces(self) -> list[int]:
        """T of the calls that read prompts without views, ascending."""
        most = min(self.config.chunk, self.config.context)
        return [size for size in SHORT_PIECES if size < most] + [most]

    def _lanes(self, size: int) -> int:
        """G of the calls that read pieces of `size` positions without views."""
        return max(1, min(READ_TOGETHER // size, self.config.rows))

    def _chunk(self, group: Sequence[int], size: int) -> slots.Chunk:
        """The next pieces of some rows, of up to `size` positions each."""
        flow, rows = self._shape.flow, self.config.rows
        seats = [self._seats[index] for index in group]
        views = None
        many = 1 if seats[0].request.row.views else self._lanes(size)
        tokens, kinds = np.zeros((many, size), np.int32), np.zeros((many, size), np.int32)
        positions = np.zeros((3, many, size), np.int32)
        u = np.zeros((many, size, flow.channels), self._state.u.dtype)
        index, start, counts = np.full(many, rows, np.int32), *np.zeros((2, many), np.int32)
        begins = np.zeros(many, bool)
        for lane, seat in enumerate(seats):
            row = seat.request.row
            count = min(len(row) - seat.read, size)
            here = slice(seat.read, seat.read + count)
            index[lane], start[lane], counts[lane] = group[lane], seat.read, count
            begins[lane] = seat.read + count == len(row)
            tokens[lane, :count], kinds[lane, :count] = row.tokens[here], row.kinds[here]
            positions[:, lane, :count] = row.positions[here].T
            latent = row.kinds == Kind.LATENT
            before = int(latent[: seat.read].sum())
            inside = np.flatnonzero(latent[here])
            u[lane, inside] = row.u.reshape(-1, flow.channels)[before : before + len(inside)]
        if seats[0].request.row.views:
            tower = self._shape.vlm.vision
            packed = pack_views([rest(seats[0].request.row, seats[0].read).views], kinds, tower)
            views = jax.tree.map(jnp.asarray, packed)
        each = [seat.request.settings() for seat in seats]
        each += each[:1] * (many - len(each))
        settings = jax.tree.map(lambda *leaves: np.concatenate(leaves), *each)
        return slots.Chunk(
            index, tokens, kinds, positions, u, start, counts, begins, settings, views
        )

    def _step(self, waiting: bool) -> list[Event]:
        """Some steps of every row, and what they gave."""
        state = slots.advance(
            self._model,
            self._state,
            self._settings,
            self._halted,
            np.int32(self.config.steps),
            # Rows that are done do not wait for the others where their prompts can be read at once.
            np.int32(self._lanes(SHORT_PIECES[0]) if waiting else self.config.rows),
        )
        self._state = state = self._in_place(state)
        self.steps += self.config.steps
        mode, length, tokens, kinds, texts, images = fetch(
            (state.mode, state.length, state.tokens, state.kinds, state.texts, state.images)
        )
        fetched: list[np.ndarray] = []

        def u(index: int, image: int) -> np.ndarray:
            if not fetched:
                fetched.append(fetch(state.u))
            return fetched[0][index, image].copy()

        events: list[Event] = []
        for index, seat in enumerate(self._seats):
            reader = seat.reader
            if reader is None:
                continue
            new = list(
                reader.read(tokens[index], kinds[index], length[index], lambda i, b=index: u(b, i))
            )
            for event in new:
                collect(seat.pieces, event)
            events += new
            seat.cached = int(length[index])
            if reader.stopped or mode[index] == Mode.DONE:
                request, end = seat.request, int(length[index])
                last = int(tokens[index, end - 1]) if end > len(request.row) else -1
                limits = request.max_new_tokens, request.max_images
                reason = reason_of(reader, last, texts[index], images[index], *limits)
                events.append(self._end(index, reason))
        return events
