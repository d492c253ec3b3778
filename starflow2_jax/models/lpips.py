"""LPIPS on VGG-16: a distance of pictures in the features of a network that sees.

Specification: arXiv 1801.03924, version 0.1. Letters: B images, H, W pixels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from starflow2_jax.models.discriminator import Convolution
from starflow2_jax.nn import layers

# Output channels of the convolutions of each part; the picture is halved between parts.
VGG_PARTS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class LPIPS(nnx.Module):
    """The network, frozen, and one weight for each channel at the end of each part."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        before, parts = 3, []
        for widths in VGG_PARTS:
            part = []
            for width in widths:
                part.append(Convolution(before, width, 3, rngs=rngs))
                before = width
            parts.append(nnx.List(part))
        self.parts = nnx.List(parts)
        self.weights = nnx.List(
            [
                nnx.Param(jnp.ones((widths[-1],), jnp.float32), logical=(None,))
                for widths in VGG_PARTS
            ]
        )

    def features(self, pixels: jax.Array) -> list[jax.Array]:
        """Pixels [B, H, W, 3], 0 black and 1 white -> the end of each part, of unit length."""
        x = (2.0 * pixels - 1.0 - jnp.asarray(_SHIFT, pixels.dtype)) / jnp.asarray(
            _SCALE, pixels.dtype
        )
        found = []
        for number, part in enumerate(self.parts):
            if number:
                x = jax.lax.reduce_window(
                    x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
                )
            for convolution in part:
                x = jax.nn.relu(convolution(x))
            wide = x.astype(layers.at_least_float32(x.dtype))
            # Under the root, so that the gradient of a place without features is finite.
            length = jnp.sqrt(jnp.square(wide).sum(-1, keepdims=True) + 1e-20)
            found.append(wide / (length + 1e-10))
        return found

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Distances [B] of pixels [B, H, W, 3], 0 black and 1 white; H and W at least 16."""
        total = jnp.zeros(len(a))
        for x, y, weight in zip(self.features(a), self.features(b), self.weights, strict=True):
            total += (jnp.square(x - y) * weight[...]).sum(-1).mean((1, 2))
        return total
