"""Plots of `analysis`: skips, log-determinants, attention to words, latent walks."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.analysis import Findings
from starflow2_jax.evaluation.pictures import grid
from starflow2_jax.nn.grid import square_side

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SKIPS, LOG_DETS, ATTENTION, WORDS, WALKS = (
    f"{name}.png" for name in ("skips", "log_dets", "attention", "words", "walks")
)
# Columns of the picture of words; more of them take more rows.
_COLUMNS = 8


def _figure(columns: int, rows: int = 1, width: float = 4.0, height: float = 3.2) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'starflow2-jax[demo]'") from error
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    figure.subplots(rows, columns, squeeze=False)
    return figure


def plot_findings(found: Findings, folder: pathlib.Path) -> None:
    """Writes `skips.png`, `log_dets.png`, `attention.png` and `words.png`.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure = _figure(2)
    for axis, place, name in zip(figure.axes, (0, 1), ("contribution", "alignment"), strict=True):
        for skips, label in ((found.visual, "VLM to flow"), (found.textual, "flow to words")):
            values = np.concatenate(skips)[:, place]
            axis.hist(values, 40, density=True, alpha=0.6, label=f"{label}: {values.mean():.3f}")
        axis.set(title=f"skips: {name}", xlabel=name, ylabel="density over positions")
        axis.legend()
    figure.savefig(folder / SKIPS, dpi=100)

    blocks = np.stack(found.log_dets)
    names = ["prior", "deep", *(f"shallow {n}" for n in range(blocks.shape[1] - 1))]
    values = np.column_stack([found.prior, blocks])
    figure = _figure(1)
    [axis] = figure.axes
    axis.bar(names, values.mean(0), yerr=values.std(0))
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set(title="parts of log p(image)", ylabel="nats per dim; bars: over images")
    figure.savefig(folder / LOG_DETS, dpi=100)

    figure = _figure(1)
    [axis] = figure.axes
    layers = np.stack(found.attention).mean(0)  # [L, 3]
    labels = ["words", "image before", "itself"]
    axis.stackplot(range(len(layers)), layers.T, labels=labels, alpha=0.8)
    axis.set(title="attention of an image's positions", xlabel="deep layer", ylabel="share")
    axis.set(ylim=(0, 1), xlim=(0, max(1, len(layers) - 1)))
    axis.legend(loc="lower left")
    figure.savefig(folder / ATTENTION, dpi=100)

    words, weights = found.example
    side = square_side(weights.shape[1])
    maps = weights.mean(0).T.reshape(len(words), side, side)
    rows = -(-len(words) // _COLUMNS)
    figure = _figure(min(len(words), _COLUMNS), rows, 1.5, 1.8)
    for axis in figure.axes:
        axis.axis("off")
    for axis, word, one in zip(figure.axes, words, maps, strict=False):
        axis.imshow(one, vmin=0, vmax=maps.max())
        axis.set_title(repr(word)[1:-1], fontsize=8)
    figure.suptitle("attention to each token before the image, mean over layers and heads")
    figure.savefig(folder / WORDS, dpi=100)


def plot_walks(walks: np.ndarray, captions: Sequence[str], folder: pathlib.Path) -> None:
    """Writes `walks.png` of uint8 [K, steps, H, W, channels]: a row for each caption.

    Raises:
        UserError: matplotlib is not installed.
    """
    steps = walks.shape[1]
    sheet = np.asarray(grid(walks.reshape(-1, *walks.shape[2:]), steps, scale=3))
    figure = _figure(1, 1, max(4.0, steps), 0.6 + len(captions))
    [axis] = figure.axes
    axis.imshow(sheet, cmap="gray")
    axis.set_yticks((np.arange(len(captions)) + 0.5) * len(sheet) / len(captions), captions)
    axis.set_xticks([])
    axis.set_title("noise from one draw to another")
    figure.savefig(folder / WALKS, dpi=100)
