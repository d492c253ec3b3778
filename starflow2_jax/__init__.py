"""STARFlow2 in JAX: one causal mechanism writes text and draws images, with exact likelihoods."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Model", "Sampling", "Turn", "load"]


def __getattr__(name: str) -> Any:
    # The command's --help must not wait for jax.
    if name in ("Model", "Sampling", "load"):
        from starflow2_jax import model

        return getattr(model, name)
    if name == "Turn":
        from starflow2_jax.data.sequences import Turn

        return Turn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
