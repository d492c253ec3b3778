"""Guidance: one Gaussian of a conditional and an unconditional one.

Letters: B rows, n tokens of this call, N tokens per image, C channels.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


def guide(
    mu_c: jax.Array, sigma_c: jax.Array, mu_u: jax.Array, sigma_u: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Classifier-free guidance of two Gaussians: (1 + w) log p_c - w log p_u, elementwise.

    Args:
        mu_c, sigma_c, mu_u, sigma_u: [..., C], conditional and unconditional.
        weight: w >= 0, broadcastable.

    Returns:
        Guided mu, sigma; with w = 0 exactly the conditional ones.
    """
    s = jnp.square(jnp.minimum(sigma_c / sigma_u, 1.0))
    q = 1.0 + weight - weight * s
    return ((1.0 + weight) * mu_c - weight * s * mu_u) / q, sigma_c / jnp.sqrt(q)


class Guidance(Protocol):
    """A rule that makes one Gaussian of a conditional and an unconditional one."""

    def __call__(
        self, mu: jax.Array, sigma: jax.Array, token: jax.Array, tokens: int
    ) -> tuple[jax.Array, jax.Array]:
        """mu, sigma [2 B, n, C], conditional rows first, of tokens `token` [n] of N: [B, n, C]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianGuidance:
    """`guide` with this weight, STARFlow's rule."""

    weight: jax.Array | float

    def __call__(
        self, mu: jax.Array, sigma: jax.Array, token: jax.Array, tokens: int
    ) -> tuple[jax.Array, jax.Array]:
        """See `Guidance`."""
        (mu_c, mu_u), (sigma_c, sigma_u) = jnp.split(mu, 2), jnp.split(sigma, 2)
        return guide(mu_c, sigma_c, mu_u, sigma_u, self.weight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogScaleGuidance:
    """Extrapolation by `weight` of mu and of log sigma, TarFlow's rule.

    Attributes:
        weight: 0 is the conditional one.
        mu, sigma: which of the two are guided.
        annealed: token n has weight n / (N - 1) of it.
    """

    weight: jax.Array | float
    mu: bool = dataclasses.field(default=True, metadata={"static": True})
    sigma: bool = dataclasses.field(default=True, metadata={"static": True})
    annealed: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(
        self, mu: jax.Array, sigma: jax.Array, token: jax.Array, tokens: int
    ) -> tuple[jax.Array, jax.Array]:
        """See `Guidance`."""
        (mu_c, mu_u), (sigma_c, sigma_u) = jnp.split(mu, 2), jnp.split(sigma, 2)
        weight = jnp.asarray(self.weight, mu.dtype)
        if self.annealed:
            weight = weight * token[:, None].astype(mu.dtype) / max(tokens - 1, 1)
        if self.mu:
            mu_c = mu_c + weight * (mu_c - mu_u)
        if self.sigma:
            sigma_c = sigma_c * jnp.exp(weight * (jnp.log(sigma_c) - jnp.log(sigma_u)))
        return mu_c, sigma_c
