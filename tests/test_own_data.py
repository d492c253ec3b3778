"""From converted parts to a run, as a user does it: the config of 7B at a tiny shape."""

import dataclasses
import json
import pathlib
import shutil

import hf_folder
import jax
import numpy as np
import pytest
import source_files
from test_latents import SIZE, make_fae

from starflow2_jax import Sampling, Turn, load
from starflow2_jax.bundle import checksum
from starflow2_jax.cli.config import load_config
from starflow2_jax.cli.main import main
from starflow2_jax.data.latents import LatentSource
from starflow2_jax.errors import UserError
from starflow2_jax.fae_bundle import load_fae, load_latent_codec, read_fae, save_fae
from starflow2_jax.metrics import read_metrics
from starflow2_jax.models.fae_codec import FAECodec
from starflow2_jax.models.pretzel import starflow2_3_6b
from starflow2_jax.training.checkpoint import load_tree
from starflow2_jax.vlm_bundle import load_vlm, read_description, read_tokenizer

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SEVEN = str(CONFIGS / "starflow2_7b.py")
RECORDS = 12


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What the commands of docs/data.md make: vlm, fae, and two caches of latents."""
    base = tmp_path_factory.mktemp("parts")
    for name in ("hf", "captions", "talk"):
        (base / name).mkdir()
    hf_folder.write(base / "hf", hf_folder.hf_model(dtype=hf_folder.torch.bfloat16))
    assert main(["convert", "qwen2_5_vl", str(base / "hf"), "--out", str(base / "vlm")]) == 0
    fae = make_fae(0)
    fae.fae.latents.fill(np.array([0.5, -0.5, 0.1]), np.array([0.5, 2.0, 1.5]))
    save_fae(base / "fae", fae)
    source_files.write_tar(base / "captions" / "a.tar", range(RECORDS))
    source_files.make_conversations(base / "talk", RECORDS)
    for out, data, image, field in (
        ("drawn", "captions/*.tar", "png", "txt"),
        ("talked", "talk/*.jsonl", "image", "conversations"),
    ):
        argv = ["data", "latents", "--fae", str(base / "fae"), "--out", str(base / out)]
        argv += ["--data", str(base / data), "--image", image, "--keep", field]
        assert main([*argv, "--shard", "8", "--batch", "4"]) == 0
    return base


def train(workdir, parts, *more, config=SEVEN):
    given = ["--vlm", str(parts / "vlm"), "--fae", str(parts / "fae")]
    given += [f"--config.data.drawn={parts / 'drawn'}"]
    given += [f"--config.data.conversations={parts / 'talked'}"]
    return main(["train", "--config", config, "--workdir", str(workdir), *given, *more])


def tiny_run():
    options = {"data.held_out": 2, "log_every": 1, "checkpoint.every": 2}
    options |= {"flow.width": 32, "flow.head_dim": 16, "flow.deep_layers": 2}
    options |= {"flow.shallow_layers": "(1,1)"}
    options |= {"evaluation.every": 2, "evaluation.samples": 2, "evaluation.batches": 1}
    options |= {"evaluation.captions": "('a picture of number 3',)"}
    for stage in ("text_to_image", "image_to_text", "joint"):
        options |= {f"stages.{stage}.batch.{name}": 8 for name in ("rows", "lanes")}
        options |= {f"stages.{stage}.batch.length": 192, f"stages.{stage}.optimizer.steps": 2}
        options |= {f"stages.{stage}.optimizer.warmup": 1}
        options |= {f"stages.{stage}.optimizer.learning_rate": 1e-2}
    return [f"--config.{key}={value}" for key, value in options.items()]


@pytest.mark.slow
def test_a_run_from_converted_parts(parts, tmp_path):
    assert train(tmp_path, parts, *tiny_run()) == 0
    rows = read_metrics(tmp_path / "metrics.jsonl")
    losses = {(row["stage"], row["step"]): row["loss"] for row in rows if "loss" in row}
    assert np.isfinite(list(losses.values())).all()
    assert sorted(losses) == [
        (stage, step) for stage in ("image_to_text", "joint", "text_to_image") for step in (1, 2)
    ]
    held_out = {row["stage"]: row for row in rows if "held_out_loss" in row}
    assert len(held_out) == 3 and not (tmp_path / "skipped_records_0.log").exists()
    samples = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert samples == ["joint_000002.png", "text_to_image_000002.png"]
    record = json.loads((tmp_path / "model" / "model.json").read_text())
    assert record["frozen_checksum_before"] == record["frozen_checksum_after"]
    # The VLM in the run's model is the converted one, in its shape and to the bit; so is the FAE.
    vlm, about = read_description(parts / "vlm")
    weights = load_tree(tmp_path / "model" / "weights")[0]
    assert checksum(weights["model"]["vlm"]) == about["checksum"]
    assert (
        read_fae(tmp_path / "model" / "fae")[1]["checksum"]
        == (read_fae(parts / "fae")[1]["checksum"])
    )
    model = load(tmp_path)
    assert model.pretzel.config.vlm.vocab_size == vlm.vocab_size
    assert (model.pretzel.config.flow.channels, model.pretzel.config.flow.side) == (3, 2)
    assert (model.bundle.codec.noise_std, model.bundle.image.moments) == (0.3, 0)
    prompt = [Turn("user", (source_files.caption(3),))]
    [reply] = model.generate([prompt], Sampling(max_images=1, max_new_tokens=1), draw=True)
    [image] = reply.images
    assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
    [scores] = model.log_prob([[*prompt, Turn("assistant", (image,))]])
    assert np.isfinite(scores.images).all()


def test_what_is_planned_is_the_papers_model():
    config, module = load_config(SEVEN)
    found = module.make_task(config, None).model_config
    without_remat = lambda part: dataclasses.replace(part, remat="none")
    paper = starflow2_3_6b()
    assert without_remat(found.flow) == without_remat(paper.flow)
    assert without_remat(found.vlm) == without_remat(paper.vlm)
    assert (found.special, found.dtype) == (paper.special, paper.dtype)


def test_what_is_not_given_is_named(parts, tmp_path, capsys):
    """Before anything large is made: this test would not have the memory."""
    for config in ("starflow2_7b.py", "starflow2_3b.py"):
        argv = ["train", "--config", str(CONFIGS / config), "--workdir", str(tmp_path / config)]
        assert main(argv) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        for flag in ("--vlm DIR", "--fae DIR", "--config.data.drawn=", "data.conversations="):
            assert flag in line
        assert not (tmp_path / config).exists()  # free for the command with its flags
    assert train(tmp_path / "a", parts, "--config.data.conversations=") == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "give --config.data.conversations=CACHE as well" in line and "drawn" not in line


@pytest.mark.parametrize(
    "option, message",
    [
        ("--config.data.caption=caption", "has no field 'caption' (kept are: txt)"),
        ("--config.data.held_out=12", "12 records, of which 12 are held out"),
        ("--config.data.held_out=0", "set held_out"),
        ("--config.stages.joint.mixture.drawn=-1", "weights of a mixture are positive"),
    ],
)
def test_data_that_no_run_can_have(parts, tmp_path, capsys, option, message):
    assert train(tmp_path / "run", parts, "--config.data.held_out=2", option) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_configs_that_take_no_vlm(parts, tmp_path, capsys):
    config = str(CONFIGS / "digits.py")
    for flag in ("--vlm", "--fae"):
        argv = ["train", "--config", config, "--workdir", str(tmp_path / "run"), flag, "DIR"]
        assert main(argv) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert f"{flag}: {config} takes none" in line
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model(parts, tmp_path):
    assert read_tokenizer(parts / "vlm").special == load_vlm(parts / "vlm").tokenizer.special
    folder = tmp_path / "vlm"
    shutil.copytree(parts / "vlm", folder)
    path = folder / "hf" / "config.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"vision_start_token_id": 1}))
    with pytest.raises(UserError, match=r"<\|vision_start\|> has the id \d+, .*_token_id 1:"):
        read_tokenizer(folder)
    del record["vision_start_token_id"]  # as published
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="151652"):
        read_tokenizer(folder)
    path = folder / "model.json"
    record = json.loads(path.read_text())
    record["model"]["vocab_size"] = 100
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="263 ids, the model 100"):
        read_tokenizer(folder)


@pytest.mark.parametrize("reading", [False, True])
def test_latents_without_the_fae_are_those_with_it(parts, reading):
    source = LatentSource(parts / "drawn", read_fae(parts / "fae")[1]["checksum"])
    moments = np.stack([source.moments(index) for index in range(RECORDS)])
    seeds = np.arange(RECORDS, dtype=np.uint32)
    whole = FAECodec(load_fae(parts / "fae"), (SIZE, SIZE, 3), 0.3)
    alone = load_latent_codec(parts / "fae", 0.3)
    assert alone.shape == moments.shape[1:]
    draw = jax.jit(lambda codec: codec.latents(moments, 7, seeds, 0.1, reading))
    found = np.asarray(draw(alone))
    np.testing.assert_array_equal(found, np.asarray(draw(whole)))
    # By hand, in the places where nothing is random: the means of many draws of the noise.
    many = jax.vmap(lambda seed: alone.latents(moments[:1], seed, seeds[:1], 0.0, True))
    mean = np.asarray(jax.jit(many)(np.arange(4000))).mean(0)
    wanted = (moments[:1, :, :3].astype(np.float32) - [0.5, -0.5, 0.1]) / [0.5, 2.0, 1.5]
    np.testing.assert_allclose(mean, wanted, atol=5 * 0.3 / np.sqrt(4000))
