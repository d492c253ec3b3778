"""Jobs of two processes: the run of one, sharded, interrupted, killed, and continued elsewhere."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from starflow2_jax.metrics import read_metrics
from starflow2_jax.training.checkpoint import checksum, load_tree

HERE = pathlib.Path(__file__).parent
LAUNCH = HERE.parent / "launch" / "local.py"

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module", autouse=True)
def _programs(tmp_path_factory):
    """The jobs compile quickly, and each program once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def start(workdir, *words, processes=2):
    devices = 8 // processes
    options = ["-n", str(processes), "--devices-per-process", str(devices)]
    command = ["train", "--config", HERE / "pod_config.py", "--workdir", workdir, *words]
    return subprocess.Popen(
        [sys.executable, LAUNCH, *options, "--", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
    )


def run(workdir, *words, processes=2, code=0):
    job = start(workdir, *words, processes=processes)
    out, err = job.communicate(timeout=900)
    assert job.returncode == code, err
    return out, err


def losses(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return {(r["stage"], r["step"], n): r[n] for r in rows for n in r if "loss" in n}


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert max(abs(ours[key] - theirs[key]) for key in ours) < 1e-4


def batches(workdir, stage):
    """Each batch's digests of rows; of the last run where several have read."""
    rows = {}
    for path in sorted(workdir.glob(f"rows_{stage}_*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines()):
            rows.setdefault(number, {}).update(json.loads(line))
    return [rows[number] for number in sorted(rows)]


def kill_when(job, line, number):
    """Sends a signal when a line of the job's output says so; returns its output."""
    for text in job.stdout:
        if line in text:
            number()
            break
    out, err = job.communicate(timeout=300)
    return err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two processes, without interruption."""
    workdir = tmp_path_factory.mktemp("whole")
    run(workdir)
    return workdir


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process."""
    workdir = tmp_path_factory.mktemp("alone")
    run(workdir, processes=1)
    return workdir


def test_two_processes_are_one(whole, alone):
    assert_close(losses(whole), losses(alone))
    for stage in ("text_to_image", "joint"):
        ours, theirs = batches(whole, stage), batches(alone, stage)
        assert len(ours) >= 4 and len(ours[0]) == 8
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            assert a == b
        # Each process reads its own rows alone.
        first = json.loads((whole / f"rows_{stage}_0.jsonl").read_text().splitlines()[0])
        assert sorted(map(int, first)) == [0, 1, 2, 3]


def test_with_a_sequence_axis(alone, tmp_path):
    words = ["--config.mesh.fsdp=2", "--config.mesh.sequence=2", "--config.mesh.tensor=2"]
    run(tmp_path, *words)
    assert_close(losses(tmp_path), losses(alone))
    assert batches(tmp_path, "joint")[:4] == batches(alone, "joint")[:4]


def test_preempted_then_continued(whole, alone, tmp_path):
    job = start(tmp_path / "a")
    began = []

    def preempt():
        began.append(time.monotonic())
        job.send_signal(signal.SIGTERM)

    err = kill_when(job, "joint 2/4", preempt)
    assert time.monotonic() - began[0] < 100
    assert job.returncode == 130, err
    assert "interrupted at stage joint step" in err and "Traceback" not in err
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    run(tmp_path / "a")
    assert losses(tmp_path / "a") == losses(whole)
    ours, theirs = (load_tree(d / "model" / "weights")[0] for d in (tmp_path / "a", whole))
    assert checksum(ours) == checksum(theirs)
    # The same checkpoint in one process, on another mesh.
    for path in (tmp_path / "b").glob("rows_joint_*"):
        path.unlink()
    words = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    run(tmp_path / "b", *words, processes=1)
    assert_close(losses(tmp_path / "b"), losses(alone))
    step = int(err.split("interrupted at stage joint step")[1].split(";")[0])
    assert 2 <= step < 4
    next_ones = batches(tmp_path / "b", "joint")
    assert next_ones[: 4 - step] == batches(alone, "joint")[step:4]


def test_a_killed_process_ends_the_job_and_the_restart_goes_on(whole, tmp_path):
    job = start(tmp_path)
    began = []

    def kill():
        children = subprocess.run(
            ["ps", "--ppid", str(job.pid), "-o", "pid="], capture_output=True, text=True
        ).stdout.split()
        began.append(time.monotonic())
        os.kill(int(children[1]), signal.SIGKILL)

    err = kill_when(job, "joint 2/4", kill)
    assert time.monotonic() - began[0] < 60
    assert job.returncode == 128 + 9
    assert "was killed by SIGKILL; ending the others" in err
    run(tmp_path)
    assert losses(tmp_path) == losses(whole)
