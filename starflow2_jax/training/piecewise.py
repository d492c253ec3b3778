"""Arrays on disk piece by piece, so that memory holds a few pieces: both directions."""

import asyncio
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts


class PiecewiseNumpyHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, without its copies, one chunk row after another.

    Orbax itself writes all arrays side by side, each in one go.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Lock()

    async def _open_and_write(
        self, value: np.ndarray, tspec: dict[str, Any], ts_context: ts.Context
    ) -> None:
        async with self._turn:
            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            if not value.ndim:
                await store.write(value)
                return
            rows = store.chunk_layout.write_chunk.shape[0]
            for start in range(0, len(value), rows):
                await store[start : start + rows].write(value[start : start + rows])


def in_pieces(array: np.ndarray, chunk_bytes: int) -> ocp.SaveArgs:
    """How to store an array in pieces of about `chunk_bytes`; a stack of large layers layerwise."""
    if array.nbytes <= chunk_bytes:
        return ocp.SaveArgs()
    layerwise = array.nbytes >= len(array) * 2**20
    return ocp.SaveArgs(chunk_byte_size=chunk_bytes, shard_axes=(0,) if layerwise else ())


def piecewise_checkpointer() -> ocp.Checkpointer:
    """Writes numpy arrays, as item `tree`, beside JSON `metadata`."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, PiecewiseNumpyHandler()),
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
