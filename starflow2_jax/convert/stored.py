"""A model's parameters between source tensors and the weights on disk, a few tensors at a time.

Nothing is put together in memory: a stacked parameter is read and written layer by layer, a large
table by some of its rows.
"""

import contextlib
import math
import pathlib
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from starflow2_jax.convert.layout import contiguous
from starflow2_jax.convert.table import Entry, misfits, source_shapes
from starflow2_jax.convert.tensor_files import TensorFile
from starflow2_jax.errors import UserError
from starflow2_jax.training.checkpoint import TreeDigest, save_tree, stored_tree
from starflow2_jax.training.piecewise import Pieces, chunk_shape, open_array

# What the writer holds of an array at a time, where rows can be read alone.
_CHUNK_BYTES = 32 * 2**20
_FLOATS = ("float16", "bfloat16", "float32", "float64")

Shapes = Mapping[str, tuple[int, ...]]


def check_absent(folder: pathlib.Path) -> None:
    """Checks that a folder is not there yet.

    Raises:
        UserError: it is.
    """
    if folder.exists():
        raise UserError(f"{folder} already exists; delete it first, or choose another place")


@contextlib.contextmanager
def complete_or_nothing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a folder beside `folder` to write into, which becomes `folder` at the end.

    After an error nothing is left; what a killed process left is removed by the next one.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    folder = folder.expanduser().absolute()
    check_absent(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def problems_of(
    entries: Sequence[Entry],
    shapes: Shapes,
    source: TensorFile,
    integers: Collection[str] = (),
) -> list[str]:
    """All in which the source does not make up a model of these shapes; see `table.misfits`.

    Tensors are of floats, save for those named in `integers`: these are int32.
    """
    problems = misfits(entries, shapes, source.shapes)
    for entry in entries:
        names = [name for group in entry.names for name in group if name in source.dtypes]
        types = {source.dtypes[name] for name in names}
        problems += [
            f"not of {'int32' if name in integers else 'floats'}: {name}"
            for name in names
            if source.dtypes[name] not in (("int32",) if name in integers else _FLOATS)
        ]
        if len(types) > 1:
            problems.append(f"of several types ({', '.join(sorted(types))}): {', '.join(names)}")
    return problems


def _pieces(
    entry: Entry, shape: tuple[int, ...], source: TensorFile, shards: Sequence[int] | None
) -> Pieces:
    dtype = np.dtype(source.dtypes[entry.names[0][0]])

    def joined(layer: int) -> np.ndarray:
        return entry.join(*(source.read(name) for name in entry.names[layer]))

    def read(start: int, stop: int) -> np.ndarray:
        if not entry.stacked:
            whole = joined(0)
            return whole[start:stop] if shape else whole
        if stop == start + 1:
            return joined(start)[None]
        return np.stack([joined(layer) for layer in range(start, stop)])

    chunk = chunk_shape(shape, dtype.itemsize, _CHUNK_BYTES, shards)
    if entry.stacked and math.prod(shape[1:]) * dtype.itemsize >= 2**20:
        # So that a layer can be read alone.
        chunk = (1, *chunk[1:])
    return Pieces(shape, dtype, chunk, read)


def _hashed(pieces: Pieces, path: tuple[str, ...], digest: TreeDigest) -> Pieces:
    """The same, that adds what is read to the digest: each row is read once, in order."""

    def read(start: int, stop: int) -> np.ndarray:
        if start == 0:
            digest.start(path, pieces.shape, pieces.dtype)
        rows = contiguous(pieces.read(start, stop))
        digest.add(rows)
        return rows

    return Pieces(pieces.shape, pieces.dtype, pieces.chunk, read)


def write_weights(
    folder: pathlib.Path,
    entries: Sequence[Entry],
    shapes: Shapes,
    source: TensorFile,
    shards: Mapping[str, Sequence[int]] | None = None,
) -> str:
    """Writes every parameter, in the source's types.

    Args:
        folder: to be made.
        entries, shapes: of the model; the source fits them (`problems_of`).
        source: open.
        shards: by path, into how many each axis is cut by those who will read it.

    Returns:
        The checksum of the tree, as `checkpoint.checksum` has it.

    Raises:
        UserError: the folder cannot be written.
    """
    digest, tree = TreeDigest(), {}
    for entry in entries:
        pieces = _pieces(entry, shapes[entry.path], source, shards and shards[entry.path])
        *parents, leaf = path = tuple(entry.path.split("."))
        node: dict[str, Any] = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = _hashed(pieces, path, digest)
    save_tree(folder, tree, {})
    return digest.hexdigest()


def stored_types(
    weights: pathlib.Path, entries: Sequence[Entry], shapes: Shapes
) -> dict[str, np.dtype]:
    """The type of every source tensor of what `write_weights` or `save_tree` wrote.

    Raises:
        UserError: the folder holds other parameters, or is damaged.
    """
    stored = {".".join(path): leaf for path, leaf in stored_tree(weights).items()}
    if {path: tuple(leaf.shape) for path, leaf in stored.items()} != dict(shapes):
        raise UserError(f"{weights} does not hold the model that {weights.parent} describes")
    return {name: stored[e.path].dtype for e in entries for group in e.names for name in group}


def tensors_of(
    weights: pathlib.Path,
    entries: Sequence[Entry],
    digest: TreeDigest | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Source names and arrays, one layer of one parameter after another.

    Args:
        weights: the folder that holds them.
        entries: of the model.
        digest: what is read is added to it; the entries are then in the order of their paths.

    Raises:
        UserError: damaged files.
    """
    try:
        for entry in entries:
            path = tuple(entry.path.split("."))
            store = open_array(weights, path)
            if digest is not None:
                digest.start(path, store.shape, store.dtype.numpy_dtype)
            for layer, group in enumerate(entry.names):
                part = (store[layer] if entry.stacked else store).read().result()
                if digest is not None:
                    digest.add(part)
                yield from zip(group, entry.split(part), strict=True)
    except ValueError as error:
        raise UserError(f"{weights} cannot be read, convert it again ({error})") from error


def wanted_tensors(entries: Sequence[Entry], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the source tensors, in the order in which `tensors_of` yields them."""
    wanted = source_shapes(entries, shapes)
    return {name: wanted[name] for e in entries for group in e.names for name in group}
