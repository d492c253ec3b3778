"""Model directories from checkpoints of a run."""

import json
import os
import pathlib
import shutil

import jax
import ml_collections
import numpy as np
import pytest

from starflow2_jax import load
from starflow2_jax.cli.main import main
from starflow2_jax.errors import UserError
from starflow2_jax.training.checkpoint import Checkpoints, checksum, load_tree

# The second stage trains the adapter alone: the flow is what the first one hands on.
CONFIG = """
import resume_config
from resume_config import make_task


def get_config():
    config = resume_config.get_config()
    config.stages.image_to_text = config.stages.joint
    config.stages.image_to_text.mixture = dict(read=1.0)
    del config.stages["joint"]
    config.checkpoint.keep_last = 3
    config.evaluation.every = 2
    return config
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "run_config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    assert main(["train", "--config", str(config), "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture
def running(finished, tmp_path):
    """A run whose last stage stands at step 4 and saves step 6; and the folder of its steps."""
    workdir = tmp_path / "running"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "model")
    steps = workdir / "image_to_text" / "checkpoints"
    (steps / "6").rename(steps / "6.orbax-checkpoint-tmp")
    return workdir, steps


def content(folder):
    """Every file's bytes, and when files and folders were changed."""
    return {
        path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


def export(config, workdir, out, *options):
    """Runs the command, which leaves the work directory as it is."""
    before = content(workdir)
    arguments = ["export", "--config", config, "--workdir", workdir, "--out", out, *options]
    code = main(list(map(str, arguments)))
    assert content(workdir) == before
    return code


def weights(folder):
    return load_tree(folder / "weights")[0]


def description(folder):
    return json.loads((folder / "model.json").read_text())


def stored(steps, step, entry):
    """An entry of a checkpoint's state, as a model directory has it."""
    with Checkpoints(steps, read_only=True) as checkpoints:
        tree = checkpoints.restore_weights_only(step, entry)[0][entry]
    return jax.tree.map(lambda leaf: leaf["value"], tree, is_leaf=lambda node: "value" in node)


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_last_step_is_the_run_s_model(config, finished, tmp_path, capsys):
    out = tmp_path / "models" / "last"
    assert export(config, finished, out) == 0
    assert f"wrote {out}: stage image_to_text, step 6" in capsys.readouterr().out
    model = finished / "model"
    assert checksum(weights(out)) == checksum(weights(model))
    about = description(out)
    assert (about.pop("stage"), about.pop("step")) == ("image_to_text", 6)
    assert about == description(model)
    assert about["frozen_checksum_before"] == about["frozen_checksum_after"] != ""
    files = lambda folder: sorted(path.relative_to(folder) for path in folder.glob("*"))
    assert files(out) == files(model)
    tokenizers = ((folder / "tokenizer").rglob("*") for folder in (out, model))
    for ours, theirs in zip(*map(sorted, tokenizers), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_that_still_trains(config, finished, running, tmp_path):
    workdir, steps = running
    out = tmp_path / "out"
    # On another mesh.
    mesh = ("--config.mesh.data=8", "--config.mesh.fsdp=1", "--config.mesh.tensor=1")
    assert export(config, workdir, out, *mesh) == 0
    assert (description(out)["stage"], description(out)["step"]) == ("image_to_text", 4)
    ours, theirs = weights(out)["model"], weights(finished / "model")["model"]
    ema = stored(steps, 4, "ema")
    assert list(ema) == ["adapter"]
    assert_same(ours["adapter"], ema["adapter"])
    assert checksum(ours["adapter"]) != checksum(theirs["adapter"])
    # What the first stage trained goes on without its average.
    steps = workdir / "text_to_image" / "checkpoints"
    first = stored(steps, 4, "trainable")
    assert_same({name: ours[name] for name in first}, first)
    assert checksum(first) != checksum(stored(steps, 4, "ema"))
    assert_same({**theirs, "adapter": None}, {**ours, "adapter": None})
    assert load(out).bundle.metadata["seed"] == 3


def test_a_stage_and_a_step(config, finished, tmp_path):
    out = tmp_path / "out"
    assert export(config, finished, out, "--stage", "text_to_image", "--step", "2") == 0
    ours, ema = weights(out)["model"], stored(finished / "text_to_image" / "checkpoints", 2, "ema")
    assert_same({name: ours[name] for name in ema}, ema)
    assert (description(out)["stage"], description(out)["step"]) == ("text_to_image", 2)
    load(out)


def measured(steps, losses):
    """Gives the checkpoints other held-out losses."""
    for step, loss in losses.items():
        path = steps / str(step) / "metrics" / "metrics"
        path.write_text(json.dumps({} if loss is None else {"held_out_loss": loss}))


def test_the_best_step(config, running, tmp_path, capsys):
    workdir, steps = running
    measured(steps, {2: -9.0, 4: 1.0})
    assert export(config, workdir, tmp_path / "best", "--step", "best") == 0
    assert description(tmp_path / "best")["step"] == 2
    ema = stored(steps, 2, "ema")
    assert_same(weights(tmp_path / "best")["model"]["adapter"], ema["adapter"])
    load(tmp_path / "best")
    measured(steps, {2: None, 4: None})
    assert export(config, workdir, tmp_path / "none", "--step", "best") == 2
    assert "no checkpoint that knows its held-out loss" in capsys.readouterr().err


def test_a_step_that_the_training_deletes_meanwhile(config, running, tmp_path, monkeypatch):
    workdir, steps = running
    read = Checkpoints.restore_weights_only

    def later(self, step, *names, **options):
        if self.directory == steps and step == 4:  # the training goes on to step 6
            (steps / "6.orbax-checkpoint-tmp").rename(steps / "6")
            shutil.rmtree(steps / "4" / "state")
        return read(self, step, *names, **options)

    monkeypatch.setattr(Checkpoints, "restore_weights_only", later)
    out = tmp_path / "out"
    arguments = ["export", "--config", config, "--workdir", workdir, "--out", out]
    assert main(list(map(str, arguments))) == 0
    assert description(out)["step"] == 6


def no_record(workdir):
    (workdir / "config.json").unlink()


def not_begun(workdir):
    for stage in ("text_to_image", "image_to_text"):
        shutil.rmtree(workdir / stage)


def first_stage(workdir):
    shutil.rmtree(workdir / "image_to_text")


def not_finished(workdir):
    shutil.rmtree(workdir / "text_to_image" / "checkpoints" / "4")


def other_vlm(workdir):
    path = workdir / "image_to_text" / "checkpoints" / "4" / "metadata" / "metadata"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"frozen_checksum": "0" * 64}))


def damaged(workdir):
    shutil.rmtree(workdir / "image_to_text" / "checkpoints" / "4" / "state")


@pytest.mark.parametrize(
    "change, options, message",
    [
        (None, ["--stage=image_to_txt"], "no stage image_to_txt; did you mean image_to_text?"),
        (None, ["--step=3"], "has no checkpoint of step 3; it has of 2, 4"),
        (None, ["--config.seed=4"], "belongs to another config; differing keys: config.seed"),
        (None, ["--config.mesh.data=3"], "config.mesh: "),
        (None, ["--vlm=models/qwen"], "takes none; it has no entry config.vlm"),
        (no_record, [], "is not the work directory of a run"),
        (not_begun, [], "has no checkpoint yet"),
        (first_stage, ["--stage=image_to_text"], "of stage image_to_text yet, only of text_to_"),
        (not_finished, [], "stage text_to_image, from which image_to_text goes on, is not fin"),
        (other_vlm, [], "was trained on other frozen weights (checksum 000000000000"),
        (damaged, [], "cannot be read, its files are damaged or missing"),
    ],
)
def test_bad_input_is_one_line(config, running, tmp_path, capsys, change, options, message):
    workdir, _ = running
    if change is not None:
        change(workdir)
    assert export(config, workdir, tmp_path / "out", *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert list(tmp_path.iterdir()) == [workdir]


def test_a_place_that_is_taken(config, running, tmp_path, capsys):
    workdir, _ = running
    (tmp_path / "out").mkdir()
    assert export(config, workdir, tmp_path / "out") == 2
    assert "already exists" in capsys.readouterr().err
    assert export(config, workdir, workdir / "model") == 2
    assert "lies in the run's work directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export(config, workdir, tmp_path / "other", "--step", "last")
    assert "'last' is no number of a step" in capsys.readouterr().err


def test_half_a_model_is_none(config, running, tmp_path, monkeypatch):
    from starflow2_jax import bundle

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(bundle, "write_json", full)
    assert export(config, running[0], tmp_path / "out") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["running"]


def test_what_a_task_makes_does_not_go_into_the_work_directory(config, running, tmp_path):
    source = config.read_text() + (
        "\n\ndef make_task(config, workdir):\n"
        "    (workdir / 'made').write_text((workdir / 'config.json').read_text())\n"
        "    (workdir / 'samples').mkdir()\n"
        "    return resume_config.make_task(config, workdir)\n"
    )
    other = tmp_path / "other.py"
    other.write_text(source)
    assert export(other, running[0], tmp_path / "out") == 0


def test_links_to_folders_become_folders(tmp_path):
    from starflow2_jax.training.export import _mirror

    other, run = tmp_path / "other_disk", tmp_path / "run"
    other.mkdir()
    run.mkdir()
    (other / "manifest.json").write_text("{}")
    (run / "latents").symlink_to(other)
    (run / "latents" / "back").symlink_to(run)
    (run / "gone").symlink_to(other / "gone")
    _mirror(run, tmp_path / "copy", frozenset())
    assert (tmp_path / "copy" / "latents" / "manifest.json").read_text() == "{}"
    assert not (tmp_path / "copy" / "latents" / "back").exists()
    (tmp_path / "copy" / "latents" / "made").write_text("")
    (tmp_path / "copy" / "gone").write_text("")
    assert sorted(path.name for path in other.iterdir()) == ["back", "manifest.json"]


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_folders_that_are_gone_or_closed_are_passed_over(tmp_path, monkeypatch, error):
    from starflow2_jax.training.export import _mirror

    (tmp_path / "run" / "closed").mkdir(parents=True)
    (tmp_path / "run" / "file").write_text("")
    listing = os.scandir

    def scandir(folder):
        if pathlib.Path(folder).name == "closed":
            raise error(folder)
        return listing(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    _mirror(tmp_path / "run", tmp_path / "copy", frozenset())
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["closed", "file"]


def test_no_place_for_links_is_one_line(tmp_path, monkeypatch):
    from starflow2_jax.training import export as exports

    def symlink_to(*_):
        raise OSError("no space left")

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("")
    monkeypatch.setattr(exports, "check_workdir", lambda workdir, _: workdir)
    monkeypatch.setattr(exports, "_check_begun", lambda *_: None)
    monkeypatch.setattr(pathlib.Path, "symlink_to", symlink_to)
    config = ml_collections.ConfigDict({"mesh": {}, "stages": {}})
    with pytest.raises(UserError, match="cannot make links to the files of .*no space left"):
        exports.export(config, None, tmp_path / "run", tmp_path / "out")
