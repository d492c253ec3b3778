"""Qwen2.5-VL from a Hugging Face folder to a model directory, and back, tensor by tensor."""

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx

from starflow2_jax import vlm_bundle
from starflow2_jax.convert import stored, table
from starflow2_jax.convert.starflow2 import qwen
from starflow2_jax.convert.table import Entry
from starflow2_jax.convert.tensor_files import TensorFile, open_folder, write_safetensors_folder
from starflow2_jax.errors import UserError
from starflow2_jax.models.qwen2_5_vl import LanguageModelConfig, Qwen25VL, from_hf
from starflow2_jax.parallel import rules

# Tables of rotary frequencies, which older files hold and nothing reads.
_UNUSED = re.compile(r".*\.rotary_(pos_)?emb\.inv_freq")
_WEIGHT_FILES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack")
_HEAD = "lm_head.weight"


def read_config(folder: pathlib.Path) -> LanguageModelConfig:
    """The shape that a Hugging Face folder's `config.json` describes.

    Raises:
        UserError: no such file, or of another architecture.
    """
    path = folder / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
        return from_hf(record)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a model folder") from error
    except ValueError as error:
        raise UserError(f"{path} does not describe a Qwen2.5-VL: {error}") from error


def entries_for(config: LanguageModelConfig, names: Sequence[str] = ()) -> list[Entry]:
    """Every parameter and its tensors, under the prefixes that these source names have.

    The published files say `visual.`, `model.`; `transformers` since 4.52 `model.visual.`,
    `model.language_model.`.
    """
    entries = list(qwen("", "", config))
    if not any(name.startswith(("model.language_model.", "model.visual.")) for name in names):
        return entries

    def renamed(name: str) -> str:
        name = re.sub(r"^model\.", "model.language_model.", name)
        return re.sub(r"^visual\.", "model.visual.", name)

    return [
        dataclasses.replace(e, names=tuple(tuple(map(renamed, group)) for group in e.names))
        for e in entries
    ]


def _abstract(config: LanguageModelConfig) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: Qwen25VL(config, rngs=nnx.Rngs(0))))


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal, compared a few rows at a time."""
    rows = range(0, len(a), 4096)
    return a.shape == b.shape and all(
        np.array_equal(a[i : i + 4096], b[i : i + 4096]) for i in rows
    )


def _ignored(config: LanguageModelConfig, source: TensorFile, embedding: str) -> list[str]:
    """Tensors without a parameter of their own: frequencies, and the copy of a tied embedding."""
    ignored = [name for name in source.shapes if _UNUSED.fullmatch(name)]
    if config.tied and _HEAD in source.shapes and embedding in source.shapes:
        if _same(source.read(_HEAD), source.read(embedding)):
            ignored.append(_HEAD)
    return ignored


def _carry(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies every file that holds no weights."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        weights = path.suffix in _WEIGHT_FILES or path.name.endswith(".index.json")
        if path.is_file() and not weights and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)


def import_folder(
    source: pathlib.Path, folder: pathlib.Path, mesh: Mapping[str, int] | None = None
) -> list[str]:
    """Converts a Hugging Face folder to a model directory; see `vlm_bundle`.

    Args:
        source: `config.json`, safetensors with or without an index, tokenizer and processor files.
        folder: of the model, to be made. It is there when it is complete, and not before.
        mesh: axis -> size of the mesh that will load it: arrays are stored in pieces that none of
            its shards shares with another, so that each device's process reads its own alone.

    Returns:
        Names of the tensors that were passed over.

    Raises:
        UserError: the folder exists; another architecture; missing, damaged or truncated files;
            tensors that do not fit the model (all of them in one message).
    """
    config = read_config(source)
    state = _abstract(config)
    shapes = table.shapes_in(state)
    opened = open_folder(source)
    entries = entries_for(config, list(opened.shapes))
    ignored = _ignored(config, opened, entries[0].names[0][0])
    kept = {name: shape for name, shape in opened.shapes.items() if name not in set(ignored)}
    tensors = TensorFile(kept, opened.dtypes, opened.read)
    problems = stored.problems_of(entries, shapes, tensors)
    if problems:
        raise UserError(f"{source} does not fit its config.json: {'; '.join(problems)}")
    with stored.complete_or_nothing(folder) as partial:
        _carry(source, partial / vlm_bundle.HF_FILES)
        shards = None if mesh is None else rules.shards(state, mesh)
        weights = partial / vlm_bundle.WEIGHTS
        checksum = stored.write_weights(weights, entries, shapes, tensors, shards)
        record = {"source": str(source), "ignored": ignored, "mesh": mesh, "checksum": checksum}
        vlm_bundle.write_description(partial, config, record)
    return ignored


def export_folder(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Converts a model directory to a folder that `transformers` loads.

    Args:
        folder: that `import_folder` wrote.
        target: to be made, with safetensors under the published names and the carried files.

    Raises:
        UserError: no such directory, damaged; the target exists or cannot be written.
    """
    config, _ = vlm_bundle.read_description(folder)
    entries, shapes = entries_for(config), table.shapes_in(_abstract(config))
    weights = folder / vlm_bundle.WEIGHTS
    types = stored.stored_types(weights, entries, shapes)
    wanted = stored.wanted_tensors(entries, shapes)
    with stored.complete_or_nothing(target) as partial:
        _carry(folder / vlm_bundle.HF_FILES, partial)
        tensors = stored.tensors_of(weights, entries)
        write_safetensors_folder(partial, wanted, types, tensors)
