"""Released STARFlow and TarFlow checkpoints into model directories, and back, tensor by tensor.

A few tensors of one layer are in memory: stacked parameters are put together in mapped files on
disk, and written from there; on the way back they are read layer by layer.
"""

import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from starflow2_jax import flow_bundle
from starflow2_jax.convert import starflow, table
from starflow2_jax.convert.table import Entry
from starflow2_jax.convert.tensor_files import TensorFile, open_tensors, write_safetensors
from starflow2_jax.errors import UserError
from starflow2_jax.models.starflow import ImageFlow, ImageFlowConfig
from starflow2_jax.training.checkpoint import save_tree, stored_tree
from starflow2_jax.training.piecewise import open_array

# What the writer holds of an array at a time.
_CHUNK_BYTES = 32 * 2**20
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def _shapes(config: ImageFlowConfig) -> dict[str, tuple[int, ...]]:
    return table.shapes_of(lambda: ImageFlow(config, rngs=nnx.Rngs(0)))


def _wrong_types(entries: Sequence[Entry], source: TensorFile) -> list[str]:
    problems = []
    for entry in entries:
        names = [name for group in entry.names for name in group if name in source.dtypes]
        types = {source.dtypes[name] for name in names}
        problems += [f"not of floats: {n}" for n in names if source.dtypes[n] not in _FLOATS]
        if len(types) > 1:
            problems.append(f"of several types ({', '.join(sorted(types))}): {', '.join(names)}")
    return problems


def _assembled(
    entry: Entry, shape: tuple[int, ...], source: TensorFile, file: pathlib.Path
) -> np.ndarray:
    """A parameter in a mapped file, layer after layer."""
    read = lambda group: entry.join(*(source.read(name) for name in group))
    if not entry.stacked:
        return np.array(read(entry.names[0]))
    value = None
    for layer, group in enumerate(entry.names):
        part = read(group)
        if value is None:
            value = np.memmap(file, part.dtype, mode="w+", shape=shape)
        value[layer] = part
    value.flush()
    return value


def _tree(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def import_checkpoint(
    config: ImageFlowConfig, checkpoint: pathlib.Path, folder: pathlib.Path
) -> list[str]:
    """Converts a checkpoint to a model directory; see `flow_bundle`.

    Args:
        config: shape of the model.
        checkpoint: `.pth` (torch state dict) or `.safetensors` with the release's names.
        folder: of the model, to be made. It is there when it is complete, and not before.

    Returns:
        Names of the unused buffers that were passed over.

    Raises:
        UserError: the folder exists; the file is truncated; it does not fit the model (all that is
            missing, unknown or of a wrong shape or type in one message).
    """
    if folder.exists():
        raise UserError(f"{folder} already exists; delete it first, or choose another place")
    entries, shapes = starflow.table(config), _shapes(config)
    with open_tensors(checkpoint) as source:
        ignored = starflow.unused(config, list(source.shapes))
        tensors = {name: s for name, s in source.shapes.items() if name not in set(ignored)}
        problems = table.misfits(entries, shapes, tensors) + _wrong_types(entries, source)
        if problems:
            raise UserError(f"{checkpoint} does not fit the model: {'; '.join(problems)}")
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            scratch = partial / "scratch"
            scratch.mkdir(parents=True)
            flat = {
                entry.path: _assembled(entry, shapes[entry.path], source, scratch / str(number))
                for number, entry in enumerate(entries)
            }
            save_tree(partial / flow_bundle.WEIGHTS, _tree(flat), {}, chunk_bytes=_CHUNK_BYTES)
            del flat
            shutil.rmtree(scratch)
            record = {"source": str(checkpoint), "ignored": ignored}
            flow_bundle.write_description(partial, config, record)
            partial.rename(folder)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return ignored


def export_checkpoint(folder: pathlib.Path, file: pathlib.Path) -> None:
    """Converts a model directory to a safetensors file with the release's names.

    Raises:
        UserError: no directory of an image model; the file exists or cannot be written.
    """
    config, _ = flow_bundle.read_description(folder)
    entries, shapes = starflow.table(config), _shapes(config)
    weights = folder / flow_bundle.WEIGHTS
    stored = {".".join(path): leaf for path, leaf in stored_tree(weights).items()}
    if {path: tuple(leaf.shape) for path, leaf in stored.items()} != shapes:
        raise UserError(f"{weights} does not hold the model that {folder} describes")
    wanted = table.source_shapes(entries, shapes)
    types = {name: stored[e.path].dtype for e in entries for group in e.names for name in group}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for entry in entries:
            store = open_array(weights, entry.path.split("."))
            for layer, group in enumerate(entry.names):
                part = store[layer] if entry.stacked else store
                yield from zip(group, entry.split(part.read().result()), strict=True)

    try:
        write_safetensors(file, wanted, types, tensors())
    except ValueError as error:
        raise UserError(f"{weights} cannot be read, convert it again ({error})") from error
