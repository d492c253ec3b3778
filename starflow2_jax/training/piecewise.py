"""Arrays on disk piece by piece, so that memory holds a few pieces: both directions."""

import asyncio
import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """An array that is read while it is written, some rows of its leading axis at a time.

    Attributes:
        shape, dtype: of the whole.
        chunk: shape of the pieces on disk.
        read: rows [start, stop) of the leading axis; of an array without axes, the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)


def chunk_shape(
    shape: Sequence[int], itemsize: int, most_bytes: int, shards: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Pieces of at most `most_bytes` where they can be cut so, leading axes first.

    Args:
        shape: of the array.
        itemsize: bytes of an element.
        most_bytes: of a piece.
        shards: into how many each axis is cut by those who will read it: no piece crosses a cut.
    """
    shards = shards or (1,) * len(shape)
    chunk = [size // parts for size, parts in zip(shape, shards, strict=True)]
    for axis, size in enumerate(chunk):
        over = math.prod(chunk) * itemsize / most_bytes
        if over <= 1:
            break
        most = max(1, int(size / over))
        # Inside a shard they are of one size, so that none crosses its border.
        even = (part for part in range(most, 0, -1) if size % part == 0)
        chunk[axis] = most if shards[axis] == 1 else next(even)
    return tuple(chunk)


class PiecewiseHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler for `Pieces`: one after another, in the order of their paths.

    Orbax itself writes all arrays side by side, each in one go.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Lock()

    async def _open_and_write(
        self, value: Pieces, tspec: dict[str, Any], ts_context: ts.Context
    ) -> None:
        async with self._turn:
            tspec["metadata"]["chunks"] = list(value.chunk)
            # Weights shrink by a fifth at best, and packing them takes five times as long as
            # writing them.
            tspec["metadata"]["compressor"] = None
            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            if not value.ndim:
                await store.write(value.read(0, 1))
                return
            writing: ts.WriteFutures | None = None
            for start in range(0, value.shape[0], value.chunk[0]):
                stop = min(start + value.chunk[0], value.shape[0])
                rows = value.read(start, stop)  # while the last ones are written
                if writing is not None:
                    await writing
                writing = store[start:stop].write(rows)
            if writing is not None:
                await writing


def piecewise_checkpointer() -> ocp.Checkpointer:
    """Writes a tree of `Pieces`, as item `tree`, beside JSON `metadata`."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (Pieces, PiecewiseHandler()),
        # For none of its arrays: Orbax looks here whether to record their layouts.
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            tree=ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            metadata=ocp.JsonCheckpointHandler(),
        )
    )


def open_array(folder: pathlib.Path, path: Sequence[str]) -> ts.TensorStore:
    """One array of what `checkpoint.save_tree` wrote, unread: `store[i].read().result()`.

    Args:
        folder: that was written.
        path: of keys inside the tree.
    """
    base = (folder / "tree").expanduser().absolute().as_uri()
    kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(path)}
    return ts.open({"driver": "zarr", "kvstore": kvstore}, read=True).result()
