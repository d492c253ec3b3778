"""Released checkpoints in and out: bit for bit, or one clear error and nothing on disk."""

import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from flax import nnx
from golden_files import recognise
from safetensors import safe_open
from safetensors.numpy import save_file

from starflow2_jax import Sampling, Turn, flow_bundle, load
from starflow2_jax.bundle import save_bundle
from starflow2_jax.cli.main import main
from starflow2_jax.convert import release, starflow2_folder, stored, table
from starflow2_jax.convert import starflow as convert
from starflow2_jax.errors import UserError
from starflow2_jax.models import starflow
from starflow2_jax.training.checkpoint import checksum, load_tree, save_tree
from starflow2_jax.training.piecewise import Pieces, chunk_shape, open_array


def golden(name):
    """Kind, tensors with buffers, and arguments of one of this repository's golden files."""
    path = pathlib.Path(__file__).parent / "golden" / f"{name}.npz"
    data = np.load(path)
    tensors = {k[2:]: data[k] for k in data.files if k.startswith("w/")}
    return recognise(path), tensors, json.loads(str(data["config_json"]))


@pytest.fixture
def source(tmp_path):
    """Tiny STARFlow: kind, tensors with buffers, config, path of the arguments."""
    kind, tensors, arguments = golden("starflow_t2i")
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps(arguments))
    return tensors, convert.starflow_config(arguments), path


def save_torch(path, tensors):
    torch.save({name: torch.from_numpy(a.copy()) for name, a in tensors.items()}, path)


def read_back(path):
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def without_buffers(tensors):
    return {
        name: a
        for name, a in tensors.items()
        if name != "var" and not name.endswith("attn_mask") and not name.startswith("feat_rope")
    }


@pytest.fixture(params=[None, 1000])
def pieces(request, monkeypatch):
    """Arrays stored in one piece, as tiny ones are, and in many."""
    if request.param:
        monkeypatch.setattr(stored, "_CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("name", ["starflow_t2i", "tarflow_cond"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_there_and_back_is_bit_exact(tmp_path, capsys, name, suffix):
    kind, tensors, arguments = golden(name)
    checkpoint, model, back = (tmp_path / n for n in (f"in{suffix}", "model", "out.safetensors"))
    (save_torch if suffix == ".pth" else lambda p, t: save_file(t, p))(checkpoint, tensors)
    (tmp_path / "a.json").write_text(json.dumps(arguments))
    options = ["--config-json", str(tmp_path / "a.json")]
    assert main(["convert", kind, str(checkpoint), "--out", str(model), *options]) == 0
    said = capsys.readouterr().out
    assert "research purposes only" in said
    assert "blocks.0.attn_mask" in said and "var" in said
    assert main(["convert", kind, str(model), "--out", str(back)]) == 0
    kept, returned = without_buffers(tensors), read_back(back)
    assert set(kept) == set(returned)
    for key, a in kept.items():
        assert a.dtype == returned[key].dtype
        np.testing.assert_array_equal(a, returned[key], key)
    loaded = flow_bundle.load_image_flow(model)
    expected = convert.from_tensors(loaded.config, tensors)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(expected))
    assert sorted(p.name for p in model.iterdir()) == ["model.json", "weights"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_narrow_types_stay_and_load_wide(tmp_path, source):
    tensors, config, _ = source
    narrow = {n: a.astype(ml_dtypes.bfloat16) for n, a in without_buffers(tensors).items()}
    torch.save(
        {n: torch.from_numpy(a.astype(np.float32)).bfloat16() for n, a in narrow.items()},
        tmp_path / "in.pth",
    )
    assert release.import_checkpoint(config, tmp_path / "in.pth", tmp_path / "model") == []
    release.export_checkpoint(tmp_path / "model", tmp_path / "out.safetensors")
    returned = read_back(tmp_path / "out.safetensors")
    for name, a in narrow.items():
        assert returned[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(a.view(np.int16), returned[name].view(np.int16))
    state = nnx.state(flow_bundle.load_image_flow(tmp_path / "model"))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype(np.float32)}


def test_a_saved_model_loads_and_exports(tmp_path, source):
    tensors, config, _ = source
    model = convert.from_tensors(config, tensors)
    flow_bundle.save_image_flow(tmp_path / "model", model)
    loaded = flow_bundle.load_image_flow(tmp_path / "model")
    assert loaded.config == config
    release.export_checkpoint(tmp_path / "model", tmp_path / "out.safetensors")
    returned = read_back(tmp_path / "out.safetensors")
    for name, a in without_buffers(tensors).items():
        np.testing.assert_array_equal(a, returned[name])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_all_that_does_not_fit_is_one_error(tmp_path, capsys, source, suffix):
    tensors, _, arguments = source
    tensors = dict(tensors)
    tensors["blocks.0.proj_inn.weight"] = tensors.pop("blocks.0.proj_in.weight")
    del tensors["blocks.1.sos_embed"]
    tensors["blocks.2.proj_out.bias"] = tensors["blocks.2.proj_out.bias"][:-1]
    tensors["blocks.3.proj_out.bias"] = np.arange(8)
    checkpoint = tmp_path / f"in{suffix}"
    (save_torch if suffix == ".pth" else lambda p, t: save_file(t, p))(checkpoint, tensors)
    before = sorted(tmp_path.iterdir())
    command = ["convert", "starflow", str(checkpoint), "--out", str(tmp_path / "model")]
    assert main([*command, "--config-json", str(arguments)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in (
        "missing: blocks.0.proj_in.weight",
        "unknown: blocks.0.proj_inn.weight",
        "missing: blocks.1.sos_embed",
        "wrong shape: blocks.2.proj_out.bias is (7,), expected (8,)",
        "not of floats: blocks.3.proj_out.bias",
        str(checkpoint),
    ):
        assert part in said, part
    assert "attn_mask" not in said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, capsys, source, suffix, kept):
    tensors, _, arguments = source
    checkpoint = tmp_path / f"in{suffix}"
    (save_torch if suffix == ".pth" else lambda p, t: save_file(t, p))(checkpoint, tensors)
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(kept * len(whole))])
    before = sorted(tmp_path.iterdir())
    command = ["convert", "starflow", str(checkpoint), "--out", str(tmp_path / "model")]
    assert main([*command, "--config-json", str(arguments)]) == 2
    said = capsys.readouterr().err
    assert f"{checkpoint} is truncated or damaged" in said and said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


class NotATensor:
    pass


def test_other_bad_input(tmp_path, source):
    tensors, config, arguments = source
    path, out = tmp_path / "in.pth", tmp_path / "model"
    with pytest.raises(UserError, match="no file"):
        release.import_checkpoint(config, path, out)
    torch.save({"a": NotATensor()}, path)
    with pytest.raises(UserError, match="more than tensors"):
        release.import_checkpoint(config, path, out)
    torch.save({"a": {"b": torch.ones(1)}}, path)
    with pytest.raises(UserError, match="no flat state dict"):
        release.import_checkpoint(config, path, out)
    out.mkdir()
    with pytest.raises(UserError, match="already exists"):
        release.import_checkpoint(config, path, out)
    with pytest.raises(UserError, match=r"no model\.json"):
        release.export_checkpoint(out, tmp_path / "a.safetensors")
    assert list(out.iterdir()) == []
    given = json.loads(arguments.read_text())
    with pytest.raises(UserError, match="did you mean txt_size"):
        convert.starflow_config({**given, "txt_sise": 1})
    with pytest.raises(UserError, match="needs the argument channels"):
        convert.tarflow_config({"in_channels": 3, "img_size": 8, "patch_size": 2})
    for depths in (0, [0] + [1] * (given["num_blocks"] - 1)):
        with pytest.raises(UserError, match="layers_per_block says 0"):
            convert.starflow_config({**given, "layers_per_block": depths})
    needed = {"in_channels": 3, "img_size": 8, "patch_size": 2, "channels": 64, "num_blocks": 2}
    with pytest.raises(UserError, match="layers_per_block says 0"):
        convert.tarflow_config({**needed, "layers_per_block": 0})


def test_large_stacks_are_stored_layer_by_layer(tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        "stack": rng.normal(size=(3, 300, 700)),  # over 1 MiB a layer
        "wide": rng.normal(size=(5003, 30)),
        "small": rng.normal(size=(7,)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3.0),
    }

    def pieces(a):
        chunk = chunk_shape(a.shape, a.itemsize, 200_000)
        return Pieces(a.shape, a.dtype, chunk, lambda i, j: a[i:j] if a.ndim else a)

    save_tree(tmp_path / "tree", {name: pieces(a) for name, a in tree.items()}, {})
    store = open_array(tmp_path / "tree", ("stack",))
    assert store.chunk_layout.read_chunk.shape == (1, 35, 700)
    np.testing.assert_array_equal(store[1].read().result(), tree["stack"][1])
    loaded, _ = load_tree(tmp_path / "tree")
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    assert loaded["small"].dtype == ml_dtypes.bfloat16


def test_pieces_do_not_cross_the_cuts_of_their_readers():
    assert chunk_shape((28, 3584, 1024), 2, 2**40) == (28, 3584, 1024)
    assert chunk_shape((28, 3584, 1024), 2, 2**20, (1, 8, 2)) == (2, 448, 512)
    assert chunk_shape((28, 3584, 1024), 2, 10**5, (1, 8, 2)) == (1, 64, 512)
    assert chunk_shape((5003, 30), 2, 6000, (1, 1)) == (100, 30)
    assert chunk_shape((), 4, 1) == ()


def test_damaged_weights_are_named(tmp_path, source):
    tensors, config, _ = source
    save_torch(tmp_path / "in.pth", tensors)
    release.import_checkpoint(config, tmp_path / "in.pth", tmp_path / "model")
    weights = tmp_path / "model" / "weights"
    largest = max((p for p in weights.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(UserError, match=str(weights)):
        release.export_checkpoint(tmp_path / "model", tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["arguments.json", "in.pth", "model"]


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch, source):
    tensors, config, _ = source
    save_torch(tmp_path / "in.pth", tensors)

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(stored, "save_tree", fails)
    with pytest.raises(UserError, match="disk full"):
        release.import_checkpoint(config, tmp_path / "in.pth", tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["arguments.json", "in.pth"]


def test_the_prior_variance_of_a_volume_preserving_flow_is_no_buffer(tmp_path):
    config = starflow.TarFlowConfig(3, 8, 2, 32, 2, 1, scale="none", head_dim=16)
    make = lambda: starflow.ImageFlow(config, rngs=nnx.Rngs(0))
    model = tiny.randomised(make)
    params = convert.by_path(nnx.state(model))
    tensors = convert.to_tensors(config, params)
    assert tensors["var"].shape == (16, 12)
    assert tensors["blocks.1.proj_out.weight"].shape == (12, 32)
    assert convert.unused(config, ["var", "blocks.0.attn_mask"]) == ["blocks.0.attn_mask"]
    again = convert.from_tensors(config, tensors)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(again))


def count(config):
    make = lambda: starflow.ImageFlow(config, rngs=nnx.Rngs(0))
    return sum(int(np.prod(s)) for s in table.shapes_of(make).values())


def test_published_parameter_counts():
    config = starflow.starflow_3b_t2i_256()
    assert count(config) == 3_858_281_544
    blocks = [0] * 6
    make = lambda: starflow.ImageFlow(config, rngs=nnx.Rngs(0))
    shapes = table.shapes_of(make)
    for path, shape in shapes.items():
        blocks[int(path.split(".")[1])] += int(np.prod(shape))
    assert blocks == [226_615_308] * 5 + [2_725_205_004]
    # 455 entries, less the buffers: var, two of feat_rope, a mask for each block.
    assert len(table.source_shapes(convert.table(config), shapes)) == 455 - 3 - 6
    assert round(count(starflow.starflow_xlv2_imagenet256()) / 1e9, 1) == 1.4


@pytest.mark.parametrize(
    "make",
    [
        starflow.tarflow_imagenet64,
        starflow.tarflow_imagenet64_classes,
        starflow.tarflow_imagenet128_classes,
        starflow.tarflow_afhq256,
        starflow.tarflow_mnist,
    ],
)
def test_tarflow_sizes(make):
    c = make()
    d, t, k = c.width, c.side**2, c.channels * c.patch**2
    layer = 12 * d * d + 13 * d  # qkv, proj, two of the MLP, with biases; two norms
    block = c.depth * layer + (k + 1) * d + (d + 1) * 2 * k + (t + c.classes) * d
    assert count(c) == c.count * block


@pytest.mark.parametrize(
    ("make", "width", "depth"),
    [
        (starflow.starflow_xl_imagenet256, 2048, 28),
        (starflow.starflow_xlv2_imagenet256, 2048, 28),
        (starflow.starflow_xxl_imagenet256, 3072, 34),
        (starflow.starflow_xxlv2_imagenet256, 3072, 34),
    ],
)
def test_starflow_sizes(make, width, depth):
    layer = 12 * width * width + 13 * width
    block = 4 + 5 * width + (width + 1) * 8 + width
    assert count(make()) == depth * layer + 6 * block + 1002 * width


# STARFlow2 itself


def files_of(folder):
    """Every file but the weights' (in which Orbax writes times), by its place."""
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in found.items() if "weights/" not in name}


def weights_of(folder):
    found = sorted(p.relative_to(folder) for p in folder.rglob("weights"))
    return {str(name): load_tree(folder / name)[0] for name in found}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A tiny model's directory, whose VLM is in bfloat16."""
    folder = tmp_path_factory.mktemp("own") / "model"
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)
    whole = tiny.bundle(images, trained_with=5)
    state = nnx.to_pure_dict(nnx.state(whole.model.vlm))
    nnx.update(whole.model.vlm, jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), state))
    save_bundle(folder, whole)
    return folder


@pytest.fixture(scope="module")
def own_tensors(own):
    """The same as safetensors."""
    folder = own.parent / "tensors"
    assert main(["convert", "starflow2", str(own), "--out", str(folder)]) == 0
    return folder


@pytest.mark.usefixtures("pieces")
def test_starflow2_there_and_back_is_bit_exact(tmp_path, own, own_tensors):
    back = tmp_path / "back"
    assert main(["convert", "starflow2", str(own_tensors), "--out", str(back)]) == 0
    assert files_of(back) == files_of(own)
    ours, theirs = weights_of(back), weights_of(own)
    assert checksum(ours) == checksum(theirs)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ours)} == {"float32", "bfloat16", "int32"}
    # Outside this package, too: the VLM under its published names, in torch's layout.
    record = json.loads((own_tensors / "config.json").read_text())
    assert record["checksums"] == {"weights": checksum(theirs["weights"])}
    tensors = read_back(own_tensors / "model.safetensors")
    head = tensors["vlm.model.embed_tokens.weight"]
    np.testing.assert_array_equal(head, theirs["weights"]["model"]["vlm"]["embedding"])
    kernel = theirs["weights"]["model"]["adapter"]["up"]["kernel"]
    np.testing.assert_array_equal(tensors["adapter.0.weight"].T, kernel)
    prompts = [[Turn("user", ("three",))]]
    sampling = Sampling(temperature=1.0, max_new_tokens=4, seed=1)
    first, second = (load(folder).generate(prompts, sampling)[0] for folder in (own, back))
    assert first.text == second.text and len(first.images) == len(second.images)
    for a, b in zip(first.images, second.images, strict=True):
        np.testing.assert_array_equal(a, b)


def test_starflow2_has_a_card(own, own_tensors):
    card = (own_tensors / "README.md").read_text()
    leaves = jax.tree.leaves(weights_of(own))
    assert f"| all | | {sum(a.size for a in leaves):,} | |" in card
    assert "license: other  # to be filled in" in card and '"trained_with": 5' in card
    assert "| image | 4 x 4 x 1 |" in card and "| flow.width | 32 |" in card


def test_starflow2_in_several_files(tmp_path, own):
    starflow2_folder.export_folder(own, tmp_path / "tensors", most_bytes=20_000)
    index = json.loads((tmp_path / "tensors" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    starflow2_folder.import_folder(tmp_path / "tensors", tmp_path / "back")
    assert checksum(weights_of(tmp_path / "back")) == checksum(weights_of(own))


def changed_config(folder, **changes):
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | changes))


def other_bytes(folder):
    tensors = read_back(folder / "model.safetensors")
    tensors["adapter.0.weight"] = -tensors["adapter.0.weight"]
    save_file(tensors, folder / "model.safetensors")


def without_a_tensor(folder):
    tensors = read_back(folder / "model.safetensors")
    tensors["adapter.0.wait"] = tensors.pop("adapter.0.weight")
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "harm, messages",
    [
        (other_bytes, ["the tensors of weights have the checksum"]),
        (without_a_tensor, ["missing: adapter.0.weight", "unknown: adapter.0.wait"]),
        (lambda f: shutil.rmtree(f / "tokenizer"), ["has no tokenizer"]),
        (lambda f: (f / "config.json").unlink(), ["neither model.json", "nor config.json"]),
        (lambda f: (f / "config.json").write_text("{"), ["cannot read", "config.json"]),
        (lambda f: changed_config(f, model_type="llama"), ["model_type llama"]),
        (lambda f: changed_config(f, format_version=9), ["format version 9"]),
        (lambda f: changed_config(f, files={}), ["is not the description of a STARFlow2"]),
        (lambda f: (f / "model.safetensors").unlink(), ["holds no safetensors"]),
    ],
)
def test_starflow2_bad_input(tmp_path, capsys, own_tensors, harm, messages):
    source = tmp_path / "tensors"
    shutil.copytree(own_tensors, source)
    harm(source)
    assert main(["convert", "starflow2", str(source), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(message in said for message in messages), said
    assert [p.name for p in tmp_path.iterdir()] == ["tensors"]


def test_starflow2_of_another_model(tmp_path, capsys, source):
    tensors, config, _ = source
    flow_bundle.save_image_flow(tmp_path / "model", convert.from_tensors(config, tensors))
    command = ["convert", "starflow2", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "is not the directory of a STARFlow2 model" in capsys.readouterr().err


def test_a_folder_that_is_no_image_model_says_what_it_is(tmp_path):
    config = starflow.TarFlowConfig(1, 4, 2, 32, 2, 1, head_dim=16)
    flow_bundle.write_description(tmp_path, config, {"note": "kept"})
    record = json.loads((tmp_path / "model.json").read_text())
    assert list(record) == ["format_version", "family", "model", "note"]
    assert (record["format_version"], record["family"]) == (1, "tarflow")
    assert flow_bundle.is_image_flow(tmp_path)
    assert flow_bundle.read_description(tmp_path) == (config, record)
    for changes, message in (
        ({"format_version": 2, "model": {"of": "another age"}}, "format version 2"),
        ({"family": "fae"}, "of family fae, expected starflow or tarflow"),
        ({"model": {"depth": 3}}, "not the description of an image model"),
    ):
        (tmp_path / "model.json").write_text(json.dumps(record | changes))
        with pytest.raises(UserError, match=message):
            flow_bundle.read_description(tmp_path)
    del record["family"]
    (tmp_path / "model.json").write_text(json.dumps(record))
    assert not flow_bundle.is_image_flow(tmp_path)
    with pytest.raises(UserError, match="of family starflow2, expected starflow or tarflow"):
        flow_bundle.read_description(tmp_path)
