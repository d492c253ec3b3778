"""The launchers: what they would run, and jobs of two processes on this machine."""

import os
import pathlib
import shlex
import subprocess
import sys
import time

import numpy as np
import pytest
from source_files import make_webdataset

from starflow2_jax.metrics import read_metrics
from starflow2_jax.parallel import distributed
from starflow2_jax.training.checkpoint import load_tree
from starflow2_jax.training.tree_files import flatten

HERE = pathlib.Path(__file__).parent
LAUNCH = HERE.parent / "launch"
SHELL = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
COMMAND = ["train", "--config", "configs/a b.py", "--workdir", "/runs/it's $HOME"]


def dry_run(*words):
    script = LAUNCH / words[0]
    start = [sys.executable] if script.suffix == ".py" else ["bash"]
    done = subprocess.run([*start, script, *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_shell(line, **variables):
    """What the words of a shell's line come to, on the machine where they run."""
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=os.environ | variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown(folder, name, *more):
    """A program that shows its words, one a line, and some variables."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["STARFLOW2_DISTRIBUTED", "JAX_LOCAL_DEVICE_IDS", *more]
    variables = ":".join(f"${name}" for name in names)
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@"\necho "{variables}"\n')
    path.chmod(0o755)
    return path


def test_there_are_four():
    assert {p.name for p in SHELL} == {"tpu_vm.sh", "xpk.sh", "slurm.sbatch"}


@pytest.mark.parametrize("script", SHELL, ids=lambda p: p.name)
def test_shellcheck(script):
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "--severity=style", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_tpu_vm(tmp_path):
    program = shown(tmp_path, "bin/starflow2")
    options = ["--name", "pod", "--zone", "us-east5-a", "--project", "p", "--dir", str(tmp_path)]
    line = dry_run("tpu_vm.sh", *options, "--bin", "bin", "--dry-run", "--", "starflow2", *COMMAND)
    words = shlex.split(line)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert words[6:9] == ["--zone=us-east5-a", "--project=p", "--worker=all"]
    [command] = words[9:]
    assert command.startswith("--command=") and program.is_file()
    assert in_shell(command.removeprefix("--command=")).splitlines() == [*COMMAND, "1:"]


def test_xpk(tmp_path):
    shown(tmp_path, "starflow2")
    options = ["--cluster", "c", "--workload", "w", "--tpu-type", "v5p-128", "--image", "i:1"]
    line = dry_run("xpk.sh", *options, "--slices", "2", "--dry-run", "--", *COMMAND)
    words = shlex.split(line)
    assert words[:3] == ["xpk", "workload", "create"]
    for word in ("--cluster=c", "--workload=w", "--tpu-type=v5p-128", "--num-slices=2"):
        assert word in words
    command = words[-1].removeprefix("--command=")
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert in_shell(command, PATH=path).splitlines() == [*COMMAND, "1:"]


@pytest.mark.parametrize(
    "each, processes, task, ids",
    [(1, 8, 5, "5"), (4, 2, 1, "4,5,6,7"), (8, 1, 0, "0,1,2,3,4,5,6,7")],
)
def test_slurm(tmp_path, each, processes, task, ids):
    shown(tmp_path, "starflow2", "JAX_PLATFORMS")
    options = ["--bin", str(tmp_path), "--gpus-per-process", str(each), "--dry-run"]
    line = dry_run("slurm.sbatch", *options, "--", *COMMAND)
    start = line.index("bash -c")
    words = shlex.split(line[:start])
    assert words[:2] == ["srun", f"--ntasks-per-node={processes}"]
    assert "--gpus-per-node=8" in words and "--kill-on-bad-exit=1" in words
    out = in_shell(line[start:], SLURM_LOCALID=str(task))
    assert out.splitlines() == [*COMMAND, f"1:{ids}:cuda"]  # the tests themselves run on "cpu"


def test_local():
    out = dry_run("local.py", "-n", "2", "--devices-per-process", "3", "--dry-run", "--", *COMMAND)
    lines = [shlex.split(line) for line in out.splitlines()]
    assert len(lines) == 2
    for index, line in enumerate(lines):
        assert {f"JAX_PROCESS_ID={index}", "JAX_NUM_PROCESSES=2", "JAX_NUM_CPU_DEVICES=3"} < {*line}
        assert line[-len(COMMAND) - 2 :] == ["-m", "starflow2_jax", *COMMAND]
    [address] = {word for line in lines for word in line if word.startswith("JAX_COORDINATOR_")}
    assert address.startswith("JAX_COORDINATOR_ADDRESS=127.0.0.1:")


@pytest.mark.parametrize(
    "words, message",
    [
        (["tpu_vm.sh", "--name", "a", "--", "train"], "--name and --zone are needed"),
        (["tpu_vm.sh", "--name", "a", "--zone", "z"], "the command is missing"),
        (["xpk.sh", "--clutser", "a"], "unknown option --clutser"),
        (["xpk.sh", "--cluster"], "--cluster needs a value"),
        (["slurm.sbatch", "--gpus-per-process", "3", "--", "train"], "8 GPUs a node cannot"),
        (["local.py", "-n", "0", "--", "train"], "at least 1"),
    ],
)
def test_wrong_options(words, message):
    start = [sys.executable] if words[0].endswith(".py") else ["bash"]
    done = subprocess.run([*start, LAUNCH / words[0], *words[1:]], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_a_job_without_a_launcher(monkeypatch):
    monkeypatch.setenv(distributed.SWITCH, "0")
    distributed.join_job()
    assert not distributed.jax.distributed.is_initialized()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_webdataset(folder, 24)
    return f"--config.shards={folder}/*.tar"


def job(workdir, *words, processes=2, devices=1):
    options = ["-n", str(processes), "--devices-per-process", str(devices)]
    command = ["train", "--config", HERE / "launch_config.py", "--workdir", workdir, *words]
    return subprocess.run(
        [sys.executable, LAUNCH / "local.py", *options, "--", *command],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one(tmp_path, shards):
    runs = {}
    for processes, devices in ((2, 1), (1, 2)):
        folder = tmp_path / str(processes)
        done = job(folder, shards, processes=processes, devices=devices)
        assert done.returncode == 0, done.stderr
        rows = read_metrics(folder / "metrics.jsonl")
        losses = [row["loss"] for row in rows if "loss" in row]
        assert len(losses) == 4
        runs[processes] = losses, load_tree(folder / "model" / "weights")[0], done
    assert max(abs(a - b) for a, b in zip(runs[1][0], runs[2][0], strict=True)) < 1e-4
    ours, theirs = (flatten(runs[n][1]) for n in (2, 1))
    assert ours.keys() == theirs.keys() and len(ours) > 20
    apart = count = 0
    for path in ours:
        distance = np.abs(np.asarray(ours[path], np.float64) - theirs[path])
        if path[:2] == ("model", "vlm") or path[0] == "codec":
            assert distance.max() < 1e-6, path  # nothing trains them
            continue
        # Sums over two devices have other last bits. Where a gradient is nothing else (that of a
        # key's bias is zero), Adam makes whole steps of them: 4 of 1e-3, in either direction.
        assert distance.max() < 8e-3, path
        apart, count = apart + (distance > 1e-5).sum(), count + distance.size
    # Of other data, all would be hundreds of times as far apart as this.
    assert count > 10_000 and apart < 0.1 * count
    data = tmp_path / "2" / "joint" / "checkpoints" / "2" / "data"
    assert {p.name for p in data.glob("process*")} == {
        "process_0-of-2.json",
        "process_1-of-2.json",
    }
    # Its report is for one process.
    assert "[0] for the report, give the same command in one process" in runs[2][2].stdout
    assert not (tmp_path / "2" / "report").exists() and (tmp_path / "1" / "report").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_process_ends_the_job(tmp_path, shards):
    began = time.monotonic()
    done = job(tmp_path, shards, "--config.die=True")
    assert done.returncode == 128 + 9
    assert "launch: process 1 of 2 was killed by SIGKILL; ending the others" in done.stderr
    assert time.monotonic() - began < 300
