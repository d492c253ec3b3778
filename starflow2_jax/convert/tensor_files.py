"""Files of named tensors, read one tensor at a time: safetensors, and torch's `.pth`."""

import contextlib
import dataclasses
import json
import os
import pathlib
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np
import safetensors

from starflow2_jax.errors import UserError

_SAFETENSORS_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
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
    opened = _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)
    with opened as file:
        yield file


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return UserError(f"{path} is truncated or damaged, get it again ({reason})")


@contextlib.contextmanager
def _open_safetensors(path: pathlib.Path) -> Iterator[TensorFile]:
    types = {short: name for name, short in _SAFETENSORS_TYPES.items()}
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="np"))
            slices = {name: file.get_slice(name) for name in file.keys()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
        named = {name: types.get(dtype, dtype.lower()) for name, dtype in dtypes.items()}
        yield TensorFile(shapes, named, file.get_tensor)


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
    header, offsets, end = {}, {}, 0
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
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            if offsets:
                raise ValueError(f"no tensors for {sorted(offsets)}")
        pathlib.Path(temporary).rename(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)
