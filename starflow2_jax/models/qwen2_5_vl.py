"""Qwen2.5-VL as four functions: embed, see, decode, logits. The vision tower is a file of its own.

Specification: Qwen2.5-VL (arXiv 2502.13923) and its published configs.
Letters: B rows, T positions, D width, V vocabulary, d head width.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from starflow2_jax.models.qwen2_5_vision import (
    Views,
    VisionConfig,
    VisionTower,
    published_tower,
)
from starflow2_jax.nn import cross_entropy, decoder, layers, partition, rope
from starflow2_jax.nn.attention import AttentionSpec


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Shape of the language model, and of its vision tower where it has one."""

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
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        if self.vision is not None and self.vision.out_width != self.width:
            raise ValueError(
                f"the vision tower gives embeddings of width {self.vision.out_width}, "
                f"the language model takes {self.width}"
            )

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


def qwen2_5_vl_3b() -> LanguageModelConfig:
    """Qwen2.5-VL-3B: the embedding is the head."""
    return LanguageModelConfig(
        vocab_size=151936,
        width=2048,
        layers=36,
        heads=16,
        kv_heads=2,
        head_dim=128,
        mlp_width=11008,
        tied=True,
        vision=published_tower(out_width=2048, mlp_width=3420),
    )


def qwen2_5_vl_7b() -> LanguageModelConfig:
    """Qwen2.5-VL-7B."""
    return LanguageModelConfig(
        vocab_size=152064,
        width=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        mlp_width=18944,
        tied=False,
        vision=published_tower(out_width=3584, mlp_width=3420),
    )


def qwen2_5_vl_32b() -> LanguageModelConfig:
    """Qwen2.5-VL-32B."""
    return LanguageModelConfig(
        vocab_size=152064,
        width=5120,
        layers=64,
        heads=40,
        kv_heads=8,
        head_dim=128,
        mlp_width=27648,
        tied=False,
        vision=published_tower(out_width=5120, mlp_width=3456),
    )


def qwen2_5_vl_72b() -> LanguageModelConfig:
    """Qwen2.5-VL-72B."""
    return LanguageModelConfig(
        vocab_size=152064,
        width=8192,
        layers=80,
        heads=64,
        kv_heads=8,
        head_dim=128,
        mlp_width=29568,
        tied=False,
        vision=published_tower(out_width=8192, mlp_width=3456),
    )


def qwen2_5_vl_tiny(vocab_size: int = 512) -> LanguageModelConfig:
    """A model of the published kind, patches and windows, small enough for tests."""
    tower = VisionConfig(
        layers=4, width=32, heads=2, mlp_width=48, out_width=64, full_layers=(1, 3)
    )
    return LanguageModelConfig(
        vocab_size=vocab_size,
        width=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        mlp_width=96,
        tied=False,
        vision=tower,
    )


def from_hf(record: Mapping[str, Any]) -> LanguageModelConfig:
    """The shape that a Hugging Face `config.json` describes.

    Args:
        record: the file's content; text keys at its top level or under `text_config`, keys that
            are absent as `transformers` fills them.

    Raises:
        ValueError: another architecture, or a variant that this model does not have; names the key.
    """
    if record.get("model_type") != "qwen2_5_vl":
        raise ValueError(f"model_type is {record.get('model_type')!r}, expected 'qwen2_5_vl'")
    from transformers import Qwen2_5_VLConfig  # takes seconds, and only conversion needs it

    try:
        whole = Qwen2_5_VLConfig.from_dict(dict(record))
    except Exception as error:
        raise ValueError(f"not a Qwen2.5-VL config: {' '.join(str(error).split())}") from error
    text, tower = whole.text_config, whole.vision_config
    head_dim = text.hidden_size // text.num_attention_heads
    if text.hidden_size % text.num_attention_heads:
        raise ValueError(
            f"hidden_size {text.hidden_size} is no multiple of the "
            f"{text.num_attention_heads} num_attention_heads"
        )
    rope_parameters = text.rope_parameters
    found_and_expected = {
        "use_sliding_window": (bool(text.use_sliding_window), False),
        "hidden_act": (text.hidden_act, "silu"),
        "vision_config.hidden_act": (tower.hidden_act, "silu"),
        "rope_scaling.rope_type": (rope_parameters.get("rope_type", "default"), "default"),
        "rope_scaling.mrope_section": (
            tuple(rope_parameters.get("mrope_section", (16, 24, 24))),
            rope.multimodal_counts(head_dim),
        ),
    }
    for key, (found, expected) in found_and_expected.items():
        if found != expected:
            raise ValueError(f"{key} is {found!r}, this model has {expected!r}")
    vision = VisionConfig(
        layers=tower.depth,
        width=tower.hidden_size,
        heads=tower.num_heads,
        mlp_width=tower.intermediate_size,
        out_width=tower.out_hidden_size,
        full_layers=tuple(tower.fullatt_block_indexes),
        channels=tower.in_channels,
        patch=tower.patch_size,
        frames=tower.temporal_patch_size,
        merge=tower.spatial_merge_size,
        window=tower.window_size,
    )
    return LanguageModelConfig(
        vocab_size=text.vocab_size,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        mlp_width=text.intermediate_size,
        tied=bool(whole.tie_word_embeddings),
        rope_theta=float(rope_parameters["rope_theta"]),
        rms_norm_epsilon=text.rms_norm_eps,
        vision=vision,
    )


def from_json(record: Mapping[str, Any]) -> LanguageModelConfig:
    """The inverse of `dataclasses.asdict` of a `LanguageModelConfig`."""
    fields = dict(record)
    if fields.get("vision") is not None:
        vision = dict(fields["vision"])
        vision["full_layers"] = tuple(vision["full_layers"])
        fields["vision"] = VisionConfig(**vision)
    return LanguageModelConfig(**fields)


class Qwen25VL(nnx.Module):
    """The frozen stream."""

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        scale = 1.0 / math.sqrt(config.width)

        def normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return scale * jax.random.normal(key, shape, dtype)

        table = (config.vocab_size, config.width)
        self.embedding = layers.parameter(rngs, normal, table, (None, "table"))
        self.decoder = decoder.Decoder(config.decoder(), rngs=rngs)
        self.head = nnx.data(
            None if config.tied else layers.parameter(rngs, normal, table, ("vocab", "embed"))
        )
        self.tower = nnx.data(
            None if config.vision is None else VisionTower(config.vision, rngs=rngs)
        )

    def embed(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """int32 [B, T] -> [B, T, D] in `dtype`."""
        rows = partition.look_up(self.embedding[...].astype(dtype), tokens)
        return partition.constrain(rows, ("batch", "length", "embed_activation"))

    def see(self, views: Views, dtype: jnp.dtype) -> jax.Array:
        """Embeddings of the pictures at their positions of the rows: [B, T, D], zero elsewhere.

        Raises:
            ValueError: the model has no vision tower.
        """
        if self.tower is None:
            raise ValueError("this model has no vision tower")
        tokens = self.tower(views, dtype)  # [B, K M, D]
        place = (jnp.maximum(views.index, 0) // self.config.vision.merge**2)[..., None]
        seen = jnp.where(views.index[..., None] >= 0, jnp.take_along_axis(tokens, place, 1), 0)
        return partition.constrain(seen, ("batch", "length", "embed_activation"))

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
        # The table lies by rows: one vector for each row of a sampler reads it once.
        if layers.rows_are_faster() and jax.sharding.get_abstract_mesh().empty:
            return layers.product_by_rows(y, head[...], wide)
        names = ("table", None) if self.head is None else ("embed", "vocab")
        return partition.product(y, head[...].T, names, wide)

    def token_log_prob(self, y: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log softmax(logits(y)) at one token each, and the log partition; never all logits.

        Args:
            y: [B, T, D].
            tokens: int32 [B, T].

        Returns:
            Two arrays [B, T], at least float32; nats.
        """
        head = self.embedding if self.head is None else self.head
        return cross_entropy.token_log_prob(y, head[...], tokens)
