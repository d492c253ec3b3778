"""WebDataset tar shards, as img2dataset writes them, read at random.

A sample is the run of members that share a key: the name up to the first dot behind the last slash.
What follows that dot names the field: `000012.jpg`, `000012.txt`, `000012.json`.
"""

import concurrent.futures
import os
import pathlib
import tarfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from starflow2_jax.data.sources.index import Arrays, cached_index
from starflow2_jax.data.sources.record import Paths, Record, RecordError, Source, expand

_VERSION = "webdataset 1"
_ABSENT = -1


class _Shard(NamedTuple):
    keys: list[str]
    members: list[dict[str, tuple[int, int]]]  # field -> offset and size, of each sample
    damage: str  # why reading stopped before the end, or nothing


def _scan(path: pathlib.Path) -> _Shard:
    """Where the members of one shard lie; what follows a damaged place is lost."""
    keys: list[str] = []
    members: list[dict[str, tuple[int, int]]] = []
    damage = ""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, field = name.partition(".")
                key = folder + slash + stem
                if not keys or keys[-1] != key:
                    keys.append(key)
                    members.append({})
                members[-1][field.lower()] = (member.offset_data, member.size)
                tar.members = []  # or the tar file would keep them all
            # A header that means nothing ends the loop as if the archive were over.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                damage = f"no member and no end of the archive at byte {tar.offset}"
    except (tarfile.TarError, OSError, EOFError) as error:
        damage = str(error) or type(error).__name__
    return _Shard(keys, members, damage)


class WebDatasetSource(Source):
    """Samples of tar shards (uncompressed); the fields are bytes."""

    def __init__(self, paths: Paths, index: str | os.PathLike[str] | None = None) -> None:
        """Finds the shards, and indexes them where that was not done before.

        A shard that ends too early or is damaged gives its samples up to there, and one more that
        cannot be read: so the damage is counted and named.

        Args:
            paths: of the shards; patterns with `*` are expanded.
            index: folder for the index; default beside the first shard.

        Raises:
            UserError: no such files, or no place for the index.
        """
        self._files = expand(paths)
        arrays = cached_index(self._files, index, _VERSION, self._build)
        self._members = arrays["members"]  # [samples, fields, 2]: offset and size
        self._keys = arrays["keys"]
        self._first = arrays["first"]  # of each shard, and the end
        self._damage = arrays["damage"]
        self._names = [name.decode() for name in arrays["fields"].tolist()]

    def _build(self) -> Arrays:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            shards = list(pool.map(_scan, self._files))
        fields = sorted({name for s in shards for sample in s.members for name in sample})
        column = {name: i for i, name in enumerate(fields)}
        samples = [len(s.keys) + bool(s.damage) for s in shards]
        first = np.concatenate([[0], np.cumsum(samples)]).astype(np.int64)
        members = np.full((first[-1], len(fields), 2), _ABSENT, np.int64)
        keys: list[bytes] = []
        for start, shard in zip(first, shards, strict=False):
            keys += [key.encode() for key in shard.keys]
            if shard.damage:
                keys.append(b"(damage)")
            for row, sample in enumerate(shard.members):
                for name, place in sample.items():
                    members[start + row, column[name]] = place
        return {
            "members": members,
            "keys": np.array(keys, dtype=np.bytes_),
            "first": first,
            "fields": np.array([name.encode() for name in fields], dtype=np.bytes_),
            "damage": np.array([shard.damage.encode() for shard in shards], dtype=np.bytes_),
        }

    def __len__(self) -> int:
        return int(self._first[-1])

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def name(self, index: int) -> str:
        """Shard and key."""
        return f"{self._files[self._shard(index)]}:{self._keys[index].decode()}"

    def __getitem__(self, index: int) -> Record:
        shard = self._shard(index)
        present = {
            name: (int(offset), int(size))
            for name, (offset, size) in zip(self._names, self._members[index], strict=True)
            if offset != _ABSENT
        }
        if not present:
            why = self._damage[shard].decode()
            raise RecordError(f"the shard is damaged or cut off here, the rest is lost ({why})")
        fields = _Members(self._files[shard], present)
        return Record(self.name(index), fields, fields.__getitem__)


class _Members(Mapping[str, bytes]):
    """The members of one sample, read on demand."""

    def __init__(self, path: pathlib.Path, places: Mapping[str, tuple[int, int]]) -> None:
        self._path = path
        self._places = places

    def __getitem__(self, name: str) -> bytes:
        if name not in self._places:
            raise RecordError(f"no member {name!r}; it has {', '.join(sorted(self._places))}")
        offset, size = self._places[name]
        with self._path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise RecordError(f"member {name!r} is cut off: {len(data)} of {size} bytes")
        return data

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
