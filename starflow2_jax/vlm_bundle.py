"""A directory of a converted Qwen2.5-VL.

DIR/model.json   shape, checksum of the weights, and where they come from
DIR/weights/     every parameter, in the types of the source
DIR/hf/          the source's config, tokenizer and processor files, as they were
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from starflow2_jax import model_folder
from starflow2_jax.data.tokenizer import Tokenizer, load_tokenizer
from starflow2_jax.models import qwen2_5_vl
from starflow2_jax.models.qwen2_5_vl import LanguageModelConfig, Qwen25VL

WEIGHTS = model_folder.WEIGHTS
HF_FILES = "hf"
FAMILY = "qwen2_5_vl"


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
    model_folder.write_description(folder, FAMILY, config, metadata)


def read_description(folder: pathlib.Path) -> tuple[LanguageModelConfig, dict[str, Any]]:
    """The shape of a directory's model, and all of its `model.json`.

    Raises:
        UserError: no directory of a converted Qwen2.5-VL, or damaged.
    """
    return model_folder.read_description(folder, "a converted VLM", {FAMILY: qwen2_5_vl.from_json})


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
    make = lambda: Qwen25VL(config, rngs=nnx.Rngs(0))
    model = model_folder.load_parameters(folder / WEIGHTS, make, dtype, mesh)
    return VlmBundle(model, load_tokenizer(folder / HF_FILES), folder / HF_FILES, record)
