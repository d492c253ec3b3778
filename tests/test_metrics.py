import io
import json
import math

import jax.numpy as jnp
import pytest

from starflow2_jax.metrics import MetricsWriter, Progress, read_metrics


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def contents(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(path)]


def test_rows(tmp_path):
    clock = Clock()
    with MetricsWriter(tmp_path, tensorboard=False, clock=clock) as writer:
        clock.now = 1.5
        writer.write("t2i", 10, {"loss_image": jnp.float32(0.5), "count": 3})
        # Flushed already.
        line = json.loads((tmp_path / "metrics.jsonl").read_text())
        assert line == {"stage": "t2i", "step": 10, "seconds": 1.5, "loss_image": 0.5, "count": 3}
        writer.write("t2i", 20, {"loss_image": math.nan, "low": -math.inf})
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    row = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert math.isnan(row["loss_image"]) and row["low"] == -math.inf
    with pytest.raises(ValueError, match="step"), MetricsWriter(tmp_path, False) as writer:
        writer.write("t2i", 30, {"step": 1})


def test_time_continues_over_an_interruption(tmp_path):
    for start in (100.0, 900.0):
        clock = Clock()
        clock.now = start
        with MetricsWriter(tmp_path, tensorboard=False, clock=clock) as writer:
            clock.now += 2
            writer.write("t2i", int(start), {})
    assert [row["seconds"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2.0, 4.0]


def test_disabled_writes_nothing(tmp_path):
    with MetricsWriter(tmp_path, enabled=False) as writer:
        writer.write("t2i", 1, {"loss": 1.0})
        writer.truncate_after("t2i", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path, tensorboard):
    def write(writer, stage, steps):
        for step in steps:
            writer.write(stage, step, {"loss": 1 / step})

    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    with MetricsWriter(tmp_path / "whole", tensorboard) as writer:
        for stage in ("t2i", "adapter", "joint"):
            write(writer, stage, range(1, 5))
    # Stopped in the last stage, resumed from a checkpoint of the second.
    with MetricsWriter(tmp_path / "resumed", tensorboard) as writer:
        write(writer, "t2i", range(1, 5))
        write(writer, "adapter", range(1, 5))
        write(writer, "joint", range(1, 3))
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "joint", "st')
    with MetricsWriter(tmp_path / "resumed", tensorboard) as writer:
        writer.truncate_after("adapter", 2)
        write(writer, "adapter", range(3, 5))
        write(writer, "joint", range(1, 5))
    whole = contents(tmp_path / "whole" / "metrics.jsonl")
    assert contents(tmp_path / "resumed" / "metrics.jsonl") == whole
    assert (tmp_path / "resumed" / "tensorboard" / "joint").is_dir() == tensorboard


def test_truncating_a_stage_without_rows(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for stage in ("t2i", "joint"):
            writer.write(stage, 1, {})
        writer.truncate_after("adapter", 0, later=["joint"])
    assert [row["stage"] for row in contents(tmp_path / "metrics.jsonl")] == ["t2i"]


@pytest.mark.parametrize(
    ("tail", "steps"),
    [
        ('{"stage": "a", "step": 2, "sec', [1]),
        ('{"stage": "a", "step": 2, "seconds": 0.2}', [1, 2]),
        ("", [1]),
    ],
)
def test_torn_last_line(tmp_path, tail, steps):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a", "step": 1, "seconds": 0.1}\n' + tail)
    assert [row["step"] for row in read_metrics(path)] == steps
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write("a", 3, {})
    assert [row["step"] for row in read_metrics(path)] == [*steps, 3]


def test_damage_before_the_last_line_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a", "st\n{"stage": "a", "step": 1, "seconds": 0.1}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_metrics(path)


def test_tensorboard_reads_the_resumed_steps_once(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    with MetricsWriter(tmp_path) as writer:
        writer.write("joint", 4, {"loss": 1.0})
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after("joint", 2)
        writer.write("joint", 3, {"loss": 1.0})
    starts = []
    for file in (tmp_path / "tensorboard" / "joint").iterdir():
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == SessionLog.START:
                starts.append(event.step)
    # TensorBoard forgets what lies at or behind the step of a START.
    assert starts == [3]


def test_progress_lines():
    clock, stream = Clock(), io.StringIO()
    progress = Progress("joint", 1000, start=100, every=10, stream=stream, clock=clock)
    fetched = []

    class Loss:
        def __float__(self):
            fetched.append(True)
            return 1.23456

    for step in range(101, 142):
        clock.now += 0.5
        progress.update(step, {"loss_image": Loss()}, images=32, tokens=2048)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "joint 101/1000  loss_image 1.235",
        "joint 121/1000  loss_image 1.235  2 steps/s  64 images/s  4.1k tokens/s  7m20s left",
        "joint 141/1000  loss_image 1.235  2 steps/s  64 images/s  4.1k tokens/s  7m10s left",
    ]
    assert len(fetched) == len(lines)
    progress.update(1000, {})
    assert stream.getvalue().splitlines()[-1].startswith("joint 1000/1000")


def test_progress_disabled():
    stream = io.StringIO()
    Progress("joint", 2, stream=stream, enabled=False).update(1, {})
    assert stream.getvalue() == ""
