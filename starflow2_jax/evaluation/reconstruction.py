"""How well an FAE shows images: PSNR, SSIM, noise of the posterior, rFID.

Letters: B images, H, W pixels.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.convert.inception import load_inception
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.distances import frechet_distance, inception_features, statistics
from starflow2_jax.models.fae import FeatureFAE, Moments

Distance = Callable[[np.ndarray, np.ndarray], float]
"""Of two sets of uint8 images [B, H, W, channels]: FID, where Inception's weights are given."""


NO_DISTANCE = (
    "No rFID: config.inception names no file of the weights of its network (docs/evaluation.md)."
)


def inception_distance(path: str) -> Distance | None:
    """FID between two sets of pictures, for `measure_reconstruction`.

    Args:
        path: of the network's weights, see `convert.inception.load_inception`; "": there are none.

    Returns:
        None where there are no weights.

    Raises:
        UserError: no such file, or another one.
    """
    if not path:
        return None
    model = load_inception(pathlib.Path(path).expanduser())

    def distance(made: np.ndarray, originals: np.ndarray) -> float:
        ours, theirs = (statistics(inception_features(model, part)) for part in (made, originals))
        return frechet_distance(ours, theirs)

    return distance


@jax.jit
def _passed(model: FeatureFAE, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    posterior = model.encode(images, jnp.dtype("float32"))
    return model.fae.decode(posterior.mean), posterior.mean, posterior.logvar


def _in_parts(
    model: FeatureFAE, images: np.ndarray, rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """uint8 reconstructions, means and log-variances, part after part; a short one is filled up."""
    for start in range(0, len(images), rows):
        part = images[start : start + rows]
        found = _passed(model, np.resize(part, (rows, *part.shape[1:])))
        pixels, mean, logvar = (np.asarray(a)[: len(part)] for a in found)
        yield np.round(np.clip(pixels, 0.0, 1.0) * 255.0).astype(np.uint8), mean, logvar


def reconstructed(model: FeatureFAE, images: np.ndarray, rows: int = 64) -> np.ndarray:
    """uint8 [B, H, W, channels] -> what the posterior's mean decodes to, the same."""
    rows = min(rows, len(images))
    return np.concatenate([levels for levels, _, _ in _in_parts(model, images, rows)])


def measure_reconstruction(
    model: FeatureFAE, images: np.ndarray, rows: int = 64, distance: Distance | None = None
) -> dict[str, Any]:
    """Reconstructions from the posterior's mean against their originals.

    Args:
        model: the FAE.
        images: uint8 [B, H, W, channels], of the size that it decodes.
        rows: images of one compiled batch.
        distance: of all reconstructions and all originals; None: no rFID is given.

    Returns:
        `psnr` (dB) and `ssim` (Gaussian windows), means over images; `deviation_ratio`: posterior
        deviation over the deviation of the means, mean over channels; `numbers_per_pixel_value`;
        with a distance also `rfid`.

    Raises:
        UserError: scikit-image is not installed.
    """
    try:
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    except ImportError as error:
        raise UserError(
            "measuring SSIM needs scikit-image: pip install 'starflow2-jax[demo]'"
        ) from error
    made, means, noises = [], Moments(), Moments()
    for levels, mean, logvar in _in_parts(model, images, rows):
        made.append(levels)
        means.add(mean)
        noises.add(np.exp(logvar))
    shown = np.concatenate(made)
    pairs = list(zip(images, shown, strict=True))
    similarity = {"channel_axis": -1, "gaussian_weights": True, "use_sample_covariance": False}

    def decibels(original: np.ndarray, image: np.ndarray) -> float:
        # Equal images have no noise; 100 dB stands for it, as in training.
        return peak_signal_noise_ratio(original, image) if (original != image).any() else 100.0

    deviations = np.sqrt(means.squares / means.count)
    measured = {
        "psnr": float(np.mean([decibels(*pair) for pair in pairs])),
        "ssim": float(np.mean([structural_similarity(*pair, **similarity) for pair in pairs])),
        "deviation_ratio": float(np.mean(np.sqrt(noises.mean) / np.maximum(deviations, 1e-12))),
        "numbers_per_pixel_value": model.config.tokens
        * model.config.channels
        / float(np.prod(images.shape[1:])),
    }
    if distance is not None:
        measured["rfid"] = distance(shown, images)
    return measured
