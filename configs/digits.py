"""STARFlow2 in small on 5,000 handwritten digits, end to end on two CPU cores.

    starflow2 train --config configs/digits.py --workdir runs/digits

Stage 0 trains a tiny Qwen2.5-shaped language model on text and freezes it; stages 1 to 3 are the
paper's. At the end: report.md, report.json and pictures in the work directory.
"""

import itertools
import pathlib

import ml_collections

from starflow2_jax.bundle import Bundle
from starflow2_jax.data.digits import DigitsData
from starflow2_jax.evaluation.digits import ReportConfig, draw_fixed_prompts, write_report
from starflow2_jax.model import Model, load
from starflow2_jax.models.pretzel import PretzelConfig
from starflow2_jax.training.pretzel import PretzelTask, small_config


def get_config() -> ml_collections.ConfigDict:
    group = ml_collections.ConfigDict
    config = group()
    config.smoke = False
    config.seed = 0
    config.cpu_devices = 2
    config.mesh = group(dict(data=-1, fsdp=1, tensor=1, sequence=1))
    config.log_every = 10
    config.log_seconds = 10.0
    config.data = group(dict(patch=4, smooth=1, copies=16, raw_share=0.5))
    config.language_model = group(dict(width=128, layers=3, head_dim=32, mlp_width=384))
    config.flow = group(dict(width=128, head_dim=32, deep_layers=6, shallow_layers=(2, 2)))
    config.stages = group()
    config.stages.pretrain_lm = group(
        dict(
            batch=dict(rows=32, length=96, images=4),
            mixture=dict(
                draw=2.0,
                draw_inverted=1.0,
                neighbour=2.0,
                nothing=0.5,
                read=2.0,
                next=2.0,
                invert=1.0,
                story=2.0,
            ),
            optimizer=dict(steps=250, learning_rate=3e-3, warmup=30),
        )
    )
    # One picture a row, and always one that its text asks for, in several wordings: what the flow
    # learns here is to draw what the language model's state says, whatever the words.
    config.stages.text_to_image = group(
        dict(
            batch=dict(rows=64, length=26, images=1),
            mixture=dict(draw=5.0, draw_inverted=1.2, neighbour=1.5, story_start=1.5, nothing=1.0),
            # The noise leaves only at the end of the last stage: without it, the fine detail of
            # the pixels drowns what the caption has to say.
            optimizer=dict(
                steps=1600,
                learning_rate=2e-3,
                warmup=50,
                weight_decay=0.1,
                noise_start=0.25,
                noise_end=0.05,
                noise_hold=0.5,
                noise_share=1.0,
            ),
        )
    )
    config.stages.image_to_text = group(
        dict(
            batch=dict(rows=32, length=96, images=4),
            mixture=dict(read=1.0),
            optimizer=dict(steps=200, learning_rate=3e-3, warmup=20),
        )
    )
    config.stages.joint = group(
        dict(
            batch=dict(rows=16, length=96, images=4),
            mixture=dict(
                draw=9.0,
                draw_inverted=1.0,
                neighbour=1.0,
                nothing=0.7,
                read=1.5,
                next=1.5,
                invert=2.0,
                story=1.2,
            ),
            optimizer=dict(
                steps=1400,
                learning_rate=8e-4,
                warmup=50,
                weight_decay=0.1,
                noise_start=0.05,
                noise_end=0.01,
                noise_hold=0.4,
                noise_share=0.92,
            ),
        )
    )
    config.checkpoint = group(dict(every=500, keep_last=2))
    config.evaluation = group(dict(every=250, batches=2, samples=1000))
    config.report = group(
        dict(
            drawings=500,
            stories=200,
            tuning=200,
            least_diversity=0.65,
            draws=4,
            guidance=(1.0, 2.0),
            temperature=(1.2, 1.3),
            edit_guidance=(1.0, 2.0),
            edit_temperature=(0.8, 0.9),
        )
    )
    return config


def smoke(config: ml_collections.ConfigDict) -> None:
    """The same code at tiny sizes."""
    config.data.copies = 0
    config.language_model.update(width=32, layers=2, head_dim=16, mlp_width=64)
    config.flow.update(width=32, head_dim=16, deep_layers=2, shallow_layers=(1, 1))
    for stage in config.stages.values():
        stage.batch.rows = 8
        stage.optimizer.update(steps=2, warmup=1)
    config.log_every = 1
    config.checkpoint.every = 1
    config.evaluation.update(every=1, batches=1, samples=2)
    config.report.update(
        drawings=20,
        stories=8,
        tuning=10,
        draws=1,
        guidance=(1.0,),
        temperature=(0.9,),
        edit_guidance=(1.0,),
        edit_temperature=(0.9,),
    )


def make_data(config: ml_collections.ConfigDict) -> DigitsData:
    mixtures = {name: stage.mixture.to_dict() for name, stage in config.stages.items()}
    return DigitsData(**config.data, mixtures=mixtures, seed=config.seed)


def make_model_config(config: ml_collections.ConfigDict, data: DigitsData) -> PretzelConfig:
    return small_config(config, data, channels=28 * 28 // data.image.side**2)


def make_task(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> PretzelTask:
    del workdir
    data = make_data(config)
    return PretzelTask(config, data, make_model_config(config, data), draw_samples)


def draw_samples(bundle: Bundle, folder: pathlib.Path, name: str) -> None:
    draw_fixed_prompts(Model(bundle), folder, name)


def report(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    r = config.report
    write_report(
        load(workdir),
        ReportConfig(
            drawings=r.drawings,
            stories=r.stories,
            tuning=r.tuning,
            candidates=tuple(itertools.product(r.guidance, r.temperature)),
            edit_candidates=tuple(itertools.product(r.edit_guidance, r.edit_temperature)),
            least_diversity=r.least_diversity,
            draws=r.draws,
            seed=config.seed,
        ),
        workdir,
    )
