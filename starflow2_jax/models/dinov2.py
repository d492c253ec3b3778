"""DINOv2: a vision transformer whose patch tokens are the FAE's features.

Specification: DINOv2 (arXiv 2304.07193), with registers (arXiv 2309.16588), and their published
configs. Letters: B images, H, W pixels, N patches (raster), R registers, D width, P numbers of a
patch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from starflow2_jax.nn import decoder, grid, layers, partition
from starflow2_jax.nn.attention import AttentionSpec

Interpolation = Literal["size", "offset", "antialias"]

# How far the scale of the "offset" rule lies above the ratio of the sizes, in patches.
_OFFSET = 0.1


@dataclasses.dataclass(frozen=True)
class DinoV2Config:
    """Shape of a DINOv2.

    Attributes:
        mlp: "gelu", or "swiglu" (giant), whose `mlp_width` is one of its two halves.
        table_side: patches along the edge of the table of positions.
        interpolation: bicubic, of the table to a grid of another size: "size", to that size
            (`transformers` without registers); "offset", by the scale (side + 0.1) / table_side
            (the original without registers); "antialias", to that size with antialias (both with
            registers).
        layer_scale: start of the layers' gains.
        mean, std: of each channel of pixels in [0, 1], which the model takes normalised.
    """

    layers: int
    width: int
    heads: int
    mlp_width: int
    mlp: Literal["gelu", "swiglu"] = "gelu"
    registers: int = 0
    patch: int = 14
    table_side: int = 37
    channels: int = 3
    interpolation: Interpolation = "size"
    layer_scale: float = 1.0
    norm_epsilon: float = 1e-6
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not share a width of {self.width} evenly")
        if self.interpolation not in ("size", "offset", "antialias"):
            raise ValueError(f"no rule of interpolation {self.interpolation!r}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std must have {self.channels} numbers each")

    def decoder(self) -> decoder.DecoderConfig:
        """LayerNorms, the last one too, full attention and MLP with biases, layer scale."""
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
            final_norm="layer",
            final_norm_epsilon=self.norm_epsilon,
            remat=self.remat,
            layer_scale=self.layer_scale,
        )


def swiglu_width(hidden: int) -> int:
    """DINOv2's width of a SwiGLU in place of an MLP of this width: 2/3 of it, a multiple of 8."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def _published(layers: int, width: int, heads: int, registers: bool) -> DinoV2Config:
    return DinoV2Config(
        layers=layers,
        width=width,
        heads=heads,
        mlp_width=4 * width,
        registers=4 if registers else 0,
        interpolation="antialias" if registers else "size",
    )


def dinov2_small(registers: bool = False) -> DinoV2Config:
    """ViT-S/14: 22 M parameters."""
    return _published(12, 384, 6, registers)


def dinov2_base(registers: bool = False) -> DinoV2Config:
    """ViT-B/14: 87 M parameters."""
    return _published(12, 768, 12, registers)


def dinov2_large(registers: bool = False) -> DinoV2Config:
    """ViT-L/14: 304 M parameters."""
    return _published(24, 1024, 16, registers)


def dinov2_giant(registers: bool = False) -> DinoV2Config:
    """ViT-g/14: 1.14 G parameters."""
    config = _published(40, 1536, 24, registers)
    return dataclasses.replace(config, mlp="swiglu", mlp_width=swiglu_width(config.mlp_width))


def from_json(fields: Mapping[str, Any]) -> DinoV2Config:
    """The inverse of `dataclasses.asdict`."""
    return DinoV2Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What DINOv2 makes of pictures, after the final LayerNorm.

    Attributes:
        cls: [B, D].
        registers: [B, R, D].
        patches: [B, N, D], raster.
    """

    cls: jax.Array
    registers: jax.Array
    patches: jax.Array


class DinoV2(nnx.Module):
    """Patch embedding, CLS and register tokens, a table of positions, a stack of layers."""

    def __init__(self, config: DinoV2Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.width
        small = lambda key, shape, dtype: (
            0.02 * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)
        )
        self.patch_embedding = layers.Linear(
            config.channels * config.patch**2, width, rngs=rngs, logical=(None, "embed")
        )
        self.cls = layers.parameter(rngs, small, (width,), ("embed",))
        self.mask = layers.parameter(rngs, layers.zeros, (width,), ("embed",))
        self.registers = nnx.data(
            layers.parameter(rngs, small, (config.registers, width), (None, "embed"))
            if config.registers
            else None
        )
        # The CLS token's position first.
        self.positions = layers.parameter(
            rngs, small, (1 + config.table_side**2, width), (None, "embed")
        )
        self.decoder = decoder.Decoder(config.decoder(), rngs=rngs)

    def normalise(self, images: jax.Array) -> jax.Array:
        """Pixels in [0, 1], [..., channels], to what `__call__` takes."""
        mean = jnp.asarray(self.config.mean, images.dtype)
        return (images - mean) / jnp.asarray(self.config.std, images.dtype)

    def position_table(self, rows: int, columns: int, dtype: jnp.dtype) -> jax.Array:
        """The table for a grid of rows x columns patches: [1 + N, D], CLS first.

        Interpolated in at least float32.
        """
        c = self.config
        table = self.positions[...].astype(layers.at_least_float32(dtype))
        if (rows, columns) == (c.table_side, c.table_side):
            return table.astype(dtype)

        def matrix(side: int) -> jax.Array:
            if c.interpolation == "offset":
                scale = (side + _OFFSET) / c.table_side
                return grid.bicubic_matrix(c.table_side, side, scale=scale)
            return grid.bicubic_matrix(c.table_side, side, c.interpolation == "antialias")

        square = table[1:].reshape(c.table_side, c.table_side, c.width)
        resized = grid.resample(square, matrix(rows), matrix(columns)).reshape(-1, c.width)
        return jnp.concatenate([table[:1], resized]).astype(dtype)

    def embed(self, images: jax.Array, masked: jax.Array | None = None) -> jax.Array:
        """The stack's input: CLS, registers, patches.

        Args:
            images: [B, H, W, channels], normalised; their dtype is the compute dtype.
            masked: bool [B, N] or None; patches that the mask token stands for.

        Returns:
            [B, 1 + R + N, D].

        Raises:
            ValueError: the patches do not fill the images.
        """
        c, dtype = self.config, images.dtype
        b, height, width, _ = images.shape
        patches = self.patch_embedding(grid.to_patches(images, c.patch))
        if masked is not None:
            patches = jnp.where(masked[..., None], self.mask[...].astype(dtype), patches)
        table = self.position_table(height // c.patch, width // c.patch, dtype)
        repeated = lambda a: jnp.broadcast_to(a, (b, *a.shape))
        parts = [repeated(self.cls[...].astype(dtype)[None] + table[:1]), patches + table[1:]]
        if self.registers is not None:
            parts.insert(1, repeated(self.registers[...].astype(dtype)))
        tokens = jnp.concatenate(parts, axis=1)
        return partition.constrain(tokens, ("batch", "length", "embed_activation"))

    def __call__(self, images: jax.Array, masked: jax.Array | None = None) -> Tokens:
        """Tokens of pictures; arguments and errors as of `embed`, in the images' dtype."""
        spec = AttentionSpec(causal=False)
        hidden = self.decoder(self.embed(images, masked), None, spec)[0]
        first = 1 + self.config.registers
        return Tokens(hidden[:, 0], hidden[:, 1:first], hidden[:, first:])
