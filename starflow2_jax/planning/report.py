"""A plan: what one program needs on one topology, as numbers and as text."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from starflow2_jax.errors import UserError

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything is of one device, but for `model_flops` and `compiled_flops`: of all.

    Attributes:
        name: of the program: a stage, or `decode`.
        topology: name, slices included.
        settings: mesh, remat, accumulation, rows: what was planned.
        fits: whether the compiler finds memory for it.
        hbm_used_gb, hbm_gb: that it takes, and that there is; GB are 10^9 bytes.
        memory_gb: what takes it, by kind; what is left is activations and temporaries.
        model_flops: of a step, without anything recomputed; NaN for decoding.
        compiled_flops: of matrix units, kernels included.
        kernel_flops: of kernels.
        mfu_bound, mfu_bound_serial: see `roofline.Roofline`.
        step_seconds_bound, step_seconds_serial: of a step; of one position for decoding.
        seconds: of matrix units, memory, links and network at full rate.
        bytes_by_collective: that a device sends, by kind and mesh axes.
        bytes_moved, bytes_needed: of main memory; needed is for decoding.
        kernels: how often each kernel runs.
        compile_seconds: until the compiler had said all this.
    """

    name: str
    topology: str
    settings: Mapping[str, Any]
    fits: bool
    hbm_used_gb: float
    hbm_gb: float
    compile_seconds: float
    memory_gb: Mapping[str, float] = dataclasses.field(default_factory=dict)
    model_flops: float = math.nan
    compiled_flops: float = math.nan
    kernel_flops: float = math.nan
    mfu_bound: float = math.nan
    mfu_bound_serial: float = math.nan
    step_seconds_bound: float = math.nan
    step_seconds_serial: float = math.nan
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bytes_by_collective: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bytes_moved: float = math.nan
    bytes_needed: float = math.nan
    kernels: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what does not apply is null."""
        record = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}


def from_json(record: Mapping[str, Any]) -> Plan:
    """The inverse of `Plan.to_json`."""
    return Plan(**{k: math.nan if v is None else v for k, v in record.items()})


def text(plan: Plan) -> str:
    """Lines for a terminal."""
    settings = ", ".join(f"{name} {value}" for name, value in plan.settings.items())
    lines = [f"{plan.name} on {plan.topology}: {settings}"]
    row = lambda name, value: lines.append(f"  {name:<30} {value}")
    if not plan.fits:
        excess = plan.hbm_used_gb - plan.hbm_gb
        row("does not fit", f"by {excess:.2f} GB: {plan.hbm_used_gb:.2f} of {plan.hbm_gb:.2f} GB")
        row("compiled in", f"{plan.compile_seconds:.0f} s")
        return "\n".join(lines)
    row("memory of a device", f"{plan.hbm_used_gb:.2f} of {plan.hbm_gb:.2f} GB")
    for name, size in plan.memory_gb.items():
        row(f"  {name}", f"{size:.3f} GB")
    if not math.isnan(plan.model_flops):
        ratio = plan.compiled_flops / plan.model_flops
        row("model's FLOPs", f"{plan.model_flops / 1e15:.3f} P a step, all devices")
        row("compiled FLOPs", f"{plan.compiled_flops / 1e15:.3f} P, {ratio:.3f} of the model's")
        row("  of them in kernels", f"{plan.kernel_flops / 1e15:.3f} P")
    for name, times in plan.kernels.items():
        row(f"    {name}", f"{times:.0f} runs")
    if not math.isnan(plan.bytes_needed):
        ratio = plan.bytes_moved / plan.bytes_needed
        row("weights and caches", f"{plan.bytes_needed / GB:.3f} GB to read")
        row("moved", f"{plan.bytes_moved / GB:.3f} GB, {ratio:.3f} of them")
    else:
        row("memory traffic", f"{plan.bytes_moved / GB:.1f} GB")
    for name, size in plan.bytes_by_collective.items():
        row(f"  {name}", f"{size / GB:.3f} GB sent")
    for name, seconds in plan.seconds.items():
        row(f"time of {name}", f"{seconds * 1e3:.2f} ms at full rate")
    row("step, all overlapped", f"{plan.step_seconds_bound * 1e3:.2f} ms or more")
    row("step, interconnect apart", f"{plan.step_seconds_serial * 1e3:.2f} ms or more")
    if not math.isnan(plan.mfu_bound):
        row("MFU, all overlapped", f"{plan.mfu_bound:.3f} at most")
        row("MFU, interconnect apart", f"{plan.mfu_bound_serial:.3f} at most")
    row("compiled in", f"{plan.compile_seconds:.0f} s")
    return "\n".join(lines)


def check_place(path: pathlib.Path) -> None:
    """Whether `write` can write there; makes its folder.

    Raises:
        UserError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open("a").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def write(path: pathlib.Path, plans: Sequence[Plan]) -> None:
    """One plan as a JSON object, several as a list of them.

    Raises:
        UserError: it cannot be written.
    """
    records = [plan.to_json() for plan in plans]
    check_place(path)
    path.write_text(json.dumps(records[0] if len(records) == 1 else records, indent=1) + "\n")
