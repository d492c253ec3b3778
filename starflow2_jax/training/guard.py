"""Updates that are left out: of steps whose loss or gradient is no number, or a spike."""

from typing import Any

import jax
import jax.numpy as jnp

Guard = dict[str, jax.Array]

_MEMORY = 0.99
"""Of the average of the gradient's norm, per step."""


def new_guard() -> Guard:
    """Before the first step: `norm`, the average norm (0: none yet); `skipped`; `in_a_row`."""
    zero = jnp.zeros((), jnp.int32)
    return {"norm": jnp.zeros((), jnp.float32), "skipped": zero, "in_a_row": zero}


def judge(guard: Guard, loss: jax.Array, norm: jax.Array, spike: float) -> tuple[jax.Array, Guard]:
    """Whether a step's update is to be made.

    Args:
        guard: before the step.
        loss: of the step, scalar.
        norm: of its gradient, scalar.
        spike: a norm of more than this many times the average of the updates made is one; 0: none
            is.

    Returns:
        A bool scalar, and the guard after the step.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    average = guard["norm"]
    if spike:
        good &= (average == 0) | (norm <= spike * average)
    moved = jnp.where(average == 0, norm, _MEMORY * average + (1 - _MEMORY) * norm)
    skip = (~good).astype(jnp.int32)
    return good, {
        "norm": jnp.where(good, moved, average).astype(average.dtype),
        "skipped": guard["skipped"] + skip,
        "in_a_row": (guard["in_a_row"] + 1) * skip,
    }


def chosen(good: jax.Array, new: Any, old: Any) -> Any:
    """The new tree, or bit for bit the old one."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
