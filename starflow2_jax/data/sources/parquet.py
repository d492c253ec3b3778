"""Parquet files with images as bytes, or as structs of bytes and path as Hugging Face writes them.

Parquet is read a row group at a time. So the order is random by groups: a few groups, drawn at
random, are kept at a time, and their rows come in random order.
"""

import collections
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from starflow2_jax.data.sources.index import Arrays, cached_index
from starflow2_jax.data.sources.record import Paths, Record, Source, expand
from starflow2_jax.errors import UserError

_VERSION = "parquet 1"


class ParquetSource(Source):
    """Rows of Parquet files; the fields are the columns.

    Needs pyarrow: `pip install 'starflow2-jax[data]'`.
    """

    def __init__(
        self,
        paths: Paths,
        columns: Sequence[str] | None = None,
        groups: int = 8,
        index: str | os.PathLike[str] | None = None,
    ) -> None:
        """Finds the files and reads their footers, where that was not done before.

        Args:
            paths: of the files; patterns with `*` are expanded.
            columns: to read; default all.
            groups: row groups whose rows are shuffled together, and kept in memory.
            index: folder for the footers' numbers; default beside the first file.

        Raises:
            UserError: no such files, files of another kind, no such column, no place for the index.
        """
        if groups < 1:
            raise ValueError(f"groups is {groups}; at least one row group has to be kept")
        self._files = expand(paths)
        self._columns = list(columns) if columns is not None else None
        self._groups = groups
        arrays = cached_index(self._files, index, _VERSION, self._build)
        self._file_of = np.asarray(arrays["file"])  # of each row group
        self._number = np.asarray(arrays["number"])  # of the row group in its file
        self._first = np.asarray(arrays["first"])  # row of each row group, and the end
        self._cache = _Groups(2 * groups)
        if self._columns is not None:
            has = _open(self._files[0]).schema_arrow.names
            for column in self._columns:
                if column not in has:
                    raise UserError(
                        f"{self._files[0]} has no column {column!r}; it has {', '.join(has)}"
                    )

    def _build(self) -> Arrays:
        file, number, rows = [], [], []
        for i, path in enumerate(self._files):
            footer = _open(path).metadata
            for group in range(footer.num_row_groups):
                file.append(i)
                number.append(group)
                rows.append(footer.row_group(group).num_rows)
        return {
            "file": np.array(file, np.int64),
            "number": np.array(number, np.int64),
            "first": np.concatenate([[0], np.cumsum(rows)]).astype(np.int64),
        }

    def __len__(self) -> int:
        return int(self._first[-1])

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def name(self, index: int) -> str:
        """File and row."""
        group = self._group(index)
        start = self._first[np.searchsorted(self._file_of, self._file_of[group])]
        return f"{self._files[self._file_of[group]]} row {index - int(start)}"

    def __getitem__(self, index: int) -> Record:
        group = self._group(index)
        path, number = self._files[self._file_of[group]], int(self._number[group])
        table = self._cache.get(group, lambda: _open(path).read_row_group(number, self._columns))
        [row] = table.slice(index - int(self._first[group]), 1).to_pylist()
        return Record(self.name(index), row)

    def order(self, start: int, stop: int, seed: int) -> grain.MapDataset:
        """Indices in random order by groups, see the module."""
        return _ByGroups(np.clip(self._first, start, stop), self._groups, seed)


def _open(path: pathlib.Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow: pip install 'starflow2-jax[data]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=True)
    # A damaged footer is either; Arrow's own exceptions are ValueErrors, or others by their kind.
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a Parquet file, or damaged ({reason})") from error


class _Groups:
    """The row groups used last; each is read by one thread. A copy for a worker starts empty."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._tables: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._reading: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return _Groups, (self._size,)

    def get(self, group: int, read: Any) -> Any:
        with self._lock:
            if group in self._tables:
                self._tables.move_to_end(group)
                return self._tables[group]
            reading = self._reading.setdefault(group, threading.Lock())
        with reading:
            with self._lock:
                if group in self._tables:
                    return self._tables[group]
            table = read()
            with self._lock:
                self._tables[group] = table
                self._reading.pop(group, None)
                while len(self._tables) > self._size:
                    self._tables.popitem(last=False)
        return table


class _ByGroups(grain.MapDataset):
    """An endless order: the groups shuffled, every few of them (a window) shuffled together."""

    def __init__(self, bounds: np.ndarray, groups: int, seed: int) -> None:
        super().__init__()
        self._bounds = np.unique(bounds)
        self._groups = groups
        self._order_seed = seed
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, at = divmod(index, int(self._bounds[-1] - self._bounds[0]))
        _, order, first = self._groups_of(epoch)
        window = int(np.searchsorted(first, at, side="right")) - 1
        return int(self._rows(epoch, window, order)[at - first[window]])

    # Threads may compute the same thing twice; they compute the same.

    def _groups_of(self, epoch: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The groups' order, and the first place of each window, and the end."""
        cached = self._epoch
        if cached is None or cached[0] != epoch:
            sizes = np.diff(self._bounds)
            order = np.random.default_rng([self._order_seed, epoch]).permutation(len(sizes))
            windows = np.add.reduceat(sizes[order], np.arange(0, len(sizes), self._groups))
            cached = epoch, order, np.concatenate([[0], np.cumsum(windows)])
            self._epoch = cached
        return cached

    def _rows(self, epoch: int, window: int, order: np.ndarray) -> np.ndarray:
        """The rows of a window in their order."""
        rows = self._windows.get((epoch, window))
        if rows is None:
            here = order[window * self._groups : (window + 1) * self._groups]
            rows = np.concatenate([np.arange(self._bounds[g], self._bounds[g + 1]) for g in here])
            rows = np.random.default_rng([self._order_seed, epoch, window]).permutation(rows)
            self._windows = dict(list(self._windows.items())[-3:]) | {(epoch, window): rows}
        return rows
