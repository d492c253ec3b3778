"""Block Jacobi sampling: AF blocks inverted several tokens at a time by fixed-point iteration.

A chunk of tokens starts from the noise. Each pass computes all its Gaussians from the estimate of
the pass before, until the estimate hardly changes. STARFlow (arXiv 2506.06276).
Letters: B rows, N tokens, n unknown tokens (N, or N - 1 without a start vector), C channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from starflow2_jax.models.af_block import AFBlock, Given, Inversion, Inverter, stretches
from starflow2_jax.models.guidance import Guidance
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.nn import decoder


@dataclasses.dataclass(frozen=True)
class JacobiConfig:
    """When a chunk is done.

    Attributes:
        chunk: tokens that are solved for together.
        threshold: a pass that changes the chunk by less than this is the last: mean square of the
            change over mean square of the result, over all rows. 0 never stops early.
        max_passes: at most this many. With chunk + 1 of them the result is exact.
    """

    chunk: int = 64
    threshold: float = 5e-3
    max_passes: int = 32

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.max_passes < 1:
            raise ValueError("chunk and max_passes are at least 1")


def _solve(
    inversion: Inversion,
    config: JacobiConfig,
    first: jax.Array,
    size: int,
    estimate: jax.Array,
    cache: decoder.Cache,
) -> tuple[jax.Array, decoder.Cache, jax.Array]:
    """Solves for the `size` tokens that the slots from `first` on predict.

    Args:
        inversion, config: of the block.
        first: scalar.
        size: of the chunk.
        estimate: [B, n + 1, C], the lead and every unknown token.
        cache: of all slots before.

    Returns:
        The estimate, the cache with the slots of the chunk in it, and the number of passes.
    """
    noise = jax.lax.dynamic_slice_in_dim(inversion.noise, first, size, axis=1)
    length = cache["length"]

    def going_on(state: tuple) -> jax.Array:
        _, _, passes, change = state
        return (passes == 0) | ((passes < config.max_passes) & ~(change < config.threshold))

    def one_pass(state: tuple) -> tuple:
        estimate, cache, passes, _ = state
        # Rolled back: the slots of the last pass lie behind the end, and are written over. Those
        # that stay were made from the inputs of the last pass, not from its results.
        cache = {**cache, "length": length}
        inputs = jax.lax.dynamic_slice_in_dim(estimate, first, size, axis=1)
        old = jax.lax.dynamic_slice_in_dim(estimate, first + 1, size, axis=1)
        mu, sigma, cache = inversion.gaussians(inputs, first, cache)
        new = mu + sigma * noise
        change = jnp.square(new - old).mean() / jnp.square(new).mean()
        estimate = jax.lax.dynamic_update_slice_in_dim(estimate, new, first + 1, axis=1)
        return estimate, cache, passes + 1, change

    start = (estimate, cache, jnp.int32(0), jnp.zeros((), estimate.dtype))
    estimate, cache, passes, _ = jax.lax.while_loop(going_on, one_pass, start)
    return estimate, cache, passes


def inverse(
    block: AFBlock,
    z: jax.Array,
    angles: jax.Array | None,
    dtype: jnp.dtype,
    given: Given = Given(),
    guidance: Guidance | None = None,
    *,
    config: JacobiConfig,
) -> tuple[jax.Array, jax.Array]:
    """Noise to data, chunk after chunk.

    Args:
        block: any AF block.
        z, angles, dtype, given, guidance: see `AFBlock.forward`.
        config: when a chunk is done.

    Returns:
        u [B, N, C], and the passes of each chunk, int32 [ceil(n / chunk)].
    """
    inversion = block.inversion(z, angles, dtype, given, guidance)
    estimate = jnp.concatenate([inversion.lead, inversion.noise], axis=1)
    unknown = inversion.noise.shape[1]
    whole, rest = divmod(unknown, config.chunk)

    def chunk(carry: tuple, first: jax.Array) -> tuple:
        estimate, cache, passes = _solve(inversion, config, first, config.chunk, *carry)
        return (estimate, cache), passes

    cache, passes = inversion.cache, [jnp.zeros((0,), jnp.int32)]
    for begin, end in stretches(whole * config.chunk, config.chunk):
        cache = inversion.room(cache, end)
        (estimate, cache), taken = jax.lax.scan(
            chunk, (estimate, cache), jnp.arange(begin, end, config.chunk)
        )
        passes.append(taken)
    if rest:
        cache = inversion.room(cache, unknown)
        first = jnp.asarray(whole * config.chunk)
        estimate, _, last = _solve(inversion, config, first, rest, estimate, cache)
        passes.append(last[None])
    return inversion.whole(estimate[:, 1:]), jnp.concatenate(passes)


def inverter(config: JacobiConfig) -> Inverter:
    """The sampler for `ImageFlow.reverse` and `ShallowFlow.inverse_by`; it notes the passes."""

    def invert(block: AFBlock, *args: object) -> tuple[jax.Array, jax.Array]:
        return inverse(block, *args, config=config)

    return invert


@functools.partial(jax.jit, static_argnames="config")
def to_x(model: Pretzel, u: jax.Array, config: JacobiConfig) -> tuple[jax.Array, list[jax.Array]]:
    """`display.to_x` by Jacobi iteration.

    Args:
        model: whose shallow flow is inverted.
        u: [..., N, C], at least float32.
        config: when a chunk is done.

    Returns:
        x [..., N, C], and the passes of each chunk of the shallow blocks, the last block first.
    """
    flat = u.reshape(-1, *u.shape[-2:])
    dtype = jnp.dtype(model.config.dtype)
    x, passes = model.shallow.inverse_by(inverter(config), flat, dtype)
    return x.reshape(u.shape), passes
