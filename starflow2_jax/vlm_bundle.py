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

from flax import nnx
from jax.sharding import Mesh

from starflow2_jax import model_folder
from starflow2_jax.data.tokenizer import Tokenizer, load_tokenizer
from starflow2_jax.errors import UserError
from starflow2_jax.models import qwen2_5_vl
from starflow2_jax.models.pretzel import QWEN_SPECIAL_TOKENS
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


_SPECIAL = {
    "vision_start": "vision_start_token_id",
    "vision_end": "vision_end_token_id",
    "image_pad": "image_token_id",
    "video_pad": "video_token_id",
}
"""Special tokens -> keys of the source's config.json, which leaves out what is as published."""


def read_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """A directory's tokenizer.

    Raises:
        UserError: no directory of a converted Qwen2.5-VL, or damaged; the tokenizer has more ids
            than the model, or special tokens of other ids.
    """
    config, _ = read_description(folder)
    files = folder / HF_FILES
    tokenizer = load_tokenizer(files)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{files}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}"
        )
    try:
        record = json.loads((files / "config.json").read_text(encoding="utf-8"))
        wanted = {
            name: record.get(key, getattr(QWEN_SPECIAL_TOKENS, name))
            for name, key in _SPECIAL.items()
        }
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{files / 'config.json'} cannot be read ({error})") from error
    for name, key in _SPECIAL.items():
        found = getattr(tokenizer.special, name)
        if found is not None and found != wanted[name]:
            raise UserError(
                f"{files}: the tokenizer's <|{name}|> has the id {found}, but config.json has "
                f"{key} {wanted[name]}: they are of different models"
            )
    return tokenizer


def load_vlm(folder: pathlib.Path, dtype: str | None = None, mesh: Mesh | None = None) -> VlmBundle:
    """Reads a directory.

    Args:
        folder: that a conversion wrote.
        dtype: of the parameters; default: as stored.
        mesh: each process reads what its devices hold of it; default: all on the first device.

    Raises:
        UserError: it is no such directory, or damaged; see `read_tokenizer`.
    """
    config, record = read_description(folder)
    make = lambda: Qwen25VL(config, rngs=nnx.Rngs(0))
    model = model_folder.load_parameters(folder / WEIGHTS, make, dtype, mesh)
    return VlmBundle(model, read_tokenizer(folder), folder / HF_FILES, record)
