"""CLIP: one space for pictures and words, and how well a picture goes with a caption.

Specification: arXiv 2103.00020 and the published configs. Letters: B pictures or texts, H, W
pixels, N patches (raster), T text positions, D a tower's width, E width of the common space.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from starflow2_jax.nn import decoder, grid, layers
from starflow2_jax.nn.attention import AttentionSpec
from starflow2_jax.nn.layers import LayerNorm, Linear


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Shape of one tower.

    Attributes:
        mlp: the activation: exact GELU, or OpenAI's approximation.
    """

    layers: int
    width: int
    heads: int
    mlp_width: int
    mlp: Literal["gelu", "quick_gelu"] = "quick_gelu"
    norm_epsilon: float = 1e-5

    def decoder(self) -> decoder.DecoderConfig:
        """Pre-norm layers with biases everywhere; what comes last is the towers' own."""
        return decoder.DecoderConfig(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.width // self.heads,
            mlp_width=self.mlp_width,
            norm="layer",
            mlp=self.mlp,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            norm_epsilon=self.norm_epsilon,
        )


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Shape of a CLIP.

    Attributes:
        text, vision: the towers.
        vocab_size: of the text's tokens.
        context: T, most tokens of a text, its first and last one included.
        side, patch: pixels along the edge of a picture and of a patch.
        width: E.
    """

    text: TowerConfig
    vision: TowerConfig
    vocab_size: int
    context: int
    side: int
    patch: int
    width: int


def _table(rngs: nnx.Rngs, rows: int, width: int) -> nnx.Param:
    normal = lambda key, shape, dtype: 0.02 * jax.random.normal(key, shape, dtype)
    return layers.parameter(rngs, normal, (rows, width), (None, "embed"))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class TextTower(nnx.Module):
    """Tokens to the state of the last one."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs) -> None:
        tower = config.text
        self.tokens = _table(rngs, config.vocab_size, tower.width)
        self.positions = _table(rngs, config.context, tower.width)
        self.decoder = decoder.Decoder(tower.decoder(), rngs=rngs)
        self.final_norm = LayerNorm(tower.width, rngs=rngs, epsilon=tower.norm_epsilon)

    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Tokens int32 [B, T] and how many of them a text has, int32 [B] -> [B, D]."""
        x = self.tokens[...][tokens] + self.positions[...][: tokens.shape[1]]
        x = self.decoder(x, None, AttentionSpec())[0]
        return self.final_norm(x[jnp.arange(len(x)), lengths - 1])


class VisionTower(nnx.Module):
    """Pixels to the state of the class token."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        tower, places = config.vision, (config.side // config.patch) ** 2
        self.patch_embedding = Linear(
            3 * config.patch**2, tower.width, rngs=rngs, logical=(None, "embed"), bias=False
        )
        self.cls = layers.parameter(rngs, layers.zeros, (tower.width,), ("embed",))
        self.positions = _table(rngs, 1 + places, tower.width)  # the class token's first
        self.first_norm = LayerNorm(tower.width, rngs=rngs, epsilon=tower.norm_epsilon)
        self.decoder = decoder.Decoder(tower.decoder(), rngs=rngs)
        self.final_norm = LayerNorm(tower.width, rngs=rngs, epsilon=tower.norm_epsilon)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Normalised pixels [B, H, W, 3] of the model's size -> [B, D]."""
        patches = self.patch_embedding(grid.to_patches(images, self.config.patch))
        cls = jnp.broadcast_to(self.cls[...], (len(images), 1, patches.shape[-1]))
        x = self.first_norm(jnp.concatenate([cls, patches], 1) + self.positions[...])
        x = self.decoder(x, None, AttentionSpec(causal=False))[0]
        return self.final_norm(x[:, 0])


class Clip(nnx.Module):
    """Both towers and their maps into the common space."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.text, self.vision = TextTower(config, rngs=rngs), VisionTower(config, rngs=rngs)
        into = lambda width: Linear(
            width, config.width, rngs=rngs, logical=("embed", None), bias=False
        )
        self.text_projection = into(config.text.width)
        self.visual_projection = into(config.vision.width)

    def embed_text(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """As `TextTower` -> unit vectors [B, E]."""
        return _unit(self.text_projection(self.text(tokens, lengths)))

    def embed_images(self, images: jax.Array) -> jax.Array:
        """As `VisionTower` -> unit vectors [B, E]."""
        return _unit(self.visual_projection(self.vision(images)))
