"""Qwen2.5-VL in and out: bit for bit, or one clear error and nothing on disk."""

import json
import os
import re
import signal
import subprocess
import sys

import hf_folder
import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from starflow2_jax.cli.main import main
from starflow2_jax.convert import stored
from starflow2_jax.convert.tensor_files import write_safetensors_folder
from starflow2_jax.errors import UserError
from starflow2_jax.parallel.mesh import MeshConfig, make_mesh
from starflow2_jax.training.checkpoint import checksum, load_tree
from starflow2_jax.training.piecewise import open_array
from starflow2_jax.vlm_bundle import load_vlm, read_description

INDEX = "model.safetensors.index.json"


def tensors_in(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def published_name(name):
    return re.sub(r"^model\.(visual\.)", r"\1", re.sub(r"^model\.language_model", "model", name))


def with_new_prefixes(folder):
    """The same weights under the names that `transformers` has in memory."""
    file = folder / "model.safetensors"
    renamed = {
        re.sub(
            r"^visual", "model.visual", re.sub(r"^model\.(?!vis|lang)", "model.language_model.", n)
        ): t
        for n, t in load_file(file).items()
    }
    assert any(name.startswith("model.language_model.") for name in renamed)
    save_file(renamed, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("dtype", "tied", "shards", "new_prefixes", "chunk"),
    [
        (torch.float32, False, None, False, None),
        (torch.bfloat16, True, "100KB", False, 1000),
        (torch.float16, False, None, True, None),
    ],
    ids=["one-file", "tied-indexed-bf16", "new-prefixes-fp16"],
)
def test_there_and_back(tmp_path, capsys, monkeypatch, dtype, tied, shards, new_prefixes, chunk):
    if chunk:
        monkeypatch.setattr(stored, "_CHUNK_BYTES", chunk)
    model = hf_folder.hf_model(tied, dtype)
    source = hf_folder.write(tmp_path / "hf", model, shards)
    assert (source / INDEX).is_file() == (shards is not None)
    if new_prefixes:
        with_new_prefixes(source)
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", "qwen2_5_vl", str(source), "--out", str(ours)]) == 0
    assert main(["convert", "qwen2_5_vl", str(ours), "--to", "hf", "--out", str(back)]) == 0
    assert "passed over" not in capsys.readouterr().out
    given, returned = tensors_in(source), tensors_in(back)
    assert {published_name(n) for n in given} == set(returned)
    for name, a in given.items():
        b = returned[published_name(name)]
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b), name
    loaded, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        back, output_loading_info=True, dtype=dtype
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for carried in ("config.json", "tokenizer.json", "chat_template.json"):
        assert (back / carried).read_bytes() == (source / carried).read_bytes()
    config, record = read_description(ours)
    assert config.tied == tied and config.vision.layers == 4
    stored_arrays, _ = load_tree(ours / "weights")
    assert record["checksum"] == checksum(stored_arrays)
    vlm = load_vlm(ours)
    assert vlm.model.embedding[...].dtype == np.dtype(str(dtype).removeprefix("torch."))
    assert record["checksum"] == checksum(nnx.to_pure_dict(nnx.state(vlm.model)))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(load_vlm(ours, "float32").model))} == {
        np.dtype("float32")
    }


@pytest.fixture
def source(tmp_path):
    return hf_folder.write(tmp_path / "hf", hf_folder.hf_model())


@pytest.mark.distributed
def test_pieces_of_a_mesh_and_loading_onto_it(tmp_path, capsys, source):
    assert len(jax.devices()) == 8
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    command = ["convert", "qwen2_5_vl", str(source), "--out"]
    assert main([*command, str(plain)]) == 0
    assert main([*command, str(cut), "--mesh", "fsdp=4,tensor=2"]) == 0
    _, a = read_description(plain)
    _, b = read_description(cut)
    assert a["checksum"] == b["checksum"]
    assert b["mesh"] == {"data": 1, "fsdp": 4, "columns": 1, "tensor": 2, "sequence": 1}
    gate = ("decoder", "layers", "mlp", "gate", "kernel")
    assert open_array(plain / "weights", gate).chunk_layout.read_chunk.shape == (2, 64, 96)
    assert open_array(cut / "weights", gate).chunk_layout.read_chunk.shape == (2, 16, 48)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    whole = load_vlm(plain).model
    for folder in (plain, cut):
        sharded = load_vlm(folder, mesh=mesh).model
        kernel = sharded.decoder.layers.mlp.gate.kernel[...]
        assert {s.data.shape for s in kernel.addressable_shards} == {(2, 16, 48)}
        jax.tree.map(np.testing.assert_array_equal, nnx.state(sharded), nnx.state(whole))
    assert main([*command, str(tmp_path / "x"), "--mesh", "fsdp=4,tensors=2"]) == 2
    assert "'tensors=2'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def refused(capsys, tmp_path, source):
    """The one line of a conversion that fails and writes nothing."""
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert main(["convert", "qwen2_5_vl", str(source), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert sorted(tmp_path.iterdir()) == before
    return said


def test_what_is_wrong_is_named(tmp_path, capsys, source):
    """One after another on one folder, each put right again."""
    file, config = source / "model.safetensors", source / "config.json"
    whole = file.read_bytes()
    for kept in (0, 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:kept])
        assert f"{file} is truncated or damaged" in refused(capsys, tmp_path, source)
    file.write_bytes(whole)

    given = config.read_text()
    config.write_text(json.dumps({**json.loads(given), "model_type": "llama"}))
    said = refused(capsys, tmp_path, source)
    assert str(config) in said and "'llama'" in said and "qwen2_5_vl" in said
    config.unlink()
    assert str(config) in refused(capsys, tmp_path, source)
    config.write_text(given)

    tensors = load_file(file)
    wrong = dict(tensors)
    wrong["model.norms.weight"] = wrong.pop("model.norm.weight")
    wrong["visual.merger.ln_q.weight"] = wrong["visual.merger.ln_q.weight"][:-1].clone()
    wrong["visual.merger.mlp.0.bias"] = torch.zeros(128, dtype=torch.int32)
    wrong["model.layers.1.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.float16)
    save_file(wrong, file, {"format": "pt"})
    said = refused(capsys, tmp_path, source)
    for part in (
        str(source),
        "missing: model.norm.weight",
        "unknown: model.norms.weight",
        "wrong shape: visual.merger.ln_q.weight is (31,), expected (32,)",
        "not of floats: visual.merger.mlp.0.bias",
        "of several types (float16, float32): model.layers.0.mlp.up_proj.weight",
    ):
        assert part in said, part
    file.unlink()
    assert "no safetensors" in refused(capsys, tmp_path, source)
    assert "there is no folder" in refused_config(capsys, tmp_path, config)


def refused_config(capsys, tmp_path, config):
    """A config of a folder that is gone."""
    from starflow2_jax.convert.tensor_files import open_folder

    with pytest.raises(UserError) as error:
        open_folder(config.parent / "gone")
    return str(error.value)


def test_several_files(tmp_path, capsys, source):
    """Missing files, with and without an index, and an index that names what is not there."""
    tensors = {n: t.numpy() for n, t in load_file(source / "model.safetensors").items()}
    (source / "model.safetensors").unlink()
    shapes = {n: a.shape for n, a in tensors.items()}
    types = {n: a.dtype for n, a in tensors.items()}
    write_safetensors_folder(source, shapes, types, tensors.items(), most_bytes=160_000)
    files = sorted(source.glob("*.safetensors"))
    assert len(files) > 2 and all(f.stat().st_size < 170_000 for f in files)
    index = json.loads((source / INDEX).read_text())
    for name, file in index["weight_map"].items():
        with safe_open(source / file, framework="np") as opened:
            assert name in opened.keys()

    record = {**index, "weight_map": {**index["weight_map"], "model.extra": files[0].name}}
    (source / INDEX).write_text(json.dumps(record))
    said = refused(capsys, tmp_path, source)
    assert "model.extra" in said and files[0].name in said
    (source / INDEX).write_text("{")
    assert str(source / INDEX) in refused(capsys, tmp_path, source)
    (source / INDEX).write_text(json.dumps(index))
    moved = files[1].rename(tmp_path / "elsewhere")
    assert f"missing file: {files[1].name}" in refused(capsys, tmp_path, source)
    (source / INDEX).unlink()
    assert f"missing file: {files[1].name}" in refused(capsys, tmp_path, source)
    moved.rename(files[1])
    command = ["convert", "qwen2_5_vl", str(source), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert main(command) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_head_beside_a_tied_embedding(tmp_path, capsys):
    source = hf_folder.write(tmp_path / "hf", hf_folder.hf_model(tied=True))
    file = source / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, file, {"format": "pt"})
    assert main(["convert", "qwen2_5_vl", str(source), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "lm_head.weight" in said and "inv_freq" in said
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, file, {"format": "pt"})
    again = ["convert", "qwen2_5_vl", str(source), "--out", str(tmp_path / "other")]
    assert main(again) == 2
    assert "unknown: lm_head.weight" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from starflow2_jax.convert import stored
from starflow2_jax import vlm_bundle
from starflow2_jax.cli.main import main

def die(*args): os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "described":
    vlm_bundle.write_description = die
else:
    real, count = stored.TreeDigest.add, [0]
    def add(self, part):
        real(self, part)
        count[0] += 1
        if count[0] == int(sys.argv[1]):
            die()
    stored.TreeDigest.add = add
main(["convert", "qwen2_5_vl", sys.argv[2], "--out", sys.argv[3]])
"""


@pytest.mark.parametrize("moment", ["7", "described"])
def test_a_killed_conversion_leaves_no_model(tmp_path, source, moment):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, moment, str(source), str(out)],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".out.partial", "hf"], left
    for folder in (out, tmp_path / ".out.partial"):
        with pytest.raises(UserError, match=r"no model\.json"):
            load_vlm(folder)
    assert main(["convert", "qwen2_5_vl", str(source), "--out", str(out)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]
    weights, _ = load_tree(out / "weights")
    assert read_description(out)[1]["checksum"] == checksum(weights)
