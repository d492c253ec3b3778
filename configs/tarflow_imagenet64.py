"""TarFlow 2-768-8-8 on unconditional ImageNet 64x64, as the paper trains it (arXiv 2412.06329).

    starflow2 train --config configs/tarflow_imagenet64.py --workdir runs/tarflow_imagenet64 \
        --config.data.train=FOLDER --config.data.held_out=FOLDER

Patches of 2, width 768, 8 blocks of 8 layers, noise 0.05, batch 256, 200 epochs; the samples are
denoised by one score step. The paper's likelihood (2.99 bits per dim) is that of a run of 100
epochs on dequantised pixels alone:

        --config.stages.train.optimizer.noise_final=0 --config.stages.train.optimizer.steps=500400

The noise comes on top of uniform dequantisation here, whose own standard deviation is 0.0023.
"""

import pathlib

import ml_collections
import numpy as np

from starflow2_jax.data.images import open_folder, random_flip, write_folder
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.image_report import ImageReportConfig, draw_grid, write_report
from starflow2_jax.flow_bundle import load_image_flow
from starflow2_jax.models.starflow import TarFlowConfig
from starflow2_jax.training.image_flow import ImageFlowTask

CHANNELS = 3


def get_config() -> ml_collections.ConfigDict:
    group = ml_collections.ConfigDict
    config = group()
    config.smoke = False
    config.seed = 0
    config.cpu_devices = None
    config.mesh = group(dict(data=1, fsdp=-1, tensor=1, sequence=1))
    config.log_every = 50
    config.log_seconds = 30.0
    config.data = group(dict(train="", held_out="", size=64))
    config.flow = group(dict(patch=2, width=768, count=8, depth=8, head_dim=64, dtype="bfloat16"))
    config.stages = group()
    epoch = 5004  # 1,281,167 images in batches of 256
    config.stages.train = group(
        dict(
            batch=dict(rows=256),
            optimizer=dict(
                steps=200 * epoch,
                learning_rate=1e-4,
                warmup=epoch,
                first_rate=0.01,
                final_rate=0.01,
                weight_decay=1e-4,
                clip=0.0,
                ema=0.0,
                latent_norm=0.0,
                noise_final=0.05,
            ),
        )
    )
    config.checkpoint = group(dict(every=2000, keep_last=3))
    config.evaluation = group(dict(every=2000, batches=8, samples=20000))
    config.report = group(
        dict(draws=1, rows=64, samples=64, columns=8, guidance=0.0, temperature=1.0)
    )
    return config


def smoke(config: ml_collections.ConfigDict) -> None:
    """The same code at tiny sizes on made data."""
    config.data.update(size=8)
    config.flow.update(width=32, count=2, depth=1, head_dim=16)
    config.stages.train.batch.rows = 8
    config.stages.train.optimizer.update(steps=2, warmup=1)
    config.log_every = 1
    config.checkpoint.every = 1
    config.evaluation.update(every=1, batches=1, samples=2)
    config.report.update(samples=8)


def _folders(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, pathlib.Path]:
    if config.smoke:
        size, rng = config.data.size, np.random.default_rng(0)
        for name in ("train", "held_out"):
            images = rng.integers(0, 256, (16, size, size, CHANNELS), dtype=np.uint8)
            write_folder(workdir / "data" / name, images, np.arange(16) % 2, ("a", "b"))
        return {name: workdir / "data" / name for name in ("train", "held_out")}
    for name in ("train", "held_out"):
        if not config.data[name]:
            raise UserError(f"config.data.{name} is empty; expected a folder of images")
    return {name: pathlib.Path(config.data[name]) for name in ("train", "held_out")}


def make_task(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> ImageFlowTask:
    folders, size, flow = _folders(config, workdir), config.data.size, config.flow
    return ImageFlowTask(
        config,
        TarFlowConfig(
            CHANNELS,
            size,
            flow.patch,
            flow.width,
            flow.count,
            flow.depth,
            head_dim=flow.head_dim,
            remat="full",
            dtype=flow.dtype,
        ),
        open_folder(folders["train"], size, CHANNELS),
        open_folder(folders["held_out"], size, CHANNELS),
        lambda model, folder, name: draw_grid(model, _report_config(config), folder, name),
        augment=random_flip,
    )


def _report_config(config: ml_collections.ConfigDict) -> ImageReportConfig:
    noise_std = config.stages.train.optimizer.noise_final
    return ImageReportConfig(**config.report, noise_std=noise_std, seed=config.seed)


def report(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    data = open_folder(_folders(config, workdir)["held_out"], config.data.size, CHANNELS)
    write_report(load_image_flow(workdir), data, (), _report_config(config), workdir)
