"""Qwen2.5-VL of `transformers` in the shape and with the weights of ours, and rows for both."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch
import transformers
from flax import nnx

from starflow2_jax.convert import starflow2, table
from starflow2_jax.data.sequences import ImageShape, Writer
from starflow2_jax.data.tokenizer import train_tokenizer
from starflow2_jax.data.views import Limits, ViewShape, pack_views, view
from starflow2_jax.models.pretzel import Kind
from starflow2_jax.models.qwen2_5_vision import VisionConfig
from starflow2_jax.models.qwen2_5_vl import Qwen25VL
from starflow2_jax.nn import rope

TOKENIZER = train_tokenizer(["a few words"], 280)
SPECIAL = TOKENIZER.special
FIRST_WORD = 6  # special tokens come before


def config_of(heads=4, kv_heads=2, tied=False, **changes):
    """A tiny model with a tower; Hugging Face ties the width to heads * head_dim."""
    tower = VisionConfig(
        layers=4, width=32, heads=2, mlp_width=48, out_width=16 * heads, full_layers=(1, 3)
    )
    shape = {"width": 16 * heads, "heads": heads, "kv_heads": kv_heads, "tied": tied}
    return tiny.vlm(vocab_size=TOKENIZER.vocab_size, vision=tower, **shape | changes)


def reference(config, dtype):
    """The Hugging Face model of this shape."""
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.rms_norm_epsilon,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "mrope_section": list(rope.multimodal_counts(config.head_dim)),
        },
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    tower = config.vision
    vision = {
        "depth": tower.layers,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_heads": tower.heads,
        "out_hidden_size": tower.out_width,
        "fullatt_block_indexes": list(tower.full_layers),
    }
    model = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=config.tied,
            image_token_id=SPECIAL.image_pad,
            vision_start_token_id=SPECIAL.vision_start,
            vision_end_token_id=SPECIAL.vision_end,
            # None of its ids may mean a video.
            video_token_id=config.vocab_size,
            attn_implementation="eager",
        )
    )
    return model.eval().to(dtype)


def load(model, config, ours):
    """Our weights under their names; every tensor of theirs is filled."""
    entries = list(starflow2.qwen("", "", config))
    tensors = {}
    for name, value in table.to_tensors(entries, starflow2.by_path(nnx.state(ours))):
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model."):
            name = f"model.language_model.{name.removeprefix('model.')}"
        tensors[name] = torch.from_numpy(np.array(value))
    if config.tied:
        assert "lm_head.weight" not in tensors
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)


def pair(config, dtype, seed=0):
    """Our model and theirs, of the same random weights."""
    ours = tiny.randomised(lambda: Qwen25VL(config, rngs=nnx.Rngs(0)), seed, dtype)
    theirs = reference(config, torch.float64 if dtype == np.float64 else torch.float32)
    load(theirs, config, ours)
    return ours, theirs


def lift(monkeypatch):
    """No cast to float32 inside `transformers`: norms, rotary and softmax stay in float64.

    Returns a function that also makes a model's rotary frequencies anew in float64.
    """
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def wide(dtype):
        return torch.float64 if dtype is torch.float32 else dtype

    def wide_to(tensor, *args, **kwargs):
        args = tuple(wide(a) for a in args)
        return to(tensor, *args, **{k: wide(v) for k, v in kwargs.items()})

    monkeypatch.setattr(torch.Tensor, "to", wide_to)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: to(tensor, torch.float64))
    monkeypatch.setattr(
        torch.nn.functional,
        "softmax",
        lambda x, dim=None, dtype=None, **rest: softmax(x, dim=dim, dtype=wide(dtype), **rest),
    )

    def prepare(model):
        for rotary in (model.model.language_model.rotary_emb, model.model.visual.rotary_pos_emb):
            count = len(rotary.inv_freq)
            theta = rotary.config.rope_parameters["rope_theta"]
            exact = float(theta) ** -(torch.arange(count, dtype=torch.float64) / count)
            assert torch.allclose(exact, rotary.inv_freq.double(), rtol=1e-6, atol=0)
            rotary.inv_freq = exact

    return prepare


@pytest.fixture
def lifted(monkeypatch):
    return lift(monkeypatch)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def views_of(config, sizes, seed=0):
    """Views of random pictures of these (height, width); sizes that 28 divides stay."""
    limits = Limits(min_pixels=28 * 28)
    return [view(picture(h, w, seed + i), config.vision, limits) for i, (h, w) in enumerate(sizes)]


def document(config, parts, seed=0):
    """A document of these parts: a number of random text tokens, or the size of a picture."""
    rng = np.random.default_rng(seed)
    writer = Writer(TOKENIZER, ImageShape(2, 2, 1, 2))
    sizes = [part for part in parts if not isinstance(part, int)]
    views = iter(views_of(config, sizes, seed))
    for part in parts:
        if isinstance(part, int):
            writer.text(rng.integers(FIRST_WORD, TOKENIZER.vocab_size, part), loss=False)
        else:
            writer.view(next(views))
    return writer.document()


@dataclasses.dataclass
class Batch:
    """Rows as our model takes them, [B, T]; and how the documents lie in them."""

    tokens: np.ndarray
    kinds: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    views: object
    places: list

    @property
    def exists(self):
        return self.segments > 0


# One shape for all batches, so that little is compiled.
LENGTH = 128
VIEW_SHAPE = ViewShape(tower_rows=2, places=7 * 64)


def batch(config, rows, left=False, count=3):
    """`count` rows of documents, padded with ids that mean nothing; missing rows are padding."""
    shape = (count, LENGTH)
    tokens, kinds = np.full(shape, 20, np.int32), np.zeros(shape, np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros((3, *shape), np.int32)
    places = []
    for b, row in enumerate(rows):
        used = sum(len(d.tokens) for d in row)
        assert used < LENGTH, used
        at = LENGTH - used if left else 0
        for s, d in enumerate(row):
            here = slice(at, at + len(d.tokens))
            tokens[b, here], kinds[b, here] = d.tokens, d.kinds
            positions[:, b, here], segments[b, here] = d.positions.T, s + 1
            places.append((b, here))
            at += len(d.tokens)
    views = [[v for d in row for v in d.views] for row in rows]
    views += [[] for _ in range(count - len(rows))]
    packed = pack_views(views, kinds, config.vision, VIEW_SHAPE)
    return Batch(tokens, kinds, positions, segments, packed, places)


def both_frames(view, config):
    """The view's patches as `transformers` takes them: every frame of the still picture."""
    c = config.vision
    patches = view.patches.reshape(len(view.patches), c.channels, 1, -1)
    return np.repeat(patches, c.frames, 2).reshape(len(view.patches), -1)


def their_inputs(config, documents, left=False, dtype=torch.float32):
    """Documents as a padded batch of `transformers`."""
    rows = batch(config, [[d] for d in documents], left, len(documents))
    used = rows.exists.any(0)
    inputs = {
        "input_ids": torch.from_numpy(rows.tokens[:, used].astype(np.int64)),
        "attention_mask": torch.from_numpy(rows.exists[:, used].astype(np.int64)),
        "mm_token_type_ids": torch.from_numpy((rows.kinds == Kind.VIT)[:, used].astype(np.int64)),
    }
    views = [v for d in documents for v in d.views]
    if views:
        pixels = np.concatenate([both_frames(v, config) for v in views])
        inputs["pixel_values"] = torch.from_numpy(pixels).type(dtype)
        inputs["image_grid_thw"] = torch.tensor([[1, v.rows, v.columns] for v in views])
    return inputs
