"""Qwen2.5-VL's vision tower: images of any size to embeddings of the language model.

Specification: Qwen2.5-VL (arXiv 2502.13923) and its published configs.
Letters: B rows, S patches of a row, M = S / 4 tokens of a row (2 x 2 patches are one token),
D width of the tower, d head width.
"""

import dataclasses

from starflow2_jax.nn import decoder


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

    def decoder(self) -> decoder.DecoderConfig:
        """RMSNorm, full multi-head attention with biases, SwiGLU with biases."""
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
            remat=self.remat,
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
