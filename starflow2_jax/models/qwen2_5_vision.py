"""Qwen2.5-VL's vision tower: images of any size to embeddings of the language model.

Specification: Qwen2.5-VL (arXiv 2502.13923) and its published configs.
A picture is cut into patches; merge x merge of them become one token. The tower holds the tokens
window by window, windows at the right and bottom edge filled up with padding, so that a window
always is the same number of places and its attention costs the same wherever it is.

Letters: B rows, K tower rows per row, S places for patches in a tower row, M = S / merge^2 tokens
of it, P numbers of a patch, D width of the tower, d head width, T positions of the language model.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from starflow2_jax.nn import decoder, layers, partition, rope
from starflow2_jax.nn.attention import AttentionSpec


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower.

    Attributes:
        out_width: width of the language model.
        full_layers: layers that attend over the whole image; the others see one window.
        patch: pixels along the edge of a patch.
        frames: frames of a patch; a still image is the same frame each time.
        merge: patches along the edge of one token.
        window: pixels along the edge of a window.
    """

    layers: int
    width: int
    heads: int
    mlp_width: int
    out_width: int
    full_layers: tuple[int, ...]
    channels: int = 3
    patch: int = 14
    frames: int = 2
    merge: int = 2
    window: int = 112
    rope_theta: float = 1e4
    norm_epsilon: float = 1e-6
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.width % (4 * self.heads):
            raise ValueError(
                f"{self.heads} heads of a tower of width {self.width}: the head width must be a "
                "multiple of 4, half of its angles for rows and half for columns"
            )
        if self.window % (self.patch * self.merge):
            raise ValueError(
                f"windows of {self.window} pixels do not hold whole tokens of "
                f"{self.patch * self.merge} pixels"
            )
        if any(layer not in range(self.layers) for layer in self.full_layers):
            raise ValueError(f"full_layers {self.full_layers} of a tower of {self.layers} layers")

    @property
    def window_tokens(self) -> int:
        """Tokens along the edge of a window."""
        return self.window // (self.patch * self.merge)

    @property
    def window_places(self) -> int:
        """Patches of a full window."""
        return (self.window // self.patch) ** 2

    @property
    def patch_numbers(self) -> int:
        """P: channels x patch x patch, of one frame."""
        return self.channels * self.patch**2

    def decoder(self) -> decoder.DecoderConfig:
        """RMSNorm, full multi-head attention with biases, SwiGLU with biases, final RMSNorm."""
        return decoder.DecoderConfig(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.width // self.heads,
            mlp_width=self.mlp_width,
            norm="rms",
            mlp="swiglu",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            norm_epsilon=self.norm_epsilon,
            final_norm="rms",
            final_norm_epsilon=self.norm_epsilon,
            remat=self.remat,
            window=self.window_places,
            whole_layers=self.full_layers,
        )


def published_tower(out_width: int, mlp_width: int) -> VisionConfig:
    """The tower that all published sizes share but for these two widths."""
    return VisionConfig(
        layers=32,
        width=1280,
        heads=16,
        mlp_width=mlp_width,
        out_width=out_width,
        full_layers=(7, 15, 23, 31),
    )


@dataclasses.dataclass(frozen=True)
class GridLayout:
    """Where the tower holds a grid of patches.

    Attributes:
        tokens: int32 [m], the token (raster) at each place for one, -1 where there is none; whole
            windows.
        patches: int32 [s], the same for patches, counted token by token.
        coordinates: int32 [s, 2], row and column of each patch, 0 where there is none.
    """

    tokens: np.ndarray
    patches: np.ndarray
    coordinates: np.ndarray


def grid_layout(config: VisionConfig, rows: int, columns: int) -> GridLayout:
    """The layout of rows x columns patches.

    Raises:
        ValueError: they are not whole tokens.
    """
    merge, window = config.merge, config.window_tokens
    if min(rows, columns) < merge or rows % merge or columns % merge:
        raise ValueError(f"{rows} x {columns} patches are not tokens of {merge} x {merge} patches")
    height, width = rows // merge, columns // merge
    raster = np.arange(height * width, dtype=np.int32).reshape(height, width)
    filled = np.pad(raster, ((0, -height % window), (0, -width % window)), constant_values=-1)
    tokens = filled.reshape(filled.shape[0] // window, window, -1, window)
    tokens = tokens.transpose(0, 2, 1, 3).reshape(-1)
    inner_row, inner_column = np.divmod(np.arange(merge**2, dtype=np.int32), merge)
    token_row, token_column = np.divmod(tokens[:, None], width)
    coordinates = np.stack(
        [token_row * merge + inner_row, token_column * merge + inner_column], axis=-1
    )
    patches = tokens[:, None] * merge**2 + np.arange(merge**2, dtype=np.int32)
    exists = (tokens >= 0)[:, None]
    return GridLayout(
        tokens=tokens,
        patches=np.where(exists, patches, -1).reshape(-1),
        coordinates=np.where(exists[..., None], coordinates, 0).reshape(-1, 2),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """The pictures that B rows look at, as the tower takes them, and where they stand in the rows.

    Attributes:
        patches: [B, K, S, P], normalised pixels of one frame, channel by channel; anything finite
            where there is no patch.
        coordinates: int32 [B, K, S, 2], row and column of each patch in its picture.
        segments: int32 [B, K, S]; pictures of one tower row, from 1; 0 where there is no patch.
        index: int32 [B, T], the token that stands at a position, as the place of its first patch
            among the row's K x S; -1: none.
    """

    patches: jax.Array
    coordinates: jax.Array
    segments: jax.Array
    index: jax.Array


class VisionTower(nnx.Module):
    """Patch embedding, a decoder that alternates between windows and whole pictures, merger."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        merged = config.merge**2 * config.width
        self.patch_embedding = layers.Linear(
            config.channels * config.frames * config.patch**2,
            config.width,
            rngs=rngs,
            logical=(None, "embed"),
            bias=False,
        )
        self.decoder = decoder.Decoder(config.decoder(), rngs=rngs)
        self.merge_up = layers.Linear(merged, merged, rngs=rngs, logical=("embed", "mlp"))
        self.merge_out = layers.Linear(
            merged, config.out_width, rngs=rngs, logical=("mlp", "embed")
        )

    def embed_patches(self, patches: jax.Array) -> jax.Array:
        """[..., P] -> [..., D], in their dtype."""
        c = self.config
        kernel = self.patch_embedding.kernel[...]
        # All frames of a still picture are the same: their weights add up.
        kernel = kernel.reshape(c.channels, c.frames, -1, c.width)
        kernel = kernel.astype(layers.at_least_float32(kernel.dtype)).sum(1)
        return patches @ kernel.reshape(-1, c.width).astype(patches.dtype)

    def encode(self, patches: jax.Array, coordinates: jax.Array, segments: jax.Array) -> jax.Array:
        """Patches to hidden states after the final RMSNorm.

        Args:
            patches: [R, S, P]; their dtype is the compute dtype.
            coordinates: int32 [R, S, 2].
            segments: int32 [R, S].

        Returns:
            [R, S, D].
        """
        quarter = self.config.width // self.config.heads // 4
        angles = rope.angles_ladder_per_axis(
            jnp.moveaxis(coordinates, -1, 0),
            (quarter, quarter),
            self.config.rope_theta,
            layers.at_least_float32(patches.dtype),
        )
        spec = AttentionSpec(causal=False, segments=segments)
        return self.decoder(self.embed_patches(patches), angles, spec)[0]

    def merge(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [R, S, D] to embeddings of the language model [R, M, Dv]."""
        rows, _, width = hidden.shape
        tokens = hidden.reshape(rows, -1, self.config.merge**2 * width)
        up = partition.constrain(self.merge_up(tokens), ("batch", None, "mlp"))
        return self.merge_out(jax.nn.gelu(up, approximate=False))

    def __call__(self, views: Views, dtype: jnp.dtype) -> jax.Array:
        """What the rows see: [B, K * M, Dv] in `dtype`."""
        b, k = views.segments.shape[:2]
        flat = lambda a: a.reshape(b * k, *a.shape[2:])
        hidden = self.encode(
            flat(views.patches).astype(dtype), flat(views.coordinates), flat(views.segments)
        )
        return self.merge(hidden).reshape(b, -1, self.config.out_width)
