"""CLIP from a Hugging Face folder, with its tokenizer and its preparation of pictures."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from flax import nnx
from PIL import Image

from starflow2_jax.convert import layout, table
from starflow2_jax.convert.table import Entry, linear, plain, transposed
from starflow2_jax.convert.tensor_files import open_folder
from starflow2_jax.errors import UserError
from starflow2_jax.models.clip import Clip, ClipConfig, TowerConfig
from starflow2_jax.nn.decoder import DecoderConfig

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# No weights: counts that old files hold, and the temperature of training.
_UNUSED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
_TEMPERATURE = "logit_scale"


def from_hf(record: Mapping[str, Any]) -> ClipConfig:
    """The shape that a `config.json` of `transformers` describes.

    Raises:
        ValueError: another architecture, or one that is not built.
    """
    if record.get("model_type") != "clip":
        raise ValueError(f"model_type is {record.get('model_type')!r}, expected 'clip'")
    # Files leave out what is the default of their class.
    shared = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    text = {
        **shared,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        **(record.get("text_config") or {}),
    }
    vision = {
        **shared,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "image_size": 224,
        "patch_size": 32,
        **(record.get("vision_config") or {}),
    }

    def tower(fields: Mapping[str, Any]) -> TowerConfig:
        if fields["hidden_act"] not in ("gelu", "quick_gelu"):
            raise ValueError(f"hidden_act is {fields['hidden_act']!r}, expected gelu or quick_gelu")
        return TowerConfig(
            layers=fields["num_hidden_layers"],
            width=fields["hidden_size"],
            heads=fields["num_attention_heads"],
            mlp_width=fields["intermediate_size"],
            mlp=fields["hidden_act"],
            norm_epsilon=fields["layer_norm_eps"],
        )

    return ClipConfig(
        text=tower(text),
        vision=tower(vision),
        vocab_size=text["vocab_size"],
        context=text["max_position_embeddings"],
        side=vision["image_size"],
        patch=vision["patch_size"],
        width=record.get("projection_dim", 512),
    )


def _layers(path: str, name: str, c: DecoderConfig) -> Iterator[Entry]:
    def entry(leaf: str, sources: tuple[str, ...], **change: Any) -> Entry:
        where = f"{path}.decoder", f"{name}.encoder.layers", c.layers
        return table.layers(*where, leaf, sources, **change)

    def join(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        return layout.join_qkv(q, k, v, c.head_dim, adjacent_pairs=False)

    def split(joined: np.ndarray) -> tuple[np.ndarray, ...]:
        return layout.split_qkv(joined, c.heads, c.kv_heads, c.head_dim, adjacent_pairs=False)

    for ours, theirs in (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
        yield entry(f"{ours}.scale", (f"{theirs}.weight",))
        yield entry(f"{ours}.bias", (f"{theirs}.bias",))
    qkv = tuple(f"self_attn.{part}_proj" for part in "qkv")
    yield entry(
        "attention.qkv.kernel",
        tuple(f"{n}.weight" for n in qkv),
        join=lambda *w: join(*w).T,
        split=lambda k: split(k.T),
    )
    yield entry("attention.qkv.bias", tuple(f"{n}.bias" for n in qkv), join=join, split=split)
    for ours, theirs in (
        ("attention.out", "self_attn.out_proj"),
        ("mlp.up", "mlp.fc1"),
        ("mlp.down", "mlp.fc2"),
    ):
        yield entry(f"{ours}.kernel", (f"{theirs}.weight",), join=transposed)
        yield entry(f"{ours}.bias", (f"{theirs}.bias",))


def entries_for(config: ClipConfig) -> Iterator[Entry]:
    """Every parameter of a `Clip` and its tensors."""
    norms = (
        ("text.final_norm", "text_model.final_layer_norm"),
        ("vision.first_norm", "vision_model.pre_layrnorm"),
        ("vision.final_norm", "vision_model.post_layernorm"),
    )
    for ours, theirs in norms:
        yield plain(f"{ours}.scale", f"{theirs}.weight")
        yield plain(f"{ours}.bias", f"{theirs}.bias")
    embeddings = "text_model.embeddings"
    yield plain("text.tokens", f"{embeddings}.token_embedding.weight")
    yield plain("text.positions", f"{embeddings}.position_embedding.weight")
    embeddings = "vision_model.embeddings"
    yield plain("vision.cls", f"{embeddings}.class_embedding")
    yield plain("vision.positions", f"{embeddings}.position_embedding.weight")
    width, square = config.vision.width, (config.patch, config.patch, 3, config.vision.width)
    yield plain(
        "vision.patch_embedding.kernel",
        f"{embeddings}.patch_embedding.weight",
        lambda w: w.transpose(2, 3, 1, 0).reshape(-1, width),
        lambda k: k.reshape(square).transpose(3, 2, 0, 1),
    )
    yield from _layers("text", "text_model", config.text.decoder())
    yield from _layers("vision", "vision_model", config.vision.decoder())
    for name in ("text_projection", "visual_projection"):
        yield from linear(name, name, bias=False)


@dataclasses.dataclass(frozen=True)
class LoadedClip:
    """A CLIP that is ready to use.

    Attributes:
        model: the network.
        mean, std: [3], of pixels in [0, 1].
    """

    model: Clip
    tokenizer: tokenizers.Tokenizer
    mean: np.ndarray
    std: np.ndarray

    def prepared(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 1 or 3] -> normalised float32 of the model's size [S, S, 3].

        The shorter side is scaled (bicubic) and the middle cropped.
        """
        side = self.model.config.side
        picture = Image.fromarray(np.repeat(image, 3, -1) if image.shape[-1] == 1 else image)
        scale = side / min(picture.size)
        width, height = (
            side if edge == min(picture.size) else int(edge * scale) for edge in picture.size
        )
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        return ((np.asarray(picture, np.float32) / 255.0 - self.mean) / self.std).astype(np.float32)

    def encoded(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Texts, cut to the context -> tokens int32 [B, T] and their lengths int32 [B]."""
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        tokens = np.zeros((len(rows), self.model.config.context), np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        return tokens, np.array([len(ids) for ids in rows], np.int32)


def load_clip(folder: pathlib.Path) -> LoadedClip:
    """The CLIP of a Hugging Face folder: config.json, tokenizer.json, safetensors.

    `preprocessor_config.json` may give other means and deviations than OpenAI's.

    Raises:
        UserError: missing or damaged files, another architecture, tensors that do not fit (all of
            them in one message).
    """

    def read(name: str) -> dict[str, Any]:
        try:
            record = json.loads((folder / name).read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {folder / name}: {error}") from error
        return record

    source = open_folder(folder)
    tensors = {
        name: np.array(source.read(name), np.float32)
        for name in source.shapes
        if name not in _UNUSED and name != _TEMPERATURE
    }
    try:
        config = from_hf(read("config.json"))
        make = lambda: Clip(config, rngs=nnx.Rngs(0))
        model = table.from_tensors(make, list(entries_for(config)), tensors)
    except ValueError as error:
        reason = " ".join(str(error).split())[:2000]
        raise UserError(f"{folder} holds no CLIP that can be used: {reason}") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"cannot read {folder / 'tokenizer.json'}: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.context)
    name = "preprocessor_config.json"
    images = read(name) if (folder / name).exists() else {}
    mean, std = images.get("image_mean", _MEAN), images.get("image_std", _STD)
    return LoadedClip(model, tokenizer, np.array(mean, np.float32), np.array(std, np.float32))
