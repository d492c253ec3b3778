"""Documents to packed batches of rows, as a Grain pipeline whose position can be saved.

Letters: B rows, T positions, I images per row, S places for the patches of a row's views, P numbers
of a patch.
"""

import dataclasses

import grain
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.sequences import Document
from starflow2_jax.data.views import packed_views, view_features
from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Kind, Rows
from starflow2_jax.models.qwen2_5_vision import Views, VisionConfig

HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """B rows of T positions with room for I images each, and for views in S places."""

    rows: int
    length: int
    images: int
    places: int = 0


def features(
    document: Document, rng: np.random.Generator, tower: VisionConfig | None = None
) -> dict[str, np.ndarray]:
    """A document as the arrays that are packed; the images get the seeds of their noise.

    Args:
        document: any.
        rng: of the seeds.
        tower: where the batches have room for views: the vision tower that they are for.

    Raises:
        ValueError: the document has views, and `tower` is None.
    """
    count = len(document.images)
    if document.views and tower is None:
        raise ValueError("a document with views needs the vision tower's config")
    views = {} if tower is None else view_features(document.views, document.kinds, tower)
    return views | {
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
    views = {}
    if "view_patches" in batch:
        views = {name: batch[name] for name in ("view_patches", "view_coordinates")}
        views |= packed_views(batch)
    return views | {
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
        `image_start` int32 [B, I]; where the shape has places for views also `view_patches` float32
        [B, S, P], `view_coordinates` int32 [B, S, 2], `view_segments` int32 [B, S], `view_index`
        int32 [B, T].

    Raises:
        UserError: when a batch is read: a document does not fit into an empty row.
    """
    per_position = dict.fromkeys(("tokens", "kinds", "positions", "text_loss"), shape.length)
    per_image = dict.fromkeys(("images", "image_seeds"), shape.images)
    per_place = {}
    if shape.places:
        names = ("view_patches", "view_coordinates", "view_pictures")
        per_place = dict.fromkeys(names, shape.places) | {"view_index": shape.length}

    def fitting(document: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, size, unit in (
            ("tokens", shape.length, "positions"),
            ("images", shape.images, "images"),
            ("view_patches", shape.places, "places of views"),
        ):
            if len(document.get(name, ())) > size:
                raise UserError(
                    f"a document has {len(document[name])} {unit}, but a row of this stage's batch "
                    f"holds {size}: make rows longer, or documents shorter"
                )
        return document

    packed = grain.experimental.FirstFitPackIterDataset(
        documents.map(fitting),
        length_struct=per_position | per_image | per_place,
        num_packing_bins=shape.rows,
        shuffle_bins=False,
    )
    batches = packed.batch(shape.rows).map(lambda batch: _finish(batch, shape.images))
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=4)


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
            max((len(v["view_patches"]) for v in views), default=0),
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
    return _finish(batch, shape.images)
