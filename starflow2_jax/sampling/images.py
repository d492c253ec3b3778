"""8-bit images from an image flow of pixels.

Letters: B images, H, W pixels, h, w patches, C channels of a patch.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.models.af_block import Given, Inverter, sequential
from starflow2_jax.models.guidance import LogScaleGuidance
from starflow2_jax.models.starflow import ImageFlow, denoise


@functools.partial(jax.jit, static_argnames=("guided", "denoised", "invert"))
def _draw(
    model: ImageFlow,
    noise: jax.Array,
    labels: jax.Array,
    weight: jax.Array,
    noise_std: jax.Array,
    *,
    guided: bool,
    denoised: bool,
    invert: Inverter,
) -> jax.Array:
    given = Given(labels=labels)
    rule = LogScaleGuidance(weight) if guided else None
    sequence, _ = model.reverse(noise, given, rule, Given(), invert)
    images = model.config.unpatchify(sequence[-1])
    if denoised:
        images = denoise(model, images, noise_std, given)
    return jnp.clip(jnp.floor((images + 1.0) * 128.0), 0, 255).astype(jnp.uint8)


def sample(
    model: ImageFlow,
    labels: Sequence[int],
    seed: int,
    *,
    guidance: float = 0.0,
    temperature: float = 1.0,
    noise_std: float = 0.0,
    invert: Inverter = sequential,
) -> np.ndarray:
    """Draws one image for each label.

    Args:
        model: a TarFlow.
        labels: B classes; -1 is no class.
        seed: of the noise.
        guidance: weight of TarFlow's rule, see `LogScaleGuidance`; 0 is off.
        temperature: scales the noise.
        noise_std: that the model was trained with, removed by one score step; 0: none.
        invert: the sampler of a block.

    Returns:
        uint8 [B, H, W, channels].
    """
    config = model.config
    shape = (len(labels), config.side, config.side, config.blocks()[-1].channels)
    noise = temperature * jax.random.normal(jax.random.key(seed), shape)
    drawn = _draw(
        model,
        noise,
        jnp.asarray(labels, jnp.int32),
        jnp.float32(guidance),
        jnp.float32(noise_std),
        guided=guidance > 0,
        denoised=noise_std > 0,
        invert=invert,
    )
    return np.asarray(drawn)
