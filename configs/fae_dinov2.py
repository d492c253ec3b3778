r"""The published FAE: latents of 16x16x32 numbers of 256x256 images, on DINOv2-g/14.

    starflow2 convert dinov2 dinov2-giant --out dinov2_giant
    starflow2 train --config configs/fae_dinov2.py --workdir runs/fae \
        --config.vit=dinov2_giant --config.data.train=imagenet/train \
        --config.data.held_out=imagenet/val --config.perceptual=vgg16.pth,vgg.pth

`perceptual` names torchvision's VGG-16 and the weights of LPIPS 0.1 on it; without them the
perceptual term is left out. `inception` names the weights of the rFID's network, as `starflow2
evaluate generation --inception` reads them; without them there is no rFID. The paper gives sizes,
steps, batches and rates (arXiv 2512.07829); what it does not give is as in the family's own decoder
training. At the end: report.json, losses.png.
"""

import functools
import pathlib

import ml_collections
import numpy as np
from flax import nnx

from starflow2_jax.convert.lpips import load_lpips
from starflow2_jax.data.images import open_folder, random_flip, write_folder
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.pictures import grid, plot_losses
from starflow2_jax.evaluation.reconstruction import (
    NO_DISTANCE,
    inception_distance,
    measure_reconstruction,
    reconstructed,
)
from starflow2_jax.fae_bundle import load_fae, load_vit
from starflow2_jax.models.dinov2 import DinoV2, DinoV2Config
from starflow2_jax.models.discriminator import DiscriminatorConfig
from starflow2_jax.models.fae import (
    EncoderConfig,
    FAEConfig,
    FeatureDecoderConfig,
    FeatureFAE,
    PixelDecoderConfig,
)
from starflow2_jax.provenance import write_json
from starflow2_jax.training.fae import FAETask, stages_of

CHANNELS = 3


def get_config() -> ml_collections.ConfigDict:
    group = ml_collections.ConfigDict
    config = group()
    config.smoke = False
    config.seed = 0
    config.cpu_devices = None
    config.mesh = group(dict(data=1, fsdp=-1, tensor=1, sequence=1))
    config.log_every = 100
    config.log_seconds = 30.0
    config.vit = "dinov2_giant"
    config.vit_dtype = "bfloat16"
    config.data = group(dict(train="imagenet/train", held_out="imagenet/val", report_images=5000))
    config.perceptual = ()
    config.inception = ""
    config.fae = group(
        dict(
            channels=32,
            side=16,
            encoder=dict(heads=24, head_dim=256),
            feature_decoder=dict(layers=6, heads=24, mlp_width=4096),
            pixel_decoder=dict(layers=24, width=1024, heads=16, mlp_width=2736, patch=16),
            remat="dots",
        )
    )
    config.discriminator = group(dict(width=128, multipliers=(1, 2, 4), side=16, groups=32))
    plain = dict(kind="l2", reconstruction=1.0, perceptual=1.1, adversarial=0.0)
    critic = plain | dict(adversarial=0.1, adaptive=False, lecam=0.001)
    dtype = dict(dtype="bfloat16")
    config.fae_stages = group(
        dict(
            features=dict(beta=1e-6, **dtype),
            pixels=dict(noise=0.4, noise_by="channel", weights=plain, **dtype),
            fine_tune=dict(weights=critic, **dtype),
            noisy=dict(noise=0.3, weights=critic, **dtype),
        )
    )
    config.stages = group()
    config.stages.features = _stage(steps=1_000_000, rows=1024)
    config.stages.pixels = _stage(steps=800_000, rows=512)
    config.stages.fine_tune = _stage(steps=200_000, rows=512)
    config.stages.noisy = _stage(steps=200_000, rows=64)
    config.checkpoint = group(dict(every=5000, keep_last=2))
    config.evaluation = group(dict(every=5000, batches=4, samples=20_000))
    return config


def _stage(steps: int, rows: int) -> ml_collections.ConfigDict:
    optimizer = dict(
        steps=steps,
        learning_rate=1e-4,
        warmup=1000,
        final_rate=0.0,
        beta2=0.999,
        weight_decay=1e-4,
        clip=1.0,
        ema=0.9999,
    )
    return ml_collections.ConfigDict(dict(batch=dict(rows=rows), optimizer=optimizer))


def smoke(config: ml_collections.ConfigDict) -> None:
    """The same code at tiny sizes, on made pictures and a ViT of random numbers."""
    config.update(vit="made", vit_dtype="float32")
    config.data.update(train="made", held_out="made", report_images=8)
    config.fae.update(channels=4, side=4, remat="none")
    config.fae.encoder.update(heads=2, head_dim=16)
    config.fae.feature_decoder.update(layers=1, heads=2, mlp_width=32)
    config.fae.pixel_decoder.update(layers=1, width=16, heads=2, mlp_width=32, patch=4)
    config.discriminator.update(width=8, multipliers=(1, 2), side=2, groups=4)
    for name, stage in config.fae_stages.items():
        stage.dtype = "float32"
        config.stages[name].batch.rows = 8
        config.stages[name].optimizer.update(steps=2, warmup=1)
    config.log_every = 1
    config.checkpoint.every = 1
    config.evaluation.update(every=1, batches=1, samples=2)


def _model(config: ml_collections.ConfigDict, features: int) -> FAEConfig:
    f = config.fae
    return FAEConfig(
        features=features,
        channels=f.channels,
        side=f.side,
        encoder=EncoderConfig(**f.encoder),
        feature_decoder=FeatureDecoderConfig(**f.feature_decoder),
        pixel_decoder=PixelDecoderConfig(**f.pixel_decoder),
        remat=f.remat,
    )


def _vit(config: ml_collections.ConfigDict) -> DinoV2:
    if config.vit != "made":
        return load_vit(pathlib.Path(config.vit).expanduser(), config.vit_dtype)
    shape = DinoV2Config(layers=1, width=32, heads=2, mlp_width=64, patch=4, table_side=4)
    return DinoV2(shape, rngs=nnx.Rngs(config.seed))


def _folder(config: ml_collections.ConfigDict, workdir: pathlib.Path, split: str) -> pathlib.Path:
    if config.data[split] != "made":
        return pathlib.Path(config.data[split]).expanduser()
    size = config.fae.side * config.fae.pixel_decoder.patch
    rng = np.random.default_rng(config.seed)
    images = rng.integers(0, 256, (16, size, size, CHANNELS), np.uint8)
    write_folder(workdir / "made", images, [0] * len(images), ["made"])
    return workdir / "made"


def make_task(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> FAETask:
    inception_distance(config.inception)  # a wrong file is said now, not after the training
    vit = _vit(config)
    try:
        model = _model(config, vit.config.width)
    except ValueError as error:
        raise UserError(f"config.fae: {error}") from error
    train, held_out = (
        open_folder(_folder(config, workdir, split), model.image_size, CHANNELS)
        for split in ("train", "held_out")
    )
    files = [pathlib.Path(name).expanduser() for name in config.perceptual]
    shown = np.linspace(0, len(held_out) - 1, min(8, len(held_out))).astype(int)
    return FAETask(
        config,
        model,
        stages_of(config.fae_stages.to_dict(), model.tokens),
        vit,
        train,
        held_out,
        workdir,
        functools.partial(draw_samples, held_out.batch(shown)["images"]),
        DiscriminatorConfig(**config.discriminator),
        load_lpips(files) if files else None,
        random_flip,
    )


def draw_samples(images: np.ndarray, model: FeatureFAE, folder: pathlib.Path, name: str) -> None:
    """Held-out pictures above their reconstructions, into `folder/NAME.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    grid([*images, *reconstructed(model, images)], len(images), scale=1).save(
        folder / f"{name}.png"
    )


def report(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    model = load_fae(workdir)
    held_out = open_folder(_folder(config, workdir, "held_out"), model.config.image_size, CHANNELS)
    count = min(config.data.report_images, len(held_out))
    images = held_out.batch(np.linspace(0, len(held_out) - 1, count).astype(int))["images"]
    distance = inception_distance(config.inception)
    measured = measure_reconstruction(model, images, distance=distance)
    write_json(workdir / "report.json", {"images": count, **measured})
    if distance is None:
        print(NO_DISTANCE)
    panels = [(n, "loss_features" if n == "features" else "loss_pixels") for n in config.stages]
    plot_losses(workdir, panels)
    for name, value in measured.items():
        print(f"{name}: {value:.4g}")
