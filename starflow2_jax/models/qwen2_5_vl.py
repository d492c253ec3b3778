"""Qwen2.5-VL as four functions: embed, see, decode, logits. The language model.

Specification: Qwen2.5-VL (arXiv 2502.13923) and its published configs.
Letters: B rows, T positions, D width, V vocabulary, d head width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from starflow2_jax.nn import decoder, layers, partition, rope
from starflow2_jax.nn.attention import AttentionSpec


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Shape of the language model; names follow the Hugging Face config where they exist."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    tied: bool
    rope_theta: float = 1e6
    rms_norm_epsilon: float = 1e-6
    remat: str = "none"

    def decoder(self) -> decoder.DecoderConfig:
        """RMSNorm, GQA with q/k/v bias, SwiGLU, final RMSNorm."""
        return decoder.DecoderConfig(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            mlp_width=self.mlp_width,
            norm="rms",
            mlp="swiglu",
            qkv_bias=True,
            out_bias=False,
            mlp_bias=False,
            norm_epsilon=self.rms_norm_epsilon,
            final_norm="rms",
            final_norm_epsilon=self.rms_norm_epsilon,
            remat=self.remat,
        )


def qwen2_5_vl_7b() -> LanguageModelConfig:
    """The language model of Qwen2.5-VL-7B."""
    return LanguageModelConfig(
        vocab_size=152064,
        width=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        mlp_width=18944,
        tied=False,
    )


class Qwen25VL(nnx.Module):
    """The frozen stream."""

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        scale = 1.0 / math.sqrt(config.width)

        def normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return scale * jax.random.normal(key, shape, dtype)

        table = (config.vocab_size, config.width)
        self.embedding = layers.parameter(rngs, normal, table, ("vocab", "embed"))
        self.decoder = decoder.Decoder(config.decoder(), rngs=rngs)
        self.head = nnx.data(
            None if config.tied else layers.parameter(rngs, normal, table, ("vocab", "embed"))
        )

    def embed(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """int32 [B, T] -> [B, T, D] in `dtype`."""
        # Gathered over the shards of its width, like every weight; a look-up in the cut table would
        # come out as the whole batch on every device.
        table = partition.constrain(self.embedding[...].astype(dtype), ("vocab", None))
        return partition.constrain(table[tokens], ("batch", "length", "embed_activation"))

    def decode(
        self,
        e: jax.Array,
        positions: jax.Array,
        spec: AttentionSpec,
        cache: decoder.Cache | None = None,
    ) -> tuple[jax.Array, decoder.Cache | None]:
        """Embeddings to hidden states y after the final RMSNorm.

        Args:
            e: [B, T, D].
            positions: int32 [3, B, T], M-RoPE ids (time, row, column).
            spec, cache: see `nn.decoder.Decoder`.

        Returns:
            y [B, T, D] and the grown cache.
        """
        angles = rope.angles_shared_ladder(
            positions,
            rope.multimodal_counts(self.config.head_dim),
            self.config.rope_theta,
            layers.at_least_float32(e.dtype),
        )
        return self.decoder(e, angles, spec, cache)

    def logits(self, y: jax.Array) -> jax.Array:
        """[..., D] -> [..., V], at least float32."""
        head = self.embedding if self.head is None else self.head
        wide = layers.at_least_float32(y.dtype)
        return jnp.einsum(
            "...d,vd->...v", y, head[...].astype(y.dtype), preferred_element_type=wide
        )
