"""Pictures of a run: samples side by side, and the curves of its losses."""

import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from starflow2_jax.data.sequences import Turn
from starflow2_jax.metrics import read_metrics
from starflow2_jax.model import Model, Sampling
from starflow2_jax.parallel.distributed import fetch


def grid(images: Sequence[np.ndarray], columns: int, scale: int = 2) -> Image.Image:
    """Images uint8 [H, W, 1 or 3] side by side, `columns` in a row, enlarged.

    What would be a last row that is not full is left out; there must be a full one.
    """
    border = ((1, 1), (1, 1), (0, 0))
    rows = [
        np.concatenate([np.pad(i, border, constant_values=96) for i in images[r : r + columns]], 1)
        for r in range(0, len(images) - columns + 1, columns)
    ]
    whole = np.concatenate(rows, 0)
    sheet = Image.fromarray(whole[..., 0] if whole.shape[-1] == 1 else whole)
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def draw_captions(
    model: Model,
    captions: Sequence[str],
    sampling: Sampling,
    path: pathlib.Path,
    columns: int | None = None,
) -> None:
    """Draws one picture of each caption, into a PNG file of so many columns (None: one row).

    All processes of a job make the call; the first one writes.
    """
    prompts = [[Turn("user", (caption,))] for caption in captions]
    x = model.draw_latents(prompts, sampling)
    drawn = fetch(model.bundle.codec.to_uint8(x))
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        grid(list(drawn), columns or len(captions)).save(path)


def plot_losses(
    workdir: pathlib.Path, panels: Sequence[tuple[str, str]], unit: str = "nats"
) -> None:
    """Draws `losses.png` from a work directory's metrics: a panel for each (stage, loss)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(workdir / "metrics.jsonl")
    width = 13 / 3 * len(panels) if len(panels) > 1 else 7
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(width, 3.6), layout="constrained", squeeze=False
    )
    for axis, (stage, name) in zip(axes[0], panels, strict=True):
        for key, label in ((name, "training"), (f"held_out_{name}", "held out, EMA")):
            found = [(r["step"], r[key]) for r in rows if r["stage"] == stage and key in r]
            if found:
                axis.plot(*zip(*found, strict=True), label=label, linewidth=1)
        axis.set(title=f"{stage}: {name}", xlabel="step", ylabel=unit)
        axis.legend()
    figure.savefig(workdir / "losses.png", dpi=90)
    pyplot.close(figure)
