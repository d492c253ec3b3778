"""Documents to packed batches of rows, with a position that can be saved; batches to `Rows`.

Letters: B rows, T positions, I images per row, S places for the patches of a row's views, P numbers
of a patch.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.batches import Batches, Documents
from starflow2_jax.data.packing import BatchShape, HostBatch, features, finish
from starflow2_jax.data.sequences import Document
from starflow2_jax.data.views import view_features
from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Rows
from starflow2_jax.models.qwen2_5_vision import Views, VisionConfig

__all__ = [
    "BatchShape",
    "Documents",
    "HostBatch",
    "features",
    "packed_batches",
    "single_batch",
    "to_rows",
]


def packed_batches(
    documents: Documents,
    shape: BatchShape,
    rows: slice | None = None,
    place: Callable[[HostBatch], Any] | None = None,
) -> Batches:
    """Documents packed first-fit into rows, and rows into batches.

    Args:
        documents: the stream.
        shape: of the job's whole batch.
        rows: those of the batch that this process is to have; default all.
        place: is applied to each batch in the thread that reads ahead, to put it on the devices.

    Returns:
        Batches of `tokens, kinds, segments` int32 [B, T], `positions` int32 [B, T, 3], `text_loss`
        bool [B, T], `images` uint8 [B, I, H, W, channels], `image_seeds` uint32 [B, I],
        `image_start` int32 [B, I]; where the shape has places for views also `view_patches` float32
        [B, S, P], `view_coordinates` int32 [B, S, 2], `view_segments` int32 [B, S], `view_index`
        int32 [B, T]; where it limits them `text_targets` int32 [B, K] and `prefix` int32 [B, P]; or
        what `place` makes of them.

    Raises:
        UserError: the lanes do not divide the rows. When a batch is read: a document that comes
            from no record does not fit into an empty row; too many records of a source are corrupt.
    """
    if shape.prefix and shape.places:
        raise UserError(
            f"a batch with a prefix ({shape.prefix}) has no views: places is {shape.places}, not 0"
        )
    if shape.lanes < 1 or shape.rows % shape.lanes:
        raise UserError(
            f"a batch of {shape.rows} rows cannot be dealt to {shape.lanes} lanes: lanes must "
            "divide rows"
        )
    start, stop, step = (rows or slice(None)).indices(shape.rows)
    if step != 1 or stop <= start:
        raise ValueError(f"rows {rows} of {shape.rows} are no run of rows")
    return Batches(documents, shape, slice(start, stop), place)


def to_rows(batch: HostBatch) -> Rows:
    """The rows of a batch, on device (or traced); every image counts in the loss."""
    start = jnp.asarray(batch["image_start"])
    views = None
    if "view_patches" in batch:
        names = ("view_patches", "view_coordinates", "view_segments")
        views = Views(
            *(jnp.asarray(batch[name])[:, None] for name in names),
            index=jnp.asarray(batch["view_index"]),
        )
    return Rows(
        tokens=jnp.asarray(batch["tokens"]),
        kinds=jnp.asarray(batch["kinds"]),
        positions=jnp.moveaxis(jnp.asarray(batch["positions"]), -1, 0),
        segments=jnp.asarray(batch["segments"]),
        text_loss_mask=jnp.asarray(batch["text_loss"]),
        image_start=start,
        image_loss_mask=start >= 0,
        views=views,
        text_targets=batch.get("text_targets"),
        prefix=batch.get("prefix"),
    )


def single_batch(
    documents: list[Document], shape: BatchShape | None = None, tower: VisionConfig | None = None
) -> HostBatch:
    """A few documents, one a row, padded at the end; noise seeds are 0 (the caller's to set).

    `shape` defaults to the smallest that holds them. `tower` is needed where they have views.
    """
    views = []
    if any(d.views for d in documents):
        if tower is None:
            raise ValueError("documents with views need the vision tower's config")
        views = [view_features(d.views, d.kinds, tower) for d in documents]
    if shape is None:
        shape = BatchShape(
            len(documents),
            max(len(d.tokens) for d in documents),
            max(1, max(len(d.images) for d in documents)),
            places=max((len(v["view_patches"]) for v in views), default=0),
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
    if views:
        for name in ("view_patches", "view_coordinates", "view_pictures"):
            batch[name] = pad([v[name] for v in views], shape.places)
        batch["view_index"] = pad([v["view_index"] for v in views], shape.length)
        owners = [np.ones(len(v["view_patches"]), np.int32) for v in views]
        batch["view_patches_segment_ids"] = pad(owners, shape.places)
    return finish(batch, shape.images)
