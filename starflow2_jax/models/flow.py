"""The flow of the Pretzel: the shallow flow, image by image, and the deep block over a whole row.

Specification: STARFlow (arXiv 2506.06276), STARFlow2 (arXiv 2605.08029).
Letters: B rows, N tokens per image, C latent channels, D width (of the flow), S shallow blocks.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from starflow2_jax.models.af_block import (
    SOFTPLUS_OF_ONE,
    AFBlock,
    BlockConfig,
    GaussianHead,
    Given,
    Inverter,
    Scale,
    sequential,
)
from starflow2_jax.models.guidance import guide
from starflow2_jax.nn import decoder, layers, rope

__all__ = [
    "SOFTPLUS_OF_ONE",
    "AFBlock",
    "DeepBlock",
    "FlowConfig",
    "GaussianHead",
    "ShallowFlow",
    "guide",
    "standard_normal_log_prob",
]

LOG_TWO_PI = 1.8378770664093453


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Shape of the flow.

    Attributes:
        channels: C of a token.
        side: tokens along each side of an image; N = side^2.
        shallow_layers: layers of each shallow block, from the data side.
        shallow_orders: "keep" or "flip" of the token order, one for each shallow block.
        soft_clip: a of o <- a tanh(o / a) on the head's output.
    """

    channels: int
    side: int
    width: int
    head_dim: int
    deep_layers: int
    shallow_layers: tuple[int, ...]
    shallow_orders: tuple[Literal["keep", "flip"], ...]
    mlp_ratio: int = 4
    soft_clip: float = 4.0
    rope_theta: float = 1e4
    layer_norm_epsilon: float = 1e-5
    rms_norm_epsilon: float = 1e-6
    remat: decoder.Remat = "none"

    def __post_init__(self) -> None:
        if len(self.shallow_layers) != len(self.shallow_orders):
            raise ValueError("shallow_layers and shallow_orders differ in length")
        if self.width % self.head_dim:
            raise ValueError(f"width {self.width} is not a multiple of head_dim {self.head_dim}")

    @property
    def tokens(self) -> int:
        """N."""
        return self.side * self.side

    @property
    def scale(self) -> Scale:
        """The scale map of every block."""
        return "softplus"

    def block(self, depth: int, order: Literal["keep", "flip"] = "keep") -> BlockConfig:
        """The AF block of this flow with `depth` layers: start vector, softplus, final norm."""
        return BlockConfig(
            channels=self.channels,
            width=self.width,
            head_dim=self.head_dim,
            layers=depth,
            flip=order == "flip",
            scale=self.scale,
            soft_clip=self.soft_clip,
            mlp_ratio=self.mlp_ratio,
            layer_norm_epsilon=self.layer_norm_epsilon,
            rms_norm_epsilon=self.rms_norm_epsilon,
            remat=self.remat,
        )

    def decoder(self, depth: int) -> decoder.DecoderConfig:
        """The transformer of a block with `depth` layers."""
        return self.block(depth).decoder()


class ShallowFlow(nnx.Module):
    """f_S: a few AF blocks over each image alone, without text; u = f_S(x)."""

    def __init__(self, config: FlowConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.blocks = nnx.List(
            [
                AFBlock(config.block(depth, order), rngs=rngs)
                for depth, order in zip(config.shallow_layers, config.shallow_orders, strict=True)
            ]
        )

    def _angles(self, dtype: jnp.dtype) -> jax.Array:
        # Slot m carries token m - 1 and rotates by the raster coordinate of m, also when flipped.
        side, quarter = self.config.side, self.config.head_dim // 4
        return rope.angles_ladder_per_axis(
            rope.raster_coordinates(side, side), (quarter, quarter), self.config.rope_theta, dtype
        )[None]

    def forward(self, x: jax.Array, dtype: jnp.dtype) -> tuple[list[jax.Array], list[jax.Array]]:
        """Data to latents u, all blocks.

        Args:
            x: [B, N, C] raster order, at least float32.
            dtype: compute dtype.

        Returns:
            Outputs of the S blocks (the last one is u) and their log-dets per element, both
            [B, N, C] in raster order.
        """
        angles = self._angles(x.dtype)
        outputs, log_dets = [], []
        for block in self.blocks:
            z, log_det = block.forward(x[:, block.order], angles, dtype)
            x = z[:, block.order]
            outputs.append(x)
            log_dets.append(log_det[:, block.order])
        return outputs, log_dets

    def inverse(self, u: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """u [B, N, C] back to x [B, N, C]."""
        return self.inverse_by(sequential, u, dtype)[0]

    def inverse_by(
        self, invert: Inverter, u: jax.Array, dtype: jnp.dtype
    ) -> tuple[jax.Array, list[Any]]:
        """u [B, N, C] back to x [B, N, C], and the notes of each block, the last block's first."""
        angles = self._angles(u.dtype)
        notes = []
        for block in reversed(list(self.blocks)):
            x, note = invert(block, u[:, block.order], angles, dtype, Given(), None)
            u = x[:, block.order]
            notes.append(note)
        return u, notes


class DeepBlock(nnx.Module):
    """The deep block: one causal stack over the whole row, and the Gaussian head.

    It has no start vector: the position before an image predicts its first token.
    """

    def __init__(self, config: FlowConfig, text_width: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.proj_text = layers.Linear(
            text_width, config.width, rngs=rngs, logical=("embed", "embed_out")
        )
        self.proj_u = layers.Linear(
            config.channels, config.width, rngs=rngs, logical=(None, "embed")
        )
        self.decoder = decoder.Decoder(config.decoder(config.deep_layers), rngs=rngs)
        self.head = GaussianHead(config, rngs=rngs)

    def angles(self, positions: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Angles [B, T, d/2] of positions [3, B, T] (time, row, column): row, column, time."""
        time, row, column = rope.multimodal_counts(self.config.head_dim)
        return rope.angles_ladder_per_axis(
            positions[jnp.array([1, 2, 0])], (row, column, time), self.config.rope_theta, dtype
        )


def standard_normal_log_prob(z: jax.Array) -> jax.Array:
    """log N(z; 0, 1), elementwise, nats."""
    return -0.5 * (jnp.square(z) + LOG_TWO_PI)
