"""Continuous batching: requests join and leave the rows of one compiled decode step.

    engine = Engine(model, EngineConfig(rows=16, context=512), unconditional=tokens)
    number = engine.submit(Request(row, seed=1, guidance=2.0))
    while engine.busy:
        for event in engine.poll(): ...

Rows that write, draw, read their prompts or wait for a twin share every step. The same request with
the same seed gives the same bits in any row and any company, for one `EngineConfig` and mesh. A
request with `keep` leaves its row's caches behind: a later one with `reuse` that goes on from there
reads only what is new, images that were drawn included.

The rows step together, or in several groups beside each other, each in a thread of its own.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Kind, Pretzel
from starflow2_jax.nn import partition
from starflow2_jax.parallel import rules
from starflow2_jax.sampling import slots
from starflow2_jax.sampling.generate import DoneEvent, Event, check_prompts, check_settings
from starflow2_jax.sampling.prompts import Row
from starflow2_jax.sampling.request import EngineConfig, Request
from starflow2_jax.sampling.row_group import RowGroup

GROUPS_ON_CPU = 2
"""Much of a small model's step is done by one core of a CPU: another group keeps another one busy.

A constant, and not the number of cores: how many rows a group has decides how numbers are rounded.
"""

GROUPED_BYTES = 2**26
"""Of larger models each group would read all weights from memory in each of its steps."""


def groups_for(model: Pretzel, rows: int, twins: int) -> int:
    """Into how many groups the rows and twins of an engine without a mesh are best shared out."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    alike = rows % GROUPS_ON_CPU == 0 and twins % GROUPS_ON_CPU == 0
    small = jax.default_backend() == "cpu" and size <= GROUPED_BYTES
    return GROUPS_ON_CPU if alike and small else 1


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
            UserError: the unconditional row and an image do not fit the context; the mesh or the
                groups do not divide the rows or the twins.
            ValueError: several groups on a mesh.
        """
        twins = config.twins or config.rows
        groups = config.groups
        if not groups:
            groups = 1 if mesh is not None else groups_for(model, config.rows, twins)
        self.config = dataclasses.replace(config, twins=twins, groups=groups)
        self._shape = model.config
        self._mesh = mesh
        self._unconditional = None if unconditional is None else tuple(map(int, unconditional))
        devices = 1
        if mesh is not None:
            if groups > 1:
                raise ValueError("the rows on a mesh are one group")
            devices = partition.extent(mesh.shape, rules.SERVING["batch"])
        for count, what in ((config.rows, "rows"), (twins, "twins")):
            for parts, of in ((devices, "devices"), (groups, "groups")):
                if count % parts:
                    raise UserError(
                        f"{count} {what} cannot be shared out over {parts} {of}: take a multiple "
                        f"of {parts}"
                    )
        if self._unconditional is not None:
            needed = len(self._unconditional) + self._shape.flow.tokens + 1
            if needed > config.context:
                raise UserError(
                    f"guidance needs {needed} positions, the context holds {config.context}"
                )
        share = dataclasses.replace(
            self.config, rows=config.rows // groups, twins=twins // groups, groups=1
        )
        decoder = slots.for_decoding(model) if mesh is None else model
        clock = itertools.count(1)
        with self._placed():
            self._groups = [
                RowGroup(decoder, share, self._unconditional, clock, keep_places=mesh is not None)
                for _ in range(groups)
            ]
        self._pool = concurrent.futures.ThreadPoolExecutor(groups, "row_group")
        self._running: dict[concurrent.futures.Future[list[Event]], RowGroup] = {}
        self._group_of: dict[int, RowGroup] = {}  # by the numbers of requests that have a row
        self._lock = threading.Lock()
        self._queue: collections.deque[tuple[int, Request]] = collections.deque()
        self._cancelled: set[int] = set()
        self._numbers = itertools.count()
        self.reused = 0
        """Positions of prompts that were cached already."""

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
        return bool(self._queue) or bool(self._group_of)

    @property
    def queued(self) -> int:
        """Requests that have no row yet."""
        return len(self._queue)

    @property
    def fed(self) -> int:
        """Positions of prompts that were read so far."""
        return sum(group.fed for group in self._groups)

    @property
    def reads(self) -> int:
        """Calls that read a piece of a prompt so far."""
        return sum(group.reads for group in self._groups)

    @property
    def steps(self) -> int:
        """Calls of the decode step so far, at most."""
        return sum(group.steps for group in self._groups)

    def run(self) -> Iterator[Event]:
        """Yields events until no request is left."""
        while self.busy:
            yield from self.poll()

    def poll(self) -> list[Event]:
        """One round: lets requests join, reads pieces of prompts, steps all rows.

        Of several groups, those that are at rest begin a round; the first one to end it is waited
        for.

        Returns:
            What is new. Events of a request are in order; the last one is a `DoneEvent`.
        """
        events = self._leave()
        self._join()
        taken = [group for group in self._at_rest() if group.taken]
        waiting = bool(self._queue)
        if len(self._groups) == 1:
            with self._placed():
                return events + self._seen([e for group in taken for e in group.round(waiting)])
        for group in taken:
            self._running[self._pool.submit(group.round, waiting)] = group
        first = concurrent.futures.FIRST_COMPLETED
        for future in concurrent.futures.wait(self._running, return_when=first).done:
            del self._running[future]
            events += self._seen(future.result())
        return events

    def warm_up(self) -> None:
        """Compiles what any request without views needs; only while no request is there."""
        token = np.array([self._shape.special.end], np.int32)
        none = np.zeros((0, self._shape.flow.tokens, self._shape.flow.channels), np.float32)
        sizes = (min(n, self.config.context - 1) for n in self._groups[0].pieces())
        for length in dict.fromkeys(sizes):
            ids = np.repeat(token, length)
            places = np.repeat(np.arange(length)[:, None], 3, 1)
            kinds = np.full(length, Kind.TEXT)
            self.submit(Request(Row(ids, kinds, places, none), max_new_tokens=1, max_images=0))
            # One at a time: what one group compiled is there for the others.
            collections.deque(self.run(), maxlen=0)
        for group in self._groups:
            group.fed = group.reads = group.steps = 0

    def _placed(self) -> contextlib.AbstractContextManager:
        if self._mesh is None:
            return contextlib.nullcontext()
        return rules.use(self._mesh, rules.SERVING)

    def _at_rest(self) -> list[RowGroup]:
        running = self._running.values()
        return [group for group in self._groups if group not in running]

    def _seen(self, events: list[Event]) -> list[Event]:
        """Takes note of the requests that are done."""
        for event in events:
            if isinstance(event, DoneEvent):
                del self._group_of[event.row]
        return events

    def _leave(self) -> list[Event]:
        """Ends what was cancelled; what a running group has, when it is at rest."""
        with self._lock:
            cancelled = self._cancelled
            waiting = [n for n, _ in self._queue if n in cancelled]
            self._queue = collections.deque(q for q in self._queue if q[0] not in cancelled)
            running = self._running.values()
            self._cancelled = {n for n in cancelled if self._group_of.get(n) in running}
        events: list[Event] = [DoneEvent(number, "cancelled") for number in waiting]
        for group in self._at_rest():
            events += self._seen(group.leave(cancelled))
        return events

    def _join(self) -> None:
        """Gives rows to queued requests, first come, first served."""
        at_rest = self._at_rest()
        running = [group for group in self._groups if group not in at_rest]
        while self._queue:
            number, request = self._queue[0]
            places = [(place, group) for group in at_rest if (place := group.place_for(request))]
            if not places:
                return
            place, group = max(places, key=lambda found: found[0].worth)
            if request.reuse:
                # What it goes on from may lie in a group that runs: that is at rest soon.
                others = [other for one in running if (other := one.place_for(request))]
                if any(other.cached > place.cached for other in others):
                    return
            with self._lock:
                self._queue.popleft()
            self.reused += group.take(place, number, request)
            self._group_of[number] = group
