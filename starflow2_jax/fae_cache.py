"""Images to cached latents of an FAE's directory; see `data.latents`."""

import dataclasses
import functools
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.decoding import decode_still
from starflow2_jax.data.latents import CacheShape, names_checksum, read_skipped, write_cache
from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.data.sources import (
    ArrayRecordSource,
    ConversationSource,
    FolderSource,
    ParquetSource,
    Source,
    WebDatasetSource,
)
from starflow2_jax.errors import UserError
from starflow2_jax.fae_bundle import load_fae, read_fae
from starflow2_jax.metrics import Progress
from starflow2_jax.model_folder import finished
from starflow2_jax.models.fae import FeatureFAE

_SOURCES = {
    ".tar": WebDatasetSource,
    ".parquet": ParquetSource,
    ".array_record": ArrayRecordSource,
    ".jsonl": ConversationSource,
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a job of caching did.

    Attributes:
        images: encoded now; those of whole shards were there already.
        seconds: that took, without loading and compiling.
        encoder: images per second of the encoder alone, in the same batches.
        skipped: records that the whole cache was made without.
    """

    images: int
    seconds: float
    encoder: float
    skipped: int = 0

    @property
    def share(self) -> float:
        """Of the encoder's own rate."""
        return self.images / self.seconds / self.encoder if self.images else 1.0


def open_images(
    data: str | os.PathLike[str], index: str | os.PathLike[str] | None = None
) -> Source:
    """A folder of image files; or files of tar, Parquet, ArrayRecord or JSONL, by a pattern.

    Args:
        data: path or pattern.
        index: folder for the index of tar, Parquet and JSONL files; default beside the first.

    Raises:
        UserError: no such files, of another kind, or no place for the index.
    """
    if pathlib.Path(data).expanduser().is_dir():
        return FolderSource(data)
    suffix = pathlib.Path(data).suffix
    if suffix not in _SOURCES:
        raise UserError(f"{data} is no folder of images, and no file of {', '.join(_SOURCES)}")
    if _SOURCES[suffix] is ArrayRecordSource:  # these have their own
        return ArrayRecordSource(data)
    return _SOURCES[suffix](data, index=index)


@functools.partial(jax.jit, static_argnames="dtype")
def _moments(model: FeatureFAE, images: jax.Array, dtype: jnp.dtype) -> jax.Array:
    posterior = model.encode(images, dtype)
    return jnp.concatenate([posterior.mean, posterior.logvar], -1).astype(jnp.bfloat16)


def cache_latents(
    fae: str | os.PathLike[str],
    source: Source,
    folder: str | os.PathLike[str],
    *,
    image: str = "image",
    keep: tuple[str, ...] = (),
    shard: int = 8192,
    batch: int = 64,
    dtype: str = "float32",
    threads: int = 4,
    skip_broken: int = 0,
) -> Rates:
    """Encodes all images of a source, or those that an interrupted job left.

    Args:
        fae: directory of the FAE, or of the run that trained it.
        source: of the images.
        folder: of the cache.
        image, keep: fields of the records: the image, and what goes along.
        shard: images of a file, a multiple of the batch.
        batch: images that are encoded at a time.
        dtype: of the encoder's computation.
        threads: that read.
        skip_broken: so many records may be left out, since they cannot be read.

    Raises:
        UserError: see `fae_bundle.load_fae` and `data.latents.write_cache`; or the batch does not
            divide the shard.
    """
    if shard < 1 or batch < 1 or shard % batch:
        raise UserError(f"a shard of {shard} images cannot be made of batches of {batch}")
    place = finished(pathlib.Path(fae).expanduser())
    config, record = read_fae(place)
    shape = CacheShape(
        fae=record["checksum"],
        tokens=config.tokens,
        moments=2 * config.channels,
        image_size=config.image_size,
        records=len(source),
        names=names_checksum(source),
        shard=shard,
        batch=batch,
        keep=tuple(keep),
        dtype=dtype,
        image=image,
    )
    model = load_fae(place)
    encode = lambda images: _moments(model, images, dtype=jnp.dtype(dtype))
    size = config.image_size
    some = np.zeros((batch, size, size, config.image_channels), np.uint8)
    encode(some).block_until_ready()  # compiles
    began, tries = time.monotonic(), 3
    for _ in range(tries):
        encode(some).block_until_ready()
    encoder = tries * batch / (time.monotonic() - began)
    progress = Progress("latents", len(source), unit="images")
    began = time.monotonic()
    done = write_cache(
        source,
        folder,
        shape,
        encode,
        functools.partial(
            decode_still, shape=ImageShape(size, size, config.image_channels, config.side)
        ),
        threads=threads,
        skip_broken=skip_broken,
        on_progress=lambda images: progress.update(images, {}),
    )
    seconds = time.monotonic() - began
    skipped = sum(map(len, read_skipped(folder).values()))
    return Rates(done, seconds, encoder, skipped)
