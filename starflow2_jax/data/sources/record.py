"""What every source gives: records with named fields, by index."""

import abc
import glob
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain

from starflow2_jax.errors import UserError


class RecordError(Exception):
    """One record is damaged, or lacks what is asked of it; the message does not name the record."""


class Record:
    """Named fields of one record, read when they are asked for.

    Attributes:
        name: where it stands, for logs: file and key, row or line.
    """

    def __init__(
        self, name: str, fields: Mapping[str, Any], read: Callable[[str], bytes] | None = None
    ) -> None:
        """A record.

        Args:
            name: where it stands.
            fields: values by name; looking one up may read it.
            read: bytes of what a field refers to by a text (a path, the name of another field).
        """
        self.name = name
        self._fields = fields
        self._read = read

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def value(self, key: str) -> Any:
        """The field as it is.

        Raises:
            RecordError: there is no such field.
        """
        if key not in self._fields:
            raise RecordError(f"no field {key!r}; it has {', '.join(sorted(self._fields))}")
        return self._fields[key]

    def text(self, key: str) -> str:
        """The field as text without blanks around it.

        Raises:
            RecordError: no such field, no text, not UTF-8, or empty.
        """
        return as_text(self.value(key), key)

    def image(self, key: str) -> bytes:
        """The encoded image in the field: bytes, a struct with `bytes` or `path`, or a reference.

        A list of one is taken for what it holds.

        Raises:
            RecordError: no such field, or no image in it.
        """
        return self.encoded(self.value(key), key)

    def encoded(self, value: Any, key: str) -> bytes:
        """The encoded image that a value of the field stands for; see `image`."""
        if isinstance(value, list) and len(value) == 1:
            [value] = value
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value and self._read is not None:
            return self._read(value)
        if not isinstance(value, bytes | bytearray) or not value:
            raise RecordError(f"field {key!r} holds no image but {_show(value)}")
        return bytes(value)


def as_text(value: Any, key: str) -> str:
    """A value of the field `key` as text; see `Record.text`."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise RecordError(f"field {key!r} is not UTF-8 ({error})") from error
    if not isinstance(value, str):
        raise RecordError(f"field {key!r} holds no text but {_show(value)}")
    if not value.strip():
        raise RecordError(f"field {key!r} is empty")
    return value.strip()


def _show(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "nothing" if value is None or value == b"" else f"a {type(value).__name__}"


class Source(abc.ABC):
    """Records by index."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many records there are, damaged ones among them."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Where a record stands, for logs: file and key, row or line."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record:
        """Reads a record.

        Raises:
            Exception: any, where it is damaged.
        """

    def order(self, start: int, stop: int, seed: int) -> grain.MapDataset:
        """Indices from start to stop in random order, a new one each time round, for ever.

        Args:
            start, stop: of the records to take, as in a slice.
            seed: of the order.
        """
        return grain.MapDataset.range(start, stop).shuffle(seed=seed).repeat()


Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def expand(paths: Paths) -> list[pathlib.Path]:
    """The files that paths and patterns with `*` name, each pattern's in alphabetical order.

    Raises:
        UserError: a file is missing, or a pattern names none.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    files: list[pathlib.Path] = []
    for path in paths:
        text = os.path.expanduser(os.fspath(path))
        found = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else [text]
        missing = [f for f in found if not os.path.isfile(f)]
        if missing or not found:
            raise UserError(f"data source: there is no file {missing[0] if missing else text}")
        files += [pathlib.Path(f) for f in found]
    if not files:
        raise UserError("data source: no files are given")
    return files
