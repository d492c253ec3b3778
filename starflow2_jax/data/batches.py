"""The batches of a job: the same rows in the same order, however many processes read them.

Packing carries state from row to row, so it cannot be shared out row by row. Instead the stream of
documents is dealt to a fixed number of lanes, lane l taking documents l, l + lanes, ...; each lane
packs its own rows, and a batch is one piece of every lane, one below the other. A process reads the
lanes that hold its rows, and no others. Lanes are independent, so their positions are saved one by
one and can be shared out to another number of processes.

Letters: B rows.
"""

import contextlib
import copy
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from starflow2_jax.data.packing import BatchShape, HostBatch, fits, packed, with_counted
from starflow2_jax.errors import UserError

LOG = logging.getLogger(__name__)

_FEWEST = 1000
"""Records of a source before which its share of corrupt ones is taken as if it were that many."""

_IN_A_ROW = 1000
"""Records that are skipped one after another before a lane gives up."""


@contextlib.contextmanager
def skipped_log(path: pathlib.Path) -> Iterator[None]:
    """Names skipped records in a file, too, which is made with the first one."""
    handler = logging.FileHandler(path, delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOG.addHandler(handler)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        handler.close()


@dataclasses.dataclass(frozen=True)
class Documents:
    """An endless stream of documents, and how to read it.

    Attributes:
        dataset: document i for every i, as `packing.features` gives it. Where it comes from a
            record it has also `source` and `record` (texts); a corrupt record has these and
            `error`, and no features.
        threads: that read, in each lane.
        ahead: documents that a lane reads ahead.
        workers: processes that read and pack; 0: this one. At most one a lane.
        most_corrupt: share of a source's records that may be corrupt.
    """

    dataset: grain.MapDataset
    threads: int = 1
    ahead: int = 64
    workers: int = 0
    most_corrupt: float = 0.01


@dataclasses.dataclass
class SourceCounts:
    """What became of a source's records so far.

    Attributes:
        seen: all.
        corrupt: skipped, since they could not be read.
        unfit: skipped, since no row of the batch holds them.
    """

    seen: int = 0
    corrupt: int = 0
    unfit: int = 0

    def __add__(self, other: "SourceCounts") -> "SourceCounts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return SourceCounts(*(a + b for a, b in pairs))


@dataclasses.dataclass
class _Tally:
    """A lane's counts, and the skipped records that nobody has been told of."""

    counts: dict[str, SourceCounts] = dataclasses.field(default_factory=dict)
    skipped: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    def state(self) -> dict[str, list[int]]:
        return {name: list(dataclasses.astuple(c)) for name, c in self.counts.items()}

    def set_state(self, state: Mapping[str, Sequence[int]]) -> None:
        self.counts = {name: SourceCounts(*counts) for name, counts in state.items()}


class _Screened(grain.IterDataset):
    """The documents that can be packed; the others are tallied."""

    def __init__(self, parent: grain.IterDataset, shape: BatchShape, tally: _Tally) -> None:
        super().__init__(parent)
        self._shape = shape
        self._tally = tally

    def __iter__(self) -> grain.DatasetIterator:
        return _ScreenedIterator(iter(self.parents[0]), self._shape, self._tally)


class _ScreenedIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, shape: BatchShape, tally: _Tally) -> None:
        super().__init__(parent)
        self._shape = shape
        self._tally = tally
        self._documents = parent

    def __next__(self) -> dict[str, np.ndarray]:
        for _ in range(_IN_A_ROW):
            document = with_counted(next(self._documents), self._shape)
            error = document.get("error", "")
            misfit = "" if error else fits(document, self._shape)
            if misfit and "source" not in document:
                raise UserError(f"{misfit}: make rows longer, or documents shorter")
            if "source" in document:
                source, record = document["source"], document["record"]
                counts = self._tally.counts.setdefault(source, SourceCounts())
                counts.seen += 1
                counts.corrupt += bool(error)
                counts.unfit += bool(misfit)
                if error or misfit:
                    self._tally.skipped.append((source, record, error or misfit))
            if not error and not misfit:
                return document
        source, record, why = self._tally.skipped[-1]
        raise UserError(
            f"data source {source}: {_IN_A_ROW} records in a row could not be used; the last one "
            f"is {record}: {why}"
        )

    def get_state(self) -> dict[str, Any]:
        return {"documents": self._documents.get_state(), "counts": self._tally.state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._documents.set_state(state["documents"])
        self._tally.set_state(state["counts"])


@dataclasses.dataclass(frozen=True)
class _Report:
    """What goes with a piece of a batch: for each lane, its position behind it, and its tally."""

    states: dict[int, Any]
    counts: dict[int, dict[str, SourceCounts]]
    skipped: list[tuple[str, str, str]]


class _Lanes(grain.IterDataset):
    """Some lanes' pieces of each batch, with a `_Report`."""

    def __init__(
        self,
        documents: Documents,
        shape: BatchShape,
        lanes: Sequence[int],
        states: Mapping[int, Any],
    ) -> None:
        super().__init__()
        self._documents = documents
        self._shape = shape
        self._lanes = list(lanes)
        self._states = dict(states)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keeps a worker's share of the lanes; Grain calls it."""
        del sequential_slice
        self._lanes = self._lanes[sl]

    def __iter__(self) -> grain.DatasetIterator:
        return _LanesIterator(self._documents, self._shape, self._lanes, self._states)


class _LanesIterator(grain.DatasetIterator):
    def __init__(
        self,
        documents: Documents,
        shape: BatchShape,
        lanes: Sequence[int],
        states: Mapping[int, Any],
    ) -> None:
        super().__init__()
        read = grain.ReadOptions(
            num_threads=documents.threads, prefetch_buffer_size=documents.ahead
        )
        self._tallies = {lane: _Tally() for lane in lanes}
        self._lanes: dict[int, grain.DatasetIterator] = {}
        for lane, tally in self._tallies.items():
            stream = documents.dataset
            if shape.lanes > 1:
                stream = stream[lane :: shape.lanes]
            screened = _Screened(stream.to_iter_dataset(read), shape, tally)
            self._lanes[lane] = iter(packed(screened, shape, shape.rows // shape.lanes))
            if lane in states:
                self._lanes[lane].set_state(states[lane])

    def __next__(self) -> dict[str, Any]:
        pieces = {str(lane): next(iterator) for lane, iterator in self._lanes.items()}
        report = _Report(
            states={lane: copy.deepcopy(i.get_state()) for lane, i in self._lanes.items()},
            counts={lane: copy.deepcopy(t.counts) for lane, t in self._tallies.items()},
            skipped=[skipped for tally in self._tallies.values() for skipped in tally.skipped],
        )
        for tally in self._tallies.values():
            tally.skipped.clear()
        return {"pieces": pieces, "report": report}

    # The position travels in the reports.

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        del state

    def close(self) -> None:
        for iterator in self._lanes.values():
            iterator.close()


class _Joined(grain.IterDataset):
    """The pieces of `streams` in turn, joined to batches of this process's rows."""

    def __init__(
        self,
        parent: grain.IterDataset,
        streams: int,
        rows: slice,
        place: Callable[[HostBatch], Any] | None,
    ) -> None:
        super().__init__(parent)
        self._streams = streams
        self._rows = rows
        self._place = place

    def __iter__(self) -> grain.DatasetIterator:
        return _JoinedIterator(iter(self.parents[0]), self._streams, self._rows, self._place)


class _JoinedIterator(grain.DatasetIterator):
    def __init__(
        self,
        parent: grain.DatasetIterator,
        streams: int,
        rows: slice,
        place: Callable[[HostBatch], Any] | None,
    ) -> None:
        super().__init__(parent)
        self._pieces = parent
        self._streams = streams
        self._rows = rows
        self._place = place

    def __next__(self) -> tuple[Any, list[_Report]]:
        found = [next(self._pieces) for _ in range(self._streams)]
        pieces = {int(lane): piece for one in found for lane, piece in one["pieces"].items()}
        ordered = [pieces[lane] for lane in sorted(pieces)]
        batch = {
            name: np.concatenate([piece[name] for piece in ordered])[self._rows]
            for name in ordered[0]
        }
        reports = [one["report"] for one in found]
        return (batch if self._place is None else self._place(batch)), reports

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        del state


class Batches(grain.IterDataset):
    """A process's rows of every batch of a job, see `pipeline.packed_batches`."""

    def __init__(
        self,
        documents: Documents,
        shape: BatchShape,
        rows: slice,
        place: Callable[[HostBatch], Any] | None,
    ) -> None:
        super().__init__()
        self._documents = documents
        self._shape = shape
        self._rows = rows
        self._place = place

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self._documents, self._shape, self._rows, self._place)


class BatchIterator(grain.DatasetIterator):
    """Batches in order; the position can be saved, also for another number of processes.

    Call `close` to end its threads and worker processes at once.
    """

    def __init__(
        self,
        documents: Documents,
        shape: BatchShape,
        rows: slice,
        place: Callable[[HostBatch], Any] | None,
    ) -> None:
        super().__init__()
        self._documents = documents
        self._shape = shape
        self._place = place
        each = shape.rows // shape.lanes
        self._lanes = range(rows.start // each, -(-rows.stop // each))
        above = self._lanes.start * each
        self._rows = slice(rows.start - above, rows.stop - above)
        self._states: dict[int, Any] = {}
        self._counts: dict[int, dict[str, SourceCounts]] = {}
        self._named: set[tuple[str, str]] = set()
        self._source: grain.DatasetIterator | None = None

    def _start(self) -> grain.DatasetIterator:
        lanes = _Lanes(self._documents, self._shape, self._lanes, self._states)
        workers = min(self._documents.workers, len(self._lanes))
        stream: grain.IterDataset = lanes
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain hands its flags on, and nobody else reads any
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
            stream = lanes.mp_prefetch(options)
        joined = _Joined(stream, max(workers, 1), self._rows, self._place)
        ahead = 4 if self._place is None else 2  # batches; device memory is scarcer
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(joined, prefetch_buffer_size=ahead)
        )

    def __next__(self) -> Any:
        if self._source is None:
            self._source = self._start()
        batch, reports = next(self._source)
        for report in reports:
            self._states |= report.states
            self._counts |= report.counts
            for source, record, why in report.skipped:
                if (source, record) not in self._named:  # once, not in every epoch
                    self._named.add((source, record))
                    LOG.warning("skipped a record of %s: %s: %s", source, record, why)
        self._check()
        return batch

    def counts(self) -> dict[str, SourceCounts]:
        """What became of the records of each source, in the lanes of this process."""
        total: dict[str, SourceCounts] = {}
        for lane in self._counts.values():
            for source, counts in lane.items():
                total[source] = total.get(source, SourceCounts()) + counts
        return total

    def _check(self) -> None:
        share = self._documents.most_corrupt
        for source, counts in self.counts().items():
            if counts.corrupt > share * max(counts.seen, _FEWEST):
                raise UserError(
                    f"data source {source}: {counts.corrupt} of {counts.seen} records are corrupt, "
                    f"more than the share of {share:g} that may be; they are named in the log"
                )

    def get_state(self) -> dict[str, Any]:
        """The position: of each lane of this process."""
        states = {str(lane): self._states.get(lane) for lane in self._lanes}
        return {"lanes": self._shape.lanes, "states": states}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position that `get_state` gave, here or in the processes of another job.

        Raises:
            UserError: the position is of another number of lanes, or lacks one of this process's.
        """
        self.set_states([state])

    def set_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Moves to the position that the processes of a job saved, of whatever number they were.

        Args:
            states: of all its processes, or of those that hold this process's lanes.

        Raises:
            UserError: see `set_state`.
        """
        known: dict[str, Any] = {}
        for state in states:
            if state.get("lanes") != self._shape.lanes:
                raise UserError(
                    f"the data's position is of a batch of {state.get('lanes')} lanes, but now it "
                    f"has {self._shape.lanes}; use the config that wrote it"
                )
            known |= state["states"]
        missing = [lane for lane in self._lanes if str(lane) not in known]
        if missing:
            raise UserError(f"the data's position of lane {missing[0]} is missing")
        self.close()
        mine = {lane: known[str(lane)] for lane in self._lanes}
        self._states = {lane: state for lane, state in mine.items() if state is not None}
        self._counts = {}

    def close(self) -> None:
        """Ends the threads and worker processes; the next batch starts them again."""
        if self._source is not None:
            self._source.close()
            self._source = None
