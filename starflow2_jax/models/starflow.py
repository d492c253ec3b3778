"""Whole image models of the family: STARFlow on latents, TarFlow on pixels.

A model is a list of AF blocks over the patches of an image; data to noise runs the first block
first. The last block, next to the prior, is the deep one in STARFlow and alone reads text.
TarFlow (arXiv 2412.06329), STARFlow (arXiv 2506.06276).
Letters: B rows, H, W pixels (or latents), h, w patches along the edges, N = h w tokens, C channels
of a token, D width, L text positions, K blocks.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from starflow2_jax.models.af_block import (
    AFBlock,
    BlockConfig,
    Given,
    Inverter,
    Scale,
    sequential,
)
from starflow2_jax.models.flow import standard_normal_log_prob
from starflow2_jax.models.guidance import Guidance
from starflow2_jax.models.patches import dequantised
from starflow2_jax.nn import layers, rope

# Angles of the time axis in models that read text, whatever the head width.
TIME_ANGLES = 8


@dataclasses.dataclass(frozen=True)
class StarFlowConfig:
    """Shape of a STARFlow.

    Attributes:
        channels: of the latents, before patches are made.
        side: patches along the side of a training image; other shapes cover the same area.
        width, deep_width: of the shallow blocks, and of the last block.
        depths: layers of each block, from the data side.
        first_order: order of the first block; they alternate.
        text_length: L that the model was trained with; others are stretched to its range.
        text_width: of the text embeddings; 0: no text.
        text_everywhere: every block reads the text, not the deep one alone.
        start, scale, soft_clip, final_norm, mlp_ratio, remat: see `BlockConfig`.
        dtype: of the transformers' arithmetic.
    """

    channels: int
    side: int
    width: int
    deep_width: int
    depths: tuple[int, ...]
    head_dim: int = 64
    patch: int = 1
    first_order: Literal["keep", "flip"] = "flip"
    text_length: int = 0
    text_width: int = 0
    text_everywhere: bool = False
    start: bool = True
    scale: Scale = "softplus"
    soft_clip: float | None = 4.0
    final_norm: bool = True
    mlp_ratio: int = 4
    rope_theta: float = 1e4
    remat: Literal["none", "dots", "full"] = "none"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.depths:
            raise ValueError("a flow needs at least one block")
        layers.check_compute_dtype(self.dtype)
        self.blocks()  # which checks each of them

    def blocks(self) -> tuple[BlockConfig, ...]:
        """The K blocks from the data side."""
        last = len(self.depths) - 1
        return tuple(
            BlockConfig(
                channels=self.channels * self.patch**2,
                width=self.deep_width if k == last else self.width,
                head_dim=self.head_dim,
                layers=depth,
                flip=(k % 2 == 0) == (self.first_order == "flip"),
                start=self.start,
                scale=self.scale,
                soft_clip=self.soft_clip,
                final_norm=self.final_norm,
                text_width=self.text_width if k == last or self.text_everywhere else 0,
                mlp_ratio=self.mlp_ratio,
                remat=self.remat,
            )
            for k, depth in enumerate(self.depths)
        )

    def guided(self, block: BlockConfig) -> bool:
        """Whether guidance changes a block: those that read text."""
        return block.text_width > 0

    def angles(self, rows: int, columns: int, text_length: int, dtype: jnp.dtype) -> jax.Array:
        """Rotary angles of L text positions and h x w slots: [1, L + N, d/2].

        Raises:
            ValueError: the head is too narrow for the axes.
        """
        at = rope.area_coordinates(rows, columns, self.side, dtype, text_length)
        if not self.text_width:
            counts = (self.head_dim // 4,) * 2
        else:
            counts = ((self.head_dim // 2 - TIME_ANGLES) // 2,) * 2 + (TIME_ANGLES,)
        if min(counts) < 1 or 2 * sum(counts) != self.head_dim:
            raise ValueError(f"head width {self.head_dim} has no room for the rotary axes")
        return rope.angles_ladder_per_axis(at[: len(counts)], counts, self.rope_theta, dtype)[None]

    def patchify(self, images: jax.Array) -> jax.Array:
        """[B, H, W, channels] -> [B, h, w, C], a token's channels in order (row, column, channel).

        Raises:
            ValueError: the patch does not divide the image.
        """
        return _cut(images, self.patch).reshape(_grid_shape(images, self.patch))

    def unpatchify(self, grid: jax.Array) -> jax.Array:
        """The inverse of `patchify`."""
        b, h, w, _ = grid.shape
        p = self.patch
        return _joined(grid.reshape(b, h, w, p, p, self.channels))


@dataclasses.dataclass(frozen=True)
class TarFlowConfig:
    """Shape of a TarFlow.

    Attributes:
        channels: colours.
        size: pixels along the side of an image; it has no other shape.
        width, depth, count: of the blocks.
        classes: rows of the class tables; 0: unconditional.
        scale: "exp", or "none": volume preserving, with a prior variance that training tracks.
        remat: see `BlockConfig`.
        dtype: of the transformers' arithmetic.
    """

    channels: int
    size: int
    patch: int
    width: int
    count: int
    depth: int
    classes: int = 0
    scale: Literal["exp", "none"] = "exp"
    head_dim: int = 64
    mlp_ratio: int = 4
    remat: Literal["none", "dots", "full"] = "none"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.size % self.patch or self.count < 1:
            raise ValueError(
                f"{self.count} blocks over patches of {self.patch} of {self.size} pixels; expected "
                "at least one block, and patches that divide the pixels"
            )
        layers.check_compute_dtype(self.dtype)
        self.blocks()  # which checks each of them

    @property
    def side(self) -> int:
        """Patches along the side."""
        return self.size // self.patch

    def blocks(self) -> tuple[BlockConfig, ...]:
        """The K blocks from the data side."""
        block = BlockConfig(
            channels=self.channels * self.patch**2,
            width=self.width,
            head_dim=self.head_dim,
            layers=self.depth,
            start=False,
            scale=self.scale,
            soft_clip=None,
            final_norm=False,
            positions=self.side**2,
            classes=self.classes,
            mlp_ratio=self.mlp_ratio,
            remat=self.remat,
        )
        return tuple(dataclasses.replace(block, flip=k % 2 == 1) for k in range(self.count))

    def guided(self, block: BlockConfig) -> bool:
        """Whether guidance changes a block: all of them."""
        del block
        return True

    def angles(self, rows: int, columns: int, text_length: int, dtype: jnp.dtype) -> None:
        """Positions are learned: there are no angles."""

    def patchify(self, images: jax.Array) -> jax.Array:
        """[B, H, W, channels] -> [B, h, w, C], a token's channels in order (channel, row, column).

        Raises:
            ValueError: the patch does not divide the image.
        """
        cut = _cut(images, self.patch)
        return jnp.moveaxis(cut, -1, 3).reshape(_grid_shape(images, self.patch))

    def unpatchify(self, grid: jax.Array) -> jax.Array:
        """The inverse of `patchify`."""
        b, h, w, _ = grid.shape
        p = self.patch
        return _joined(jnp.moveaxis(grid.reshape(b, h, w, self.channels, p, p), 3, -1))


ImageFlowConfig = StarFlowConfig | TarFlowConfig


def _grid_shape(images: jax.Array, patch: int) -> tuple[int, ...]:
    b, h, w, c = images.shape
    return b, h // patch, w // patch, patch * patch * c


def _cut(images: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, channels] -> [B, h, w, p, p, channels]."""
    b, h, w, c = images.shape
    if h % patch or w % patch:
        raise ValueError(f"patches of {patch} do not divide images of {h} x {w}")
    return images.reshape(b, h // patch, patch, w // patch, patch, c).swapaxes(2, 3)


def _joined(patches: jax.Array) -> jax.Array:
    """[B, h, w, p, p, channels] -> [B, H, W, channels]."""
    b, h, w, p, _, c = patches.shape
    return patches.swapaxes(2, 3).reshape(b, h * p, w * p, c)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Passed:
    """What one pass from data to noise says; nats, raster order.

    Attributes:
        outputs: K + 1 arrays [B, h, w, C]: the patches, then what each block makes of them.
        log_dets: K arrays [B, h, w, C], -log sigma.
        prior_variance: [h, w, C], of the noise that is sampled from; None: 1.
    """

    outputs: list[jax.Array]
    log_dets: list[jax.Array]
    prior_variance: jax.Array | None = None

    @property
    def z(self) -> jax.Array:
        """The noise, [B, h, w, C]."""
        return self.outputs[-1]

    @property
    def loss_prior(self) -> jax.Array:
        """Mean of z^2 / 2, whatever the prior's variance is; scalar."""
        return 0.5 * jnp.square(self.z).mean()

    @property
    def loss_scale(self) -> jax.Array:
        """Sum over the blocks of mean log sigma; scalar."""
        return -sum(log_det.mean() for log_det in self.log_dets)

    @property
    def loss(self) -> jax.Array:
        """The training loss, nats per dim without log(2 pi) / 2; scalar."""
        return self.loss_prior + self.loss_scale

    @property
    def latent_norm(self) -> jax.Array:
        """Sum over the patches and all outputs but z of their mean square; scalar."""
        return sum(jnp.square(output).mean() for output in self.outputs[:-1])

    @property
    def log_prob(self) -> jax.Array:
        """log p(image), with every constant, [B]."""
        prior = standard_normal_log_prob(self.z)
        if self.prior_variance is not None:
            scaled = self.z / jnp.sqrt(self.prior_variance)
            prior = standard_normal_log_prob(scaled) - 0.5 * jnp.log(self.prior_variance)
        return (prior + sum(self.log_dets)).sum((1, 2, 3))


class PriorVariance(nnx.Variable):
    """A statistic that training tracks, and no gradient changes."""


def tracked_variance(variance: jax.Array, z: jax.Array) -> jax.Array:
    """The prior variance [N, C] after a step with noise z [B, h, w, C]: 0.9 old + 0.1 of z^2."""
    seen = jnp.square(z).mean(0).reshape(variance.shape)
    return 0.9 * variance + 0.1 * seen


class ImageFlow(nnx.Module):
    """A STARFlow or a TarFlow."""

    def __init__(self, config: ImageFlowConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.blocks = nnx.List([AFBlock(block, rngs=rngs) for block in config.blocks()])
        # [N, C]; only a volume-preserving flow leaves the scale of the noise to the prior.
        self.prior_variance = nnx.data(
            PriorVariance(jnp.ones((config.side**2, config.blocks()[-1].channels), jnp.float32))
            if config.scale == "none"
            else None
        )

    def forward(
        self,
        images: jax.Array,
        given: Given = Given(),
        guidance: Guidance | None = None,
        unconditional: Given = Given(),
    ) -> Passed:
        """Data to noise.

        Args:
            images: [B, H, W, channels], at least float32.
            given: of these rows.
            guidance: of the blocks that it concerns, or None.
            unconditional: of the B rows that guidance compares with.
        """
        x = self.config.patchify(images)
        _, h, w, _ = x.shape
        outputs, log_dets = [x], []
        for block in self.blocks:
            flat = x.reshape(len(x), h * w, -1)[:, block.order]
            case = self._case(block, x.shape, x.dtype, given, guidance, unconditional)
            z, log_det = block.forward(flat, *case)
            x = z[:, block.order].reshape(x.shape)
            outputs.append(x)
            log_dets.append(log_det[:, block.order].reshape(x.shape))
        variance = self.prior_variance
        if variance is not None:
            variance = variance[...].astype(x.dtype).reshape(x.shape[1:])
        return Passed(outputs, log_dets, variance)

    def reverse(
        self,
        noise: jax.Array,
        given: Given = Given(),
        guidance: Guidance | None = None,
        unconditional: Given = Given(),
        invert: Inverter = sequential,
    ) -> tuple[list[jax.Array], list[Any]]:
        """Noise to data.

        Args:
            noise: [B, h, w, C], standard normal, at least float32.
            given, guidance, unconditional: see `forward`.
            invert: the sampler of a block.

        Returns:
            K + 1 arrays [B, h, w, C]: the noise, then what each inverted block makes of it, the
            last block first (`config.unpatchify` makes images of them); and the sampler's K notes.
        """
        x, notes = noise, []
        sequence = [noise]
        if self.prior_variance is not None:
            scale = jnp.sqrt(self.prior_variance[...]).astype(noise.dtype)
            x = noise * scale.reshape(noise.shape[1:])
        for block in reversed(list(self.blocks)):
            flat = x.reshape(len(x), -1, x.shape[-1])[:, block.order]
            case = self._case(block, x.shape, x.dtype, given, guidance, unconditional)
            u, note = invert(block, flat, *case)
            x = u[:, block.order].reshape(x.shape)
            sequence.append(x)
            notes.append(note)
        return sequence, notes

    def _case(
        self,
        block: AFBlock,
        shape: tuple[int, ...],
        dtype: jnp.dtype,
        given: Given,
        guidance: Guidance | None,
        unconditional: Given,
    ) -> tuple[jax.Array | None, jnp.dtype, Given, Guidance | None]:
        """What a block is run with: angles, compute dtype, given, guidance."""
        b, h, w, _ = shape
        if guidance is None or not self.config.guided(block.config):
            guidance = None
        else:
            given = given.beside(unconditional, b)
        length = given.text_length if block.config.text_width else 0
        angles = self.config.angles(h, w, length, layers.at_least_float32(dtype))
        return angles, jnp.dtype(self.config.dtype), given, guidance


def bits_per_dim(
    model: ImageFlow, images: jax.Array, uniform: jax.Array, given: Given = Given()
) -> jax.Array:
    """An upper bound on the bits per dim of 8-bit images, one draw of the dequantisation: [B].

    Args:
        model: of pixels.
        images: uint8 [B, H, W, channels].
        uniform: U[0, 1) noise of that shape, at least float32.
        given: see `ImageFlow.forward`; TarFlow's published numbers are without classes.
    """
    log_prob = model.forward(dequantised(images, uniform), given).log_prob
    # A grey level is 2/256 wide.
    return -log_prob / (math.prod(images.shape[1:]) * math.log(2.0)) + 7.0


def denoise(
    model: ImageFlow, images: jax.Array, noise_std: jax.Array | float, given: Given = Given()
) -> jax.Array:
    """Removes the training noise by one score step: x + noise_std^2 * grad_x log p(x | given).

    Args:
        model: the model; no guidance enters.
        images: [B, H, W, channels], samples or noised data.
        noise_std: that the model was trained with.
        given: see `ImageFlow.forward`.
    """
    score = jax.grad(lambda x: model.forward(x, given).log_prob.sum())(images)
    return images + jnp.asarray(noise_std, images.dtype) ** 2 * score


# Named sizes: every published image model.


def starflow_3b_t2i_256() -> StarFlowConfig:
    """The released text-to-image model: 24(6)-3072 on the SD VAE, FLAN-T5-XL text."""
    return StarFlowConfig(
        channels=4,
        side=32,
        width=3072,
        deep_width=3072,
        depths=(2, 2, 2, 2, 2, 24),
        text_length=128,
        text_width=2048,
        remat="full",
    )


def _starflow_imagenet256(width: int, depths: tuple[int, ...]) -> StarFlowConfig:
    # A class is one text position: one-hot of 1000 classes and the absent one.
    return StarFlowConfig(
        channels=4,
        side=32,
        width=width,
        deep_width=width,
        depths=depths,
        text_length=1,
        text_width=1001,
        remat="full",
    )


def starflow_xl_imagenet256() -> StarFlowConfig:
    """2048 wide, two deeper blocks."""
    return _starflow_imagenet256(2048, (2, 2, 2, 2, 10, 10))


def starflow_xlv2_imagenet256() -> StarFlowConfig:
    """The paper's ImageNet model, 18(6)-2048, 1.4 B parameters."""
    return _starflow_imagenet256(2048, (2, 2, 2, 2, 2, 18))


def starflow_xxl_imagenet256() -> StarFlowConfig:
    """3072 wide, two deeper blocks."""
    return _starflow_imagenet256(3072, (2, 2, 2, 2, 13, 13))


def starflow_xxlv2_imagenet256() -> StarFlowConfig:
    """24(6)-3072, the shape of the released model with classes for text."""
    return _starflow_imagenet256(3072, (2, 2, 2, 2, 2, 24))


def tarflow_imagenet64(classes: int = 0) -> TarFlowConfig:
    """2-768-8-8, unconditional (2.99 bits per dim); with 1000 classes the conditional model."""
    return TarFlowConfig(3, 64, 2, 768, 8, 8, classes, remat="full")


def tarflow_imagenet64_classes() -> TarFlowConfig:
    """2-768-8-8 with 1000 classes."""
    return tarflow_imagenet64(1000)


def tarflow_imagenet128_classes() -> TarFlowConfig:
    """4-1024-8-8 with 1000 classes."""
    return TarFlowConfig(3, 128, 4, 1024, 8, 8, 1000, remat="full")


def tarflow_afhq256() -> TarFlowConfig:
    """8-768-8-8, the published checkpoint."""
    return TarFlowConfig(3, 256, 8, 768, 8, 8, remat="full")


def tarflow_mnist() -> TarFlowConfig:
    """4-128-4-4 with 10 classes, on 28 x 28 grey images."""
    return TarFlowConfig(1, 28, 4, 128, 4, 4, 10)
