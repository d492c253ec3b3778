"""Named sizes of Qwen2.5-VL, and those read from a Hugging Face `config.json`."""

import json

import pytest
import transformers

from starflow2_jax.models import qwen2_5_vl
from starflow2_jax.models.qwen2_5_vl import from_hf

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
