"""Files of named tensors, read one tensor at a time: safetensors, and torch's `.pth`."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from starflow2_jax.convert.layout import contiguous
from starflow2_jax.errors import UserError
from starflow2_jax.provenance import write_json

INDEX_FILE = "model.safetensors.index.json"

_NUMBERED = re.compile(r"(?P<stem>.+)-\d+-of-(?P<count>\d+)\.safetensors")
_SAFETENSORS_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
}


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """An open file.

    Attributes:
        shapes: of every tensor in it, by name.
        dtypes: their numpy names ("bfloat16" too).
        read: one tensor by its name, as long as the file is open; it may share the file's memory.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    read: Callable[[str], np.ndarray]


@contextlib.contextmanager
def open_tensors(path: pathlib.Path) -> Iterator[TensorFile]:
    """Opens a file without reading its tensors.

    Args:
        path: `.safetensors`, or else a torch state dict (which needs torch).

    Raises:
        UserError: no such file, one that is damaged or truncated, or no flat state dict.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        yield _mapped_safetensors(path)
        return
    with _open_torch(path) as file:
        yield file


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return UserError(f"{path} is truncated or damaged, get it again ({reason})")


def _mapped_safetensors(path: pathlib.Path) -> TensorFile:
    """A file whose tensors are views of its mapped pages: reading one takes no memory of its own.

    Raises:
        UserError: damaged or truncated.
    """
    types = {short: name for name, short in _SAFETENSORS_TYPES.items()}
    try:
        with safetensors.safe_open(path, framework="np"):
            pass  # it has checked the header, and that the file is as long as that says
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        pages = np.memmap(path, np.uint8, mode="r")[8 + length :]
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    header.pop("__metadata__", None)

    def read(name: str) -> np.ndarray:
        entry = header[name]
        begin, end = entry["data_offsets"]
        return pages[begin:end].view(np.dtype(types[entry["dtype"]])).reshape(entry["shape"])

    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    dtypes = {name: entry["dtype"] for name, entry in header.items()}
    return TensorFile(shapes, {n: types.get(t, t.lower()) for n, t in dtypes.items()}, read)


def _indexed_files(index: pathlib.Path) -> dict[str, str]:
    """Tensor -> file name, as an index has it.

    Raises:
        UserError: it is no index.
    """
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) for name in files.values()):
            raise TypeError("weight_map names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of safetensors files ({error!r})") from error
    return files


def _numbered_gaps(names: Sequence[str]) -> list[str]:
    """What is missing between files that are numbered -00001-of-00005."""
    gaps = []
    numbered = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    for stem, count in sorted({(m["stem"], m["count"]) for m in numbered}):
        for number in range(1, int(count) + 1):
            name = f"{stem}-{number:0{len(count)}}-of-{count}.safetensors"
            if name not in names:
                gaps.append(f"missing file: {name}")
    return gaps


def open_folder(folder: pathlib.Path) -> TensorFile:
    """All tensors of a Hugging Face folder: `model.safetensors`, or several files and their index.

    Raises:
        UserError: no such folder or no safetensors in it; a damaged file; files or tensors that the
            index names and that are not there (all of them in one message).
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    index, problems = folder / INDEX_FILE, []
    placed: dict[str, str] = {}
    if index.is_file():
        placed = _indexed_files(index)
        names = sorted(set(placed.values()))
        problems = [
            f"missing file: {name}, which {INDEX_FILE} names"
            for name in names
            if not (folder / name).is_file()
        ]
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        problems = _numbered_gaps(names)
        if not names:
            raise UserError(f"{folder} holds no safetensors files; expected model.safetensors")
    files = {n: _mapped_safetensors(folder / n) for n in names if (folder / n).is_file()}
    where: dict[str, str] = {}
    for name, file in files.items():
        for tensor in file.shapes:
            if tensor in where:
                problems.append(f"{tensor} is in {where[tensor]} and in {name}")
            where[tensor] = name
    for tensor, name in placed.items():
        if name in files and tensor not in files[name].shapes:
            problems.append(f"{INDEX_FILE} names {tensor} in {name}, where it is not")
    if problems:
        raise UserError(f"{folder} is not complete: {'; '.join(problems)}")
    return TensorFile(
        {tensor: files[name].shapes[tensor] for tensor, name in where.items()},
        {tensor: files[name].dtypes[tensor] for tensor, name in where.items()},
        lambda tensor: files[where[tensor]].read(tensor),
    )


@contextlib.contextmanager
def _open_torch(path: pathlib.Path) -> Iterator[TensorFile]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"reading {path} needs torch: pip install 'starflow2-jax[torch]'"
        ) from error
    import pickle

    try:
        # Mapped: a tensor's pages are read when it is, and weights_only runs no code of the file.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors, and is not read") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path} is no flat state dict of tensors")

    def read(name: str) -> np.ndarray:
        tensor = state[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    yield TensorFile(
        {name: tuple(t.shape) for name, t in state.items()},
        {name: str(t.dtype).removeprefix("torch.") for name, t in state.items()},
        read,
    )


def write_safetensors(
    path: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes tensors as they come, beside `path`, and renames: the file is never half there.

    Args:
        path: of the file to make.
        shapes, dtypes: of every tensor.
        tensors: name and array, all of them, in any order.

    Raises:
        UserError: the file exists, or cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} already exists; delete it first, or choose another place")
    # `transformers` refuses a file that does not say this.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, shape in shapes.items():
        dtype = np.dtype(dtypes[name])
        begin, end = end, end + int(np.prod(shape)) * dtype.itemsize
        offsets[name] = begin
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[dtype.name],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            base = file.tell()
            for name, array in tensors:
                begin = offsets.pop(name)
                if array.shape != tuple(shapes[name]) or array.dtype != dtypes[name]:
                    raise ValueError(f"{name} is {array.dtype} {array.shape}")
                file.seek(base + begin)
                file.write(contiguous(array).reshape(-1).view(np.uint8).data)
            if offsets:
                raise ValueError(f"no tensors for {sorted(offsets)}")
        pathlib.Path(temporary).rename(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)


def write_safetensors_folder(
    folder: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    tensors: Iterable[tuple[str, np.ndarray]],
    most_bytes: int = 5 * 10**9,
) -> None:
    """Writes tensors as they come: `model.safetensors`, or several files with their index.

    Args:
        folder: to write into; there already.
        shapes, dtypes: of every tensor, in the order in which they come.
        tensors: name and array, all of them.
        most_bytes: of a file, save for one that a single tensor fills.

    Raises:
        UserError: the files exist, or cannot be written.
    """
    size = {n: int(np.prod(s)) * np.dtype(dtypes[n]).itemsize for n, s in shapes.items()}
    files: list[list[str]] = [[]]
    for name in shapes:
        if files[-1] and sum(size[n] for n in files[-1]) + size[name] > most_bytes:
            files.append([])
        files[-1].append(name)
    coming = iter(tensors)
    placed = {}
    for number, names in enumerate(files, 1):
        file = "model.safetensors"
        if len(files) > 1:
            file = f"model-{number:05}-of-{len(files):05}.safetensors"
        placed |= dict.fromkeys(names, file)
        mine = {n: shapes[n] for n in names}
        write_safetensors(folder / file, mine, dtypes, itertools.islice(coming, len(names)))
    if len(files) > 1:
        record = {"metadata": {"total_size": sum(size.values())}, "weight_map": placed}
        write_json(folder / INDEX_FILE, record)
