"""Our Qwen2.5-VL language model against that of `transformers`, with random weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import qwen_reference as qwen  # noqa: E402
from qwen_reference import lifted  # noqa: E402, F401

from starflow2_jax.models.pretzel import Kind  # noqa: E402
from starflow2_jax.nn.attention import AttentionSpec  # noqa: E402

pytestmark = pytest.mark.parity

# (heads, kv heads): each kv head serves 1, 4, 7 query heads.
RATIOS = {"1": (2, 2), "4": (8, 2), "7": (7, 1)}


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
    ours, model = qwen.pair(config, dtype)
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
    compare(qwen.config_of(*RATIOS[ratio], tied), np.float32, 1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_language_model_in_float64(x64, lifted, ratio, tied):  # noqa: F811
    compare(qwen.config_of(*RATIOS[ratio], tied), np.float64, 1e-10, lifted)


def test_the_lifted_casts_matter(x64):
    """With the casts as shipped, float64 parity fails: the test above measures what it says."""
    with pytest.raises(AssertionError):
        compare(qwen.config_of(*RATIOS["4"], False), np.float64, 1e-10)
