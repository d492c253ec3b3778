"""The paper's model: 3.6 B trainable parameters on a frozen Qwen2.5-VL-7B, at 256 x 256.

    starflow2 plan --config configs/starflow2_7b.py --topology v5p:4x4x4

`--config.topology=v5p:4x4x4` gives a run the settings that were planned, too. What
it needs on each topology: docs/scale.md.
"""

import dataclasses
import math
import pathlib

import jax.numpy as jnp
import ml_collections

from starflow2_jax.data.batches import Documents
from starflow2_jax.data.made import MadeData
from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.errors import UserError
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.latents import LatentCodec
from starflow2_jax.models.pretzel import PretzelConfig, starflow2_3_6b
from starflow2_jax.models.qwen2_5_vl import qwen2_5_vl_tiny
from starflow2_jax.training.pretzel import PretzelTask

# Topology -> mesh axes, and how many parts a batch of each stage runs in. "2x" is slices.
TOPOLOGIES = {
    "v5e:16x16": (dict(fsdp=16, columns=16), dict(image_to_text=2, joint=2)),
    "2xv5e:16x16": (dict(data=2, fsdp=16, columns=16), {}),
    "v6e:16x16": (dict(fsdp=16, columns=16), {}),
    "v5p:4x4x4": (dict(fsdp=16, columns=4), dict(joint=2)),
    "tpu7x:4x4x4": (dict(fsdp=16, columns=8), {}),
    "v5e:4x4": (dict(fsdp=16), {}),
    "v6e:2x4": (dict(fsdp=8), {}),
    "h100:4x8": (dict(fsdp=32), dict(text_to_image=4, image_to_text=8, joint=8)),
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
    config.noise_std = 0.3  # on the normalised latents
    config.log_every = 10
    config.log_seconds = 30.0
    config.stages = group()
    # 800 M, 200 M and 80 M samples in the paper; learning rates are those of the group's other
    # models of this size. Rows of stage 1: 128 positions of text, 256 of one image, padded to 512;
    # of the other stages: packed.
    config.stages.text_to_image = group(
        dict(
            batch=dict(rows=1024, length=512, images=1, prefix=128),
            optimizer=dict(
                steps=780_000, learning_rate=1e-4, warmup=10_000, ema=0.9999, accumulate=1
            ),
        )
    )
    config.stages.image_to_text = group(
        dict(
            batch=dict(rows=1024, length=1024, images=3, targets=256),
            optimizer=dict(
                steps=65_000, learning_rate=1e-4, warmup=2_000, ema=0.9999, accumulate=1
            ),
        )
    )
    config.stages.joint = group(
        dict(
            batch=dict(rows=1024, length=1024, images=3, targets=256),
            optimizer=dict(
                steps=26_000, learning_rate=3e-5, warmup=2_000, ema=0.9999, accumulate=1
            ),
        )
    )
    config.sample = group(dict(rows=64, positions=1024))
    config.checkpoint = group(dict(every=1000, keep_last=3))
    config.evaluation = group(dict(every=1000, batches=8, samples=0))
    return config


def smoke(config: ml_collections.ConfigDict) -> None:
    """The same code at tiny sizes."""
    for stage in config.stages.values():
        stage.batch.rows = 8
        stage.optimizer.update(steps=2, warmup=1)
    config.stages.text_to_image.batch.update(length=128, prefix=64)
    for name in ("image_to_text", "joint"):
        config.stages[name].batch.update(length=128, targets=64)
    config.sample.update(rows=8, positions=128)
    config.log_every = 1
    config.checkpoint.every = 1
    config.evaluation.update(every=1, batches=1)


def for_topology(config: ml_collections.ConfigDict) -> None:
    """The settings of `config.topology`, as far as there are any."""
    apply(config, TOPOLOGIES)


def apply(config: ml_collections.ConfigDict, settings: dict[str, tuple[dict, dict]]) -> None:
    slices = f"{config.slices}x" if config.slices > 1 else ""
    mesh, parts = settings.get(f"{slices}{config.topology}", ({}, {}))
    config.mesh.update(mesh)
    for name, count in parts.items():
        config.stages[name].optimizer.accumulate = count


def with_remat(model: PretzelConfig, config: ml_collections.ConfigDict) -> PretzelConfig:
    return dataclasses.replace(
        model,
        vlm=dataclasses.replace(model.vlm, remat=config.remat),
        flow=dataclasses.replace(model.flow, remat=config.remat),
        dtype=config.dtype,
    )


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

    def __init__(self, codec: LatentCodec) -> None:
        self.codec = codec
        tokens, moments = codec.shape
        side = math.isqrt(tokens)
        self.image = ImageShape(16 * side, 16 * side, 3, side, moments)

    def documents(self, stage: str, held_out: bool, seed: int) -> Documents:
        """There are none.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"stage {stage} has no data: this config says what a run costs; to train, give "
            "make_task a data.mixture.MixtureData of your sources"
        )


def make_task(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> PretzelTask:
    del workdir
    return task_of(config, with_remat(starflow2_3_6b(), config))


def task_of(config: ml_collections.ConfigDict, model: PretzelConfig) -> PretzelTask:
    if config.smoke:
        data = MadeData()
        return PretzelTask(config, data, make_smoke_config(config, data), draw_samples=None)
    channels, tokens = model.flow.channels, model.flow.tokens
    codec = LatentCodec(jnp.zeros(channels), jnp.ones(channels), tokens, config.noise_std)
    return PretzelTask(config, Unread(codec), model, draw_samples=None)
