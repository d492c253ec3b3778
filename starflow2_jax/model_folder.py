"""What the directories of all models share: a description, and weights.

DIR/model.json   format version, family, shape, and where the weights come from
DIR/weights/     every parameter
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from starflow2_jax.errors import UserError
from starflow2_jax.nn import partition
from starflow2_jax.parallel import rules
from starflow2_jax.provenance import write_json
from starflow2_jax.training.checkpoint import load_tree, stored_tree

MODEL_FILE = "model.json"
WEIGHTS = "weights"
FORMAT_VERSION = 1

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nnx.Module)


def finished(folder: pathlib.Path) -> pathlib.Path:
    """The model directory itself, where `folder` may be the work directory of a finished run."""
    inside = folder / "model"
    return inside if not (folder / MODEL_FILE).is_file() and inside.is_dir() else folder


def write_description(
    folder: pathlib.Path, family: str, config: Any, metadata: Mapping[str, Any]
) -> None:
    """Writes `model.json`; it comes last: without it the directory is no model.

    Args:
        folder: of the model.
        family: names the kind of model.
        config: dataclass of its shape.
        metadata: what else is written.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "family": family,
        "model": dataclasses.asdict(config),
        **metadata,
    }
    write_json(folder / MODEL_FILE, record)


def read_description(
    folder: pathlib.Path, what: str, families: Mapping[str, Callable[[Mapping[str, Any]], Config]]
) -> tuple[Config, dict[str, Any]]:
    """The shape of a directory's model, and all of its `model.json`.

    Args:
        folder: of the model.
        what: it should hold, for messages: "an image model".
        families: those expected, with what makes a shape of its fields.

    Raises:
        UserError: no directory of such a model, or damaged.
    """
    path = folder / MODEL_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no {MODEL_FILE}; expected the directory of {what}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, family = record["format_version"], record.get("family", "starflow2")
        if family not in families:
            raise UserError(f"{path} is of family {family}, expected {' or '.join(families)}")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}, this package reads {FORMAT_VERSION}"
            )
        return families[family](record["model"]), record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the description of {what} ({error!r})") from error


def stored_parameters(
    weights: pathlib.Path,
    abstract: nnx.State,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    table: Mapping[str, partition.MeshAxes] = rules.RULES,
    part: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What to restore a model's parameters as: a pure dict of `jax.ShapeDtypeStruct`.

    Args:
        weights: the folder that holds them.
        abstract: the parameters' shapes.
        dtype: of the parameters; default: as stored.
        mesh: each process reads what its devices hold of it; default: all on the first device.
        table: how they are cut over the mesh.
        part: where they are in the folder's tree.

    Raises:
        UserError: damaged.
    """
    stored = stored_tree(weights)
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    else:
        shardings = rules.shardings(abstract, mesh, table)

    def wanted(path: tuple, leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        names = part + tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        as_stored = stored[names].dtype if names in stored else leaf.dtype
        kind = jnp.dtype(dtype) if dtype else as_stored
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=sharding)

    return jax.tree_util.tree_map_with_path(
        wanted, nnx.to_pure_dict(abstract), nnx.to_pure_dict(shardings)
    )


def load_parameters(
    weights: pathlib.Path,
    make_model: Callable[[], Model],
    dtype: str | None = None,
    mesh: Mesh | None = None,
    stored: nnx.filterlib.Filter = nnx.Param,
) -> Model:
    """A model with the parameters that a folder holds.

    Args:
        weights: the folder.
        make_model: builds the model; it is traced only.
        dtype, mesh: see `stored_parameters`.
        stored: what the folder holds; anything else (statistics of data, say) keeps its place
            without a value.

    Raises:
        UserError: damaged, or of another model.
    """
    graphdef, abstract, others = nnx.split(nnx.eval_shape(make_model), stored, ...)
    arrays, _ = load_tree(weights, stored_parameters(weights, abstract, dtype, mesh))
    nnx.replace_by_pure_dict(abstract, arrays)
    return nnx.merge(graphdef, abstract, others)
