"""CLIP score: how well pictures go with their captions.

Specification: arXiv 2104.08718, on the scale of 0 to 100 that is usual since.
"""

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from starflow2_jax.convert.clip import LoadedClip
from starflow2_jax.evaluation.distances import in_batches

_embed_images = jax.jit(lambda model, images: model.embed_images(images))
_embed_text = jax.jit(lambda model, tokens, lengths: model.embed_text(tokens, lengths))


def clip_scores(
    clip: LoadedClip, images: Iterable[np.ndarray], captions: Sequence[str], rows: int = 32
) -> np.ndarray:
    """100 max(cos(picture, caption), 0) of each pair: float64 [n].

    Args:
        clip: see `load_clip`.
        images: uint8 [H, W, 1 or 3] of any sizes, as many as captions.
        captions: those that are longer than the model's context are cut.
        rows: of a compiled batch.
    """
    pictures = in_batches(
        lambda batch: _embed_images(clip.model, batch), map(clip.prepared, images), rows
    )
    tokens, lengths = clip.encoded(captions)
    words = in_batches(
        lambda batch: _embed_text(clip.model, batch[:, :-1], batch[:, -1]),
        np.concatenate([tokens, lengths[:, None]], 1),
        rows,
    )
    cosines = (pictures.astype(np.float64) * words).sum(-1)
    return 100.0 * np.maximum(cosines, 0.0)
