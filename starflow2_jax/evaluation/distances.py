"""Distances of two sets of pictures in a network's features: Fréchet (FID) and kernel (KID).

Specifications: arXiv 1706.08500 (FID), arXiv 1801.01401 (KID). Letters: n pictures, D features.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from starflow2_jax.models.inception import Inception, resized


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of the features of a set.

    Attributes:
        mean: float64 [D].
        covariance: float64 [D, D], of a sample: over n - 1.
    """

    mean: np.ndarray
    covariance: np.ndarray


def statistics(features: np.ndarray) -> Statistics:
    """Of features [n, D], n at least 2."""
    wide = features.astype(np.float64)
    return Statistics(wide.mean(0), np.atleast_2d(np.cov(wide, rowvar=False)))


def _root(matrix: np.ndarray) -> np.ndarray:
    """The square root of a symmetric matrix; what rounding made negative is zero."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    The last trace is that of (C_a^(1/2) C_b C_a^(1/2))^(1/2), which is symmetric: it needs no
    complex numbers and no offset, even with fewer pictures than features.
    """
    root = _root(a.covariance)
    mixed = np.linalg.eigvalsh(root @ b.covariance @ root)
    shared = np.sqrt(np.maximum(mixed, 0.0)).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(np.square(a.mean - b.mean).sum() + traces - 2.0 * shared)


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The squared maximum mean discrepancy of features [n, D] under (x.y / D + 1)^3.

    Unbiased within each pair of subsets: a distance of nothing may be negative.

    Args:
        a, b: features.
        subsets: pairs of subsets that are drawn without replacement.
        size: of a subset; fewer where a set is smaller.
        seed: of the draws.

    Returns:
        Mean and standard deviation over the pairs.

    Raises:
        ValueError: fewer than two pictures.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError("a kernel distance needs at least two pictures of each set")
    rng = np.random.default_rng(seed)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    def off_diagonal(x: np.ndarray) -> float:
        square = kernel(x, x)
        return (square.sum() - np.trace(square)) / (size * (size - 1))

    found = []
    for _ in range(subsets):
        x, y = (
            some[rng.choice(len(some), size, replace=False)].astype(np.float64) for some in (a, b)
        )
        found.append(off_diagonal(x) + off_diagonal(y) - 2.0 * kernel(x, y).mean())
    return float(np.mean(found)), float(np.std(found))


def _batches(images: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    part: list[np.ndarray] = []
    for image in images:
        part.append(image)
        if len(part) == rows:
            yield np.stack(part)
            part = []
    if part:
        yield np.stack(part)


def in_batches(
    compute: Callable[[np.ndarray], jax.Array], inputs: Iterable[np.ndarray], rows: int
) -> np.ndarray:
    """What a compiled function gives for inputs of one shape [...]: float32 [n, D].

    A short last batch is filled up: one shape is compiled.

    Raises:
        ValueError: no inputs.
    """
    parts = []
    for batch in _batches(inputs, rows):
        full = np.resize(batch, (rows, *batch.shape[1:]))
        parts.append(np.asarray(compute(full), np.float32)[: len(batch)])
    return np.concatenate(parts)


_features = jax.jit(lambda model, pixels: model(pixels))


def inception_features(
    model: Inception, images: Iterable[np.ndarray], rows: int = 32
) -> np.ndarray:
    """Features float32 [n, 2048] of images uint8 [H, W, 1 or 3], of any sizes."""

    def prepared() -> Iterator[np.ndarray]:
        for image in images:
            rgb = np.repeat(image, 3, -1) if image.shape[-1] == 1 else image
            yield resized(rgb)

    return in_batches(lambda batch: _features(model, batch), prepared(), rows)
