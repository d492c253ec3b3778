"""Long evaluations: one line for each record, shared out to processes, resumed where they stopped.

The records come in chunks of a fixed size. A chunk is the work of one process; its lines are a file
of their own in `parts/`, which is whole or absent. So what a chunk gives depends on nothing but the
chunk, and the result is the same to the byte however many processes there were and however often
they were killed.

DIR/job.json        what is measured, of which model and data; another job is refused
DIR/parts/          one file for each finished chunk, until all are finished
DIR/examples.jsonl  one line for each record, in order
DIR/summary.json    totals; whole results have it
"""

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from starflow2_jax.errors import UserError
from starflow2_jax.provenance import differing_keys, write_json, write_text

JOB, PARTS, EXAMPLES, SUMMARY = "job.json", "parts", "examples.jsonl", "summary.json"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        out: folder of the results; where there are several processes, all of them see it.
        records: how many there are.
        rows: records of a chunk.
        about: what decides the results: model, data (not their names alone: digests of what they
            hold), settings; plain JSON.
    """

    out: pathlib.Path
    records: int
    rows: int
    about: Mapping[str, Any]


def mean(values: Iterable[float]) -> float:
    """Mean of numbers whose order does not matter: their sum is exact before it is rounded."""
    values = list(values)
    return math.fsum(values) / len(values)


def standard_error(values: Iterable[float]) -> float:
    """Of the mean, whatever the order; 0 for a single value."""
    values = list(values)
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    squares = math.fsum((v - middle) ** 2 for v in values)
    return math.sqrt(squares / (len(values) - 1) / len(values))


def spread(values: Sequence[float]) -> float:
    """Standard deviation of draws; 0 for a single one."""
    return standard_error(values) * math.sqrt(len(values))


def run_job(
    job: Job,
    score: Callable[[range], list[Row]],
    summarise: Callable[[list[Row]], Row],
    on_progress: Callable[[int, int], None] | None = None,
) -> Row:
    """Scores what is not yet scored, in all processes of the job, and writes the results.

    Args:
        job: see `Job`.
        score: the rows of some records, in order; plain JSON.
        summarise: of all rows, in order.
        on_progress: called with this process's records done and to do.

    Returns:
        The summary, in every process.

    Raises:
        UserError: the folder belongs to another job, a number is not finite, or what `score`
            raises.
    """
    process, processes = jax.process_index(), jax.process_count()
    parts = job.out / PARTS
    if process == 0:
        _claim(job)
    _together(processes, "claimed")
    if not (job.out / SUMMARY).exists():
        chunks = range(0, job.records, job.rows)
        mine = chunks[process::processes]
        total, done = sum(min(job.rows, job.records - start) for start in mine), 0
        for start in mine:
            records = range(start, min(start + job.rows, job.records))
            path = parts / f"{start:010d}.jsonl"
            if not path.exists():
                lines = [_line(row) for row in score(records)]
                write_text(path, "".join(lines))
            done += len(records)
            if on_progress:
                on_progress(done, total)
        _together(processes, "scored")
        if process == 0:
            _finish(job, [parts / f"{start:010d}.jsonl" for start in chunks], summarise)
        _together(processes, "finished")
    return json.loads((job.out / SUMMARY).read_text(encoding="utf-8"))


def _together(processes: int, name: str) -> None:
    if processes > 1:
        multihost_utils.sync_global_devices(name)


def _claim(job: Job) -> None:
    """Makes the folder this job's, or checks that it is."""
    about = json.loads(json.dumps({**job.about, "records": job.records, "rows": job.rows}))
    path = job.out / JOB
    try:
        (job.out / PARTS).mkdir(parents=True, exist_ok=True)
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot use {job.out} for results: {error}") from error
    if old is None:
        write_json(path, about)
    elif different := differing_keys(old, about):
        listed = ", ".join(
            f"{key.removeprefix('config.')} ({a!r} there, {b!r} now)"
            for key, (a, b) in different.items()
        )
        raise UserError(
            f"{job.out} holds the results of another job: {listed}; give another --out, or the "
            "same settings to continue"
        )
    if (job.out / SUMMARY).exists():
        shutil.rmtree(job.out / PARTS)


def _line(row: Row) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        name = row.get("id", row.get("index"))
        raise UserError(f"record {name}: a log-probability is not finite: {row}") from error


def _finish(job: Job, parts: Sequence[pathlib.Path], summarise: Callable[[list[Row]], Row]) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in parts)
    # Not splitlines: a text may hold other line breaks of Unicode's.
    rows = [json.loads(line) for line in text.split("\n") if line]
    write_text(job.out / EXAMPLES, text)
    write_json(job.out / SUMMARY, {**job.about, **summarise(rows)})
    shutil.rmtree(job.out / PARTS)
