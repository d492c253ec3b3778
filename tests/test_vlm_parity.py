"""Our Qwen2.5-VL language model against that of `transformers`, with random weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from starflow2_jax.convert import starflow2
from starflow2_jax.models.pretzel import Kind, PretzelConfig
from starflow2_jax.models.qwen2_5_vl import Qwen25VL
from starflow2_jax.nn.attention import AttentionSpec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

# (heads, kv heads): each kv head serves 1, 4, 7 query heads.
RATIOS = {"1": (2, 2), "4": (8, 2), "7": (7, 1)}


def config_of(heads, kv_heads, tied):
    # Hugging Face ties the width to heads * head_dim.
    return tiny.vlm(width=16 * heads, heads=heads, kv_heads=kv_heads, tied=tied)


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
            "mrope_section": [2, 3, 3],
        },
        "pad_token_id": None,
    }
    # The vision tower is not under test here; it only has to exist.
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": config.width,
        "fullatt_block_indexes": [0],
    }
    model = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=config.tied,
            attn_implementation="eager",
        )
    )
    return model.eval().to(dtype)


def load(model, config, ours):
    """Our weights under their names; every tensor of theirs is filled."""
    whole = PretzelConfig(config, tiny.flow(), tiny.SPECIAL)
    paths = {f"vlm.{path}": value for path, value in starflow2.by_path(nnx.state(ours)).items()}
    tensors = {
        name.removeprefix("vlm."): torch.from_numpy(np.array(value))
        for name, value in starflow2.to_tensors(whole, paths).items()
    }
    head = tensors.pop("lm_head.weight", None)
    language = {name.removeprefix("model."): value for name, value in tensors.items()}
    model.model.language_model.load_state_dict(language, strict=True)
    if config.tied:
        assert head is None
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    else:
        model.lm_head.load_state_dict({"weight": head}, strict=True)


def batch():
    """Rows of text and images, so that the three axes of positions differ, with right padding."""
    cfg = tiny.config(side=3)
    rows, _ = tiny.pack(
        cfg,
        [
            [tiny.document(cfg, parts, i)]
            for i, parts in enumerate([[4, "image", 3, "image", 2], [7, "image", 1], [5]])
        ],
    )
    assert (rows.positions[0] != rows.positions[1]).any()
    assert (rows.positions[1] != rows.positions[2]).any()
    return rows


@tiny.jit
def ours_of(model, rows, spec):
    e = model.embed(rows.tokens, model.embedding[...].dtype)
    y, _ = model.decode(e, rows.positions, spec)
    return y, model.logits(y)


def theirs_of(model, rows, exists):
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(np.array(rows.tokens, np.int64)),
            position_ids=torch.from_numpy(np.array(rows.positions, np.int64)),
            attention_mask=torch.from_numpy(exists.astype(np.int64)),
            output_hidden_states=True,
            use_cache=False,
        )
    return out.hidden_states[-1].numpy(), out.logits.numpy()


def compare(config, dtype, tolerance, prepare=lambda model: None):
    rows = batch()
    exists = np.asarray(rows.kinds) != Kind.PAD
    ours = tiny.randomised(lambda: Qwen25VL(config, rngs=nnx.Rngs(0)), dtype=dtype)
    model = reference(config, torch.float64 if dtype == np.float64 else torch.float32)
    load(model, config, ours)
    prepare(model)
    y, logits = theirs_of(model, rows, exists)
    assert y.dtype == logits.dtype == dtype
    for spec in (
        AttentionSpec(segments=rows.segments),
        AttentionSpec(lengths=jnp.asarray(exists.sum(1), jnp.int32)),
    ):
        for name, a, b in zip(("y", "logits"), ours_of(ours, rows, spec), (y, logits), strict=True):
            assert a.dtype == dtype
            assert np.abs(b[exists]).max() > 0.5, name
            worst = np.abs(np.asarray(a)[exists] - b[exists]).max()
            assert worst <= tolerance * np.abs(b[exists]).max(), (name, worst)


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_language_model_as_shipped(ratio, tied):
    compare(config_of(*RATIOS[ratio], tied), np.float32, 1e-5)


@pytest.fixture
def lifted(monkeypatch):
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
        rotary = model.model.language_model.rotary_emb
        steps = torch.arange(8, dtype=torch.float64) / 8
        theta = rotary.config.rope_parameters["rope_theta"]
        exact = float(theta) ** -steps
        assert torch.allclose(exact, rotary.inv_freq.double(), rtol=1e-6, atol=0)
        rotary.inv_freq = exact

    return prepare


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_language_model_in_float64(x64, lifted, ratio, tied):
    compare(config_of(*RATIOS[ratio], tied), np.float64, 1e-10, lifted)


def test_the_lifted_casts_matter(x64):
    """With the casts as shipped, float64 parity fails: the test above measures what it says."""
    with pytest.raises(AssertionError):
        compare(config_of(*RATIOS["4"], False), np.float64, 1e-10)
