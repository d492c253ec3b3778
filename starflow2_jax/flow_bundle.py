"""A directory of a STARFlow or TarFlow image model, see `model_folder`."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from flax import nnx

from starflow2_jax import model_folder
from starflow2_jax.models.starflow import (
    ImageFlow,
    ImageFlowConfig,
    StarFlowConfig,
    TarFlowConfig,
)
from starflow2_jax.training.checkpoint import save_tree

STARFLOW, TARFLOW = "starflow", "tarflow"
WEIGHTS = model_folder.WEIGHTS


def write_description(
    folder: pathlib.Path, config: ImageFlowConfig, metadata: Mapping[str, Any]
) -> None:
    """See `model_folder.write_description`."""
    family = STARFLOW if isinstance(config, StarFlowConfig) else TARFLOW
    model_folder.write_description(folder, family, config, metadata)


def is_image_flow(folder: pathlib.Path) -> bool:
    """Whether a directory says that it is of an image model (a STARFlow2 model has no family)."""
    try:
        path = model_folder.finished(folder) / model_folder.MODEL_FILE
        return "family" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def read_description(folder: pathlib.Path) -> tuple[ImageFlowConfig, dict[str, Any]]:
    """The shape of a directory's model, and all of its `model.json`.

    Raises:
        UserError: no directory of an image model, or damaged.
    """
    families = {
        STARFLOW: lambda fields: StarFlowConfig(**{**fields, "depths": tuple(fields["depths"])}),
        TARFLOW: lambda fields: TarFlowConfig(**fields),
    }
    return model_folder.read_description(model_folder.finished(folder), "an image model", families)


def save_image_flow(
    folder: pathlib.Path, model: ImageFlow, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes the directory.

    Raises:
        UserError: its files cannot be written.
    """
    save_tree(folder / WEIGHTS, nnx.to_pure_dict(nnx.state(model)), {}, overwrite=True)
    write_description(folder, model.config, metadata or {})


def load_image_flow(folder: pathlib.Path) -> ImageFlow:
    """Reads a directory that `save_image_flow` or a conversion wrote; parameters in float32.

    The work directory of a finished run stands for its model.

    Raises:
        UserError: it is none, or damaged.
    """
    config, _ = read_description(folder)
    weights = model_folder.finished(folder) / WEIGHTS
    make = lambda: ImageFlow(config, rngs=nnx.Rngs(0))
    # The prior's variance is no parameter, but stored with them.
    return model_folder.load_parameters(weights, make, "float32", stored=nnx.Variable)
