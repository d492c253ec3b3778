"""ArrayRecord files. By default each record is a serialised `tf.train.Example`."""

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import numpy as np

from starflow2_jax.data.sources.index import Arrays, cached_index
from starflow2_jax.data.sources.record import Paths, Record, RecordError, Source, expand
from starflow2_jax.errors import UserError

_VERSION = "array_record 1"

Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _WholeFile:
    """What tells the reader a file's length, so that it need not open all files at the start."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


def _length(path: pathlib.Path) -> int:
    try:
        return len(grain.sources.ArrayRecordDataSource(str(path)))
    except Exception as error:  # the reader has kinds of its own
        line = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} is not an ArrayRecord file, or damaged ({line})") from error


class ArrayRecordSource(Source):
    """Records of ArrayRecord files (written with group size 1, or reading at random is slow)."""

    def __init__(
        self,
        paths: Paths,
        parse: Callable[[bytes], Fields] | None = None,
        index: str | os.PathLike[str] | None = None,
    ) -> None:
        """Finds the files, and counts their records where that was not done before.

        Args:
            paths: of the files; patterns with `*` are expanded.
            parse: a record's bytes to its fields; default `parse_example`. A picklable function.
            index: folder for the counts; default beside the first file.

        Raises:
            UserError: no such files, files of another kind, no place for the counts.
        """
        self._files = expand(paths)
        self._parse = parse or parse_example
        lengths = cached_index(self._files, index, _VERSION, self._build)["lengths"]
        whole = [_WholeFile(str(f), int(n)) for f, n in zip(self._files, lengths, strict=True)]
        self._source = grain.sources.ArrayRecordDataSource(whole)
        self._first = np.concatenate([[0], np.cumsum(lengths)])

    def _build(self) -> Arrays:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return {"lengths": np.array(list(pool.map(_length, self._files)), np.int64)}

    def __len__(self) -> int:
        return int(self._first[-1])

    def name(self, index: int) -> str:
        """File and number of the record in it."""
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        return f"{self._files[file]} record {index - int(self._first[file])}"

    def __getitem__(self, index: int) -> Record:
        return Record(self.name(index), self._parse(self._source[index]))


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _messages(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """The fields of a protocol buffer message: number, and bytes or integer."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise RecordError("not a tf.train.Example (protocol buffer of an unknown kind)")
        if at + size > len(data):
            raise RecordError("not a whole tf.train.Example: it is cut off")
        yield number, data[at : at + size]
        at += size


def _values(feature: memoryview) -> Any:
    """The value of a feature; a list where there is not exactly one."""
    values: list[Any] = []
    for kind, content in _messages(feature):
        if isinstance(content, int):
            raise RecordError("not a tf.train.Example (a feature without a list)")
        for _, item in _messages(content):
            if kind == 1:
                values.append(bytes(item))
            elif kind == 2:  # packed floats, or one of four bytes
                values += np.frombuffer(item, "<f4").tolist()
            elif isinstance(item, int):
                values.append(item - 2**64 if item >= 2**63 else item)
            else:
                at = 0
                while at < len(item):
                    value, at = _varint(item, at)
                    values.append(value - 2**64 if value >= 2**63 else value)
    return values[0] if len(values) == 1 else values


def parse_example(data: bytes) -> Fields:
    """A serialised `tf.train.Example` as {name: bytes, float, int, or list of those}.

    Raises:
        RecordError: the bytes are something else.
    """
    fields = {}
    try:
        for _, features in _messages(memoryview(data)):
            for _, entry in _messages(features):
                parts = dict(_messages(entry))
                fields[bytes(parts[1]).decode()] = _values(parts.get(2, memoryview(b"")))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"not a tf.train.Example ({error})") from error
    return fields


def _delimited(number: int, content: bytes) -> bytes:
    """A field of bytes of a protocol buffer message."""
    out, size = bytearray([number << 3 | 2]), len(content)
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out) + content


def serialised_example(fields: Mapping[str, bytes]) -> bytes:
    """Fields of bytes as a `tf.train.Example`, what `parse_example` reads; sorted by name."""
    features = b""
    for name in sorted(fields):
        feature = _delimited(1, _delimited(1, fields[name]))
        features += _delimited(1, _delimited(1, name.encode()) + _delimited(2, feature))
    return _delimited(1, features)
