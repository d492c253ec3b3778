"""An FAE of 64x64 emoji, on bare patches of pixels or on the features of a small ViT.

    npm pack emoji-datasource-google
    starflow2 data emoji --archive emoji-datasource-google-16.0.0.tgz --out data/emoji
    starflow2 train --config configs/fae_emoji.py --workdir runs/fae_emoji

A ViT, shaped as DINOv2, learns by masked reconstruction; then come the FAE's stages. What the FAE
encodes are bare patches: drawings were better in their latents than in those of the ViT's features,
which `--config.features=vit` takes (docs/emoji.md). Drawings are measured in the ViT's features, so
it is trained in either case. At the end the work directory holds `model/` (decoders tuned to the
flow's noise), `model_untuned/`, `vit/`, report.md and pictures. The report has the rFID where
`--config.inception` names the weights of its network, as `starflow2 evaluate generation
--inception` reads them.
"""

import dataclasses
import functools
import pathlib
import types

import ml_collections
import numpy as np
from jax.sharding import Mesh

from starflow2_jax.data.emoji import varied
from starflow2_jax.data.emoji_archive import SIZE, load_pictures, read_manifest, write_made
from starflow2_jax.data.images import open_folder
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.emoji_fae import reconstructions, write_fae_report
from starflow2_jax.evaluation.pictures import grid
from starflow2_jax.evaluation.reconstruction import inception_distance
from starflow2_jax.fae_bundle import load_fae, load_vit, save_fae
from starflow2_jax.models.dinov2 import DinoV2Config
from starflow2_jax.models.fae import (
    EncoderConfig,
    FAEConfig,
    FeatureDecoderConfig,
    FeatureFAE,
    PixelDecoderConfig,
)
from starflow2_jax.training import loop
from starflow2_jax.training.fae import FAETask, FAETraining, stages_of
from starflow2_jax.training.masked_vit import MaskedLoss, MaskedViTTask

UNTUNED = "model_untuned"


def get_config() -> ml_collections.ConfigDict:
    group = ml_collections.ConfigDict
    config = group()
    config.smoke = False
    config.seed = 0
    config.cpu_devices = 2
    config.mesh = group(dict(data=-1, fsdp=1, tensor=1, sequence=1))
    config.log_every = 20
    config.log_seconds = 10.0
    config.emoji = "data/emoji"
    config.inception = ""
    config.features = "patches"
    config.vit = group(
        dict(width=512, layers=2, head_dim=64, layer_scale=0.05, most_masked=0.5, seen=4.0)
    )
    # 768 numbers in place of 12,288: of the ViT 2 x 2 tokens of 192; of bare patches, whose feature
    # decoder is as wide as a patch has numbers, 4 x 4 of 48.
    config.fae = group()
    config.fae.vit = group(
        dict(
            patch=32,
            channels=192,
            encoder=dict(heads=12, head_dim=64),
            feature_decoder=dict(layers=2, mlp_width=1024, positions="learned"),
            pixel_decoder=dict(layers=2, width=576, heads=9, mlp_width=1024),
        )
    )
    config.fae.patches = group(
        dict(
            patch=16,
            channels=48,
            encoder=dict(heads=12, head_dim=64),
            feature_decoder=dict(layers=2, mlp_width=1024, positions="learned"),
            pixel_decoder=dict(layers=2, width=832, heads=13, mlp_width=1024),
        )
    )
    # No perceptual network and no critic: what is asked of this FAE is the pixels.
    plain = dict(reconstruction=4.0, perceptual=0.0, adversarial=0.0)
    config.fae_stages = group(
        dict(
            features=dict(beta=1e-6),
            pixels=dict(noise=0.2, weights=plain),
            fine_tune=dict(weights=plain),
            noisy=dict(noise=0.3, weights=plain),
        )
    )
    config.vit_stage = _stage(steps=300)
    config.stages = group()
    config.stages.features = _stage(steps=700)
    config.stages.pixels = _stage(steps=100)
    config.stages.fine_tune = _stage(steps=450)
    config.stages.noisy = _stage(steps=200)
    config.checkpoint = group(dict(every=250, keep_last=1))
    config.evaluation = group(dict(every=100, batches=2, samples=1000))
    return config


def _stage(steps: int) -> ml_collections.ConfigDict:
    optimizer = dict(
        steps=steps, learning_rate=5e-4, warmup=50, beta2=0.99, weight_decay=1e-4, ema=0.99
    )
    return ml_collections.ConfigDict(dict(batch=dict(rows=64), optimizer=optimizer))


def smoke(config: ml_collections.ConfigDict) -> None:
    """The same code at tiny sizes, on made pictures."""
    config.emoji = "made"
    config.vit.update(width=32, layers=1, head_dim=16)
    config.fae.vit.patch = 16
    config.fae.vit.pixel_decoder.update(width=64, heads=2)
    for fae in config.fae.values():
        fae.channels = 4
        fae.encoder.update(heads=2, head_dim=8)
        fae.feature_decoder.update(layers=1, mlp_width=32)
        fae.pixel_decoder.update(layers=1, mlp_width=32)
    for stage in [config.vit_stage, *config.stages.values()]:
        stage.batch.rows = 8
        stage.optimizer.update(steps=2, warmup=1)
    config.log_every = 1
    config.checkpoint.every = 1
    config.evaluation.update(every=1, batches=1)


def folder_of(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """The folder of emoji; in smoke mode one of made pictures, in the work directory."""
    if config.emoji != "made":
        return pathlib.Path(config.emoji).expanduser()
    return write_made(workdir / "made", config.seed)


def _vit(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> DinoV2Config:
    """Trains the ViT, or finds that it is trained."""
    v = config.vit
    model = DinoV2Config(
        layers=v.layers,
        width=v.width,
        heads=v.width // v.head_dim,
        mlp_width=4 * v.width,
        patch=config.fae.vit.patch,
        table_side=SIZE // config.fae.vit.patch,
        layer_scale=v.layer_scale,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    own = ml_collections.ConfigDict({**config.to_dict(), "stages": {"vit": config.vit_stage}})
    train, held_out = _folders(config, workdir)
    loss = MaskedLoss(model.table_side**2, most_masked=v.most_masked, seen=v.seen)
    task = MaskedViTTask(own, model, train, held_out, loss, varied, start_images=2000)
    (workdir / "vit").mkdir(exist_ok=True)
    loop.run(own, types.SimpleNamespace(make_task=lambda *_: task), workdir / "vit")
    return model


def _folders(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list:
    root = folder_of(config, workdir)
    return [open_folder(root / split, SIZE, 3) for split in ("train", "tune")]


@dataclasses.dataclass(frozen=True)
class EmojiFAETask(FAETask):
    """Keeps the FAE as it is before its decoders are tuned to noise."""

    def prepare(self, stage: str, model: FAETraining, mesh: Mesh) -> FAETraining:
        """See `FAETask`."""
        model = super().prepare(stage, model, mesh)
        if stage == "noisy":
            save_fae(self.workdir / UNTUNED, model.model, {"tuned_to_noise": 0.0})
        return model


def make_task(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> EmojiFAETask:
    if config.features not in config.fae:
        raise UserError(f"config.features: {config.features!r} is none of {sorted(config.fae)}")
    f, vit = config.fae[config.features], None
    side = SIZE // f.patch
    features = 3 * f.patch**2
    shape = _vit(config, workdir)
    if config.features == "vit":
        features = shape.width
        vit = load_vit(workdir / "vit")
    model = FAEConfig(
        features=features,
        channels=f.channels,
        side=side,
        encoder=EncoderConfig(**f.encoder),
        feature_decoder=FeatureDecoderConfig(
            **f.feature_decoder,
            heads=max(1, features // 64),
            final_norm="none",
        ),
        pixel_decoder=PixelDecoderConfig(**f.pixel_decoder, patch=f.patch),
    )
    train, held_out = _folders(config, workdir)
    stages = stages_of(config.fae_stages.to_dict(), side**2)
    some = held_out.batch(range(0, len(held_out), max(1, len(held_out) // 12)))["images"]
    draw = functools.partial(draw_samples, some)
    return EmojiFAETask(
        config,
        model,
        stages,
        vit,
        train,
        held_out,
        workdir,
        draw,
        augment=varied,
        linear_start=True,
    )


def draw_samples(images: np.ndarray, model: FeatureFAE, folder: pathlib.Path, name: str) -> None:
    """Pictures above their reconstructions, into `folder/NAME.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = np.round(np.clip(reconstructions(model, images), 0.0, 1.0) * 255.0).astype(np.uint8)
    grid([*images, *made], len(images), scale=1).save(folder / f"{name}.png")


def report(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    root = folder_of(config, workdir)
    emoji = read_manifest(root)
    pictures = {
        split: load_pictures(root, [one for one in emoji if one.split == split])
        for split in ("train", "test")
    }
    write_fae_report(
        workdir,
        load_fae(workdir / UNTUNED),
        load_fae(workdir / "model"),
        pictures["train"],
        pictures["test"],
        inception_distance(config.inception),
    )
