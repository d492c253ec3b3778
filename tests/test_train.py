"""The train command as a user runs it: stages, resuming, interruption, bad work directories."""

import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import types

import jax
import ml_collections
import numpy as np
import pytest
import resume_config
from flax import nnx
from test_export import content

from starflow2_jax import metrics
from starflow2_jax.cli.main import main
from starflow2_jax.errors import UserError
from starflow2_jax.metrics import read_metrics
from starflow2_jax.nn import partition
from starflow2_jax.parallel.mesh import make_mesh
from starflow2_jax.provenance import to_json
from starflow2_jax.training import loop
from starflow2_jax.training.checkpoint import checksum, load_tree
from starflow2_jax.training.config_file import step_config
from starflow2_jax.training.meter import TIMES
from starflow2_jax.training.step import init_state

HERE = pathlib.Path(__file__).parent
CONFIG = str(HERE / "resume_config.py")
CONFIGS = sorted((HERE.parent / "configs").glob("*.py"))
# Whose tasks make files, or another model, in the work directory.
OWN_FILES = ("emoji", "fae_emoji", "tarflow_digits")

pytestmark = pytest.mark.slow


def train(workdir, before="", **options):
    """Runs the command in a process of its own, after the statements `before`."""
    code = textwrap.dedent(before) + textwrap.dedent(
        f"""
        import sys
        from starflow2_jax.cli.main import main
        sys.exit(main(["train", "--config", {CONFIG!r}, "--workdir", {str(workdir)!r}]))
        """
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, **options
    )


def losses(workdir):
    """Everything in metrics.jsonl that is not a time or a rate."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", *TIMES)}
        for row in read_metrics(workdir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    done = train(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def assert_same_run(workdir, uninterrupted):
    assert losses(workdir) == losses(uninterrupted)
    ours, theirs = (load_tree(d / "model" / "weights")[0] for d in (workdir, uninterrupted))
    assert checksum(ours) == checksum(theirs)


def test_two_runs_are_bit_equal_and_the_frozen_weights_stay(uninterrupted, tmp_path):
    assert train(tmp_path).returncode == 0
    assert_same_run(tmp_path, uninterrupted)
    record = json.loads((tmp_path / "model" / "model.json").read_text())
    assert record["frozen_checksum_before"] == record["frozen_checksum_after"] != ""


MIDDLE_OF_A_STEP = """
    import os, signal
    from starflow2_jax import metrics
    update = metrics.Progress.update
    def kill(self, step, *args, **kwargs):  # a step has just been dispatched
        if self._stage == "joint" and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, step, *args, **kwargs)
    metrics.Progress.update = kill
"""
# Orbax commits a step by renaming its directory.
MIDDLE_OF_A_SAVE = """
    import os, signal
    rename = os.rename
    def kill(source, target, *args, **kwargs):
        if str(target).endswith("joint/checkpoints/4"):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, *args, **kwargs)
    os.rename = kill
"""


@pytest.mark.parametrize("fatal", [MIDDLE_OF_A_STEP, MIDDLE_OF_A_SAVE], ids=["step", "save"])
def test_killed_run_resumes_to_the_same_bits(uninterrupted, tmp_path, fatal):
    killed = train(tmp_path, fatal)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "joint" / "checkpoints"
    saved = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    # The save of step 4 has waited for that of step 2; whether it is complete is a race, but for
    # the run that was killed in the middle of it.
    assert saved == [2] or (saved == [2, 4] and fatal is MIDDLE_OF_A_STEP)
    resumed = train(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"joint {saved[-1] + 1}/6" in resumed.stdout
    assert "text_to_image 1/4" not in resumed.stdout
    assert_same_run(tmp_path, uninterrupted)


def test_interruption_saves_and_ends_cleanly(uninterrupted, tmp_path):
    interrupt = MIDDLE_OF_A_STEP.replace("SIGKILL", "SIGINT")
    stopped = train(tmp_path, interrupt)
    assert stopped.returncode == 130
    assert "interrupted at stage joint step 5; saved" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert train(tmp_path).returncode == 0
    assert_same_run(tmp_path, uninterrupted)


def test_finished_run_says_so(uninterrupted, capsys):
    assert main(["train", "--config", CONFIG, "--workdir", str(uninterrupted)]) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "override, message",
    [
        ("--config.stages.joint.optimizer.learning_rat=1", "learning_rate"),
        ("--config.seed=4", "belongs to another config"),
    ],
)
def test_bad_input_is_one_line(uninterrupted, capsys, override, message):
    arguments = ["train", "--config", CONFIG, "--workdir", str(uninterrupted), override]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_a_batch_that_the_mesh_does_not_divide(tmp_path, capsys):
    arguments = ["train", "--config", CONFIG, "--workdir", str(tmp_path)]
    assert main([*arguments, "--config.stages.joint.batch.rows=6"]) == 2
    assert "batch of 6 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, message",
    [
        ("stages.joint.optimizer.warmup=9", "joint.optimizer: warmup=9 does not fit into steps=6"),
        ("stages.joint.optimizer.steps=1", "joint.optimizer: warmup=1 does not fit into steps=1"),
        ("checkpoint.keep_last=0", "config.checkpoint.keep_last is 0; it has to be at least 1"),
        ("checkpoint.every=0", "config.checkpoint.every is 0"),
        ("log_every=0", "config.log_every is 0"),
    ],
)
def test_a_bad_number_leaves_nothing_behind(tmp_path, capsys, override, message):
    workdir = tmp_path / "run"
    arguments = ["train", "--config", CONFIG, "--workdir", str(workdir)]
    assert main([*arguments, f"--config.{override}"]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not workdir.exists()


def test_long_rows_that_no_accelerator_cuts(tmp_path, monkeypatch):
    monkeypatch.setattr(partition, "platform", lambda: "tpu")
    config = resume_config.get_config()
    config.mesh.update(data=1, sequence=2)
    config.stages.joint.batch.length = 8192
    with pytest.raises(UserError, match="config.mesh: attention over 8192 positions .*sequence=1"):
        loop.run(config, resume_config, tmp_path)


def changed_task(change):
    """A config module whose model has another shape than the config's."""

    def make_task(config, workdir):
        task = resume_config.make_task(config, workdir)
        return dataclasses.replace(task, model_config=change(task.model_config))

    return types.SimpleNamespace(make_task=make_task, __file__="some_config.py")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: dataclasses.replace(c, dtype="bf16"), "dtype 'bf16' is unknown"),
        (
            lambda c: dataclasses.replace(c, flow=dataclasses.replace(c.flow, width=33)),
            "width 33 is not a multiple of head_dim 16",
        ),
    ],
    ids=["dtype", "width"],
)
def test_a_config_of_no_model_is_named(tmp_path, change, message):
    with pytest.raises(UserError, match="some_config.py makes no model") as raised:
        loop.run(resume_config.get_config(), changed_task(change), tmp_path)
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_there_is_not(tmp_path):
    config = resume_config.get_config()
    config.stages = {"joints": config.stages.joint}
    with pytest.raises(UserError, match="stages.joints: there is no such stage; .* mean joint?"):
        loop.run(config, resume_config, tmp_path)
    config.stages = {}
    with pytest.raises(UserError, match="stages is empty: .* pretrain_lm, .*joint"):
        loop.run(config, resume_config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_devices_hold_what_is_trained_once(tmp_path):
    # The state has the parameters, two moments and the average: nothing keeps the stage's start,
    # or what an earlier stage made.
    config = resume_config.get_config()
    config.evaluation.samples = 100
    task = resume_config.make_task(config, None)
    shape = (task.model_config.flow.channels, task.model_config.flow.width)
    held = {}

    def count(bundle, folder, name):
        held[name] = sum(leaf.shape == shape for leaf in jax.live_arrays())

    task = dataclasses.replace(task, draw_samples=count)
    gc.collect()
    loop.run(config, types.SimpleNamespace(make_task=lambda *_: task), tmp_path)
    # The three blocks of the flow have a kernel of that shape, and the adapter, which the first
    # stage does not train.
    assert held == {"text_to_image_000004": 3 * 4 + 1, "joint_000006": 4 * 4}


def test_a_corrupt_checkpoint_is_named_and_kept(uninterrupted, tmp_path, capsys):
    assert train(tmp_path, MIDDLE_OF_A_SAVE).returncode == -signal.SIGKILL
    step = tmp_path / "joint" / "checkpoints" / "2"
    for arrays in step.rglob("d/*"):  # which of these files holds what is the storage's choice
        os.truncate(arrays, arrays.stat().st_size // 2)
    assert main(["train", "--config", CONFIG, "--workdir", str(tmp_path)]) == 2
    assert str(step) in capsys.readouterr().err
    assert step.is_dir()


def assert_exports_the_same(arguments, workdir, out):
    """Beside the files that the task has made in the work directory, and makes again."""
    before = content(workdir)
    assert main(["export", *arguments, "--out", str(out)]) == 0
    assert content(workdir) == before
    model = workdir / "model"
    names = [sorted(path.name for path in folder.iterdir()) for folder in (out, model)]
    assert names[0] == names[1]
    ours, theirs = (load_tree(folder / "weights")[0] for folder in (out, model))
    assert checksum(ours) == checksum(theirs)
    ours, theirs = (json.loads((folder / "model.json").read_text()) for folder in (out, model))
    assert {**ours, **theirs} == ours


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_every_config_runs_in_smoke_mode(config, tmp_path):
    workdir = tmp_path / "run"
    arguments = ["--config", str(config), "--workdir", str(workdir), "--config.smoke=True"]
    assert main(["train", *arguments]) == 0
    if config.stem in OWN_FILES:
        assert_exports_the_same(arguments, workdir, tmp_path / "out")
    if "def report(" not in config.read_text():  # made data, of which there is nothing to report
        rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        losses = [(row["stage"], row["loss"]) for row in rows if "loss" in row]
        assert {"text_to_image", "image_to_text", "joint"} <= {stage for stage, _ in losses}
        assert np.isfinite([loss for _, loss in losses]).all()
        return
    report = json.loads((workdir / "report.json").read_text())
    measure = "psnr" if config.stem.startswith("fae") else "bits_per_dim"
    assert np.isfinite(report.get("held_out", report)[measure])
    record = json.loads((workdir / "model" / "model.json").read_text())
    if config.stem.startswith(("tarflow", "fae_emoji")):  # of which nothing is frozen
        assert "frozen_checksum_before" not in record
    else:
        assert record["frozen_checksum_before"] == record["frozen_checksum_after"] != ""
    assert (workdir / "losses.png").is_file()


def test_emoji_in_the_latents_of_a_trained_vit(tmp_path):
    fae, run = tmp_path / "fae", tmp_path / "run"
    configs = HERE.parent / "configs"
    smoke = ["--config.smoke=True", "--config.features=vit"]
    arguments = ["train", "--config", str(configs / "fae_emoji.py"), "--workdir", str(fae)]
    assert main([*arguments, *smoke]) == 0
    record = json.loads((fae / "model" / "model.json").read_text())
    assert record["frozen_checksum_before"] == record["frozen_checksum_after"] != ""
    arguments = ["train", "--config", str(configs / "emoji.py"), "--workdir", str(run)]
    assert main([*arguments, "--config.smoke=True", f"--config.fae={fae}"]) == 0
    report = json.loads((run / "report.json").read_text())
    # In the features of the ViT that stands beside the FAE.
    assert {"kid_tuned", "kid_score_step", "kid_noisy"} <= set(report)


def test_an_interrupted_image_flow_resumes_to_the_same_bits(tmp_path, monkeypatch, capsys):
    config = HERE.parent / "configs" / "tarflow_imagenet64.py"
    options = ["--config.smoke=True", "--config.flow.count=1", "--config.report.samples=8"]
    options += ["--config.stages.train.optimizer.steps=4", "--config.evaluation.samples=0"]

    def run(name):
        return main(["train", "--config", str(config), "--workdir", str(tmp_path / name), *options])

    assert run("whole") == 0
    update = metrics.Progress.update

    def interrupting(self, step, *args, **kwargs):
        if self._stage == "train" and step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, step, *args, **kwargs)

    monkeypatch.setattr(metrics.Progress, "update", interrupting)
    assert run("parts") == 130
    assert "interrupted at stage train step 2; saved" in capsys.readouterr().err
    monkeypatch.setattr(metrics.Progress, "update", update)
    assert run("parts") == 0
    assert "train 3/4" in capsys.readouterr().out
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_continued_run_names_its_own_revision_and_config(tmp_path, monkeypatch):
    optimizer = {"steps": 2, "learning_rate": 1e-3, "warmup": 1}
    config = ml_collections.ConfigDict(
        {"seed": 0, "stages": {"one": {"optimizer": optimizer}}, "checkpoint": {"keep_last": 1}}
    )
    old = {"seconds": 1.0, "frozen_checksum": "", "config": {}, "git_revision": "old"}
    seen = []

    class Stored(contextlib.nullcontext):
        def __init__(self, *_, **__):
            super().__init__(self)

        def latest(self):
            return 1

        def restore(self, step, abstract, batches):
            return init_state(parts[1], step_config(config.stages.one), 0), old

    def trained(this, stage, config, parts, batches, checkpoints, metadata):
        seen.append(metadata)
        return parts[1]

    monkeypatch.setattr(loop, "Checkpoints", Stored)
    monkeypatch.setattr(loop, "_train", trained)
    monkeypatch.setattr(loop, "git_revision", lambda: "new")
    parts = nnx.split(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), nnx.Param, ...)
    stage = types.SimpleNamespace(name="one", averaged=False, steps=lambda config: config)
    anything = lambda *_, **__: None
    this = types.SimpleNamespace(
        config=config,
        workdir=tmp_path,
        mesh=make_mesh(),
        task=types.SimpleNamespace(stages=[stage]),
        succession=types.SimpleNamespace(start=lambda _: parts, check=anything, go_on=anything),
        metrics=types.SimpleNamespace(truncate_after=anything),
        batches=lambda *_, **__: types.SimpleNamespace(close=anything),
    )
    loop._run_stage(this, stage)
    assert seen == [{**old, "git_revision": "new", "config": to_json(config)}]
