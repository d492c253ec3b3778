r"""JSONL files with images beside them, in the form that LLaVA made common.

One object a line: `{"id": ..., "image": PATH or [PATH, ...], "conversations": [{"from": "human",
"value": "<image>\nWhat is this?"}, {"from": "gpt", "value": ...}]}`. Other fields are allowed.
"""

import json
import os
import pathlib
from collections.abc import Callable

import numpy as np

from starflow2_jax.data.sources.index import Arrays, cached_index
from starflow2_jax.data.sources.record import Paths, Record, RecordError, Source, expand
from starflow2_jax.errors import UserError

_VERSION = "jsonl 1"
_PIECE = 2**24


def _line_starts(path: pathlib.Path) -> np.ndarray:
    """Byte offsets of the lines that are not empty, and of the end."""
    starts, at, last = [np.zeros(1, np.int64)], 0, b"\n"
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found = np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")) + 1
            starts.append(found.astype(np.int64) + at)
            at, last = at + len(piece), piece[-1:]
    ends = np.concatenate(starts)
    if last != b"\n":
        ends = np.append(ends, at)
    return ends


class ConversationSource(Source):
    """Lines of JSONL files; the fields are the objects' own."""

    def __init__(
        self,
        paths: Paths,
        images: str | os.PathLike[str] | None = None,
        index: str | os.PathLike[str] | None = None,
    ) -> None:
        """Finds the files, and indexes their lines where that was not done before.

        Args:
            paths: of the JSONL files; patterns with `*` are expanded.
            images: folder that the image paths start from; default each file's own.
            index: folder for the index; default beside the first file.

        Raises:
            UserError: no such files, a JSON array instead of lines, no place for the index.
        """
        self._files = expand(paths)
        self._images = pathlib.Path(images).expanduser() if images is not None else None
        for file in self._files:
            with file.open("rb") as opened:
                if opened.read(64).lstrip().startswith(b"["):
                    raise UserError(
                        f"{file} holds one JSON array; write one object a line (JSONL): "
                        "jq -c '.[]' OLD > NEW"
                    )
        arrays = cached_index(self._files, index, _VERSION, self._build)
        self._bounds = arrays["bounds"]  # starts of the lines of each file, then its end
        self._first = arrays["first"]  # of each file's records, and the end

    def _build(self) -> Arrays:
        bounds = [_line_starts(file) for file in self._files]
        lines = [len(b) - 1 for b in bounds]
        return {
            "bounds": np.concatenate(bounds),
            "first": np.concatenate([[0], np.cumsum(lines)]).astype(np.int64),
        }

    def __len__(self) -> int:
        return int(self._first[-1])

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def name(self, index: int) -> str:
        """File and line."""
        file = self._file(index)
        return f"{self._files[file]} line {index - int(self._first[file]) + 1}"

    def __getitem__(self, index: int) -> Record:
        number = self._file(index)
        path = self._files[number]
        # Each file has one bound more than it has lines.
        start, stop = (int(b) for b in self._bounds[index + number : index + number + 2])
        with path.open("rb") as file:
            file.seek(start)
            line = file.read(stop - start)
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise RecordError(f"not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise RecordError(f"not a JSON object but a {type(fields).__name__}")
        return Record(self.name(index), fields, _reader(self._images or path.parent))


def _reader(folder: pathlib.Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise RecordError(f"image {folder / name}: {error.strerror}") from error

    return read
