"""Jobs of several processes: each runs the same program on its own devices."""

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from starflow2_jax.errors import UserError

SWITCH = "STARFLOW2_DISTRIBUTED"
"""Environment variable that the launchers set to 1 in every process of a job."""

_HEARTBEAT_SECONDS = 50
"""Silence after which a process counts as dead, and ends all others."""

_FAREWELL_SECONDS = 24 * 3600
"""How long the processes wait for each other at the end: one may have more to write."""


def join_job() -> None:
    """Joins the other processes of the job, where a launcher says that this process has some.

    To be called before any device is looked at. The address comes from the environment: from
    `JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or from what JAX itself
    knows of Slurm, Cloud TPU, Kubernetes and Open MPI.

    Raises:
        UserError: there is no such environment, or the others do not come.
    """
    if os.environ.get(SWITCH) != "1" or jax.distributed.is_initialized():
        return
    count, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        jax.distributed.initialize(
            num_processes=None if count is None else int(count),
            process_id=None if index is None else int(index),
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_FAREWELL_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"cannot join the job ({line}); {SWITCH}=1 is for processes that a launcher of launch/ "
            "or srun starts: unset it to run alone"
        ) from error
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        # CPU processes connect at their first collective, and wait half a minute for each other:
        # now they are together, but later one may be that far behind.
        multihost_utils.sync_global_devices("join_job")


def preempted(step: int) -> bool:
    """Whether the job is to save and end: SIGTERM has reached one of its processes.

    JAX catches the signal from `join_job` on, unless another handler is installed after it. All
    processes get the same answer at the same step, which may be a few steps after the signal. A
    process that is alone is never told.

    Args:
        step: rising from call to call, the same in all processes.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def fetch(tree: Any) -> Any:
    """Arrays as numpy arrays, whole in every process of the job; all of them make the call.

    Args:
        tree: pytree of arrays; those of which other processes hold parts are gathered.
    """

    def one(leaf: Any) -> np.ndarray:
        local = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if local or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)
