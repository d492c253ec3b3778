"""The family's discriminator: a convolutional critic of patches, and the averages of its logits.

Letters: B images, H, W pixels, C channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from starflow2_jax.nn import layers


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Shape of the critic.

    Attributes:
        width: channels of the first stage.
        multipliers: of it, after each stage; a stage halves the picture.
        side: logits along the edge of a picture, whatever its size.
        groups: of the normalisation.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4)
    side: int = 16
    groups: int = 32
    channels: int = 3
    slope: float = 0.1

    def __post_init__(self) -> None:
        if self.width % self.groups:
            raise ValueError(f"{self.groups} groups do not share {self.width} channels evenly")


class Convolution(nnx.Module):
    """A convolution of one stride with the picture's size kept; kernels [h, w, in, out]."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, rngs: nnx.Rngs) -> None:
        init = layers.uniform_fan_in(in_channels * size * size)
        shape = (size, size, in_channels, out_channels)
        self.kernel = layers.parameter(rngs, init, shape, (None, None, None, None))
        self.bias = layers.parameter(rngs, init, (out_channels,), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in] -> [B, H, W, out]; in x's dtype."""
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...].astype(x.dtype)


def blur_halved(x: jax.Array) -> jax.Array:
    """Through the filter [1, 3, 3, 1], every second place: [B, H, W, C] -> [B, H/2, W/2, C]."""
    taps = np.array([1.0, 3.0, 3.0, 1.0]) / 8.0
    kernel = jnp.asarray(np.outer(taps, taps), x.dtype)[:, :, None, None]
    channels = x.shape[-1]
    return jax.lax.conv_general_dilated(
        x,
        jnp.tile(kernel, (1, 1, 1, channels)),
        window_strides=(2, 2),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )


def pooled(x: jax.Array, side: int) -> jax.Array:
    """Maxima over side x side windows that cover [B, H, W, C] evenly, as torch's adaptive pool."""
    for axis in (1, 2):
        size = x.shape[axis]
        edges = [(i * size // side, -(-(i + 1) * size // side)) for i in range(side)]
        # Pair by pair: the gradient of a maximum over an axis goes to those that equal it. In a
        # training step over several CPU devices that comparison found none, and 0 / 0 is NaN.
        places = [jax.lax.index_in_dim(x, i, axis, keepdims=False) for i in range(size)]
        maxima = [functools.reduce(jnp.maximum, places[first:end]) for first, end in edges]
        x = jnp.stack(maxima, axis=axis)
    return x


class GroupNorm(nnx.Module):
    """Over places and the channels of a group, statistics in at least float32; eps 1e-5."""

    def __init__(self, channels: int, groups: int) -> None:
        self.groups = groups
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32), logical=(None,))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32), logical=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> the same, in x's dtype."""
        wide = x.astype(layers.at_least_float32(x.dtype))
        grouped = wide.reshape(*x.shape[:3], self.groups, -1)
        centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
        variance = jnp.square(centred).mean((1, 2, 4), keepdims=True)
        normed = (centred * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class Discriminator(nnx.Module):
    """conv5, stages of conv3 + blur + norm, a pool to side x side, conv1, conv5 to one logit."""

    def __init__(self, config: DiscriminatorConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        widths = [config.width * m for m in (1, *config.multipliers)]
        self.first = Convolution(config.channels, config.width, 5, rngs=rngs)
        self.stages = nnx.List(
            [Convolution(a, b, 3, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False)]
        )
        self.norms = nnx.List([GroupNorm(width, config.groups) for width in widths[1:]])
        self.middle = Convolution(widths[-1], widths[-1], 1, rngs=rngs)
        self.last = Convolution(widths[-1], 1, 5, rngs=rngs)
        # Running means of the logits of real and of made pictures, which no gradient descends: see
        # `training.fae_step`.
        self.averages = nnx.Param(jnp.zeros((2,), jnp.float32), logical=(None,))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, H, W, channels], 0 black and 1 white -> logits [B, side, side, 1]."""
        act = lambda x: jax.nn.leaky_relu(x, self.config.slope)
        x = act(self.first(pixels))
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = act(norm(blur_halved(stage(x))))
        x = pooled(x, self.config.side)
        logits = self.last(act(self.middle(x)))
        return logits.astype(layers.at_least_float32(logits.dtype))
