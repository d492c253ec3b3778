"""STARFlow2: a frozen VLM and a deep autoregressive flow over one causal row, coupled by two skips.

    u = f_S(x)                                                shallow flow, image by image
    e = embed(token)  | embed(image_pad) + adapter(u)  | tower(image)   TEXT | LATENT | VIT
    y = VLM(e)
    h = P_text y      | P_u u + W_vlm y                | P_text y       TEXT | LATENT | VIT
    g = Deep(h)
    next token:  softmax(LM(y + W_flow g))  |  N(mu(g), sigma(g)^2)

STARFlow2 (arXiv 2605.08029). Letters: B rows, T positions, I images per row, N tokens per image,
C latent channels, V vocabulary, Dv VLM width, Df flow width, S shallow blocks.
"""

import dataclasses
import enum
import math

import jax
import jax.numpy as jnp
from flax import nnx

from starflow2_jax.models.flow import (
    DeepBlock,
    FlowConfig,
    ShallowFlow,
    standard_normal_log_prob,
)
from starflow2_jax.models.qwen2_5_vision import Views
from starflow2_jax.models.qwen2_5_vl import LanguageModelConfig, Qwen25VL, qwen2_5_vl_7b
from starflow2_jax.nn import decoder, layers
from starflow2_jax.nn.attention import AttentionSpec


class Kind(enum.IntEnum):
    """What a position holds."""

    PAD = 0
    TEXT = 1
    LATENT = 2
    VIT = 3


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids that the model itself knows of."""

    vision_start: int
    vision_end: int
    image_pad: int
    end: int
    video_pad: int | None = None


@dataclasses.dataclass(frozen=True)
class PretzelConfig:
    """Shape of the whole model; `dtype` is the compute dtype of both streams."""

    vlm: LanguageModelConfig
    flow: FlowConfig
    special: SpecialTokens
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        layers.check_compute_dtype(self.dtype)


QWEN_SPECIAL_TOKENS = SpecialTokens(
    vision_start=151652, vision_end=151653, image_pad=151655, end=151645, video_pad=151656
)


def starflow2_3_6b() -> PretzelConfig:
    """The paper's model: 3.6 B trainable parameters on Qwen2.5-VL-7B."""
    flow = FlowConfig(
        channels=32,
        side=16,
        width=3072,
        head_dim=64,
        deep_layers=24,
        shallow_layers=(4, 4),
        shallow_orders=("keep", "flip"),
        remat="full",
    )
    return PretzelConfig(qwen2_5_vl_7b(), flow, QWEN_SPECIAL_TOKENS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch of rows.

    Attributes:
        tokens: int32 [B, T]; image_pad at LATENT, anything at PAD.
        kinds: int32 [B, T], values of `Kind`.
        positions: int32 [3, B, T] (time, row, column), restarting at 0 in each segment.
        segments: int32 [B, T]; documents packed into one row, from 1; 0 at PAD.
        text_loss_mask: bool [B, T], at the target: this token's -log p is trained.
        image_start: int32 [B, I], index of an image's first LATENT; -1 = no such image.
        image_loss_mask: bool [B, I]: this image's likelihood is trained.
        views: what stands at VIT; None if there is none.
        text_targets: int32 [B, K], the positions that `text_loss_mask` marks, then -1: the only
            ones whose text likelihood is computed; None: all are.
        prefix: int32 [B, P], the positions before each image that hold no image, then -1: the only
            ones that the VLM runs over, which is all that is needed where adapter and skips are
            off; None: it runs over all.
    """

    tokens: jax.Array
    kinds: jax.Array
    positions: jax.Array
    segments: jax.Array
    text_loss_mask: jax.Array
    image_start: jax.Array
    image_loss_mask: jax.Array
    views: Views | None = None
    text_targets: jax.Array | None = None
    prefix: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Parts:
    """Which couplings are computed, the others are zero; and whether the text has a likelihood."""

    adapter: bool = True
    skips: bool = True
    deep: bool = True
    text: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
    """Both streams over T positions: e, y [B, T, Dv]; h, g [B, T, Df] (None where deep is off).

    Where the rows have a prefix, e and y are of its P positions.
    """

    e: jax.Array
    y: jax.Array
    h: jax.Array | None
    g: jax.Array | None
    caches: dict[str, decoder.Cache] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Likelihood:
    """What one parallel pass says of the rows; nats.

    Attributes:
        streams: hidden states of both streams.
        shallow_outputs: S arrays [B, I, N, C], raster order; the last one is u.
        shallow_log_dets: S arrays [B, I, N, C], -log sigma, raster order.
        z: [B, T, C] noise at LATENT positions, zero elsewhere.
        deep_log_det: [B, T, C], -log sigma of the deep block at LATENT positions, zero elsewhere.
        text_log_prob: [B, T], at the target: log p of each TEXT token that has a predecessor in its
            segment (of `Rows.text_targets` alone, where given), zero elsewhere.
        text_log_partition: [B, T], at the same targets: logsumexp of the logits, zero elsewhere.
        image_log_prob: [B, I], log p of each latent x given all before it, with every constant.
    """

    streams: Streams
    shallow_outputs: list[jax.Array]
    shallow_log_dets: list[jax.Array]
    z: jax.Array | None
    deep_log_det: jax.Array | None
    text_log_prob: jax.Array | None
    text_log_partition: jax.Array | None
    image_log_prob: jax.Array | None


class Adapter(nnx.Module):
    """u into the VLM's embedding space: Linear, exact GELU, Linear that starts at zero."""

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.up = layers.Linear(channels, width, rngs=rngs, logical=(None, "embed"))
        self.out = layers.Linear(
            width,
            width,
            rngs=rngs,
            logical=("embed", "embed_out"),
            kernel_init=layers.zeros,
            bias_init=layers.zeros,
        )

    def __call__(self, u: jax.Array) -> jax.Array:
        """[..., C] -> [..., Dv]."""
        return self.out(jax.nn.gelu(self.up(u), approximate=False))


class Pretzel(nnx.Module):
    """The two streams and their couplings."""

    def __init__(self, config: PretzelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        vlm, flow = config.vlm, config.flow
        self.vlm = Qwen25VL(vlm, rngs=rngs)
        self.adapter = Adapter(flow.channels, vlm.width, rngs=rngs)
        self.shallow = ShallowFlow(flow, rngs=rngs)
        self.deep = DeepBlock(flow, vlm.width, rngs=rngs)
        skip = {"rngs": rngs, "bias": False, "kernel_init": layers.zeros}
        self.skip_vlm = layers.Linear(vlm.width, flow.width, logical=("embed", "embed_out"), **skip)
        self.skip_flow = layers.Linear(
            flow.width, vlm.width, logical=("embed", "embed_out"), **skip
        )

    def empty_caches(self, rows: int, slots: int) -> dict[str, decoder.Cache]:
        """Caches of both streams for `slots` positions of `rows` rows."""
        dtype = jnp.dtype(self.config.dtype)
        deep = self.config.flow.decoder(self.config.flow.deep_layers)
        return {
            "vlm": decoder.empty_cache(self.config.vlm.decoder(), rows, slots, dtype),
            "deep": decoder.empty_cache(deep, rows, slots, dtype),
        }

    def run(
        self,
        tokens: jax.Array,
        kinds: jax.Array,
        positions: jax.Array,
        u: jax.Array,
        spec: AttentionSpec,
        parts: Parts = Parts(),
        caches: dict[str, decoder.Cache] | None = None,
        views: Views | None = None,
        prefix: jax.Array | None = None,
    ) -> Streams:
        """Feeds T positions through both streams: a whole row, a prompt, or one decode step.

        Args:
            tokens, kinds: int32 [B, T].
            positions: int32 [3, B, T].
            u: [B, T, C], the flow's latents at LATENT positions; ignored elsewhere.
            spec: who sees whom among the T positions.
            parts: what is computed.
            caches: see `empty_caches`; None for a whole row.
            views: what stands at VIT positions; None if there is none.
            prefix: see `Rows`; for whole rows.

        Raises:
            ValueError: a prefix with adapter or skips, or with views.
        """
        dtype = jnp.dtype(self.config.dtype)
        latent = (kinds == Kind.LATENT)[..., None]
        u = u.astype(dtype)
        vlm_cache = None
        if prefix is not None:
            if parts.adapter or parts.skips or views is not None:
                raise ValueError("adapter, skips and views need the VLM over whole rows")
            e, y = self._read_prefix(tokens, positions, spec, prefix)
        else:
            e = self.vlm.embed(tokens, dtype)
            if parts.adapter:
                e = jnp.where(latent, e + self.adapter(u), e)
            if views is not None:
                e = jnp.where((kinds == Kind.VIT)[..., None], self.vlm.see(views, dtype), e)
            y, vlm_cache = self.vlm.decode(e, positions, spec, caches and caches["vlm"])
        if not parts.deep:
            return Streams(e, y, None, None, None)
        visual = self.deep.proj_u(u)
        if parts.skips:
            visual = visual + self.skip_vlm(y)
        plain = self.deep.proj_text(y)
        if prefix is not None:
            plain = _scatter(plain, prefix, tokens.shape[1])
        h = jnp.where(latent, visual, plain)
        angles = self.deep.angles(positions, layers.at_least_float32(dtype))
        g, deep_cache = self.deep.decoder(h, angles, spec, caches and caches["deep"])
        grown = None if caches is None else {"vlm": vlm_cache, "deep": deep_cache}
        return Streams(e, y, h, g, grown)

    def _read_prefix(
        self, tokens: jax.Array, positions: jax.Array, spec: AttentionSpec, prefix: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """e, y [B, P, Dv] of the positions `prefix` of whole rows, which see each other alone."""
        at = jnp.maximum(prefix, 0)
        e = self.vlm.embed(jnp.take_along_axis(tokens, at, 1), jnp.dtype(self.config.dtype))
        segments = jnp.where(prefix >= 0, jnp.take_along_axis(spec.segments, at, 1), 0)
        there = jnp.take_along_axis(positions, at[None], 2)
        return e, self.vlm.decode(e, there, AttentionSpec(causal=True, segments=segments))[0]

    def logits(self, y: jax.Array, g: jax.Array | None, parts: Parts = Parts()) -> jax.Array:
        """LM(y + W_flow g): [..., V], at least float32."""
        if parts.deep and parts.skips:
            y = y + self.skip_flow(g)
        return self.vlm.logits(y)

    def log_prob(self, rows: Rows, x: jax.Array, parts: Parts = Parts()) -> Likelihood:
        """Exact log-probabilities of every image and text token of the rows.

        Args:
            rows: see `Rows`.
            x: [B, I, N, C] latents, normalised and noised as the model was trained; at least
                float32. Absent images may hold anything finite.
            parts: what is computed; without the deep block no image has a likelihood.

        Returns:
            A `Likelihood`. DESIGN formula: sum over N, C of log N(z; 0, 1) - log sigma_D, plus the
            shallow blocks' -log sigma.
        """
        b, i, n, c = x.shape
        outputs, log_dets = self.shallow.forward(
            x.reshape(b * i, n, c), jnp.dtype(self.config.dtype)
        )
        outputs = [o.reshape(b, i, n, c) for o in outputs]
        log_dets = [d.reshape(b, i, n, c) for d in log_dets]
        u = spread_images(outputs[-1], rows.image_start, rows.tokens.shape[1])
        streams = self.run(
            rows.tokens,
            rows.kinds,
            rows.positions,
            u,
            AttentionSpec(causal=True, segments=rows.segments),
            parts,
            views=rows.views,
            prefix=rows.prefix,
        )
        follows = rows.segments[:, 1:] == rows.segments[:, :-1]
        before = lambda a: None if a is None else a[:, :-1]
        text_log_prob = text_log_partition = None
        if parts.text:
            text_log_prob, text_log_partition = self._text(rows, streams, follows, parts)
        z = deep_log_det = image_log_prob = None
        if parts.deep:
            latent = (follows & (rows.kinds[:, 1:] == Kind.LATENT))[..., None]
            mu, sigma = self.deep.head(before(streams.g))
            shift = ((0, 0), (1, 0), (0, 0))
            z = jnp.pad(jnp.where(latent, (u[:, 1:] - mu) / sigma, 0.0), shift)
            deep_log_det = jnp.pad(jnp.where(latent, -jnp.log(sigma), 0.0), shift)
            per_position = (standard_normal_log_prob(z) + deep_log_det).sum(-1)  # [B, T]
            inside = image_membership(rows.image_start, n, rows.tokens.shape[1])
            image_log_prob = jnp.einsum(
                "bit,bt->bi", inside.astype(per_position.dtype), per_position
            ) + sum(d.sum((-1, -2)) for d in log_dets) * (rows.image_start >= 0)
        return Likelihood(
            streams,
            outputs,
            log_dets,
            z,
            deep_log_det,
            text_log_prob,
            text_log_partition,
            image_log_prob,
        )

    def _text(
        self, rows: Rows, streams: Streams, follows: jax.Array, parts: Parts
    ) -> tuple[jax.Array, jax.Array]:
        """`Likelihood.text_log_prob` and `text_log_partition`; follows: bool [B, T - 1]."""
        if rows.prefix is not None:
            raise ValueError("where the VLM runs over a prefix, text has no likelihood")
        text = follows & (rows.kinds[:, 1:] == Kind.TEXT)
        tokens, at = rows.tokens[:, 1:], rows.text_targets
        pick = lambda a: a
        if at is not None:  # [B, K]
            source = jnp.maximum(at - 1, 0)
            text = jnp.take_along_axis(text, source, 1) & (at > 0)
            tokens = jnp.take_along_axis(tokens, source, 1)
            pick = lambda a: jnp.take_along_axis(a, source[..., None], 1)
        y = pick(streams.y[:, :-1])
        if parts.deep and parts.skips:
            y = y + self.skip_flow(pick(streams.g[:, :-1]))
        found = [jnp.where(text, each, 0.0) for each in self.vlm.token_log_prob(y, tokens)]
        if at is None:
            return tuple(jnp.pad(each, ((0, 0), (1, 0))) for each in found)
        return tuple(_scatter(each, at, rows.tokens.shape[1]) for each in found)


def image_membership(image_start: jax.Array, tokens: int, length: int) -> jax.Array:
    """bool [B, I, T]: position t holds a token of image i."""
    offset = jnp.arange(length) - image_start[..., None]
    return (image_start[..., None] >= 0) & (offset >= 0) & (offset < tokens)


def spread_images(u: jax.Array, image_start: jax.Array, length: int) -> jax.Array:
    """Images [B, I, N, C] at their positions of the row [B, T, C]; zeros elsewhere."""
    b, i, n, c = u.shape
    inside = image_membership(image_start, n, length)
    offset = jnp.arange(length) - image_start[..., None] + n * jnp.arange(i)[:, None]
    slot = jnp.where(inside, offset, 0).sum(1)  # [B, T]
    spread = jnp.take_along_axis(u.reshape(b, i * n, c), slot[..., None], axis=1)
    return jnp.where(inside.any(1)[..., None], spread, 0.0)


def _scatter(values: jax.Array, at: jax.Array, length: int) -> jax.Array:
    """Values [B, K, ...] at the positions int32 [B, K] of a row of `length`; zeros elsewhere.

    Those of a negative position are dropped.
    """
    one = lambda values, at: (
        jnp.zeros((length, *values.shape[1:]), values.dtype).at[at].set(values, mode="drop")
    )
    return jax.vmap(one)(values, jnp.where(at < 0, length, at))


def bits_per_dim(log_prob: jax.Array, dims: int) -> jax.Array:
    """-log p in nats of `dims` numbers, as bits per dim."""
    return -log_prob / (dims * math.log(2.0))
