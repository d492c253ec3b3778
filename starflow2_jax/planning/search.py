"""Tries meshes, remat policies and parts of the batch for one program, and ranks what fits."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import ml_collections

from starflow2_jax.errors import UserError
from starflow2_jax.planning.plan import Request, plan
from starflow2_jax.planning.report import Plan
from starflow2_jax.planning.topology import Topology, check_installed

REMATS = ("products", "full")
MOST_PARTS = 8


def candidates(
    config: ml_collections.ConfigDict, topology: Topology, stage: str | None
) -> Iterator[dict[str, str]]:
    """Overrides to try, the most promising first.

    Meshes: data over the slices (GPUs: nodes); inside one the devices as fsdp x columns, as square
    as they go, with tensor groups of 1, 2 and 4. Parts: powers of two that leave each device a row.
    """
    groups = topology.network_groups
    inside = topology.chips * topology.chip.cores // groups
    for tensor in (1, 2, 4):
        if inside % tensor:
            continue
        rest = inside // tensor
        square = max(n for n in range(1, math.isqrt(rest) + 1) if rest % n == 0)
        for columns in sorted({square, max(1, square // 4), 1}, reverse=True):
            mesh = {
                "mesh.data": str(groups),
                "mesh.fsdp": str(rest // columns),
                "mesh.columns": str(columns),
                "mesh.tensor": str(tensor),
            }
            if stage is None:
                if tensor == columns == 1:
                    yield mesh
                continue
            rows = config.stages[stage].batch.rows
            shares = groups * rest
            for remat in REMATS:
                parts = 1
                while parts <= MOST_PARTS and rows % (shares * parts) == 0:
                    yield mesh | {
                        "remat": remat,
                        f"stages.{stage}.optimizer.accumulate": str(parts),
                    }
                    parts *= 2


def search(
    request: Request,
    config: ml_collections.ConfigDict,
    topology: Topology,
    tell: Callable[[str], None],
) -> list[Plan]:
    """Plans of all candidates that compile, those that fit first, the quickest step first.

    Ranked by the mean of the bounds with and without the interconnect overlapped: what is reached
    lies between. Settings with more parts of a batch than the first that fits are not tried: they
    gather the weights more often for nothing.

    Args:
        request: the program; what a candidate sets wins over its own overrides.
        config: as loaded for it.
        topology: of it.
        tell: is given a line for each candidate.

    Raises:
        UserError: the compiler is not installed; or what is wrong with every candidate alike.
    """
    check_installed(topology)
    found: list[Plan] = []
    wrong: list[UserError] = []
    failed = 0
    enough: set[tuple] = set()
    for settings in candidates(config, topology, request.stage):
        parts = f"stages.{request.stage}.optimizer.accumulate"
        same = tuple((k, v) for k, v in settings.items() if k != parts)
        if same in enough:
            continue
        overrides = [*request.overrides, *settings.items()]
        try:
            one = plan(dataclasses.replace(request, overrides=overrides))
        except (UserError, RuntimeError) as error:
            tell(f"{dict(settings)}: {str(error).splitlines()[-1][:150]}")
            if isinstance(error, UserError):
                wrong.append(error)
            else:
                failed += 1
            continue
        found.append(one)
        if one.fits:
            enough.add(same)
        tell(line(one))
    if wrong and not found and not failed:
        raise wrong[0]
    ranked = sorted(found, key=_rank)
    tell("ranked:")
    for one in ranked:
        if one.fits:
            tell(line(one))
    return ranked


def _rank(plan: Plan) -> tuple[bool, float]:
    return not plan.fits, (plan.step_seconds_bound + plan.step_seconds_serial) / 2


def line(plan: Plan) -> str:
    """One candidate."""
    settings = ", ".join(f"{name} {value}" for name, value in plan.settings.items())
    if not plan.fits:
        return f"{settings}: over by {plan.hbm_used_gb - plan.hbm_gb:.1f} GB"
    times = f"{plan.step_seconds_bound * 1e3:.0f} to {plan.step_seconds_serial * 1e3:.0f} ms"
    return f"{settings}: {plan.hbm_used_gb:.1f} GB, {times}"
