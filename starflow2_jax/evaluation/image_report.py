"""The report on a trained image flow: likelihoods of held-out images, loss curves, samples."""

import dataclasses
import pathlib
import resource
import time
from typing import Any

import numpy as np

from starflow2_jax.data.images import NO_CLASS, ImageFolder
from starflow2_jax.evaluation.image_likelihood import write_likelihoods
from starflow2_jax.evaluation.pictures import grid, plot_losses
from starflow2_jax.metrics import Progress, read_metrics
from starflow2_jax.models.starflow import ImageFlow
from starflow2_jax.provenance import write_json
from starflow2_jax.sampling.images import sample


@dataclasses.dataclass(frozen=True)
class ImageReportConfig:
    """How much is measured.

    Attributes:
        draws: dequantisation draws of each likelihood.
        rows: images of one compiled batch.
        samples: drawn, a multiple of `columns`; classes take turns.
        columns: of their grid.
        guidance, temperature, noise_std: see `sampling.images.sample`.
        seed: of draws and samples.
    """

    draws: int
    rows: int
    samples: int
    columns: int
    guidance: float
    temperature: float
    noise_std: float
    seed: int


def draw_grid(model: ImageFlow, config: ImageReportConfig, folder: pathlib.Path, name: str) -> None:
    """Draws images, the classes in turn, into `folder/NAME.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    known = model.config.classes
    labels = [i % known if known else NO_CLASS for i in range(config.samples)]
    drawn: list[np.ndarray] = []
    for start in range(0, config.samples, config.rows):
        here = labels[start : start + config.rows]
        drawn += [
            *sample(
                model,
                here,
                config.seed + start,
                guidance=config.guidance,
                temperature=config.temperature,
                noise_std=config.noise_std,
            )
        ]
    grid(drawn, config.columns).save(folder / f"{name}.png")


def _training(workdir: pathlib.Path) -> dict[str, float]:
    """The last row of the training in `metrics.jsonl`: seconds, rates, memory."""
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if "stage_seconds" in row]
    names = ("stage_seconds", "images_per_second", "peak_memory_gb")
    return {"steps": rows[-1]["step"], **{name: rows[-1][name] for name in names}}


def write_report(
    model: ImageFlow,
    data: ImageFolder,
    classes: tuple[str, ...],
    config: ImageReportConfig,
    workdir: pathlib.Path,
) -> dict[str, Any]:
    """Measures, and writes `report.json`, `report.md` and the pictures into the work directory.

    Args:
        model: trained.
        data: held-out images.
        classes: names of the model's classes; empty: only each image's own is scored.
        config: how much.
        workdir: of the run.
    """
    began = time.monotonic()
    progress = Progress("likelihood", len(data), unit="images")
    summary = write_likelihoods(
        model,
        data,
        workdir / "likelihood",
        classes=classes,
        about={"data": data.root.name},
        on_progress=lambda done, _: progress.update(done, {}),
        draws=config.draws,
        seed=config.seed,
        rows=config.rows,
    )
    del summary["seconds"]
    draw_grid(model, config, workdir, "samples")
    plot_losses(workdir, [("train", "loss_image")])
    report = summary | _training(workdir)
    report |= {
        "guidance": config.guidance,
        "temperature": config.temperature,
        "seconds_evaluation": time.monotonic() - began,
        "peak_memory_gb": max(
            report["peak_memory_gb"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        ),
    }
    write_json(workdir / "report.json", report)
    numbers = {k: v for k, v in report.items() if isinstance(v, int | float)}
    table = "\n".join(
        ["| measure | value |", "|---|---|", *(f"| {k} | {v:.5g} |" for k, v in numbers.items())]
    )
    (workdir / "report.md").write_text(
        f"# {len(data)} held-out images of `{data.root.name}`\n\n{table}\n\n"
        "Image by image: `likelihood/examples.jsonl`.\n\n"
        "![losses](losses.png)\n\n![samples](samples.png)\n",
        encoding="utf-8",
    )
    print(table)
    return report
