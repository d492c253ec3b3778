"""Plans: each program is lowered, compiled and read in a process of its own.

The compilers print what they like, and on TPUs are left in the middle of their work.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import types
from collections.abc import Sequence
from typing import Any

import ml_collections

from starflow2_jax.errors import UserError
from starflow2_jax.planning import topology as topologies
from starflow2_jax.planning.report import GB, Plan, from_json


@dataclasses.dataclass(frozen=True)
class Request:
    """What to plan.

    Attributes:
        config: path of the config file.
        overrides: of the config, (key, text).
        topology: name, see `topology.parse`.
        slices: of it.
        stage: a train step's; None: the decode step.
    """

    config: str
    overrides: Sequence[tuple[str, str]]
    topology: str
    slices: int = 1
    stage: str | None = None


def command(request: Request, path: str) -> list[str]:
    """The command line that answers a request in a process of its own."""
    which = ["--sample"] if request.stage is None else ["--stage", request.stage]
    return [
        *(sys.executable, "-m", "starflow2_jax", "plan", "--config", request.config),
        *("--topology", request.topology, "--slices", str(request.slices), *which),
        *(f"--config.{key}={value}" for key, value in request.overrides),
        *("--answer", path),
    ]


def plan(request: Request) -> Plan:
    """Compiles, in another process.

    Raises:
        UserError: bad config or topology, or no compiler for it.
        RuntimeError: the compiler fails.
    """
    topologies.check_installed(topologies.parse(request.topology, request.slices))
    with tempfile.TemporaryDirectory(prefix="starflow2_plan_") as folder:
        path = pathlib.Path(folder) / "answer.json"
        run = subprocess.run(
            command(request, str(path)), capture_output=True, text=True, check=False
        )
        if path.is_file():
            return from_json(json.loads(path.read_text()))
    said = run.stderr.strip()
    if run.returncode == 2:
        raise UserError(said.rsplit("starflow2: error: ", 1)[-1])
    raise RuntimeError(
        f"planning {request.topology} failed (exit {run.returncode}):\n{said[-4000:]}"
    )


def _settings(config: ml_collections.ConfigDict, request: Request, mesh: Any) -> dict[str, Any]:
    sizes = {name: size for name, size in mesh.shape.items() if size > 1}
    shown: dict[str, Any] = {
        "mesh": " x ".join(f"{name} {size}" for name, size in sizes.items()) or "1 device"
    }
    if request.stage is None:
        return shown | {"rows": config.sample.rows, "positions": config.sample.positions}
    stage = config.stages[request.stage]
    return shown | {
        "remat": config.remat,
        "rows": stage.batch.rows,
        "length": stage.batch.length,
        "accumulate": stage.optimizer.get("accumulate", 1),
    }


def answer(request: Request, config: ml_collections.ConfigDict, module: types.ModuleType) -> Plan:
    """`plan`, in this process, which must end by `os._exit`: a compiler may still be at work.

    Args:
        request: whose overrides are in the config.
        config, module: of its config file.
    """
    from starflow2_jax.planning import compiler, programs
    from starflow2_jax.planning.cost import cost
    from starflow2_jax.planning.roofline import roofline

    topology = topologies.parse(request.topology, request.slices)
    if request.stage is None:
        program = programs.decode_program(config, module, topology)
    else:
        program = programs.train_program(config, module, topology, request.stage)
    chip = topology.chip.per_device()
    slices = f"{request.slices} slices of " if request.slices > 1 else ""
    about = {
        "name": request.stage or "decode",
        "topology": f"{slices}{topology.name}",
        "settings": _settings(config, request, program.mesh),
    }
    compiled = compiler.compile_program(program.lowered, topology)
    if isinstance(compiled, compiler.TooLarge):
        return Plan(
            **about,
            fits=False,
            hbm_used_gb=compiled.used / GB,
            hbm_gb=compiled.available / GB,
            compile_seconds=compiled.seconds,
        )
    count = program.mesh.size
    found = cost(compiled.module, dict(program.mesh.shape), program.slice_of(), program.open_loop)
    times = roofline(found, chip, program.model_flops / count)
    parts = {name: size / GB for name, size in program.parts.items()}
    parts["activations and temporaries"] = compiled.used / GB - sum(parts.values())
    kernels: dict[str, float] = {}
    for call in found.kernels:
        kernels[call.name] = kernels.get(call.name, 0) + call.times
    return Plan(
        **about,
        fits=True,
        hbm_used_gb=compiled.used / GB,
        hbm_gb=chip.hbm_bytes / GB,
        compile_seconds=compiled.seconds,
        memory_gb=parts,
        model_flops=program.model_flops,
        compiled_flops=times.compiled_flops * count,
        kernel_flops=times.kernel_flops * count,
        mfu_bound=times.mfu,
        mfu_bound_serial=times.mfu_serial,
        step_seconds_bound=times.seconds,
        step_seconds_serial=times.seconds_serial,
        seconds={
            "matrix units": times.matrix,
            "memory": times.memory,
            "links": times.links,
            "network": times.network,
        },
        bytes_by_collective=found.bytes_by_collective(),
        bytes_moved=found.memory_bytes,
        bytes_needed=program.needed or float("nan"),
        kernels=kernels,
    )
