r"""JSONL files with images beside them, in the form that LLaVA made common.

One object a line: `{"id": ..., "image": PATH or [PATH, ...], "conversations": [{"from": "human",
"value": "<image>\nWhat is this?"}, {"from": "gpt", "value": ...}]}`. Other fields are allowed.
"""

import array
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np

from starflow2_jax.data.sources.index import Arrays, cached_index
from starflow2_jax.data.sources.record import Paths, Record, RecordError, Source, expand
from starflow2_jax.errors import UserError

_VERSION = "jsonl 2"


def _line_starts(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Of the lines that are not blank.

    Returns:
        Their byte offsets, with the file's end behind them: from one to the next is a line, with
        the blank ones that follow it. And their numbers in the file, from 1 on.
    """
    starts, numbers = array.array("q"), array.array("q")
    at = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                starts.append(at)
                numbers.append(number)
            at += len(line)
    starts.append(at)
    return np.array(starts, np.int64), np.array(numbers, np.int64)


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
        self._numbers = arrays["numbers"]  # of the lines in their files
        self._first = arrays["first"]  # of each file's records, and the end

    def _build(self) -> Arrays:
        bounds, numbers = zip(*(_line_starts(file) for file in self._files), strict=True)
        lines = [len(b) - 1 for b in bounds]
        return {
            "bounds": np.concatenate(bounds),
            "numbers": np.concatenate(numbers),
            "first": np.concatenate([[0], np.cumsum(lines)]).astype(np.int64),
        }

    def __len__(self) -> int:
        return int(self._first[-1])

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def name(self, index: int) -> str:
        """File and line."""
        return f"{self._files[self._file(index)]} line {self._numbers[index]}"

    def __getitem__(self, index: int) -> Record:
        number = self._file(index)
        path = self._files[number]
        # Each file has one bound more than it has lines.
        start, stop = (int(b) for b in self._bounds[index + number : index + number + 2])
        with path.open("rb") as file:
            file.seek(start)
            line = file.read(stop - start).strip()  # blank lines may have what JSON knows not
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
