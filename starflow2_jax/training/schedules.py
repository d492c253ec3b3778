"""Learning-rate schedules of the released trainers."""

import jax
import jax.numpy as jnp
import optax


def warmup_cosine(
    warmup: int, total: int, minimum: float, maximum: float, start: float | None = None
) -> optax.Schedule:
    """Linear warm-up to `maximum`, then half a cosine to `minimum`: both STARFlow's and TarFlow's.

    Args:
        warmup: W, steps until `maximum`; the release's default is one epoch.
        total: steps until `minimum`, beyond which it stays there.
        minimum, maximum: rates.
        start: at step 0; by default the smaller one of `minimum` and 1e-6.

    Returns:
        step -> rate, where step k = 1, 2, ... is the release's counter.

    Raises:
        ValueError: the warm-up is not within the total.
    """
    if not 0 <= warmup < total:
        raise ValueError(
            f"warmup={warmup} does not fit into steps={total}: it is at least 0 and less than steps"
        )
    start = min(minimum, 1e-6) if start is None else start

    def rate(step: jax.Array | int) -> jax.Array:
        rising = start + step / max(warmup, 1) * (maximum - start)
        done = jnp.clip((step - warmup) / (total - warmup), 0.0, 1.0)
        falling = minimum + 0.5 * (1.0 + jnp.cos(jnp.pi * done)) * (maximum - minimum)
        return jnp.where(step < warmup, rising, falling)

    return rate
