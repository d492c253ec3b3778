"""What a run reports while it works: metrics.jsonl, TensorBoard files, lines on the terminal."""

import hashlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, TextIO

from starflow2_jax.errors import UserError

_RESERVED = ("stage", "step", "seconds")
# JSON has no such numbers, and a diverged loss must be seen for what it is.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _number(value: Any) -> float | int | str:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _decode(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in order: stage, step, seconds, and the values by name.

    A last line that a crash tore is left out. NaN and infinities are floats again. A missing file
    has no rows.

    Raises:
        ValueError: a line before the last is no JSON object.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no object")
        except ValueError as error:
            if number == len(lines):  # empty where the file ends in a newline, else torn
                break
            raise ValueError(f"{path}, line {number}: not a JSON object") from error
        rows.append({name: _decode(value) for name, value in row.items()})
    return rows


class MetricsWriter:
    """Appends rows to `metrics.jsonl`, and to TensorBoard where tensorboardX is installed.

    A row is `{"stage": ..., "step": ..., "seconds": ..., NAME: VALUE, ...}`; seconds count the time
    this run has been training, over interruptions. Each row is on the disk when `write` returns.
    TensorBoard has one run per stage, so that steps of stages do not mix.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        tensorboard: bool = True,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
        wandb: str | None = None,
    ) -> None:
        """Opens (or makes) the files; a torn last line is removed.

        Args:
            workdir: existing folder.
            tensorboard: also write `workdir/tensorboard/STAGE`, where tensorboardX is importable.
            enabled: False in all but one process of a job; then nothing is written.
            clock: seconds.
            wandb: Weights & Biases project that the rows are sent to as well, each under
                `STAGE/NAME`; None or "": none.

        Raises:
            UserError: a project is given, and wandb is not installed.
        """
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        self._enabled = enabled
        self._clock = clock
        self._summary_writer = None
        self._writers: dict[str, Any] = {}
        self._purge_from: dict[str, int] = {}
        self._purge_others = False
        self._wandb: Any = None
        if not enabled:
            return
        if wandb:
            self._wandb = _wandb_run(wandb, self.path.parent.absolute())
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                pass
            else:
                self._summary_writer = SummaryWriter
        rows = self._mend()
        before = rows[-1]["seconds"] if rows else 0.0
        self._start = clock() - before
        self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mend(self) -> list[dict[str, Any]]:
        """Ends the file with a complete line; returns its rows."""
        rows = read_metrics(self.path)
        if self.path.exists():
            content = self.path.read_bytes()
            if content and not content.endswith(b"\n"):
                complete = content.count(b"\n") + 1 == len(rows)
                kept = content + b"\n" if complete else content[: content.rfind(b"\n") + 1]
                self._replace(kept)
        return rows

    def _replace(self, content: bytes) -> None:
        temporary = self.path.with_name(f".{self.path.name}.new")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends one row.

        Args:
            stage: name of the stage.
            step: of this stage.
            values: scalars by name; device values are fetched.

        Raises:
            ValueError: a value is named stage, step or seconds.
        """
        taken = [name for name in _RESERVED if name in values]
        if taken:
            raise ValueError(f"a metric cannot be named {taken[0]!r}")
        if not self._enabled:
            return
        numbers = {name: _number(value) for name, value in values.items()}
        seconds = round(self._clock() - self._start, 3)
        row = {"stage": stage, "step": int(step), "seconds": seconds, **numbers}
        # One write of one line, so that a crash tears at most the last one.
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._summary_writer is not None:
            writer = self._tensorboard(stage)
            for name, number in numbers.items():
                writer.add_scalar(name, _decode(number), int(step))

        if self._wandb is not None:
            # By a step of each stage: W&B's own only rises, and a resumed run goes back.
            named = {f"{stage}/{name}": _decode(number) for name, number in numbers.items()}
            self._wandb.log(named | {f"{stage}/step": int(step)})

    def _tensorboard(self, stage: str) -> Any:
        if stage not in self._writers:
            purge = self._purge_from.get(stage, 0 if self._purge_others else None)
            folder = self.path.parent / "tensorboard" / stage
            self._writers[stage] = self._summary_writer(
                str(folder), purge_step=purge if folder.exists() else None
            )
        return self._writers[stage]

    def truncate_after(self, stage: str, step: int, later: Collection[str] = ()) -> None:
        """Drops what a resumed run is about to write again.

        These are the rows of `stage` with a larger step, all rows that follow the first row of
        `stage` and are of another stage, and all rows of the stages in `later`. The file afterwards
        is that of a run that went no further.

        Args:
            stage: that is resumed.
            step: that it is resumed from.
            later: names of the stages that follow it; they matter only where `stage` has no row.
        """
        if not self._enabled:
            return
        kept = []
        seen = False
        before = 0.0
        for line, row in zip(
            self.path.read_bytes().splitlines(keepends=True), read_metrics(self.path), strict=True
        ):
            mine = row["stage"] == stage
            seen = seen or mine
            if row["step"] <= step if mine else not seen and row["stage"] not in later:
                kept.append(line)
                before = row["seconds"]
        self._start = self._clock() - before
        self._file.close()
        self._replace(b"".join(kept))
        self._file = self.path.open("a", encoding="utf-8")
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
        # The stages that are written from here on are this one and later ones.
        self._purge_from = {stage: step + 1}
        self._purge_others = True

    def close(self) -> None:
        """Closes the files."""
        if not self._enabled:
            return
        self._file.close()
        for writer in self._writers.values():
            writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_run(project: str, workdir: pathlib.Path) -> Any:
    """A run of Weights & Biases: the same one whenever the work directory is continued."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"config.wandb is {project!r}, but wandb is not installed: pip install wandb, or leave "
            "it empty"
        ) from error
    run_id = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
    run = wandb.init(project=project, name=workdir.name, id=run_id, resume="allow", dir=workdir)
    run.define_metric("*/step", hidden=True)
    return run


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def _rate(per_second: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if per_second >= size:
            return f"{per_second / size:.3g}{unit}"
    return f"{per_second:.3g}"


class Progress:
    """Plain lines on the terminal: stage, step, losses, rates, time left.

        joint 120/1000  loss_image 1.234  4.1 steps/s  131 images/s  33.6k tokens/s  3m35s left

    A line comes with the first step, then every few seconds, and with the last step. Values are
    fetched from the device only for a line that is printed.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        start: int = 0,
        every: float = 10.0,
        stream: TextIO | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
        unit: str = "steps",
    ) -> None:
        """Starts the clock.

        Args:
            stage: name of the stage.
            total: its last step.
            start: the step that a resumed stage starts from.
            every: seconds between lines.
            stream: default stdout.
            enabled: False in all but one process of a job.
            clock: seconds.
            unit: what a step is called.
        """
        self._stage = stage
        self._unit = unit
        self._total = total
        self._every = every
        self._stream = stream
        self._enabled = enabled
        self._clock = clock
        self._last_step = start
        self._last_time: float | None = None
        self._images = 0
        self._tokens = 0

    def update(
        self, step: int, values: Mapping[str, Any], images: int = 0, tokens: int = 0
    ) -> None:
        """Call once a step.

        Args:
            step: the one that has just been dispatched.
            values: scalars to show, by name; may be on the device still.
            images: how many this step trained on, over all devices.
            tokens: likewise.
        """
        if not self._enabled:
            return
        first = self._last_time is None
        if not first:
            self._images += images
            self._tokens += tokens
            if self._clock() - self._last_time < self._every and step < self._total:
                return
        # Fetching waits for the step, so the clock is read behind it. The first step compiles: it
        # and its time are in no rate.
        words = [f"{name} {float(value):.4g}" for name, value in values.items()]
        now = self._clock()
        words.insert(0, f"{self._stage} {step}/{self._total}")
        if not first:
            seconds = max(now - self._last_time, 1e-9)
            steps = (step - self._last_step) / seconds
            words.append(f"{_rate(steps)} {self._unit}/s")
            words += [
                f"{_rate(count / seconds)} {unit}/s"
                for count, unit in ((self._images, "images"), (self._tokens, "tokens"))
                if count
            ]
            if steps > 0:
                words.append(f"{_duration((self._total - step) / steps)} left")
        print("  ".join(words), file=self._stream or sys.stdout, flush=True)
        self._last_step, self._last_time = step, now
        self._images = self._tokens = 0
