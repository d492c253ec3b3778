"""A checksum of a tree of arrays, wherever they lie."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from starflow2_jax.training.tree_files import Path, flatten

_CHUNK_BYTES = 64 * 2**20


def _is_local(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _chunks(leaf: Any) -> Iterator[np.ndarray]:
    """The rows of an array in order, on this host.

    All at once, or, where parts lie on other hosts, at most `_CHUNK_BYTES` (or one row) at a time.
    """
    if _is_local(leaf):
        yield np.asarray(leaf)
        return
    mesh = leaf.sharding.mesh
    everywhere = jax.NamedSharding(mesh, jax.P())
    rows = leaf.shape[0] if leaf.ndim else 1
    step = max(1, min(rows, _CHUNK_BYTES * rows // max(leaf.nbytes, 1)))
    cut = jax.jit(jax.lax.dynamic_slice_in_dim, static_argnums=2, out_shardings=everywhere)
    for start in range(0, rows, step):
        part = cut(leaf, start, min(step, rows - start)) if leaf.ndim else leaf
        yield np.asarray(part.addressable_data(0))


class TreeDigest:
    """SHA-256 of a tree's paths, shapes, dtypes and bytes, leaf after leaf in sorted order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._last: Path = ()

    def start(self, path: Path, shape: Sequence[int], dtype: np.dtype) -> None:
        """The next leaf.

        Raises:
            ValueError: its path does not follow the last one's.
        """
        if path <= self._last:
            raise ValueError(f"{path} does not follow {self._last}")
        self._last = path
        self._digest.update(json.dumps([path, list(shape), np.dtype(dtype).name]).encode())

    def add(self, part: np.ndarray) -> None:
        """The leaf's next rows."""
        # As bytes, since the buffer protocol knows no bfloat16.
        self._digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8))

    def hexdigest(self) -> str:
        """In hexadecimal."""
        return self._digest.hexdigest()


def checksum(tree: Any) -> str:
    """SHA-256, in hexadecimal, of a tree's paths, shapes, dtypes and bytes.

    The same for numpy and JAX arrays, on any mesh and host count, and for keys 1 and "1". At most
    one leaf at a time is on the host. In a job of several processes all of them make the call.
    """
    digest = TreeDigest()
    for path, leaf in sorted(flatten(tree).items(), key=lambda item: item[0]):
        digest.start(path, leaf.shape, leaf.dtype)
        for part in _chunks(leaf):
            digest.add(part)
    return digest.hexdigest()
