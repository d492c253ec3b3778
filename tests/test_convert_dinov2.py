"""`starflow2 convert dinov2`: every form of the weights gives the same model."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import save_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from starflow2_jax import fae_bundle  # noqa: E402
from starflow2_jax.cli.main import main  # noqa: E402
from starflow2_jax.convert import dinov2 as convert  # noqa: E402
from starflow2_jax.models.dinov2 import dinov2_giant, swiglu_width  # noqa: E402


def theirs(swiglu=True, registers=False, width=64):
    """A model of `transformers`, all of its numbers random."""
    fields = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 64,
        "use_swiglu_ffn": swiglu,
        "patch_size": 14,
        "image_size": 56,
    }
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    made = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, f"{kind}Model")(made).eval()
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        value.data = 0.2 * torch.randn(value.shape, generator=generator)
    return model


def new_names(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def old_names(model):
    """The names of published files, and of `transformers` before 5."""
    found = {}
    for name, value in new_names(model).items():
        for new, old in (("q", "query"), ("k", "key"), ("v", "value")):
            name = name.replace(f"attention.{new}_proj", f"attention.attention.{old}")
        name = name.replace("attention.o_proj", "attention.output.dense")
        found[name.replace("mlp.down_proj", "mlp.weights_out")] = value
    for name in [name for name in found if ".mlp.gate_proj." in name]:
        parts = [found.pop(name), found.pop(name.replace("gate_proj", "up_proj"))]
        found[name.replace("gate_proj", "weights_in")] = np.concatenate(parts)
    if not any("down" in name or "fc2" in name for name in found):
        return found
    return {
        n.replace("mlp.weights_out", "mlp.fc2") if "fc1" in n else n: v for n, v in found.items()
    }


def original_names(model):
    """Those of the original release."""
    new, found = new_names(model), {}
    for name, value in new.items():
        if "k_proj" in name or "v_proj" in name or "up_proj" in name:
            continue
        if "q_proj" in name:
            value = np.concatenate([new[name.replace("q_proj", f"{p}_proj")] for p in "qkv"])
        if "gate_proj" in name:
            value = np.concatenate([value, new[name.replace("gate_proj", "up_proj")]])
        for a, b in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.", ""),
            ("layernorm.", "norm."),
            ("encoder.layer.", "blocks."),
            ("attention.q_proj", "attn.qkv"),
            ("attention.o_proj", "attn.proj"),
            ("mlp.gate_proj", "mlp.w12"),
            ("mlp.down_proj", "mlp.w3"),
        ):
            name = name.replace(a, b)
        found[re.sub(r"layer_scale(\d)\.lambda1", r"ls\1.gamma", name)] = value
    return found


def write_hf(folder, model, tensors):
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file(
        {n: np.ascontiguousarray(v) for n, v in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def converted(source, out, *more):
    assert main(["convert", "dinov2", str(source), "--out", str(out), *more]) == 0
    return fae_bundle.load_vit(out)


def flat(model):
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))


@pytest.mark.slow
@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("swiglu", [False, True], ids=["gelu", "swiglu"])
def test_all_names_give_the_same_model(tmp_path, swiglu, registers):
    model = theirs(swiglu, registers)
    folders = {}
    for form, names in (("new", new_names), ("old", old_names)):
        source = write_hf(tmp_path / form, model, names(model))
        folders[form] = converted(source, tmp_path / f"{form}_out")
    path = tmp_path / "original.pth"
    torch.save({n: torch.from_numpy(np.array(v)) for n, v in original_names(model).items()}, path)
    folders["original"] = converted(path, tmp_path / "original_out")
    # Files that `transformers` itself writes.
    model.save_pretrained(tmp_path / "saved")
    folders["saved"] = converted(tmp_path / "saved", tmp_path / "saved_out")
    for other in folders.values():
        for a, b in zip(flat(folders["new"]), flat(other), strict=True):
            np.testing.assert_array_equal(a, b)
    rules = {form: made.config.interpolation for form, made in folders.items()}
    plain = "antialias" if registers else "size"
    assert rules == {
        "new": plain,
        "old": plain,
        "saved": plain,
        "original": "antialias" if registers else "offset",
    }
    # And it is their model.
    images = np.random.default_rng(0).normal(size=(1, 42, 42, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        hidden = model(pixels).last_hidden_state.numpy()
    tokens = jax.jit(lambda model, images: model(images))(folders["new"], jnp.asarray(images))
    tiny.close(tokens.patches, hidden[:, 5 if registers else 1 :], 1e-5)


def test_classifier_is_passed_over(tmp_path, capsys):
    model = theirs()
    tensors = {f"dinov2.{n}": v for n, v in old_names(model).items()}
    tensors["classifier.weight"] = np.zeros((2, 128), np.float32)
    source = write_hf(tmp_path / "source", model, tensors)
    converted(source, tmp_path / "out", "--interpolation", "antialias")
    assert "passed over, not used by the model: classifier.weight" in capsys.readouterr().out
    record = fae_bundle.read_vit(tmp_path / "out")[1]
    assert record["ignored"] == ["classifier.weight"]
    assert record["model"]["interpolation"] == "antialias"


def failing(source, tmp_path, capsys):
    assert main(["convert", "dinov2", str(source), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


def test_another_width(tmp_path, capsys):
    model = theirs()
    source = write_hf(tmp_path / "source", model, old_names(model))
    record = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(record | {"hidden_size": 128}))
    message = failing(source, tmp_path, capsys)
    assert "does not fit its description" in message
    assert "wrong shape: embeddings.cls_token is (1, 1, 64), expected (1, 1, 128)" in message


def test_missing_and_unknown_tensors(tmp_path, capsys):
    model = theirs()
    tensors = old_names(model)
    del tensors["encoder.layer.1.mlp.weights_in.bias"]
    tensors["encoder.extra"] = np.zeros(3, np.float32)
    message = failing(write_hf(tmp_path / "source", model, tensors), tmp_path, capsys)
    assert "missing: encoder.layer.1.mlp.gate_proj.bias" in message
    assert "missing: encoder.layer.1.mlp.up_proj.bias" in message
    assert "unknown: encoder.extra" in message


def test_missing_files(tmp_path, capsys):
    assert "there is no file" in failing(tmp_path / "nothing.pth", tmp_path, capsys)
    source = write_hf(tmp_path / "source", theirs(), new_names(theirs()))
    (source / "config.json").unlink()
    assert "cannot read" in failing(source, tmp_path, capsys)
    (source / "config.json").write_text('{"model_type": "vit"}')
    message = failing(source, tmp_path, capsys)
    assert "model_type is 'vit', expected dinov2" in message
    (source / "model.safetensors").unlink()
    assert "holds no safetensors files" in failing(source, tmp_path, capsys)


def test_shapes_of_the_published_configs():
    published = {
        "model_type": "dinov2",
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "mlp_ratio": 4,
        "use_swiglu_ffn": True,
        "patch_size": 14,
        "image_size": 518,
    }
    assert convert.from_hf(published) == dinov2_giant()
    assert convert.from_hf(published | {"model_type": "dinov2_with_registers"}) == dinov2_giant(
        True
    )
    assert swiglu_width(6144) == 4096
