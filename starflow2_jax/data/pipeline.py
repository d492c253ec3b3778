"""Documents to packed batches of rows, as a Grain pipeline whose position can be saved.

Letters: B rows, T positions, I images per row.
"""

import dataclasses

import grain
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.sequences import Document
from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Kind, Rows

HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """B rows of T positions with room for I images each."""

    rows: int
    length: int
    images: int


def features(document: Document, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A document as the arrays that are packed; the images get the seeds of their noise."""
    count = len(document.images)
    return {
        "tokens": document.tokens,
        "kinds": document.kinds,
        "positions": document.positions,
        "text_loss": document.text_loss,
        "images": document.images,
        "image_seeds": rng.integers(0, 2**32, size=count, dtype=np.uint32),
    }


def _finish(batch: HostBatch, images: int) -> HostBatch:
    kinds = batch["kinds"]
    starts = (kinds == Kind.LATENT) & (np.pad(kinds, ((0, 0), (1, 0)))[:, :-1] != Kind.LATENT)
    image_start = np.full((len(kinds), images), -1, np.int32)
    for row, row_starts in enumerate(starts):
        found = np.flatnonzero(row_starts)
        image_start[row, : len(found)] = found
    return {
        "tokens": batch["tokens"],
        "kinds": kinds,
        "positions": batch["positions"],
        "segments": batch["tokens_segment_ids"],
        "text_loss": batch["text_loss"],
        "images": batch["images"],
        "image_seeds": batch["image_seeds"],
        "image_start": image_start,
    }


def packed_batches(documents: grain.IterDataset, shape: BatchShape) -> grain.IterDataset:
    """Packs documents' `features` first-fit into rows and rows into batches.

    Args:
        documents: of `features` dictionaries.
        shape: of a batch.

    Returns:
        Batches of `tokens, kinds, segments` int32 [B, T], `positions` int32 [B, T, 3], `text_loss`
        bool [B, T], `images` uint8 [B, I, H, W, channels], `image_seeds` uint32 [B, I],
        `image_start` int32 [B, I].

    Raises:
        UserError: when a batch is read: a document does not fit into an empty row.
    """
    per_position = dict.fromkeys(("tokens", "kinds", "positions", "text_loss"), shape.length)
    per_image = dict.fromkeys(("images", "image_seeds"), shape.images)

    def fitting(document: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, size, unit in (
            ("tokens", shape.length, "positions"),
            ("images", shape.images, "images"),
        ):
            if len(document[name]) > size:
                raise UserError(
                    f"a document has {len(document[name])} {unit}, but a row of this stage's batch "
                    f"holds {size}: make rows longer, or documents shorter"
                )
        return document

    packed = grain.experimental.FirstFitPackIterDataset(
        documents.map(fitting),
        length_struct=per_position | per_image,
        num_packing_bins=shape.rows,
        shuffle_bins=False,
    )
    batches = packed.batch(shape.rows).map(lambda batch: _finish(batch, shape.images))
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=4)


def to_rows(batch: HostBatch) -> Rows:
    """The rows of a batch, on device (or traced); every image counts in the loss."""
    start = jnp.asarray(batch["image_start"])
    return Rows(
        tokens=jnp.asarray(batch["tokens"]),
        kinds=jnp.asarray(batch["kinds"]),
        positions=jnp.moveaxis(jnp.asarray(batch["positions"]), -1, 0),
        segments=jnp.asarray(batch["segments"]),
        text_loss_mask=jnp.asarray(batch["text_loss"]),
        image_start=start,
        image_loss_mask=start >= 0,
    )


def single_batch(documents: list[Document], shape: BatchShape | None = None) -> HostBatch:
    """A few documents, one a row, padded at the end; noise seeds are 0 (the caller's to set).

    `shape` defaults to the smallest that holds them.
    """
    if shape is None:
        shape = BatchShape(
            len(documents),
            max(len(d.tokens) for d in documents),
            max(1, max(len(d.images) for d in documents)),
        )

    def pad(arrays: list[np.ndarray], size: int) -> np.ndarray:
        out = np.zeros((shape.rows, size, *arrays[0].shape[1:]), arrays[0].dtype)
        for row, array in enumerate(arrays):
            out[row, : len(array)] = array
        return out

    tokens = pad([d.tokens for d in documents], shape.length)
    lengths = pad([np.ones(len(d.tokens), np.int32) for d in documents], shape.length)
    batch = {
        "tokens": tokens,
        "tokens_segment_ids": lengths,
        "kinds": pad([d.kinds for d in documents], shape.length),
        "positions": pad([d.positions for d in documents], shape.length),
        "text_loss": pad([d.text_loss for d in documents], shape.length),
        "images": pad([d.images for d in documents], shape.images),
        "image_seeds": np.zeros((shape.rows, shape.images), np.uint32),
    }
    return _finish(batch, shape.images)
