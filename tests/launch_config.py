"""The two stages of `resume_config`, in which process 1 can be made to die."""

import os
import pathlib
import signal

import resume_config
from resume_config import make_model_config  # noqa: F401  part of the config file


def get_config():
    config = resume_config.get_config()
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    for stage in config.stages.values():
        stage.batch.lanes = 2
        stage.optimizer.steps = 2
    config.die = False
    return config


def make_data(config):
    if config.die and os.environ["JAX_PROCESS_ID"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return resume_config.make_data(config)


def report(config, workdir):
    pathlib.Path(workdir, "report").touch()
