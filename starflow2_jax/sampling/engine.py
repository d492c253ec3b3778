"""Continuous batching: requests join and leave the rows of one compiled decode step.

    engine = Engine(model, EngineConfig(rows=16, context=512), unconditional=tokens)
    number = engine.submit(Request(row, seed=1, guidance=2.0))
    while engine.busy:
        for event in engine.poll(): ...

Rows that write, draw, read their prompts or wait for a twin share every step. The same request with
the same seed gives the same bits in any row and any company, for one `EngineConfig` and mesh. A
request with `keep` leaves its row's caches behind: a later one with `reuse` that goes on from there
reads only what is new, images that were drawn included.

Letters: B rows, T positions, I images, N tokens per image, C latent channels.
"""

import collections
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from starflow2_jax.data.views import pack_views
from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Kind, Pretzel
from starflow2_jax.nn import partition
from starflow2_jax.parallel import rules
from starflow2_jax.parallel.distributed import fetch
from starflow2_jax.sampling import slots
from starflow2_jax.sampling.generate import (
    SHORTEST_PROMPT,
    DoneEvent,
    Event,
    Reader,
    Reason,
    Stop,
    bucket,
    check_prompts,
    check_settings,
    collect,
    reason_of,
)
from starflow2_jax.sampling.prompts import Piece, Row, extended, rest, shared
from starflow2_jax.sampling.state import Mode, RowSettings, SampleState, row_settings

SHORT_PIECES = (8, 16)
"""Positions that prompts, or what is new of them, are filled up to; longer ones to `chunk`."""

READ_TOGETHER = 64
"""Positions of one call that reads several prompts: a lone short one costs as much as that."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes, all of them compiled once.

    Attributes:
        rows: B, requests that are served at a time.
        twins: P, images that are drawn with guidance at a time, each of which costs one row more;
            0: as many as rows. More rows than twins wait their turn before they draw.
        context: most positions of a request, its prompt included.
        images: I, most images of one reply.
        chunk: positions of a prompt that are read at a time, between the steps of the others.
        chunks: calls that read such a piece, or short prompts of several rows, in one of `poll`.
        steps: decode steps in one call of `poll`, fewer where others wait for rows that are done.
    """

    rows: int = 8
    twins: int = 0
    context: int = 512
    images: int = 4
    chunk: int = 64
    chunks: int = 4
    steps: int = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One row to continue; fields as in `RowSettings`.

    Attributes:
        row: the prompt; see `prompts.extended`. Where it ends with `<|vision_start|>`, an image
            follows at once.
        stop: strings that end the reply.
        keep: the caches stay for a request that goes on from this one's row and reply, until the
            row is needed.
        reuse: this one goes on from where a request with `keep` ended, if it can. Its numbers then
            are those of another order of computation, equal to rounding.
    """

    row: Row
    seed: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    image_temperature: float = 1.0
    guidance: float = 0.0
    max_new_tokens: int = 64
    max_images: int = 1
    stop: Stop | None = None
    keep: bool = False
    reuse: bool = False

    def settings(self) -> RowSettings:
        """Of one row."""
        return row_settings(
            1,
            seed=[self.seed],
            temperature=self.temperature,
            top_p=self.top_p,
            image_temperature=self.image_temperature,
            guidance=self.guidance,
            max_new_tokens=self.max_new_tokens,
            max_images=self.max_images,
        )


@dataclasses.dataclass
class _Seat:
    """One row of the engine, as the host knows it.

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


class Engine:
    """See the module. `submit` and `cancel` may be called from any thread, `poll` from one."""

    def __init__(
        self,
        model: Pretzel,
        config: EngineConfig = EngineConfig(),
        *,
        unconditional: Sequence[int] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Allocates the caches.

        Args:
            model: the model; under a mesh its parameters lie on it already, by `rules.SERVING`.
            config: sizes.
            unconditional: token ids of the row without content, up to `<|vision_start|>`; None:
                requests with guidance are refused.
            mesh: weights stay where they are, the rows' caches are cut over its devices. All
                processes of a job make the same calls.

        Raises:
            UserError: the unconditional row and an image do not fit the context; the mesh does not
                divide the rows or the twins.
        """
        self.config = config
        self._shape = model.config
        self._model = slots.for_decoding(model) if mesh is None else model
        self._mesh = mesh
        self._unconditional = None if unconditional is None else tuple(map(int, unconditional))
        twins = config.twins or config.rows
        devices = 1
        if mesh is not None:
            devices = partition.extent(mesh.shape, rules.SERVING["batch"])
        for count, what in ((config.rows, "rows"), (twins, "twins")):
            if count % devices:
                raise UserError(
                    f"{count} {what} cannot be shared out over {devices} devices: take a multiple "
                    f"of {devices}"
                )
        if self._unconditional is not None:
            needed = len(self._unconditional) + self._shape.flow.tokens + 1
            if needed > config.context:
                raise UserError(
                    f"guidance needs {needed} positions, the context holds {config.context}"
                )
        with self._placed():
            self._state, self._settings = slots.empty(
                self._model,
                None if unconditional is None else jnp.asarray(self._unconditional, jnp.int32),
                rows=config.rows,
                twins=twins,
                slots=config.context,
                images=config.images,
            )
        self._places = jax.tree.map(lambda leaf: leaf.sharding, self._state)
        self._seats = [_Seat() for _ in range(config.rows)]
        self._halted = np.zeros(config.rows, bool)
        self._lock = threading.Lock()
        self._queue: collections.deque[tuple[int, Request]] = collections.deque()
        self._cancelled: set[int] = set()
        self._numbers = itertools.count()
        self._clock = itertools.count(1)
        self.fed = 0
        """Positions of prompts that were read so far."""
        self.reused = 0
        """Positions of prompts that were cached already."""
        self.reads = 0
        """Calls that read a piece of a prompt so far."""
        self.steps = 0
        """Calls of the decode step so far, at most."""

    def submit(self, request: Request) -> int:
        """Queues a request; its number is the `row` of its events.

        Raises:
            UserError: a setting out of range, or a prompt that does not fit.
        """
        self.check(request)
        with self._lock:
            number = next(self._numbers)
            self._queue.append((number, request))
        return number

    def check(self, request: Request, name: str = "the prompt") -> None:
        """Raises UserError as `submit` does; `name`: what to call the prompt."""
        settings, config = request.settings(), self.config
        check_settings(settings, 1, self._shape, self._unconditional, request.stop)
        check_prompts([request.row], settings, self._shape, None, config.context, [name])
        if request.row.views and self._shape.vlm.vision is None:
            raise UserError(f"{name} has views, but the model has no vision tower")
        if request.max_images > config.images:
            raise UserError(
                f"max_images is {request.max_images}, this engine draws up to {config.images}"
            )

    def cancel(self, number: int) -> None:
        """Ends a request: its last event is a `DoneEvent` with the reason "cancelled"."""
        with self._lock:
            self._cancelled.add(number)

    @property
    def busy(self) -> bool:
        """Whether any request is queued or under way."""
        return bool(self._queue) or any(seat.number is not None for seat in self._seats)

    @property
    def queued(self) -> int:
        """Requests that have no row yet."""
        return len(self._queue)

    def run(self) -> Iterator[Event]:
        """Yields events until no request is left."""
        while self.busy:
            yield from self.poll()

    def poll(self) -> list[Event]:
        """One round: lets requests join, reads pieces of prompts, steps all rows.

        Returns:
            What is new. Events of a request are in order; the last one is a `DoneEvent`.
        """
        with self._placed():
            events = self._leave()
            self._join()
            self._read()
            if any(seat.reader for seat in self._seats):
                events += self._step()
        return events

    def warm_up(self) -> None:
        """Compiles what any request without views needs; only while no request is there."""
        token = np.array([self._shape.special.end], np.int32)
        none = np.zeros((0, self._shape.flow.tokens, self._shape.flow.channels), np.float32)
        for length in dict.fromkeys(min(n, self.config.context - 1) for n in self._pieces()):
            ids = np.repeat(token, length)
            places = np.repeat(np.arange(length)[:, None], 3, 1)
            kinds = np.full(length, Kind.TEXT)
            self.submit(Request(Row(ids, kinds, places, none), max_new_tokens=1, max_images=0))
        collections.deque(self.run(), maxlen=0)
        self.fed = self.reads = self.steps = 0

    def _placed(self) -> contextlib.AbstractContextManager:
        if self._mesh is None:
            return contextlib.nullcontext()
        return rules.use(self._mesh, rules.SERVING)

    def _in_place(self, state: SampleState) -> SampleState:
        """On a mesh, with every array named as lying where it lay at the start: nothing moves.

        The partitioner names the same place otherwise in every program, and each name of an
        argument's place is a compilation.
        """
        return state if self._mesh is None else jax.device_put(state, self._places)

    def _leave(self) -> list[Event]:
        """Ends what was cancelled."""
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            waiting = [n for n, _ in self._queue if n in cancelled]
            self._queue = collections.deque(q for q in self._queue if q[0] not in cancelled)
        events: list[Event] = [DoneEvent(number, "cancelled") for number in waiting]
        for index, seat in enumerate(self._seats):
            if seat.number in cancelled and seat.number is not None:
                events.append(self._end(index, "cancelled"))
        return events

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

    def _place_of(self, request: Request) -> tuple[int, int] | None:
        """The row for a request and how much of its prompt lies there; None if all are taken."""
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
                return best, min(same[best], len(request.row) - 1)
        # Rows that keep nothing first, then the one that was used least recently.
        return min(free, key=lambda i: (self._seats[i].kept is not None, self._seats[i].used)), 0

    def _join(self) -> None:
        """Gives rows to queued requests, first come, first served."""
        while self._queue:
            place = self._place_of(self._queue[0][1])
            if place is None:
                return
            with self._lock:
                number, request = self._queue.popleft()
            index, start = place
            if request.row.views:
                start = 0 if np.any(request.row.kinds[:start] == Kind.VIT) else start
            self._seats[index] = _Seat(number, request, start)
            self.reused += start

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
        sizes = self._pieces()
        return next((size for size in sizes if size >= left), sizes[-1])

    def _pieces(self) -> list[int]:
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

    def _step(self) -> list[Event]:
        """Some steps of every row, and what they gave."""
        state = slots.advance(
            self._model,
            self._state,
            self._settings,
            self._halted,
            np.int32(self.config.steps),
            # Rows that are done do not wait for the others where their prompts can be read at once.
            np.int32(self._lanes(SHORT_PIECES[0]) if self._queue else self.config.rows),
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
