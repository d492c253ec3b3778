"""Documents as arrays, and arrays packed into batches of rows.

Letters: B rows, T positions, I images per row.
"""

import dataclasses
import functools

import grain
import numpy as np

from starflow2_jax.data.sequences import Document
from starflow2_jax.models.pretzel import Kind

HostBatch = dict[str, np.ndarray]


_LEAST_BINS = 8
"""Rows that are filled at a time: with fewer, more of each row stays empty."""


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """B rows of T positions with room for I images each.

    Attributes:
        rows: B, of the whole job.
        length: T.
        images: I.
        lanes: parts of equally many rows that are read and packed apart, see `data.batches`. The
            batches depend on it.
    """

    rows: int
    length: int
    images: int
    lanes: int = 1


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


def finish(batch: HostBatch, images: int) -> HostBatch:
    """A packed batch under the names that `pipeline.packed_batches` gives, with `image_start`."""
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


def fits(document: dict[str, np.ndarray], shape: BatchShape) -> str:
    """Why a document does not fit into an empty row; nothing where it does."""
    for name, size, unit in (
        ("tokens", shape.length, "positions"),
        ("images", shape.images, "images"),
    ):
        if len(document[name]) > size:
            return (
                f"a document has {len(document[name])} {unit}, but a row of this stage's batch "
                f"holds {size}"
            )
    return ""


def packed(documents: grain.IterDataset, shape: BatchShape, rows: int) -> grain.IterDataset:
    """Packs documents' `features` first-fit into rows, and `rows` of them into batches."""
    per_position = dict.fromkeys(("tokens", "kinds", "positions", "text_loss"), shape.length)
    per_image = dict.fromkeys(("images", "image_seeds"), shape.images)
    bins = grain.experimental.FirstFitPackIterDataset(
        documents,
        length_struct=per_position | per_image,
        num_packing_bins=max(rows, _LEAST_BINS),
        shuffle_bins=False,
    )
    return bins.batch(rows).map(functools.partial(finish, images=shape.images))
