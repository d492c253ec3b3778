"""A STARFlow2 model directory to a folder of safetensors, and back, tensor by tensor.

FOLDER/model.safetensors   every parameter and codec array (or several files, and their index)
FOLDER/config.json         the descriptions of the directory's parts, and checksums of their weights
FOLDER/tokenizer/          as in the model directory
FOLDER/README.md           a model card; the licence in it is for whoever publishes the folder

Names: those of `convert.starflow2`; behind `codec.` the arrays of a patch codec; behind `fae.` and
`fae.vit.` the FAE and its ViT under the names and in the layout that this package gives them.
"""

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from starflow2_jax import bundle, fae_bundle, model_folder
from starflow2_jax.convert import starflow2, stored, table
from starflow2_jax.convert.table import Entry, plain
from starflow2_jax.convert.tensor_files import TensorFile, open_folder, write_safetensors_folder
from starflow2_jax.errors import UserError
from starflow2_jax.models import dinov2, fae
from starflow2_jax.models.dinov2 import DinoV2
from starflow2_jax.models.fae import FAE
from starflow2_jax.models.pretzel import Pretzel, PretzelConfig
from starflow2_jax.provenance import write_json, write_text
from starflow2_jax.training.checkpoint import TreeDigest

MODEL_TYPE = "starflow2"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
FORMAT_VERSION = 1

_TOKENIZER = "tokenizer"
_FAE, _VIT = f"{bundle.FAE_FOLDER}/", f"{bundle.FAE_FOLDER}/{fae_bundle.VIT_FOLDER}/"
_MODEL_FILE = model_folder.MODEL_FILE
# Descriptions by their place in the directory, in the order in which they are written: with the
# first one missing the directory is no model.
_DESCRIPTIONS = (
    f"{_VIT}{_MODEL_FILE}",
    f"{_FAE}{fae_bundle.STATISTICS_FILE}",
    f"{_FAE}{_MODEL_FILE}",
    _MODEL_FILE,
)

Descriptions = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Part:
    """One folder of weights.

    Attributes:
        folder: of the weights, in the directory.
        prefix: that the names of its tensors have in common, and no other part's.
        entries, shapes: its parameters.
    """

    folder: str
    prefix: str
    entries: list[Entry]
    shapes: dict[str, tuple[int, ...]]


def _as_it_is(make_model: Callable[[], nnx.Module], folder: str, prefix: str) -> _Part:
    """A part whose tensors are its parameters."""
    shapes = table.shapes_in(nnx.state(nnx.eval_shape(make_model), nnx.Param))
    entries = [plain(path, f"{prefix}{path}") for path in shapes]
    return _Part(f"{folder}{model_folder.WEIGHTS}", prefix, entries, shapes)


def _model_part(config: PretzelConfig, codec: bool) -> _Part:
    shapes = table.shapes_of(lambda: Pretzel(config, rngs=nnx.Rngs(0)))
    shapes = {f"model.{path}": shape for path, shape in shapes.items()}
    entries = [
        dataclasses.replace(entry, path=f"model.{entry.path}") for entry in starflow2.table(config)
    ]
    if codec:
        arrays = bundle.codec_shapes(config)
        shapes |= {f"codec.{name}": struct.shape for name, struct in arrays.items()}
        entries += [plain(f"codec.{name}", f"codec.{name}") for name in arrays]
    return _Part(model_folder.WEIGHTS, "", entries, shapes)


def _parts(where: pathlib.Path, descriptions: Descriptions) -> list[_Part]:
    """The folders of weights that these descriptions are of.

    Raises:
        UserError: they describe no model, or lack a part.
    """
    try:
        record = descriptions[_MODEL_FILE]
        version = record["format_version"]
        if version != bundle.FORMAT_VERSION:
            raise UserError(
                f"{where} is of a model of format version {version}, this package reads "
                f"{bundle.FORMAT_VERSION}"
            )
        has_fae = "fae" in record
        parts = [_model_part(bundle.config_from_json(record["model"]), codec=not has_fae)]
        if has_fae:
            statistics = f"{_FAE}{fae_bundle.STATISTICS_FILE}"
            if statistics not in descriptions:  # without them nobody could load it
                raise UserError(f"{where} has no {statistics}; copy its whole directory")
            config = fae.from_json(descriptions[f"{_FAE}{_MODEL_FILE}"]["model"])
            parts.append(_as_it_is(lambda: FAE(config, rngs=nnx.Rngs(0)), _FAE, "fae."))
        if has_fae and f"{_VIT}{_MODEL_FILE}" in descriptions:
            vit = dinov2.from_json(descriptions[f"{_VIT}{_MODEL_FILE}"]["model"])
            parts.append(_as_it_is(lambda: DinoV2(vit, rngs=nnx.Rngs(0)), _VIT, "fae.vit."))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where} is not the description of a STARFlow2 model ({error!r})"
        ) from error
    for part in parts:
        part.entries.sort(key=lambda entry: tuple(entry.path.split(".")))  # as checksums want it
    return parts


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def is_model(folder: pathlib.Path) -> bool:
    """Whether a folder is a model directory, or the work directory of a finished run."""
    return (model_folder.finished(folder) / _MODEL_FILE).is_file()


def export_folder(folder: pathlib.Path, target: pathlib.Path, most_bytes: int = 5 * 10**9) -> None:
    """Converts a model directory to a folder of safetensors; at most a few tensors are in memory.

    Args:
        folder: of the model, or the work directory of a finished run.
        target: to be made. It is there when it is complete, and not before.
        most_bytes: of a file, save for one that a single tensor fills.

    Raises:
        UserError: no directory of a STARFlow2, damaged; the target exists or cannot be written.
    """
    folder = model_folder.finished(folder)
    if not bundle.is_bundle(folder):
        raise UserError(f"{folder} is not the directory of a STARFlow2 model")
    descriptions = {
        name: _read_json(folder / name) for name in _DESCRIPTIONS if (folder / name).is_file()
    }
    parts = _parts(folder, descriptions)
    if not (folder / _TOKENIZER).is_dir():
        raise UserError(f"{folder} has no {_TOKENIZER}; copy its whole directory")
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, np.dtype] = {}
    for part in parts:
        dtypes |= stored.stored_types(folder / part.folder, part.entries, part.shapes)
        shapes |= stored.wanted_tensors(part.entries, part.shapes)
    digests = {part.folder: TreeDigest() for part in parts}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for part in parts:
            weights = folder / part.folder
            yield from stored.tensors_of(weights, part.entries, digests[part.folder])

    with stored.complete_or_nothing(target) as partial:
        write_safetensors_folder(partial, shapes, dtypes, tensors(), most_bytes)
        shutil.copytree(folder / _TOKENIZER, partial / _TOKENIZER)
        checksums = {name: digest.hexdigest() for name, digest in digests.items()}
        record = {
            "model_type": MODEL_TYPE,
            "format_version": FORMAT_VERSION,
            "checksums": checksums,
            "files": descriptions,
        }
        write_json(partial / CONFIG_FILE, record)
        write_text(partial / CARD_FILE, _card(descriptions, shapes, dtypes, checksums))


def import_folder(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Converts a folder that `export_folder` wrote back to the same model directory.

    Args:
        source: with `config.json`, safetensors with or without an index, and the tokenizer.
        folder: of the model, to be made. It is there when it is complete, and not before.

    Raises:
        UserError: the folder exists; no such source; missing, damaged or truncated files; tensors
            that do not fit the model (all of them in one message), or whose bytes are others.
    """
    path = source / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{source} has neither {_MODEL_FILE} (a model directory) nor {CONFIG_FILE} (a folder "
            "of safetensors)"
        )
    record = _read_json(path)
    kind = record.get("model_type") if isinstance(record, dict) else None
    if kind != MODEL_TYPE:
        raise UserError(f"{path} is of model_type {kind}, expected {MODEL_TYPE}")
    if record.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {record.get('format_version')}, this package reads "
            f"{FORMAT_VERSION}"
        )
    descriptions, checksums = record.get("files"), record.get("checksums")
    if not isinstance(descriptions, dict) or not isinstance(checksums, dict):
        raise UserError(f"{path} lacks files or checksums; get the folder again")
    parts = _parts(path, descriptions)
    if not (source / _TOKENIZER).is_dir():
        raise UserError(f"{source} has no {_TOKENIZER}; get the whole folder")
    opened = open_folder(source)
    sources = _split(opened, parts)
    problems = [
        problem
        for part in parts
        for problem in stored.problems_of(
            part.entries, part.shapes, sources[part.folder], integers=("codec.order",)
        )
    ]
    if problems:
        raise UserError(f"{source} does not fit its {CONFIG_FILE}: {'; '.join(problems)}")
    with stored.complete_or_nothing(folder) as partial:
        for part in parts:
            found = stored.write_weights(
                partial / part.folder, part.entries, part.shapes, sources[part.folder]
            )
            if found != checksums.get(part.folder):
                raise UserError(
                    f"{source}: the tensors of {part.folder} have the checksum {found[:12]}, but "
                    f"{CONFIG_FILE} says {str(checksums.get(part.folder))[:12]}; get them again"
                )
        shutil.copytree(source / _TOKENIZER, partial / _TOKENIZER)
        for name in _DESCRIPTIONS:
            if name in descriptions:
                write_json(partial / name, descriptions[name])


def _split(opened: TensorFile, parts: list[_Part]) -> dict[str, TensorFile]:
    """Each part's tensors: those with its prefix that no longer prefix claims."""
    prefixes = sorted((part.prefix for part in parts), key=len, reverse=True)

    def owner(name: str) -> str:
        return next(prefix for prefix in prefixes if name.startswith(prefix))

    return {
        part.folder: TensorFile(
            {n: shape for n, shape in opened.shapes.items() if owner(n) == part.prefix},
            opened.dtypes,
            opened.read,
        )
        for part in parts
    }


# The model card


def _group(name: str) -> str:
    """What a tensor belongs to, for the table of sizes."""
    if name.startswith("fae.vit."):
        return "fae.vit"
    return name.partition(".")[0]


_GROUPS = {
    "vlm": "frozen vision-language model",
    "shallow": "shallow flow, image by image",
    "deep": "deep flow, causal over text and images, with its projections",
    "adapter": "image tokens into the vision-language model",
    "skip": "skips between the two streams",
    "codec": "patch codec of the images (constants)",
    "fae": "FAE: images to latents and back",
    "fae.vit": "frozen ViT whose features the FAE takes",
}


def _rows(of: Mapping[str, Any]) -> list[str]:
    return [f"| {name} | {value} |" for name, value in of.items()]


def _card(
    descriptions: Descriptions,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    checksums: Mapping[str, str],
) -> str:
    """The text of `README.md`."""
    record = descriptions[_MODEL_FILE]
    counts: dict[str, int] = {}
    kinds: dict[str, set[str]] = {}
    for name, shape in shapes.items():
        group = _group(name)
        counts[group] = counts.get(group, 0) + math.prod(shape)
        kinds.setdefault(group, set()).add(np.dtype(dtypes[name]).name)
    training = {
        key: value
        for key, value in record.items()
        if key not in ("format_version", "model", "image", "fae")
    }
    vlm, flow, image = record["model"]["vlm"], record["model"]["flow"], record["image"]
    lines = [
        "---",
        "library_name: starflow2-jax",
        "pipeline_tag: any-to-any",
        "license: other  # to be filled in by whoever publishes this folder",
        "---",
        "",
        "# STARFlow2",
        "",
        "An autoregressive normalizing flow over image latents beside a frozen vision-language",
        "model: it writes text and draws images in one causal sequence, and gives the exact",
        "log-likelihood of both. Made by `starflow2 convert starflow2`. Convert it back to use it:",
        "",
        "```bash",
        "starflow2 convert starflow2 THIS_FOLDER --out MODEL",
        "```",
        "",
        "```python",
        "from starflow2_jax import load",
        "",
        'model = load("MODEL")',
        "```",
        "",
        "## Parameters",
        "",
        "| part | | parameters | stored as |",
        "|---|---|---:|---|",
        *(
            f"| `{group}` | {_GROUPS.get(group, '')} | {counts[group]:,} | "
            f"{', '.join(sorted(kinds[group]))} |"
            for group in counts
        ),
        f"| all | | {sum(counts.values()):,} | |",
        "",
        "## Shape",
        "",
        "| | |",
        "|---|---|",
        f"| image | {image['height']} x {image['width']} x {image['channels']} |",
        *_rows({f"flow.{key}": value for key, value in flow.items()}),
        *_rows({f"vlm.{key}": value for key, value in vlm.items() if key != "vision"}),
        "",
        "## Training",
        "",
        "```json",
        json.dumps(training, indent=2),
        "```",
        "",
        "## Checksums",
        "",
        "SHA-256 of the weights' paths, shapes, types and bytes; the way back verifies them.",
        "",
        "| weights | checksum |",
        "|---|---|",
        *_rows({f"`{name}`": f"`{value}`" for name, value in checksums.items()}),
        "",
        "## Licence",
        "",
        "To be filled in by whoever publishes this folder. The vision-language model, the FAE and",
        "the training data have licences of their own.",
        "",
    ]
    return "\n".join(lines)
