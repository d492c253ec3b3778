"""Documents as arrays, and arrays packed into batches of rows.

Letters: B rows, T positions, I images per row, S places for the patches of a row's views.
"""

import dataclasses
import functools

import grain
import numpy as np

from starflow2_jax.data.sequences import Document
from starflow2_jax.data.views import packed_views, view_features
from starflow2_jax.models.pretzel import Kind
from starflow2_jax.models.qwen2_5_vision import VisionConfig

HostBatch = dict[str, np.ndarray]


_LEAST_BINS = 8
"""Rows that are filled at a time: with fewer, more of each row stays empty."""


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """B rows of T positions with room for I images each, and for views in S places.

    Attributes:
        rows: B, of the whole job.
        length: T.
        images: I.
        lanes: parts of equally many rows that are read and packed apart, see `data.batches`. The
            batches depend on it.
        places: S.
        targets: most positions of a row with text loss, beyond which no logits are computed;
            0: all may have it.
        prefix: most positions of a row's text before images, the only ones that the VLM runs over
            in a stage without adapter and skips; 0: it runs over whole rows.
    """

    rows: int
    length: int
    images: int
    lanes: int = 1
    places: int = 0
    targets: int = 0
    prefix: int = 0


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


def _before_images(batch: HostBatch) -> np.ndarray:
    """bool [B, T]: the position is before an image of its own segment, and of none."""
    kinds, segments = batch["kinds"], batch["tokens_segment_ids"]
    return np.stack([_prefix(*row) for row in zip(kinds, segments, strict=True)])


def _prefix(kinds: np.ndarray, segments: np.ndarray) -> np.ndarray:
    last = np.zeros(segments.max(initial=0) + 1, np.int64)
    drawn = np.flatnonzero(kinds == Kind.LATENT)
    np.maximum.at(last, segments[drawn], drawn)  # of each segment, its last image's last position
    return (np.arange(len(kinds)) < last[segments]) & (kinds != Kind.LATENT) & (segments > 0)


def _indices(mask: np.ndarray, size: int) -> np.ndarray:
    """Where each row of the mask is true, int32 [B, size], then -1."""
    found = np.full((len(mask), size), -1, np.int32)
    for row, true in enumerate(mask):
        at = np.flatnonzero(true)
        found[row, : len(at)] = at
    return found


def finish(batch: HostBatch, images: int) -> HostBatch:
    """A packed batch under the names that `pipeline.packed_batches` gives, with `image_start`."""
    kinds = batch["kinds"]
    starts = (kinds == Kind.LATENT) & (np.pad(kinds, ((0, 0), (1, 0)))[:, :-1] != Kind.LATENT)
    image_start = np.full((len(kinds), images), -1, np.int32)
    for row, row_starts in enumerate(starts):
        found = np.flatnonzero(row_starts)
        image_start[row, : len(found)] = found
    chosen = {}
    for name, mask in (("text_targets", batch["text_loss"]), ("prefix", _before_images(batch))):
        if name in batch:
            chosen[name] = _indices(mask, batch[name].shape[1])
    views = {}
    if "view_patches" in batch:
        views = {name: batch[name] for name in ("view_patches", "view_coordinates")}
        views |= packed_views(batch)
    return (
        views
        | chosen
        | {
            "tokens": batch["tokens"],
            "kinds": kinds,
            "positions": batch["positions"],
            "segments": batch["tokens_segment_ids"],
            "text_loss": batch["text_loss"],
            "images": batch["images"],
            "image_seeds": batch["image_seeds"],
            "image_start": image_start,
        }
    )


def fits(document: dict[str, np.ndarray], shape: BatchShape) -> str:
    """Why a document does not fit into an empty row; nothing where it does."""
    for name, size, unit in (
        ("tokens", shape.length, "positions"),
        ("images", shape.images, "images"),
        ("view_patches", shape.places, "places of views"),
        ("text_targets", shape.targets or shape.length, "positions with text loss"),
        ("prefix", shape.prefix or shape.length, "positions before images"),
    ):
        if len(document.get(name, ())) > size:
            return (
                f"a document has {len(document[name])} {unit}, but a row of this stage's batch "
                f"holds {size}"
            )
    if shape.prefix:
        kinds, prefix = document["kinds"], document["prefix"]
        first = np.flatnonzero(kinds == Kind.LATENT)[:1]
        if len(prefix) and prefix[-1] > first[0]:
            return (
                "a document has text between its images, but this stage's batch has a prefix: "
                "the VLM reads text that no image comes before"
            )
    return ""


def with_counted(document: dict[str, np.ndarray], shape: BatchShape) -> dict[str, np.ndarray]:
    """A document, and what a row has a limited number of beside positions and images."""
    if "error" in document:
        return document
    counted = {}
    if shape.targets:
        counted["text_targets"] = np.flatnonzero(document["text_loss"]).astype(np.int32)
    if shape.prefix:
        kinds = document["kinds"]
        before = _prefix(kinds, np.ones(len(kinds), np.int32))
        counted["prefix"] = np.flatnonzero(before).astype(np.int32)
    return document | counted


def packed(documents: grain.IterDataset, shape: BatchShape, rows: int) -> grain.IterDataset:
    """Packs documents' `features` first-fit into rows, and `rows` of them into batches."""
    per_position = dict.fromkeys(("tokens", "kinds", "positions", "text_loss"), shape.length)
    per_image = dict.fromkeys(("images", "image_seeds"), shape.images)
    counted = {"text_targets": shape.targets, "prefix": shape.prefix}
    per_place = {name: size for name, size in counted.items() if size}
    if shape.places:
        names = ("view_patches", "view_coordinates", "view_pictures")
        per_place |= dict.fromkeys(names, shape.places) | {"view_index": shape.length}
    bins = grain.experimental.FirstFitPackIterDataset(
        documents,
        length_struct=per_position | per_image | per_place,
        num_packing_bins=max(rows, _LEAST_BINS),
        shuffle_bins=False,
    )
    return bins.batch(rows).map(functools.partial(finish, images=shape.images))
