"""A directory of a converted Qwen2.5-VL.

DIR/model.json   shape, checksum of the weights, and where they come from
DIR/weights/     every parameter, in the types of the source
DIR/hf/          the source's config, tokenizer and processor files, as they were
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from starflow2_jax.data.tokenizer import Tokenizer, load_tokenizer
from starflow2_jax.errors import UserError
from starflow2_jax.models import qwen2_5_vl
from starflow2_jax.models.qwen2_5_vl import LanguageModelConfig, Qwen25VL
from starflow2_jax.parallel import rules
from starflow2_jax.provenance import write_json
from starflow2_jax.training.checkpoint import load_tree, stored_tree

MODEL_FILE = "model.json"
WEIGHTS = "weights"
HF_FILES = "hf"
FAMILY = "qwen2_5_vl"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class VlmBundle:
    """What the directory holds.

    Attributes:
        model: the model.
        tokenizer: of `hf/`.
        files: the folder of the carried-along files.
        record: `model.json`. Its `checksum` is `checkpoint.checksum` of the weights as stored,
            nested dicts.
    """

    model: Qwen25VL
    tokenizer: Tokenizer
    files: pathlib.Path
    record: Mapping[str, Any]


def write_description(
    folder: pathlib.Path, config: LanguageModelConfig, metadata: Mapping[str, Any]
) -> None:
    """Writes `model.json`; it comes last: without it the directory is no model."""
    record = {
        "format_version": FORMAT_VERSION,
        "family": FAMILY,
        "model": dataclasses.asdict(config),
        **metadata,
    }
    write_json(folder / MODEL_FILE, record)


def read_description(folder: pathlib.Path) -> tuple[LanguageModelConfig, dict[str, Any]]:
    """The shape of a directory's model, and all of its `model.json`.

    Raises:
        UserError: no directory of a converted Qwen2.5-VL, or damaged.
    """
    path = folder / MODEL_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no {MODEL_FILE}; expected the directory of a converted VLM")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, family = record["format_version"], record.get("family")
        if family != FAMILY:
            raise UserError(f"{path} is of family {family!r}, expected {FAMILY!r}")
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has format version {version}, expected {FORMAT_VERSION}")
        return qwen2_5_vl.from_json(record["model"]), record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the description of a VLM ({error!r})") from error


def load_vlm(folder: pathlib.Path, dtype: str | None = None, mesh: Mesh | None = None) -> VlmBundle:
    """Reads a directory.

    Args:
        folder: that a conversion wrote.
        dtype: of the parameters; default: as stored.
        mesh: each process reads what its devices hold of it; default: all on the first device.

    Raises:
        UserError: it is no such directory, or damaged.
    """
    config, record = read_description(folder)
    weights = folder / WEIGHTS
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Qwen25VL(config, rngs=nnx.Rngs(0))))
    stored = stored_tree(weights)
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    else:
        shardings = rules.shardings(abstract, mesh)

    def wanted(path: tuple, leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        names = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        as_stored = stored[names].dtype if names in stored else leaf.dtype
        kind = jnp.dtype(dtype) if dtype else as_stored
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=sharding)

    tree = jax.tree_util.tree_map_with_path(
        wanted, nnx.to_pure_dict(abstract), nnx.to_pure_dict(shardings)
    )
    arrays, _ = load_tree(weights, tree)
    nnx.replace_by_pure_dict(abstract, arrays)
    model = nnx.merge(graphdef, abstract)
    return VlmBundle(model, load_tokenizer(folder / HF_FILES), folder / HF_FILES, record)
