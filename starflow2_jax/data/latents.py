"""Latents of images, computed once and kept: means and log-variances of an FAE's posterior.

    DIR/manifest.json                 the FAE's checksum, shapes, where the images come from, and
                                      what was left out
    DIR/latents-00000-of-00004.array_record, ...

A record is a `tf.train.Example` with `moments`, bfloat16 [N, 2C] (means, then log-variances; the
posterior is sampled anew each time the record is read in training), and the fields that were kept
of the image's own record. A shard gets its name when it is whole, so that an interrupted job goes
on with the next one, and ends with the same bytes.

Letters: B images of a batch, N tokens, C latent channels.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from PIL.Image import DecompressionBombError

from starflow2_jax.data.sources.array_record import ArrayRecordSource, serialised_example
from starflow2_jax.data.sources.record import Record, RecordError, Source
from starflow2_jax.errors import UserError
from starflow2_jax.provenance import write_json

MANIFEST = "manifest.json"
MOMENTS = "moments"
FORMAT_VERSION = 1

Encode = Callable[[np.ndarray], Any]
"""uint8 [B, H, W, channels] -> bfloat16 [B, N, 2C]; may return before it is computed."""


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """What a cache is made of.

    Attributes:
        fae: checksum of the FAE.
        tokens: N.
        moments: 2C.
        image_size: pixels along the edge of the images that were encoded.
        records, names: how many images there are, and a checksum of what they are called.
        shard: records of a shard; the last may have fewer.
        batch: B. Whoever computes in other batches gets other last bits.
        keep: fields of the images' records that go along.
        dtype: of the encoder's computation.
        image: field of the images' records that was encoded.
    """

    fae: str
    tokens: int
    moments: int
    image_size: int
    records: int
    names: str
    shard: int
    batch: int
    keep: tuple[str, ...] = ()
    # Caches that do not name them were made with the command's defaults.
    dtype: str = "float32"
    image: str = "image"

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.records // self.shard)

    def file(self, number: int) -> str:
        """Name of a shard."""
        return f"latents-{number:05d}-of-{self.shards:05d}.array_record"


def names_checksum(source: Source) -> str:
    """Of the names of all records, in order."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(source.name(index).encode() + b"\0")
    return digest.hexdigest()


def read_manifest(folder: str | os.PathLike[str]) -> tuple[CacheShape, bool]:
    """What a cache is made of, and whether it is complete.

    Raises:
        UserError: no cache, or damaged.
    """
    path = pathlib.Path(folder).expanduser() / MANIFEST
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {record['format_version']}")
        shape = {**record["cache"], "keep": tuple(record["cache"]["keep"])}
        return CacheShape(**shape), bool(record["complete"])
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; expected a folder that `starflow2 data latents` wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the manifest of cached latents ({error})") from error


def read_skipped(folder: str | os.PathLike[str]) -> dict[str, list[str]]:
    """The broken records that a cache was made without: shard file -> their names, with reasons.

    Raises:
        UserError: no cache, or damaged.
    """
    read_manifest(folder)
    path = pathlib.Path(folder).expanduser() / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")).get("skipped", {})


def _claim(folder: pathlib.Path, shape: CacheShape) -> None:
    """Makes the folder this cache's own, or checks that it is."""
    if (folder / MANIFEST).is_file():
        there, _ = read_manifest(folder)
        if there.fae != shape.fae:
            raise UserError(
                f"{folder} holds latents of another FAE (checksum {there.fae[:12]}, this one has "
                f"{shape.fae[:12]}); give another folder"
            )
        differing = [
            f"{field.name} ({getattr(there, field.name)} there, {getattr(shape, field.name)} now)"
            for field in dataclasses.fields(shape)
            if getattr(there, field.name) != getattr(shape, field.name)
        ]
        if differing:
            raise UserError(
                f"{folder} holds another cache; differing: {', '.join(differing)}; give another "
                "folder, or the same images and options to go on"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    _write_manifest(folder, shape, {}, complete=False)


def _write_manifest(
    folder: pathlib.Path, shape: CacheShape, skipped: Mapping[str, list[str]], complete: bool
) -> None:
    record: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "complete": complete,
        "cache": dataclasses.asdict(shape),
    }
    if skipped:
        record["skipped"] = dict(skipped)
    write_json(folder / MANIFEST, record)


def _kept(record: Record, keys: Sequence[str]) -> dict[str, bytes]:
    values = {key: record.value(key) for key in keys}
    for key, value in values.items():
        if not isinstance(value, bytes | str):
            values[key] = json.dumps(value)
    return {k: v.encode() if isinstance(v, str) else v for k, v in values.items()}


class _Broken(str):
    """What is wrong with a record, and its name."""


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Images of a source, decoded; or what is wrong with one."""

    source: Source
    decode: Callable[[bytes], np.ndarray]
    image: str
    keep: tuple[str, ...]

    def __call__(self, index: int) -> tuple[np.ndarray, dict[str, bytes]] | _Broken:
        name = self.source.name(index)
        try:
            record = self.source[index]
            return self.decode(record.image(self.image)), _kept(record, self.keep)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        except (RecordError, OSError, ValueError, SyntaxError, DecompressionBombError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            return _Broken(f"{name} cannot be read: {reason}")


def _whole(
    items: Iterator[tuple[np.ndarray, dict[str, bytes]] | _Broken],
    broken: list[str],
    before: int,
    most: int,
) -> Iterator[tuple[np.ndarray, dict[str, bytes]]]:
    """The items that are not broken; what is wrong with the others goes to `broken`.

    Raises:
        UserError: with those `before` there are more than `most`.
    """
    for item in items:
        if not isinstance(item, _Broken):
            yield item
            continue
        others = before + len(broken)
        if others >= most:
            reached = f", after {others} that were left out" if others else ""
            raise UserError(
                f"{item}{reached}; nothing else is lost. --skip-broken N leaves out up to N"
            )
        broken.append(item)


def _ahead(
    pool: concurrent.futures.Executor, read: _Reader, indices: range, depth: int
) -> Iterator[tuple[np.ndarray, dict[str, bytes]] | _Broken]:
    """What `read` gives for each index in order, so many of them read ahead."""
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    rest = iter(indices)
    for index in itertools.islice(rest, depth):
        waiting.append(pool.submit(read, index))
    try:
        while waiting:
            item = waiting.popleft().result()
            for index in itertools.islice(rest, 1):
                waiting.append(pool.submit(read, index))
            yield item
    finally:
        for future in waiting:
            future.cancel()


def write_cache(
    source: Source,
    folder: str | os.PathLike[str],
    shape: CacheShape,
    encode: Encode,
    decode: Callable[[bytes], np.ndarray],
    *,
    threads: int = 4,
    skip_broken: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> int:
    """Encodes the images of a source that the folder lacks.

    Images are read by threads, ahead of the encoder, and written behind it. A shard lacks the
    broken records of its part of the source, and has no others in their place: which those are is
    in the manifest before the shard has its name.

    Args:
        source: of the images.
        folder: of the cache; of one that was interrupted, the shards that are missing are written.
        shape: see `CacheShape`.
        encode: of `shape.batch` images at a time.
        decode: an encoded image to uint8 [H, W, channels].
        threads: that read.
        skip_broken: so many records in all may be left out, since they cannot be read.
        on_progress: is called with the number of images done so far in this call.

    Returns:
        Images encoded in this call.

    Raises:
        UserError: the folder holds another cache, more images are broken than may be (the name of
            one is in the message), the folder cannot be written to.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = pathlib.Path(folder).expanduser()
    _claim(folder, shape)
    skipped = read_skipped(folder)
    read = _Reader(source, decode, shape.image, shape.keep)
    done = 0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for number in range(shape.shards):
            final = folder / shape.file(number)
            if final.is_file():
                continue
            first = number * shape.shard
            indices = range(first, min(first + shape.shard, shape.records))
            fresh = folder / f".{final.name}.new"
            fresh.unlink(missing_ok=True)
            # Records one by one: they are read at random.
            writer = ArrayRecordWriter(str(fresh), "group_size:1")
            reading = _ahead(pool, read, indices, 3 * shape.batch)
            skipped.pop(final.name, None)  # of an attempt that was interrupted
            before = sum(map(len, skipped.values()))
            broken: list[str] = []
            items = _whole(reading, broken, before, skip_broken)
            pending: tuple[Any, list[dict[str, bytes]]] | None = None
            try:
                while batch := list(itertools.islice(items, shape.batch)):
                    images = np.stack([pixels for pixels, _ in batch])
                    # A short last batch is filled up: one shape is compiled.
                    padded = np.resize(images, (shape.batch, *images.shape[1:]))
                    computed = encode(padded)
                    done += _write(writer, pending)
                    pending = computed, [kept for _, kept in batch]
                    if on_progress:
                        on_progress(done)
                done += _write(writer, pending)
            finally:
                reading.close()
                writer.close()
            if broken:
                skipped[final.name] = broken
                _write_manifest(folder, shape, skipped, complete=False)
            os.replace(fresh, final)
            if on_progress:
                on_progress(done)
    _write_manifest(folder, shape, skipped, complete=True)
    return done


def _write(writer: Any, pending: tuple[Any, list[dict[str, bytes]]] | None) -> int:
    """Writes a batch's records; how many there were."""
    if pending is None:
        return 0
    moments = np.asarray(pending[0])
    for one, kept in zip(moments, pending[1], strict=False):  # what fills a batch up is left out
        writer.write(serialised_example(kept | {MOMENTS: one.tobytes()}))
    return len(pending[1])


class LatentSource(ArrayRecordSource):
    """The records of a cache: `moments`, and what was kept."""

    def __init__(self, folder: str | os.PathLike[str], fae: str) -> None:
        """Opens a cache.

        Args:
            folder: of the cache.
            fae: checksum of the FAE that the model draws with.

        Raises:
            UserError: no cache, not complete, of another FAE, or damaged.
        """
        folder = pathlib.Path(folder).expanduser()
        shape, complete = read_manifest(folder)
        if shape.fae != fae:
            raise UserError(
                f"{folder} holds latents of another FAE (checksum {shape.fae[:12]}, this one has "
                f"{fae[:12]}); cache the images again"
            )
        if not complete:
            raise UserError(f"{folder} is not complete; `starflow2 data latents` goes on with it")
        super().__init__([folder / shape.file(n) for n in range(shape.shards)])
        self.shape = shape

    def moments(self, index: int) -> np.ndarray:
        """bfloat16 [N, 2C].

        Raises:
            ValueError: the record holds another number of bytes.
        """
        data = self[index].image(MOMENTS)
        shape = (self.shape.tokens, self.shape.moments)
        return np.frombuffer(data, ml_dtypes.bfloat16).reshape(shape)
