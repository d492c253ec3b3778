"""STARFlow2 in small on 64x64 emoji, in the latent space of an FAE, on two CPU cores.

    starflow2 train --config configs/fae_emoji.py --workdir runs/fae_emoji
    starflow2 train --config configs/emoji.py --workdir runs/emoji

Caches the FAE's latents in the work directory, then trains stage 0 (a tiny language model) and the
paper's three. At the end: report.md, report.json and pictures in the work directory.
"""

import pathlib

import ml_collections

from starflow2_jax.bundle import Bundle
from starflow2_jax.data.emoji import EmojiData, EmojiSet, RecolouredSource, cached_set
from starflow2_jax.data.emoji_archive import (
    SIZE,
    load_pictures,
    read_manifest,
    write_made,
)
from starflow2_jax.data.latents import LatentSource
from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.data.sources import FolderSource
from starflow2_jax.evaluation.emoji import ReportConfig, write_report
from starflow2_jax.evaluation.pictures import draw_captions
from starflow2_jax.fae_bundle import load_fae, load_vit, read_fae, save_fae
from starflow2_jax.fae_cache import cache_latents
from starflow2_jax.model import Model, Sampling, load
from starflow2_jax.model_folder import finished
from starflow2_jax.models.fae import (
    EncoderConfig,
    FAEConfig,
    FeatureDecoderConfig,
    FeatureFAE,
    PixelDecoderConfig,
)
from starflow2_jax.models.fae_codec import FAECodec
from starflow2_jax.training.pretzel import PretzelTask, small_config

SPLITS = ("train", "tune")


def get_config() -> ml_collections.ConfigDict:
    group = ml_collections.ConfigDict
    config = group()
    config.smoke = False
    config.seed = 0
    config.cpu_devices = 2
    config.mesh = group(dict(data=-1, fsdp=1, tensor=1, sequence=1))
    config.log_every = 10
    config.log_seconds = 10.0
    config.emoji = "data/emoji"
    config.fae = "runs/fae_emoji"
    config.judge = ""  # run of fae_emoji.py in whose ViT's features KID is measured; "": the FAE's
    config.noise_std = 0.3
    config.language_model = group(dict(width=128, layers=3, head_dim=32, mlp_width=384))
    config.flow = group(dict(width=192, head_dim=32, deep_layers=3, shallow_layers=(2, 2)))
    config.stages = group()
    config.stages.pretrain_lm = _stage(
        dict(rows=16, length=168, images=6),
        dict(draw=2.0, nothing=0.3, category=2.0, tone=2.0, restore=2.0),
        dict(steps=250, learning_rate=3e-3, warmup=20),
    )
    config.stages.text_to_image = _stage(
        dict(rows=32, length=42, images=1),
        dict(draw=9.0, nothing=1.0),
        dict(steps=750, learning_rate=2e-3, warmup=50, weight_decay=0.1),
    )
    config.stages.image_to_text = _stage(
        dict(rows=16, length=168, images=6),
        dict(category=1.0),
        dict(steps=100, learning_rate=3e-3, warmup=20),
    )
    config.stages.joint = _stage(
        dict(rows=16, length=168, images=6),
        dict(draw=5.0, nothing=1.0, category=1.0, tone=5.0, restore=5.0),
        dict(steps=1000, learning_rate=2e-3, warmup=50, weight_decay=0.1),
    )
    config.checkpoint = group(dict(every=250, keep_last=1))
    config.evaluation = group(dict(every=250, batches=2, samples=500))
    config.report = group(
        dict(
            groups=4,
            drawings=128,
            edits=22,
            questions=96,
            guidance=1.0,
            temperature=0.9,
        )
    )
    return config


def _stage(batch: dict, mixture: dict, optimizer: dict) -> ml_collections.ConfigDict:
    parts = dict(batch=batch, mixture=mixture, optimizer=optimizer)
    return ml_collections.ConfigDict(parts)


def smoke(config: ml_collections.ConfigDict) -> None:
    """The same code at tiny sizes, on made pictures and an FAE that nobody has trained."""
    config.emoji = config.fae = "made"
    config.language_model.update(width=32, layers=2, head_dim=16, mlp_width=64)
    config.flow.update(width=32, head_dim=16, deep_layers=2, shallow_layers=(1, 1))
    for stage in config.stages.values():
        stage.batch.update(rows=8, length=96, images=4)
        stage.optimizer.update(steps=2, warmup=1)
    config.log_every = 1
    config.checkpoint.every = 1
    config.evaluation.update(every=1, batches=1, samples=2)
    config.report.update(groups=1, drawings=4, edits=1, questions=4)


def _made_fae(folder: pathlib.Path, seed: int) -> pathlib.Path:
    from flax import nnx

    if not (folder / "model.json").is_file():
        config = FAEConfig(
            features=3 * 16**2,
            channels=4,
            side=SIZE // 16,
            encoder=EncoderConfig(heads=2, head_dim=8),
            feature_decoder=FeatureDecoderConfig(1, 4, 32, final_norm="none"),
            pixel_decoder=PixelDecoderConfig(1, 32, 2, 32),
        )
        save_fae(folder, FeatureFAE(config, None, rngs=nnx.Rngs(seed)))
    return folder


def _folders(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    """Of the emoji, of the FAE, and of the FAE before its decoders were tuned to noise."""
    made = workdir / "made"
    emoji = write_made(made, config.seed) if config.emoji == "made" else config.emoji
    if config.fae == "made":
        fae = _made_fae(workdir / "made_fae", config.seed)
        return pathlib.Path(emoji), fae, fae
    run = pathlib.Path(config.fae).expanduser()
    untuned = run / "model_untuned"
    return pathlib.Path(emoji), finished(run), untuned if untuned.is_dir() else finished(run)


def make_task(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> PretzelTask:
    emoji, fae, _ = _folders(config, workdir)
    fae_config, about = read_fae(fae)
    sets = {}
    for split in SPLITS:
        cache = workdir / "latents" / split
        pictures = RecolouredSource(FolderSource(emoji / split))
        cache_latents(fae, pictures, cache, keep=("file",), shard=1024)
        wanted = [one for one in read_manifest(emoji) if one.split == split]
        sets[split] = cached_set(wanted, LatentSource(cache, about["checksum"]))
    shape = (SIZE, SIZE, 3)
    data = EmojiData(
        train=sets["train"],
        held_out=sets["tune"],
        image=ImageShape(*shape, fae_config.side, moments=2 * fae_config.channels),
        codec=FAECodec(load_fae(fae), shape, noise_std=config.noise_std),
        mixtures={name: stage.mixture.to_dict() for name, stage in config.stages.items()},
    )
    model = small_config(config, data, fae_config.channels)
    return PretzelTask(config, data, model, draw_samples)


def draw_samples(bundle: Bundle, folder: pathlib.Path, name: str) -> None:
    """A few captions, drawn with a fixed seed, into `folder/NAME.png`."""
    captions = ("grinning face", "red apple", "japan flag", "dog face", "rocket", "blue heart")
    draw_captions(Model(bundle), captions, Sampling(1.0, 0.9, seed=0), folder / f"{name}.png")


def report(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    emoji, _, untuned = _folders(config, workdir)
    splits = {}
    for split in ("train", "test"):
        wanted = tuple(one for one in read_manifest(emoji) if one.split == split)
        splits[split] = EmojiSet(wanted, load_pictures(emoji, wanted))
    settings = ReportConfig(**config.report, seed=config.seed)
    vit = pathlib.Path(config.judge or config.fae).expanduser() / "vit"
    write_report(
        load(workdir),
        load_fae(untuned),
        load_vit(vit) if config.judge or vit.is_dir() else None,
        splits,
        config.noise_std,
        settings,
        workdir,
    )
