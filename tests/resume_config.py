"""Two stages of the digits job at tiny sizes: what the tests of resuming run."""

import ml_collections

from starflow2_jax.data.digits import DigitsData
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.pretzel import PretzelConfig
from starflow2_jax.models.qwen2_5_vl import LanguageModelConfig
from starflow2_jax.training.pretzel import PretzelTask


def get_config():
    group = ml_collections.ConfigDict
    stage = dict(batch=dict(rows=8, length=64, images=3), mixture=dict(draw=1.0, story=1.0))
    return group(
        dict(
            seed=3,
            cpu_devices=None,
            mesh=dict(data=2, fsdp=2, tensor=2, sequence=1),
            log_every=1,
            log_seconds=60.0,
            stages=dict(
                text_to_image=stage
                | dict(optimizer=dict(steps=4, learning_rate=1e-3, warmup=1, noise_final=0.1)),
                joint=stage | dict(optimizer=dict(steps=6, learning_rate=1e-3, warmup=1)),
            ),
            checkpoint=dict(every=2, keep_last=2),
            evaluation=dict(every=100, batches=1, samples=0),
        )
    )


def make_data(config):
    mixtures = {name: stage.mixture.to_dict() for name, stage in config.stages.items()}
    return DigitsData(patch=2, smooth=1, copies=0, raw_share=1.0, mixtures=mixtures, seed=0)


def make_model_config(config, data):
    return PretzelConfig(
        vlm=LanguageModelConfig(
            vocab_size=data.tokenizer.vocab_size,
            width=32,
            layers=1,
            heads=2,
            kv_heads=1,
            head_dim=16,
            mlp_width=32,
            tied=True,
        ),
        flow=FlowConfig(
            channels=14 * 14,
            side=2,
            width=32,
            head_dim=16,
            deep_layers=1,
            shallow_layers=(1, 1),
            shallow_orders=("keep", "flip"),
        ),
        special=data.tokenizer.special,
        dtype="float32",
    )


def make_task(config, workdir):
    data = make_data(config)
    return PretzelTask(config, data, make_model_config(config, data), draw_samples=None)
