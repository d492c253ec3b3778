"""Named sizes of Qwen2.5-VL, those read from a Hugging Face `config.json`, and their tensors."""

import json
import math

import pytest
import transformers
from flax import nnx

from starflow2_jax.convert import starflow2, table
from starflow2_jax.models import qwen2_5_vl
from starflow2_jax.models.qwen2_5_vl import Qwen25VL, from_hf

TEXT = {
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
VISION = {"hidden_size": 1280, "in_chans": 3, "model_type": "qwen2_5_vl", "spatial_patch_size": 14}


def published(layers, width, heads, kv_heads, mlp_width, tied=False, vision=None, **text):
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "vision_config": VISION | {"out_hidden_size": width} | (vision or {}),
        **TEXT,
        **text,
    }


# The published configs: the smaller two towers leave their MLP's width to the default.
PUBLISHED = {
    "3b": published(36, 2048, 16, 2, 11008, tied=True, vocab_size=151936),
    "7b": published(28, 3584, 28, 4, 18944),
    "32b": published(64, 5120, 40, 8, 27648, vision={"intermediate_size": 3456}),
    "72b": published(80, 8192, 64, 8, 29568, vision={"intermediate_size": 3456}),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_named_sizes_are_the_published_ones(size):
    named = getattr(qwen2_5_vl, f"qwen2_5_vl_{size}")()
    assert from_hf(PUBLISHED[size]) == named


@pytest.mark.parametrize("size", PUBLISHED)
def test_configs_that_transformers_saves(size, tmp_path):
    """Text keys under `text_config`, rotary ones renamed."""
    transformers.Qwen2_5_VLConfig.from_dict(PUBLISHED[size]).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" in record
    assert from_hf(record) == from_hf(PUBLISHED[size])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen2_vl"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"num_attention_heads": 27}, "hidden_size"),
        ({"rope_scaling": {"mrope_section": [24, 20, 20], "type": "default"}}, "mrope_section"),
        ({"vision_config": VISION | {"out_hidden_size": 2048}}, "2048"),
    ],
)
def test_other_models_are_refused(changes, named):
    with pytest.raises(ValueError, match=named) as refusal:
        from_hf(PUBLISHED["7b"] | changes)
    assert "\n" not in str(refusal.value)


def tensors_of(config):
    """Name and shape of every tensor that a checkpoint of this shape holds; nothing is made."""
    shapes = table.shapes_of(lambda: Qwen25VL(config, rngs=nnx.Rngs(0)))
    entries = list(starflow2.qwen("", "", config))
    tensors = table.source_shapes(entries, shapes)
    assert not table.misfits(entries, shapes, tensors)
    return tensors


def count(tensors, prefix=""):
    return sum(math.prod(shape) for name, shape in tensors.items() if name.startswith(prefix))


def test_tensors_of_the_7b():
    tensors = tensors_of(from_hf(PUBLISHED["7b"]))
    assert len(tensors) == 729
    assert count(tensors) == 8_292_166_656
    assert count(tensors, "visual.") == 676_550_144
    assert count(tensors, "model.") == 7_070_619_136
    assert count(tensors, "lm_head.") == count(tensors, "model.embed_tokens.") == 544_997_376
    block, layer = "visual.blocks.31", "model.layers.27"
    expected = {
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        f"{block}.norm1.weight": (1280,),
        f"{block}.norm2.weight": (1280,),
        f"{block}.attn.qkv.weight": (3840, 1280),
        f"{block}.attn.qkv.bias": (3840,),
        f"{block}.attn.proj.weight": (1280, 1280),
        f"{block}.attn.proj.bias": (1280,),
        f"{block}.mlp.gate_proj.weight": (3420, 1280),
        f"{block}.mlp.gate_proj.bias": (3420,),
        f"{block}.mlp.up_proj.weight": (3420, 1280),
        f"{block}.mlp.up_proj.bias": (3420,),
        f"{block}.mlp.down_proj.weight": (1280, 3420),
        f"{block}.mlp.down_proj.bias": (1280,),
        "visual.merger.ln_q.weight": (1280,),
        "visual.merger.mlp.0.weight": (5120, 5120),
        "visual.merger.mlp.0.bias": (5120,),
        "visual.merger.mlp.2.weight": (3584, 5120),
        "visual.merger.mlp.2.bias": (3584,),
        "model.embed_tokens.weight": (152064, 3584),
        f"{layer}.self_attn.q_proj.weight": (3584, 3584),
        f"{layer}.self_attn.q_proj.bias": (3584,),
        f"{layer}.self_attn.k_proj.weight": (512, 3584),
        f"{layer}.self_attn.k_proj.bias": (512,),
        f"{layer}.self_attn.v_proj.weight": (512, 3584),
        f"{layer}.self_attn.v_proj.bias": (512,),
        f"{layer}.self_attn.o_proj.weight": (3584, 3584),
        f"{layer}.mlp.gate_proj.weight": (18944, 3584),
        f"{layer}.mlp.up_proj.weight": (18944, 3584),
        f"{layer}.mlp.down_proj.weight": (3584, 18944),
        f"{layer}.input_layernorm.weight": (3584,),
        f"{layer}.post_attention_layernorm.weight": (3584,),
        "model.norm.weight": (3584,),
        "lm_head.weight": (152064, 3584),
    }
    assert expected.items() <= tensors.items()
    # The last layers stand for all; nothing else is there.
    assert len(tensors) == 28 * 12 + 32 * 12 + 9
    assert len(expected) == 12 + 12 + 9


@pytest.mark.parity
@pytest.mark.parametrize("size", PUBLISHED)
def test_tensors_are_those_of_transformers(size):
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        config = transformers.Qwen2_5_VLConfig.from_dict(PUBLISHED[size])
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    theirs = {}
    for name, value in model.state_dict().items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        theirs[name] = tuple(value.shape)
    if config.tie_word_embeddings:
        assert theirs.pop("lm_head.weight") == theirs["model.embed_tokens.weight"]
    assert tensors_of(from_hf(PUBLISHED[size])) == theirs
