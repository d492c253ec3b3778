"""DINOv2 to a model directory, tensor by tensor: Hugging Face folders and the original `.pth`.

The table has the names that `transformers` 5 has in memory, where every matrix is its own tensor;
`named` gives a file of older or original names those, some of them as rows of a larger tensor.
"""

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from starflow2_jax import fae_bundle, model_folder
from starflow2_jax.convert import layout, stored, table
from starflow2_jax.convert.table import Entry, Join, Split, layers, plain, same, transposed
from starflow2_jax.convert.tensor_files import TensorFile, open_folder, open_tensors
from starflow2_jax.errors import UserError
from starflow2_jax.models.dinov2 import DinoV2, DinoV2Config, Interpolation, swiglu_width
from starflow2_jax.nn.grid import square_side

# A classifier's own layers, which are no part of the model.
_HEAD = re.compile(r"(classifier|head|linear_head)\..*")
_WRAPPERS = re.compile(r"^(dinov2_with_registers|dinov2|backbone|module)\.")

# Other names -> those of the table; several for the rows of one tensor, cut evenly.
_RENAMED: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"cls_token", ("embeddings.cls_token",)),
    (r"mask_token", ("embeddings.mask_token",)),
    (r"register_tokens", ("embeddings.register_tokens",)),
    (r"pos_embed", ("embeddings.position_embeddings",)),
    (r"patch_embed\.proj\.(.*)", (r"embeddings.patch_embeddings.projection.\1",)),
    (r"norm\.(.*)", (r"layernorm.\1",)),
    # The original may keep its blocks in chunks: blocks.CHUNK.BLOCK.
    (r"blocks\.(?:\d+\.)?(\d+)\.attn\.proj\.(.*)", (r"encoder.layer.\1.attention.o_proj.\2",)),
    (
        r"blocks\.(?:\d+\.)?(\d+)\.attn\.qkv\.(.*)",
        tuple(rf"encoder.layer.\1.attention.{part}_proj.\2" for part in "qkv"),
    ),
    (r"blocks\.(?:\d+\.)?(\d+)\.ls(\d)\.gamma", (r"encoder.layer.\1.layer_scale\2.lambda1",)),
    (
        r"blocks\.(?:\d+\.)?(\d+)\.mlp\.w12\.(.*)",
        (r"encoder.layer.\1.mlp.gate_proj.\2", r"encoder.layer.\1.mlp.up_proj.\2"),
    ),
    (r"blocks\.(?:\d+\.)?(\d+)\.mlp\.w3\.(.*)", (r"encoder.layer.\1.mlp.down_proj.\2",)),
    (r"blocks\.(?:\d+\.)?(\d+)\.(norm\d|mlp\.fc\d)\.(.*)", (r"encoder.layer.\1.\2.\3",)),
    *(
        (rf"(encoder\.layer\.\d+\.attention)\.attention\.{old}\.(.*)", (rf"\1.{new}_proj.\2",))
        for old, new in (("query", "q"), ("key", "k"), ("value", "v"))
    ),
    (r"(encoder\.layer\.\d+\.attention)\.output\.dense\.(.*)", (r"\1.o_proj.\2",)),
    (
        r"(encoder\.layer\.\d+\.mlp)\.weights_in\.(.*)",
        (r"\1.gate_proj.\2", r"\1.up_proj.\2"),
    ),
    (r"(encoder\.layer\.\d+\.mlp)\.weights_out\.(.*)", (r"\1.down_proj.\2",)),
)


def _new_names(name: str) -> tuple[str, ...]:
    name = _WRAPPERS.sub("", name)
    for pattern, templates in _RENAMED:
        if match := re.fullmatch(pattern, name):
            return tuple(match.expand(template) for template in templates)
    return (name,)


def named(source: TensorFile) -> tuple[TensorFile, list[str]]:
    """A source under the table's names, and the names of its tensors that no DINOv2 has.

    Raises:
        UserError: two tensors of the source are the same one, or one does not cut evenly.
    """
    parts: dict[str, tuple[str, int, int]] = {}
    ignored = []
    for old in source.shapes:
        if _HEAD.fullmatch(old):
            ignored.append(old)
            continue
        new = _new_names(old)
        rows = (source.shapes[old] or (0,))[0]
        if len(new) > 1 and rows % len(new):
            raise UserError(f"{old} has {rows} rows, not {len(new)} equal parts")
        size = rows // len(new)
        for i, name in enumerate(new):
            if name in parts:
                raise UserError(f"{old} and {parts[name][0]} are both {name}")
            parts[name] = (old, i * size, (i + 1) * size)

    def shape(name: str) -> tuple[int, ...]:
        old, start, stop = parts[name]
        whole = source.shapes[old]
        return (stop - start, *whole[1:]) if whole else whole

    def read(name: str) -> np.ndarray:
        old, start, stop = parts[name]
        whole = source.read(old)
        return whole[start:stop] if whole.ndim else whole

    shapes = {name: shape(name) for name in parts}
    return TensorFile(shapes, {n: source.dtypes[parts[n][0]] for n in parts}, read), ignored


def _entries(config: DinoV2Config) -> Iterator[Entry]:
    c, width = config.decoder(), config.width
    square = (config.patch, config.patch, config.channels, width)

    def entry(
        leaf: str, sources: tuple[str, ...], join: Join = same, split: Split | None = None
    ) -> Entry:
        return layers("decoder", "encoder.layer", c.layers, leaf, sources, join, split)

    def join(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        return layout.join_qkv(q, k, v, c.head_dim, adjacent_pairs=False)

    def split(joined: np.ndarray) -> tuple[np.ndarray, ...]:
        return layout.split_qkv(joined, c.heads, c.kv_heads, c.head_dim, adjacent_pairs=False)

    yield plain("cls", "embeddings.cls_token", lambda a: a[0, 0], lambda a: a.reshape(1, 1, width))
    yield plain("mask", "embeddings.mask_token", lambda a: a[0], lambda a: a.reshape(1, width))
    yield plain("positions", "embeddings.position_embeddings", lambda a: a[0], lambda a: a[None])
    if config.registers:
        yield plain("registers", "embeddings.register_tokens", lambda a: a[0], lambda a: a[None])
    yield plain(
        "patch_embedding.kernel",
        "embeddings.patch_embeddings.projection.weight",
        lambda w: w.transpose(2, 3, 1, 0).reshape(-1, width),
        lambda k: k.reshape(square).transpose(3, 2, 0, 1),
    )
    yield plain("patch_embedding.bias", "embeddings.patch_embeddings.projection.bias")
    for ours, theirs in (("attention_norm", "norm1"), ("mlp_norm", "norm2")):
        yield entry(f"{ours}.scale", (f"{theirs}.weight",))
        yield entry(f"{ours}.bias", (f"{theirs}.bias",))
    qkv = tuple(f"attention.{part}_proj" for part in "qkv")
    yield entry(
        "attention.qkv.kernel",
        tuple(f"{n}.weight" for n in qkv),
        lambda *w: join(*w).T,
        lambda k: split(k.T),
    )
    yield entry("attention.qkv.bias", tuple(f"{n}.bias" for n in qkv), join, split)
    maps = [("attention.out", "attention.o_proj")]
    if config.mlp == "swiglu":
        maps += [(f"mlp.{part}", f"mlp.{part}_proj") for part in ("gate", "up", "down")]
    else:
        maps += [("mlp.up", "mlp.fc1"), ("mlp.down", "mlp.fc2")]
    for ours, theirs in maps:
        yield entry(f"{ours}.kernel", (f"{theirs}.weight",), transposed)
        yield entry(f"{ours}.bias", (f"{theirs}.bias",))
    yield entry("attention_scale.gain", ("layer_scale1.lambda1",))
    yield entry("mlp_scale.gain", ("layer_scale2.lambda1",))
    yield plain("decoder.final_norm.scale", "layernorm.weight")
    yield plain("decoder.final_norm.bias", "layernorm.bias")


def entries_for(config: DinoV2Config) -> list[Entry]:
    """Every parameter of a `DinoV2` and its tensors."""
    return list(_entries(config))


def from_hf(record: Mapping[str, Any], interpolation: Interpolation | None = None) -> DinoV2Config:
    """The shape that a `config.json` of `transformers` describes.

    Args:
        record: of the file.
        interpolation: see `DinoV2Config`; default: that of `transformers`.

    Raises:
        ValueError: another architecture, or one that is not built.
    """
    kind = record.get("model_type")
    if kind not in ("dinov2", "dinov2_with_registers"):
        raise ValueError(f"model_type is {kind!r}, expected dinov2 or dinov2_with_registers")
    # Files leave out what is the default of their class.
    get = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": 224,
        "patch_size": 14 if kind == "dinov2" else 16,
        "num_channels": 3,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "num_register_tokens": 4,
        **record,
    }
    if not get["qkv_bias"] or get["hidden_act"] != "gelu":
        raise ValueError("only qkv_bias true and hidden_act gelu are built")
    width, patch, channels = get["hidden_size"], get["patch_size"], get["num_channels"]
    if channels != 3:
        raise ValueError(f"num_channels is {channels}, expected 3")
    hidden, registers = int(width * get["mlp_ratio"]), kind == "dinov2_with_registers"
    return DinoV2Config(
        layers=get["num_hidden_layers"],
        width=width,
        heads=get["num_attention_heads"],
        mlp_width=swiglu_width(hidden) if get["use_swiglu_ffn"] else hidden,
        mlp="swiglu" if get["use_swiglu_ffn"] else "gelu",
        registers=get["num_register_tokens"] if registers else 0,
        patch=patch,
        table_side=get["image_size"] // patch,
        interpolation=interpolation or ("antialias" if registers else "size"),
        norm_epsilon=get["layer_norm_eps"],
    )


def from_shapes(
    shapes: Mapping[str, tuple[int, ...]], interpolation: Interpolation | None = None
) -> DinoV2Config:
    """The shape of a model from those of its tensors, of which heads are 64 channels wide.

    Args:
        shapes: under the table's names.
        interpolation: see `DinoV2Config`; default: that of the original.

    Raises:
        ValueError: a tensor that tells of the shape is missing or has no shape of a DINOv2.
    """
    try:
        width, _, patch, _ = shapes["embeddings.patch_embeddings.projection.weight"]
        _, positions, _ = shapes["embeddings.position_embeddings"]
        _, registers, _ = shapes.get("embeddings.register_tokens", (1, 0, width))
        swiglu = "encoder.layer.0.mlp.gate_proj.weight" in shapes
        up = "encoder.layer.0.mlp.gate_proj.weight" if swiglu else "encoder.layer.0.mlp.fc1.weight"
        mlp_width, _ = shapes[up]
    except KeyError as error:
        raise ValueError(f"it has no tensor {error.args[0]}") from error
    found = (re.fullmatch(r"encoder\.layer\.(\d+)\..*", name) for name in shapes)
    return DinoV2Config(
        layers=1 + max(int(match[1]) for match in found if match),
        width=width,
        heads=width // 64,
        mlp_width=mlp_width,
        mlp="swiglu" if swiglu else "gelu",
        registers=registers,
        patch=patch,
        table_side=square_side(positions - 1),
        interpolation=interpolation or ("antialias" if registers else "offset"),
    )


def _config_of(
    source: pathlib.Path, tensors: TensorFile, interpolation: Interpolation | None
) -> DinoV2Config:
    """The shape that `source` has, by its `config.json` if it is a folder, else by its tensors."""
    path = source / "config.json" if source.is_dir() else source
    try:
        if path is source:
            return from_shapes(tensors.shapes, interpolation)
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
        return from_hf(record, interpolation)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a model folder") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} does not describe a DINOv2: {error}") from error


def import_weights(
    source: pathlib.Path, folder: pathlib.Path, interpolation: Interpolation | None = None
) -> list[str]:
    """Converts a DINOv2 to a model directory; see `fae_bundle`.

    Args:
        source: Hugging Face folder (`config.json`, safetensors under old or new names), or a file
            of the original (`.pth`, which needs torch, or `.safetensors`).
        folder: of the model, to be made. It is there when it is complete, and not before.
        interpolation: of the positions, see `DinoV2Config`; default: the source's own.

    Returns:
        Names of the tensors that were passed over: a classifier's.

    Raises:
        UserError: the folder exists; another architecture; missing, damaged or truncated files;
            tensors that do not fit the model (all of them in one message).
    """
    with contextlib.ExitStack() as open_files:
        if source.is_dir():
            opened = open_folder(source)
        else:
            opened = open_files.enter_context(open_tensors(source))
        tensors, ignored = named(opened)
        config = _config_of(source, tensors, interpolation)
        entries = entries_for(config)
        shapes = table.shapes_of(lambda: DinoV2(config, rngs=nnx.Rngs(0)))
        problems = stored.problems_of(entries, shapes, tensors)
        if problems:
            raise UserError(f"{source} does not fit its description: {'; '.join(problems)}")
        with stored.complete_or_nothing(folder) as partial:
            weights = partial / model_folder.WEIGHTS
            checksum = stored.write_weights(weights, entries, shapes, tensors)
            record = {"source": str(source), "ignored": ignored, "checksum": checksum}
            model_folder.write_description(partial, fae_bundle.VIT, config, record)
    return ignored
