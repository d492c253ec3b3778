"""A directory of a STARFlow or TarFlow image model.

DIR/model.json   family, shape, and where the weights come from
DIR/weights/     every parameter
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from starflow2_jax.errors import UserError
from starflow2_jax.models.starflow import (
    ImageFlow,
    ImageFlowConfig,
    StarFlowConfig,
    TarFlowConfig,
)
from starflow2_jax.provenance import write_json
from starflow2_jax.training.checkpoint import load_tree, save_tree

MODEL_FILE = "model.json"
WEIGHTS = "weights"
FORMAT_VERSION = 1


def write_description(
    folder: pathlib.Path, config: ImageFlowConfig, metadata: Mapping[str, Any]
) -> None:
    """Writes `model.json`; it comes last: without it the directory is no model."""
    record = {
        "format_version": FORMAT_VERSION,
        "family": "starflow" if isinstance(config, StarFlowConfig) else "tarflow",
        "model": dataclasses.asdict(config),
        **metadata,
    }
    write_json(folder / MODEL_FILE, record)


def model_folder(folder: pathlib.Path) -> pathlib.Path:
    """The model directory itself, where `folder` may be the work directory of a finished run."""
    inside = folder / "model"
    return inside if not (folder / MODEL_FILE).is_file() and inside.is_dir() else folder


def is_image_flow(folder: pathlib.Path) -> bool:
    """Whether a directory says that it is of an image model (a STARFlow2 model has no family)."""
    try:
        text = (model_folder(folder) / MODEL_FILE).read_text(encoding="utf-8")
        return "family" in json.loads(text)
    except (OSError, ValueError, TypeError):
        return False


def read_description(folder: pathlib.Path) -> tuple[ImageFlowConfig, dict[str, Any]]:
    """The shape of a directory's model, and all of its `model.json`.

    Raises:
        UserError: no directory of an image model, or damaged.
    """
    path = model_folder(folder) / MODEL_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no {MODEL_FILE}; expected the directory of an image model")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "family" not in record:
            raise UserError(f"{path} is of no image model of the family: it is a STARFlow2 model")
        version, family, fields = record["format_version"], record["family"], record["model"]
        if family == "starflow":
            config = StarFlowConfig(**{**fields, "depths": tuple(fields["depths"])})
        elif family == "tarflow":
            config = TarFlowConfig(**fields)
        else:
            raise UserError(f"{path} is of family {family!r}; expected starflow or tarflow")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the description of an image model ({error!r})") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this package reads {FORMAT_VERSION}")
    return config, record


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
    folder = model_folder(folder)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: ImageFlow(config, rngs=nnx.Rngs(0))))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        nnx.to_pure_dict(abstract),
    )
    arrays, _ = load_tree(folder / WEIGHTS, wanted)
    nnx.replace_by_pure_dict(abstract, arrays)
    return nnx.merge(graphdef, abstract)
