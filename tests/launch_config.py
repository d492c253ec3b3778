"""The two stages of `resume_config` on tar shards; process 1 can be made to die."""

import os
import pathlib
import signal

import resume_config

from starflow2_jax.data.mixture import Entry, MixtureData
from starflow2_jax.data.sources import WebDatasetSource
from starflow2_jax.data.tasks import Draw, Read
from starflow2_jax.training.pretzel import PretzelTask


def get_config():
    config = resume_config.get_config()
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    for stage in config.stages.values():
        stage.batch.lanes = 2
        stage.optimizer.steps = 2
        stage.mixture = dict(drawings=2.0, readings=1.0)
    config.shards = ""
    config.die = False
    return config


def make_data(config):
    if config.die and os.environ["JAX_PROCESS_ID"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    source = WebDatasetSource(config.shards)
    mixtures = {name: stage.mixture.to_dict() for name, stage in config.stages.items()}
    digits = resume_config.make_data(config)
    return MixtureData(
        tokenizer=digits.tokenizer,
        image=digits.image,
        codec=digits.codec,
        entries={
            "drawings": Entry(source, Draw("png"), held_out=4),
            "readings": Entry(source, Read("png"), held_out=4),
        },
        mixtures=mixtures,
    )


def make_task(config, workdir):
    data = make_data(config)
    model_config = resume_config.make_model_config(config, data)
    return PretzelTask(config, data, model_config, draw_samples=None)


def report(config, workdir):
    pathlib.Path(workdir, "report").touch()
