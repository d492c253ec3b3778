"""Exact likelihoods of images under captions: bits per dim, mixtures, Bayes' rule.

All log-probabilities are in nats, of the latents; a codec's `bits_per_dim` converts them to the
8-bit image where pixels are the latents.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from starflow2_jax.data.sequences import Turn
from starflow2_jax.model import Model


@dataclasses.dataclass(frozen=True)
class CaptionScores:
    """log p(image | caption) for every image and caption, and without any caption.

    Attributes:
        captioned: [images, captions], nats.
        empty: [images], under the empty prompt, nats.
    """

    captioned: np.ndarray
    empty: np.ndarray

    def mixture(self) -> np.ndarray:
        """log of the mean over captions of p(image | caption): [images], nats."""
        top = self.captioned.max(1, keepdims=True)
        return (top + np.log(np.exp(self.captioned - top).mean(1, keepdims=True)))[:, 0]

    def posterior_argmax(self) -> np.ndarray:
        """Bayes' rule with a uniform prior: the likeliest caption of each image, [images]."""
        return self.captioned.argmax(1)


def score_captions(
    model: Model,
    images: np.ndarray,
    captions: Sequence[str],
    *,
    draws: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> CaptionScores:
    """Scores every image under every caption, with the same dequantisation noise throughout.

    Args:
        model: a trained one.
        images: uint8 [n, H, W, channels].
        captions: user's texts; the empty prompt is added.
        draws: dequantisation draws to average log p over.
        on_progress: called with captions done and to do.
    """
    columns = []
    prompts: list[tuple[str, ...]] = [*((c,) for c in captions), ()]
    for done, prompt in enumerate(prompts):
        conversations = [[Turn("user", prompt), Turn("assistant", (image,))] for image in images]
        scores = model.log_prob(conversations, draws=draws)
        columns.append([s.images[0] for s in scores])
        if on_progress:
            on_progress(done + 1, len(prompts))
    table = np.array(columns).T
    return CaptionScores(table[:, :-1], table[:, -1])


def paired_difference(better: np.ndarray, worse: np.ndarray) -> tuple[float, float]:
    """Mean of better - worse over examples, and its standard error."""
    difference = better - worse
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))
