"""The paper's model: 3.6 B trainable parameters on a frozen Qwen2.5-VL-7B, at 256 x 256.

    starflow2 plan --config configs/starflow2_7b.py --topology v5p:4x4x4
    starflow2 train --config configs/starflow2_7b.py --config.topology=v5p:4x4x4 --workdir RUN
        --vlm VLM --fae FAE --config.data.drawn=CACHE --config.data.conversations=CACHE

The first says what a run costs; docs/scale.md has that of each topology. `--config.topology` gives
a run the settings that were planned. docs/data.md makes what the second is given.
"""

import dataclasses
import functools
import pathlib

import jax.numpy as jnp
import ml_collections

from starflow2_jax.bundle import Bundle
from starflow2_jax.data.batches import Documents
from starflow2_jax.data.latents import MOMENTS, LatentSource
from starflow2_jax.data.made import MadeData
from starflow2_jax.data.mixture import Entry, MixtureData
from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.data.tasks import Conversation, Draw
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.pictures import draw_captions
from starflow2_jax.fae_bundle import load_fae, load_latent_codec, read_fae
from starflow2_jax.model import Model, Sampling
from starflow2_jax.model_folder import finished
from starflow2_jax.models.fae import FAEConfig, fae_dinov2_giant
from starflow2_jax.models.fae_codec import FAECodec
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.latents import LatentCodec
from starflow2_jax.models.pretzel import QWEN_SPECIAL_TOKENS, PretzelConfig, SpecialTokens
from starflow2_jax.models.qwen2_5_vl import LanguageModelConfig, qwen2_5_vl_7b, qwen2_5_vl_tiny
from starflow2_jax.training.pretzel import PretzelTask
from starflow2_jax.vlm_bundle import read_description, read_tokenizer

# Topology -> mesh axes, and how many parts a batch of each stage runs in. "2x" is slices.
TOPOLOGIES = {
    "v5e:16x16": (dict(fsdp=16, columns=16), dict(image_to_text=2, joint=2)),
    "2xv5e:16x16": (dict(data=2, fsdp=16, columns=16), {}),
    "v6e:16x16": (dict(fsdp=16, columns=16), {}),
    "v5p:4x4x4": (dict(fsdp=8, columns=8), {}),
    "tpu7x:4x4x4": (dict(fsdp=16, columns=8), {}),
    "v5e:4x4": (dict(fsdp=16), {}),
    "v6e:2x4": (dict(fsdp=8), {}),
    "h100:4x8": (dict(data=4, fsdp=8), dict(text_to_image=4, image_to_text=4, joint=4)),
}


def get_config() -> ml_collections.ConfigDict:
    group = ml_collections.ConfigDict
    config = group()
    config.smoke = False
    config.seed = 0
    config.cpu_devices = None
    config.topology = ""  # of TOPOLOGIES; its settings are the defaults of what follows
    config.slices = 1
    config.mesh = group(dict(data=1, fsdp=-1, columns=1, tensor=1, sequence=1))
    config.remat = "products"
    config.dtype = "bfloat16"
    config.vlm = ""  # directory of the converted VLM, whose shape is the run's
    config.fae = ""  # directory of the FAE, or of the run that trained it
    config.noise_std = 0.3  # on the normalised latents
    # `drawn` and `conversations`: caches of `starflow2 data latents`, with a field of captions, and
    # with LLaVA's field `conversations` about one image each. `held_out`: records of each.
    config.data = group(
        dict(
            drawn="",
            caption="txt",
            conversations="",
            held_out=1024,
            text_drop=0.1,
            most_corrupt=0.01,
            threads=2,
            workers=0,
        )
    )
    config.flow = group(dict(width=3072, head_dim=64, deep_layers=24, shallow_layers=(4, 4)))
    config.log_every = 10
    config.log_seconds = 30.0
    config.stages = group()
    # 800 M, 200 M and 80 M samples in the paper; learning rates are those of the group's other
    # models of this size. Rows of stage 1: 128 positions of text, 256 of one image, padded to 512;
    # of the other stages: packed. Lanes: see docs/launch.md; as many as processes share the rows.
    config.stages.text_to_image = group(
        dict(
            batch=dict(rows=1024, lanes=32, length=512, images=1, prefix=128),
            mixture=dict(drawn=1.0),
            optimizer=dict(
                steps=780_000, learning_rate=1e-4, warmup=10_000, ema=0.9999, accumulate=1
            ),
        )
    )
    config.stages.image_to_text = group(
        dict(
            batch=dict(rows=1024, lanes=32, length=1024, images=3, targets=256),
            mixture=dict(conversations=1.0),
            optimizer=dict(
                steps=65_000, learning_rate=1e-4, warmup=2_000, ema=0.9999, accumulate=1
            ),
        )
    )
    config.stages.joint = group(
        dict(
            batch=dict(rows=1024, lanes=32, length=1024, images=3, targets=256),
            mixture=dict(drawn=1.0, conversations=1.0),
            optimizer=dict(
                steps=26_000, learning_rate=3e-5, warmup=2_000, ema=0.9999, accumulate=1
            ),
        )
    )
    config.sample = group(dict(rows=64, positions=1024))
    config.checkpoint = group(dict(every=1000, keep_last=3))
    config.evaluation = group(
        dict(
            every=1000,
            batches=8,
            samples=5000,
            captions=(
                "a red apple on a wooden table",
                "two dogs running on a beach at sunset",
                "a narrow street in an old town, watercolour",
                "a yellow school bus in front of a brick building",
            ),
            guidance=1.0,
        )
    )
    return config


def smoke(config: ml_collections.ConfigDict) -> None:
    """The same code at tiny sizes."""
    for stage in config.stages.values():
        stage.batch.update(rows=8, lanes=1)
        stage.optimizer.update(steps=2, warmup=1)
    config.stages.text_to_image.batch.update(length=128, prefix=64)
    for name in ("image_to_text", "joint"):
        config.stages[name].batch.update(length=128, targets=64)
    config.sample.update(rows=8, positions=128)
    config.log_every = 1
    config.checkpoint.every = 1
    config.evaluation.update(every=1, batches=1, samples=0)


def for_topology(config: ml_collections.ConfigDict) -> None:
    """The settings of `config.topology`.

    Raises:
        UserError: there are none.
    """
    apply(config, TOPOLOGIES)


def apply(config: ml_collections.ConfigDict, settings: dict[str, tuple[dict, dict]]) -> None:
    slices = f"{config.slices}x" if config.slices > 1 else ""
    name = f"{slices}{config.topology}"
    if name not in settings:
        raise UserError(
            f"config.topology: there are no settings for {name}, only for {', '.join(settings)} "
            "(2x: config.slices=2); for another one leave it out, and give config.mesh and "
            "config.stages.NAME.optimizer.accumulate"
        )
    mesh, parts = settings[name]
    config.mesh.update(mesh)
    for name, count in parts.items():
        config.stages[name].optimizer.accumulate = count


def make_smoke_config(config: ml_collections.ConfigDict, data: MadeData) -> PretzelConfig:
    return PretzelConfig(
        vlm=dataclasses.replace(
            qwen2_5_vl_tiny(data.tokenizer.vocab_size), vision=None, remat=config.remat
        ),
        flow=FlowConfig(
            channels=4,
            side=data.image.side,
            width=64,
            head_dim=32,
            deep_layers=2,
            shallow_layers=(1, 1),
            shallow_orders=("keep", "flip"),
            remat=config.remat,
        ),
        special=data.tokenizer.special,
        dtype=config.dtype,
    )


class Unread:
    """Latents of which only the shapes are known: what `starflow2 plan` needs of the data."""

    tokenizer = None

    def __init__(self, codec: LatentCodec, image: ImageShape, missing: list[str]) -> None:
        self.codec = codec
        self.image = image
        self._missing = missing

    def documents(self, stage: str, held_out: bool, seed: int) -> Documents:
        """There are none.

        Raises:
            UserError: always.
        """
        raise UserError(
            "as it stands this config can only be planned; to train, give "
            f"{', '.join(self._missing)} as well (docs/data.md)"
        )


def make_task(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> PretzelTask:
    del workdir
    return task_of(config, qwen2_5_vl_7b())


def task_of(config: ml_collections.ConfigDict, planned: LanguageModelConfig) -> PretzelTask:
    """Of a run, or of a plan, in which `planned` is the shape of a VLM that is not there."""
    if config.smoke:
        made = MadeData()
        return PretzelTask(config, made, make_smoke_config(config, made), draw_samples=None)
    vlm, special = planned, QWEN_SPECIAL_TOKENS
    fae, checksum = fae_dinov2_giant(), ""
    codec = LatentCodec(
        jnp.zeros(fae.channels), jnp.ones(fae.channels), fae.tokens, config.noise_std
    )
    if config.vlm:
        vlm_folder = pathlib.Path(config.vlm).expanduser()
        vlm, _ = read_description(vlm_folder)
        tokenizer = read_tokenizer(vlm_folder)
        special = tokenizer.special
    if config.fae:
        fae_folder = finished(pathlib.Path(config.fae).expanduser())
        fae, about = read_fae(fae_folder)
        checksum = about["checksum"]
        codec = load_latent_codec(fae_folder, config.noise_std)
    model = make_model_config(config, vlm, fae, special)
    shape = (fae.image_size, fae.image_size, fae.image_channels)
    image = ImageShape(*shape, fae.side, moments=2 * fae.channels)
    mixtures = {
        name: {source: weight for source, weight in stage.mixture.items() if weight}
        for name, stage in config.stages.items()
    }
    needed = sorted({source for mixture in mixtures.values() for source in mixture})
    missing = [f"--{name} DIR" for name in ("vlm", "fae") if not config[name]]
    missing += [f"--config.data.{name}=CACHE" for name in needed if not config.data[name]]
    if missing:
        return PretzelTask(config, Unread(codec, image, missing), model, draw_samples=None)
    data = MixtureData(
        tokenizer=tokenizer,
        image=image,
        codec=codec,
        entries={name: make_entry(config.data, name, checksum) for name in needed},
        mixtures=mixtures,
        text_drop=config.data.text_drop,
        most_corrupt=config.data.most_corrupt,
        threads=config.data.threads,
        workers=config.data.workers,
    )
    # The FAE itself draws, and is exported; while it trains, no device has it.
    load_codec = lambda: FAECodec(load_fae(fae_folder), shape, config.noise_std)
    draw = functools.partial(draw_samples, config.evaluation)
    return PretzelTask(config, data, model, draw, vlm_folder, load_codec)


def make_model_config(
    config: ml_collections.ConfigDict,
    vlm: LanguageModelConfig,
    fae: FAEConfig,
    special: SpecialTokens,
) -> PretzelConfig:
    flow, blocks = config.flow, len(config.flow.shallow_layers)
    return PretzelConfig(
        vlm=dataclasses.replace(vlm, remat=config.remat),
        flow=FlowConfig(
            channels=fae.channels,
            side=fae.side,
            width=flow.width,
            head_dim=flow.head_dim,
            deep_layers=flow.deep_layers,
            shallow_layers=tuple(flow.shallow_layers),
            shallow_orders=(("keep", "flip") * blocks)[:blocks],
            remat=config.remat,
        ),
        special=special,
        dtype=config.dtype,
    )


def make_entry(data: ml_collections.ConfigDict, name: str, checksum: str) -> Entry:
    """A cache, and what its records are for; the FAE has this checksum."""
    field, task = {
        "drawn": (data.caption, Draw(MOMENTS, data.caption)),
        "conversations": ("conversations", Conversation(image=MOMENTS)),
    }[name]
    source = LatentSource(data[name], checksum)
    if field not in source.shape.keep:
        kept = ", ".join(source.shape.keep) or "none"
        raise UserError(
            f"{data[name]} has no field {field!r} (kept are: {kept}); cache the images again with "
            f"--keep {field}"
        )
    return Entry(source, task, data.held_out)


def draw_samples(
    settings: ml_collections.ConfigDict, bundle: Bundle, folder: pathlib.Path, name: str
) -> None:
    """The captions of the config, drawn with a fixed seed, into `folder/NAME.png`."""
    sampling = Sampling(guidance=settings.guidance, seed=0)
    draw_captions(Model(bundle), settings.captions, sampling, folder / f"{name}.png")
