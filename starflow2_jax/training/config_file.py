"""What training takes of a config file: its task, and the hyperparameters of its stages."""

import difflib
import pathlib
from typing import Protocol

import ml_collections
from flax import nnx

from starflow2_jax.errors import UserError
from starflow2_jax.training.step import StepConfig
from starflow2_jax.training.task import Task


class ConfigFile(Protocol):
    """What a config file defines besides `get_config`."""

    def make_task(self, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Task:
        """What is trained; files that it makes for itself go into the work directory.

        It is called again when a run goes on, and for an export, whose work directory has links in
        the place of files: what is there is used, or replaced by a file of the same name.
        """


def make_task(config: ml_collections.ConfigDict, module: ConfigFile, workdir: pathlib.Path) -> Task:
    """The config file's task, whose model can be built and whose stages are the config's.

    Raises:
        UserError: a config of no model, or of other stages.
    """
    try:
        task = module.make_task(config, workdir)
        nnx.eval_shape(lambda: task.make_model(config.seed))
    except (ValueError, TypeError) as error:
        where = getattr(module, "__file__", None) or "the config"
        message = " ".join(str(error).split())
        raise UserError(f"{where} makes no model of this config: {message}") from error
    names = [stage.name for stage in task.stages]
    if not set(config.stages):
        raise UserError(f"config.stages is empty: there is nothing to train of {', '.join(names)}")
    for name in sorted(set(config.stages) - set(names)):
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise UserError(
            f"config.stages.{name}: there is no such stage; did you mean {near}? "
            f"(there are {', '.join(names)})"
        )
    return task


def step_config(group: ml_collections.ConfigDict) -> StepConfig:
    """The hyperparameters of a stage's group in the config."""
    return StepConfig(**group.optimizer)
