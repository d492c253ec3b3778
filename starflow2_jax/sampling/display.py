"""Between the latents u of the deep stream and the latents x of an image, off the critical path.

Letters: B rows, T positions, I images, N tokens per image, C latent channels.
"""

import jax
import jax.numpy as jnp

from starflow2_jax.models.pretzel import Pretzel, Rows


@jax.jit
def to_x(model: Pretzel, u: jax.Array) -> jax.Array:
    """Data from latents, x = f_S^-1(u): [..., N, C], at least float32."""
    flat = u.reshape(-1, *u.shape[-2:])
    return model.shallow.inverse(flat, jnp.dtype(model.config.dtype)).reshape(u.shape)


@jax.jit
def to_u(model: Pretzel, x: jax.Array) -> jax.Array:
    """Latents from data, u = f_S(x): [..., N, C], at least float32.

    x is normalised and noised as in training.
    """
    flat = x.reshape(-1, *x.shape[-2:])
    outputs, _ = model.shallow.forward(flat, jnp.dtype(model.config.dtype))
    return outputs[-1].reshape(x.shape)


@jax.jit
def score(model: Pretzel, rows: Rows, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-likelihood of each image given all before it, and its gradient by that image.

    Args:
        model: the model; no guidance enters.
        rows: see `Rows`. What follows an image changes nothing of it.
        x: [B, I, N, C].

    Returns:
        log p(x | before) [B, I] and its gradient [B, I, N, C], nats; 0 for absent images.
    """
    log_prob, pull_back = jax.vjp(lambda x: model.log_prob(rows, x).image_log_prob, x)

    def own(image: jax.Array) -> jax.Array:
        # An image is also context of those behind it: its own row of the Jacobian, no sum.
        return pull_back(jnp.zeros_like(log_prob).at[:, image].set(1.0))[0][:, image]

    gradient = jnp.moveaxis(jax.lax.map(own, jnp.arange(x.shape[1])), 0, 1)
    present = rows.image_start >= 0
    gradient = jnp.where(present[..., None, None], gradient, 0.0)
    return jnp.where(present, log_prob, 0.0), gradient


def denoise(model: Pretzel, rows: Rows, x: jax.Array, noise_std: float) -> jax.Array:
    """Removes the training noise by one score step: x + noise_std^2 * grad_x log p(x | before).

    Arguments as in `score`; noise_std is the one that the model was trained with.
    """
    return x + noise_std**2 * score(model, rows, x)[1]
