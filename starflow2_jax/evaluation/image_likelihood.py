"""Exact likelihoods of 8-bit images under an image flow of pixels, image by image.

A dequantised image has an exact density; -log2 of it, per dimension and with the width of a grey
level, bounds the bits that the 8-bit image costs from above. Several draws of the dequantisation
say how much hangs on it. Letters: n images, K classes, S draws.
"""

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.images import NO_CLASS, ImageFolder
from starflow2_jax.data.pipeline import HostBatch
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.likelihood import CaptionScores
from starflow2_jax.models.af_block import Given
from starflow2_jax.models.patches import dequantised, image_noise
from starflow2_jax.models.starflow import ImageFlow
from starflow2_jax.provenance import write_json

EXAMPLES, SUMMARY = "examples.jsonl", "summary.json"


@dataclasses.dataclass(frozen=True)
class ImageScores:
    """log p of dequantised images, nats.

    Attributes:
        labels: int32 [n]; -1 where an image has no class.
        by_class: [S, n, K], given each class; K is 0 for models without classes.
        plain: [S, n], given no class.
        dims: numbers of one image.
    """

    labels: np.ndarray
    by_class: np.ndarray
    plain: np.ndarray
    dims: int

    @functools.cached_property
    def own(self) -> np.ndarray:
        """Given the image's own class, or none where it has none: [S, n]."""
        if not self.by_class.shape[2]:
            return self.plain
        index = np.maximum(self.labels, 0)[None, :, None]
        own = np.take_along_axis(self.by_class, index, axis=2)[..., 0]
        return np.where(self.labels == NO_CLASS, self.plain, own)

    @functools.cached_property
    def mixture(self) -> np.ndarray:
        """Under equally likely classes: [S, n]."""
        draws = zip(self.by_class, self.plain, strict=True)
        return np.stack([CaptionScores(table, plain).mixture() for table, plain in draws])

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """Bayes' rule with equally likely classes: [n]."""
        return CaptionScores(self.by_class.mean(0), self.plain.mean(0)).posterior_argmax()

    def bits(self, nats: np.ndarray) -> np.ndarray:
        """Nats of an image -> bits per dim of its 8-bit values: a grey level is 2/256 wide."""
        return -nats / (self.dims * math.log(2.0)) + 7.0


@jax.jit
def _log_prob(model: ImageFlow, batch: HostBatch, labels: jax.Array, seed: jax.Array) -> jax.Array:
    """[B], nats."""
    images = batch["images"]
    uniform, _ = image_noise(seed, batch["image_seeds"], images.shape[1:])
    return model.forward(dequantised(images, uniform), Given(labels=labels)).log_prob


def score_images(
    model: ImageFlow,
    data: ImageFolder,
    *,
    draws: int = 1,
    seed: int = 0,
    rows: int = 64,
    classes: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> ImageScores:
    """Scores every image of a folder, with the same noise under every class.

    Args:
        model: of pixels.
        data: the images; their classes are the model's.
        draws: S, of the dequantisation.
        seed: of the draws.
        rows: images of one compiled batch.
        classes: score every class of a model with classes; else only the image's own.
        on_progress: called with images done and to do.

    Raises:
        UserError: an image that cannot be read.
    """
    count, known = len(data), model.config.classes
    rows = min(rows, count)
    draw_seeds = np.random.SeedSequence(seed).generate_state(draws)
    columns = list(range(known)) if known and classes else []
    table, plain = np.zeros((draws, count, len(columns))), np.zeros((draws, count))
    own = np.zeros((draws, count))
    labels = data.labels if known else np.full(count, NO_CLASS, np.int32)
    for start in range(0, count, rows):
        # The last batch is filled up with the last image: one shape is compiled.
        here = np.minimum(np.arange(start, start + rows), count - 1)
        batch, kept = data.batch(here), slice(start, min(start + rows, count))
        size = kept.stop - start

        def scored(
            label: np.ndarray, draw_seed: int, batch: HostBatch = batch, size: int = size
        ) -> np.ndarray:
            found = _log_prob(model, batch, jnp.asarray(label, jnp.int32), draw_seed)
            return np.asarray(found, np.float64)[:size]

        for draw, draw_seed in enumerate(draw_seeds):
            plain[draw, kept] = scored(np.full(rows, NO_CLASS), draw_seed)
            for column in columns:
                table[draw, kept, column] = scored(np.full(rows, column), draw_seed)
            if known and not columns:
                own[draw, kept] = scored(labels[here], draw_seed)
        if on_progress:
            on_progress(kept.stop, count)
    dims = data.size**2 * data.channels
    if known and not columns:
        # One column: each image's own class.
        labels, table = np.where(labels == NO_CLASS, NO_CLASS, 0), own[..., None]
    return ImageScores(labels, table, plain, dims)


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean over images [n], and its standard error."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(error)


def _spread(values: np.ndarray) -> np.ndarray:
    """Standard deviation over draws [S, ...]; 0 for one draw."""
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def summarise(scores: ImageScores, classes: bool = True) -> dict[str, Any]:
    """The numbers of `summary.json`: means over images with standard errors, spreads over draws.

    Args:
        scores: of all images.
        classes: every class was scored.
    """
    own = scores.own
    bits, error = _mean(scores.bits(own).mean(0))
    by_draw = scores.bits(own).mean(1)
    summary: dict[str, Any] = {
        "images": own.shape[1],
        "dims": scores.dims,
        "draws": own.shape[0],
        "nats": float(own.mean()),
        "bits_per_dim": bits,
        "bits_per_dim_standard_error": error,
        "bits_per_dim_by_draw": [float(b) for b in by_draw],
        "bits_per_dim_spread": float(_spread(by_draw)),
    }
    if scores.by_class.shape[2]:
        summary["bits_per_dim_no_class"] = float(scores.bits(scores.plain).mean())
    if scores.by_class.shape[2] and classes:
        summary["bits_per_dim_mixture"] = float(scores.bits(scores.mixture).mean())
        known = scores.labels != NO_CLASS
        if known.any():
            right = scores.predicted[known] == scores.labels[known]
            summary["bayes_accuracy"] = float(right.mean())
    return summary


def _example(
    scores: ImageScores, data: ImageFolder, classes: tuple[str, ...], index: int
) -> dict[str, Any]:
    own = scores.own[:, index]
    label = data.labels[index]
    row: dict[str, Any] = {
        "file": data.files[index],
        "class": None if label == NO_CLASS else data.classes[label],
        "nats": float(own.mean()),
        "nats_spread": float(_spread(own)),
        "bits_per_dim": float(scores.bits(own).mean()),
        "bits_per_dim_spread": float(_spread(scores.bits(own))),
    }
    if scores.by_class.shape[2]:
        row["nats_no_class"] = float(scores.plain[:, index].mean())
    if classes:
        row["nats_by_class"] = [float(v) for v in scores.by_class[:, index].mean(0)]
        row["nats_mixture"] = float(scores.mixture[:, index].mean())
        row["predicted"] = classes[scores.predicted[index]]
    return row


def write_likelihoods(
    model: ImageFlow,
    data: ImageFolder,
    out: pathlib.Path,
    *,
    classes: tuple[str, ...] = (),
    about: dict[str, Any],
    on_progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores a folder and writes `examples.jsonl` and `summary.json`.

    Args:
        model: of pixels.
        data: the images.
        out: folder of the results; made where missing.
        classes: names of the model's classes; empty: only each image's own is scored.
        about: what else the summary records: model, data.
        on_progress: see `score_images`.
        options: see `score_images`.

    Returns:
        The summary.

    Raises:
        UserError: an image that cannot be read, or the results cannot be written.
    """
    began = time.monotonic()
    scores = score_images(model, data, classes=bool(classes), on_progress=on_progress, **options)
    summary = about | summarise(scores, bool(classes))
    if classes:
        summary["classes"] = list(classes)
    summary["seconds"] = time.monotonic() - began
    lines = [json.dumps(_example(scores, data, classes, i)) + "\n" for i in range(len(data))]
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / EXAMPLES).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    write_json(out / SUMMARY, summary)
    return summary
