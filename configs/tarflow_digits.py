"""TarFlow on the pixels of 5,000 handwritten digits, class-conditional, on two CPU cores.

    starflow2 train --config configs/tarflow_digits.py --workdir runs/tarflow_digits

The digits are written to `data/` in the work directory as PNG files, a folder for each split and in
it one for each class. At the end: report.md, report.json and pictures in the work directory.
"""

import pathlib

import ml_collections

from starflow2_jax.data.digits import random_affine, write_folders
from starflow2_jax.data.images import open_folder
from starflow2_jax.evaluation.image_report import ImageReportConfig, draw_grid, write_report
from starflow2_jax.flow_bundle import load_image_flow
from starflow2_jax.models.starflow import TarFlowConfig
from starflow2_jax.training.image_flow import ImageFlowTask

SIZE, CHANNELS = 28, 1


def get_config() -> ml_collections.ConfigDict:
    group = ml_collections.ConfigDict
    config = group()
    config.smoke = False
    config.seed = 0
    config.cpu_devices = 2
    config.mesh = group(dict(data=-1, fsdp=1, tensor=1, sequence=1))
    config.log_every = 10
    config.log_seconds = 10.0
    config.data = group(dict(raw_share=0.3))
    config.flow = group(dict(patch=4, width=128, count=4, depth=2, head_dim=64, label_drop=0.1))
    config.stages = group()
    config.stages.train = group(
        dict(
            batch=dict(rows=32),
            optimizer=dict(
                steps=2400,
                learning_rate=2e-3,
                warmup=50,
                weight_decay=1e-4,
                latent_norm=0.0,
                # So short a run leaves an average behind: the parameters themselves are kept.
                ema=0.0,
                # Shapes first, then the exact grey of empty pixels; the end is free of noise.
                noise_start=0.25,
                noise_end=0.01,
                noise_hold=0.5,
                noise_share=0.92,
            ),
        )
    )
    config.checkpoint = group(dict(every=250, keep_last=2))
    config.evaluation = group(dict(every=100, batches=2, samples=500))
    config.report = group(dict(draws=4, samples=100, columns=10, guidance=1.0, temperature=0.9))
    return config


def smoke(config: ml_collections.ConfigDict) -> None:
    """The same code at tiny sizes."""
    config.flow.update(patch=7, width=32, count=2, depth=1, head_dim=16)
    config.stages.train.batch.rows = 8
    config.stages.train.optimizer.update(steps=2, warmup=1)
    config.log_every = 1
    config.checkpoint.every = 1
    config.evaluation.update(every=1, batches=1, samples=2)
    config.report.update(draws=1, samples=10)


def make_task(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> ImageFlowTask:
    folders = write_folders(workdir / "data")
    train = open_folder(folders["train"], SIZE, CHANNELS)
    flow = config.flow
    share = config.data.raw_share
    return ImageFlowTask(
        config,
        TarFlowConfig(
            CHANNELS,
            SIZE,
            flow.patch,
            flow.width,
            flow.count,
            flow.depth,
            len(train.classes),
            head_dim=flow.head_dim,
            # Recomputing is cheaper than the memory traffic of keeping, on CPU.
            remat="full",
        ),
        train,
        open_folder(folders["tune"], SIZE, CHANNELS),
        lambda model, folder, name: draw_grid(model, _report_config(config), folder, name),
        augment=lambda image, rng: image if rng.random() < share else random_affine(image, rng),
        label_drop=flow.label_drop,
    )


def _report_config(config: ml_collections.ConfigDict) -> ImageReportConfig:
    return ImageReportConfig(**config.report, rows=50, noise_std=0.0, seed=config.seed)


def report(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    test = open_folder(write_folders(workdir / "data")["test"], SIZE, CHANNELS)
    write_report(load_image_flow(workdir), test, test.classes, _report_config(config), workdir)
