"""The report on an FAE of emoji: how well it shows pictures that it has not seen.

Letters: B images, H, W pixels.
"""

import dataclasses
import math
import pathlib
import resource
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.evaluation.distances import in_batches
from starflow2_jax.evaluation.pictures import grid, plot_losses
from starflow2_jax.evaluation.reconstruction import NO_DISTANCE, Distance, measure_reconstruction
from starflow2_jax.metrics import read_metrics
from starflow2_jax.models.fae import FeatureFAE
from starflow2_jax.provenance import write_json


@dataclasses.dataclass(frozen=True)
class Quality:
    """Peak signal-to-noise ratios in dB, the mean over pictures.

    Attributes:
        whole: of all pixels.
        shown: of the pixels that are not white in the original.
    """

    whole: float
    shown: float


def quality(made: np.ndarray, originals: np.ndarray) -> Quality:
    """Of pictures [B, H, W, 3], 1 is white, against uint8 originals.

    Pictures that are all white count in `whole` alone.
    """
    errors = np.square(np.clip(made, 0.0, 1.0) - originals / 255.0).mean(-1)
    decibels = lambda mean: -10.0 * math.log10(max(mean, 1e-10))
    shown = (originals < 255).any(-1)
    pairs = [(e, s) for e, s in zip(errors, shown, strict=True) if s.any()]
    return Quality(
        whole=float(np.mean([decibels(e.mean()) for e in errors])),
        shown=float(np.mean([decibels(e[s].mean()) for e, s in pairs])),
    )


def reconstructions(model: FeatureFAE, images: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] -> what the posterior's mean decodes to, 1 is white."""
    decode = jax.jit(
        lambda model, images: model.fae.decode(model.encode(images, jnp.dtype("float32")).mean)
    )
    return in_batches(lambda part: decode(model, part), images, rows=64)


def principal_components(train: np.ndarray, images: np.ndarray, count: int) -> np.ndarray:
    """Images uint8 [B, H, W, 3] from `count` coefficients of a PCA of `train`, 1 is white.

    Whole pictures at once. Fewer coefficients where there are fewer training images.
    """
    flat = lambda part: part.reshape(len(part), -1).astype(np.float32) / 255.0
    data = flat(train)
    mean = data.mean(0)
    centred = data - mean
    # Of the images, not of the pixels: there are fewer of them.
    variances, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))
    kept = np.argsort(-variances)[: min(count, len(train) - 1)]
    kept = kept[variances[kept] > 1e-9 * variances.max()]
    axes = centred.T @ (vectors[:, kept] / np.sqrt(variances[kept])).astype(np.float32)
    made = (flat(images) - mean) @ axes @ axes.T + mean
    return made.reshape(images.shape)


def write_fae_report(
    workdir: pathlib.Path,
    model: FeatureFAE,
    tuned: FeatureFAE | None,
    train: np.ndarray,
    test: np.ndarray,
    distance: Distance | None = None,
) -> dict[str, Any]:
    """Measures; writes `report.json`, `report.md` and pictures into the work directory.

    Args:
        workdir: of the run.
        model: as it was before its decoders were tuned to noise.
        tuned: afterwards, or None.
        train, test: uint8 [n, H, W, 3]; the second were never trained on.
        distance: of reconstructions and originals, for the rFID; None: the report says so.
    """
    config = model.config
    numbers = config.tokens * config.channels
    made = reconstructions(model, test)
    components = principal_components(train, test, numbers)
    rows = {"FAE": quality(made, test), "PCA": quality(components, test)}
    if tuned is not None:
        rows["FAE, decoders tuned to noise"] = quality(reconstructions(tuned, test), test)
    seen = train[np.linspace(0, len(train) - 1, len(test)).astype(int)]
    rows["FAE, seen in training"] = quality(reconstructions(model, seen), seen)
    stages = {
        row["stage"]: row["stage_seconds"]
        for path in (workdir / "vit" / "metrics.jsonl", workdir / "metrics.jsonl")
        if path.is_file()
        for row in read_metrics(path)
        if "stage_seconds" in row
    }
    report = {
        "held_out_images": len(test),
        "latent_numbers": numbers,
        "pixel_numbers": int(np.prod(test.shape[1:])),
        **measure_reconstruction(model, test, distance=distance),
        "qualities": {name: dataclasses.asdict(q) for name, q in rows.items()},
        "stage_seconds": stages,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    write_json(workdir / "report.json", report)
    some = np.linspace(0, len(test) - 1, min(16, len(test))).astype(int)
    levels = lambda part: np.round(np.clip(part, 0.0, 1.0) * 255.0).astype(np.uint8)
    sheet = [*test[some], *levels(made[some]), *levels(components[some])]
    grid(sheet, len(some), scale=1).save(workdir / "reconstructions.png")
    names = [name for name in stages if name != "vit"]
    panels = [(n, "loss_features" if n == "features" else "loss_pixels") for n in names]
    plot_losses(workdir, panels, unit="mean square error")
    if "vit" in stages:
        plot_losses(workdir / "vit", [("vit", "loss_masked"), ("vit", "loss_seen")], "mean square")
    table = "\n".join(
        [
            "| held-out emoji | PSNR, dB | of pixels that are not white |",
            "|---|---|---|",
            *(f"| {name} | {q.whole:.2f} | {q.shown:.2f} |" for name, q in rows.items()),
        ]
    )
    rfid = f"rFID: {report['rfid']:.2f}" if "rfid" in report else NO_DISTANCE
    times = "\n".join(f"| {name} | {seconds:.0f} |" for name, seconds in stages.items())
    (workdir / "report.md").write_text(
        f"# An FAE of emoji\n\n{len(test)} held-out emoji, from the posterior's mean: {numbers} "
        f"numbers in place of {report['pixel_numbers']}, as many as the PCA has coefficients.\n\n"
        f"{table}\n\n{rfid}\n\n| stage | seconds |\n|---|---|\n{times}\n\n"
        "Originals, FAE, PCA:\n\n![reconstructions](reconstructions.png)\n\n"
        "![losses](losses.png)\n",
        encoding="utf-8",
    )
    print(table)
    print(rfid)
    return report
