"""FAE: one attention layer takes a frozen ViT's features to a small latent, two decoders lead back.

Specification: Feature Auto-Encoder (arXiv 2512.07829). Features x of a picture -> posterior of the
latent z -> features -> pixels. Everything is in the features' and the latent's own units; inside,
both are normalised by statistics that are computed once and kept with the model.

Letters: B images, N tokens (a square raster), D features, C latent channels, W width of the pixel
decoder, P numbers of a patch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from starflow2_jax.models.dinov2 import DinoV2, DinoV2Config, dinov2_giant, swiglu_width
from starflow2_jax.nn import decoder, grid, layers, partition, rope
from starflow2_jax.nn.attention import AttentionSpec, attend

Positions = Literal["sincos", "learned"]
_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "none": lambda x: x,
}
# Log-variances of a posterior are kept within these.
_LOGVAR = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The one attention layer. Its parameter count leaves open all but the first two.

    Attributes:
        norm: of the features before queries, keys and values.
        activation: after attention and skip.
        qk_norm: RMSNorm of queries and keys, each head.
    """

    heads: int = 24
    head_dim: int = 256
    norm: Literal["none", "rms", "layer"] = "rms"
    activation: Literal["silu", "gelu", "none"] = "silu"
    qk_norm: bool = False
    norm_epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class FeatureDecoderConfig:
    """A transformer as wide as the features. Its parameter count leaves open the last four.

    Attributes:
        mlp_width: of the SwiGLU.
        positions: added once: a fixed table of sines and cosines, or one that starts so.
        rope: axial rotary positions in every layer.
        final_norm: "rms" fits tokens after a LayerNorm, which all have about the same length;
            features of other kinds need "none".
    """

    layers: int = 6
    heads: int = 24
    mlp_width: int = 4096
    positions: Positions = "sincos"
    rope: bool = True
    qk_norm: bool = False
    final_norm: Literal["none", "rms"] = "rms"
    norm_epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class PixelDecoderConfig:
    """A ViT from features to pixels.

    Attributes:
        mlp_width: of the SwiGLU.
        patch: pixels along the edge of a token's patch.
        norm, layer_scale: "layer" without, or "rms" with a gain, fit the published size; the gain
            is its start, 0 none.
        positions: see `FeatureDecoderConfig`.
        rope: axial rotary positions in every layer.
    """

    layers: int = 24
    width: int = 1024
    heads: int = 16
    mlp_width: int = swiglu_width(4096)
    patch: int = 16
    norm: Literal["layer", "rms"] = "layer"
    layer_scale: float = 0.0
    positions: Positions = "sincos"
    rope: bool = False
    norm_epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class FAEConfig:
    """Shape of an FAE.

    Attributes:
        features: D.
        channels: C.
        side: tokens along the edge of the raster; N = side^2.
        image_channels: of the pixels.
        remat: what the backward pass of the decoders recomputes.
    """

    features: int = 1536
    channels: int = 32
    side: int = 16
    image_channels: int = 3
    encoder: EncoderConfig = EncoderConfig()
    feature_decoder: FeatureDecoderConfig = FeatureDecoderConfig()
    pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self) -> None:
        for width, heads in (
            (self.features, self.feature_decoder.heads),
            (self.pixel_decoder.width, self.pixel_decoder.heads),
        ):
            if width % (4 * heads):
                raise ValueError(
                    f"{heads} heads of a decoder of width {width}: the head width must be a "
                    "multiple of 4, half of its angles for rows and half for columns"
                )

    @property
    def tokens(self) -> int:
        """N."""
        return self.side**2

    @property
    def image_size(self) -> int:
        """Pixels along the edge of a decoded image."""
        return self.side * self.pixel_decoder.patch

    def features_stack(self) -> decoder.DecoderConfig:
        """RMSNorm, full attention and SwiGLU with biases."""
        c = self.feature_decoder
        return _stack(
            c.layers,
            self.features,
            c.heads,
            c.mlp_width,
            norm="rms",
            final_norm=c.final_norm,
            norm_epsilon=c.norm_epsilon,
            final_norm_epsilon=c.norm_epsilon,
            qk_norm=c.qk_norm,
            remat=self.remat,
        )

    def pixels_stack(self) -> decoder.DecoderConfig:
        """A ViT with SwiGLU and biases, and a final norm of the layers' kind."""
        c = self.pixel_decoder
        return _stack(
            c.layers,
            c.width,
            c.heads,
            c.mlp_width,
            norm=c.norm,
            final_norm=c.norm,
            norm_epsilon=c.norm_epsilon,
            final_norm_epsilon=c.norm_epsilon,
            layer_scale=c.layer_scale,
            remat=self.remat,
        )


def _stack(
    layer_count: int, width: int, heads: int, mlp_width: int, **kind: Any
) -> decoder.DecoderConfig:
    return decoder.DecoderConfig(
        layers=layer_count,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=mlp_width,
        mlp="swiglu",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        **kind,
    )


def fae_dinov2_giant(channels: int = 32) -> FAEConfig:
    """The published one, on DINOv2-g/14: 38.17 M, 170.43 M and 305.36 M parameters."""
    return FAEConfig(features=dinov2_giant().width, channels=channels)


def from_json(fields: Mapping[str, Any]) -> FAEConfig:
    """The inverse of `dataclasses.asdict`."""
    parts = {
        "encoder": EncoderConfig,
        "feature_decoder": FeatureDecoderConfig,
        "pixel_decoder": PixelDecoderConfig,
    }
    return FAEConfig(**{**fields, **{name: make(**fields[name]) for name, make in parts.items()}})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Posterior:
    """q(z | x), a normal distribution with independent channels, in at least float32.

    Attributes:
        mean, logvar: [..., N, C].
    """

    mean: jax.Array
    logvar: jax.Array

    @property
    def std(self) -> jax.Array:
        """[..., N, C]."""
        return jnp.exp(0.5 * self.logvar)

    def sample(self, normal: jax.Array) -> jax.Array:
        """Standard normal [..., N, C] -> z of that shape."""
        return self.mean + self.std * normal

    def kl(self) -> jax.Array:
        """KL(q || N(0, I)), nats, summed over tokens and channels: [...]."""
        each = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * each.sum((-2, -1))


class Statistic(nnx.Variable):
    """A number that is computed from data and never trained."""


class Statistics(nnx.Module):
    """Mean and standard deviation of each channel, over places and images; 0 and 1 at first."""

    def __init__(self, channels: int) -> None:
        self.mean = Statistic(jnp.zeros((channels,), jnp.float32), logical=(None,))
        self.std = Statistic(jnp.ones((channels,), jnp.float32), logical=(None,))

    def fill(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Takes these, [channels] each, where the ones before them are."""
        for variable, value in ((self.mean, mean), (self.std, std)):
            place = variable[...].sharding
            variable[...] = jax.device_put(np.asarray(value, np.float32), place)

    def normalise(self, x: jax.Array) -> jax.Array:
        """[..., channels] to mean 0 and standard deviation 1; in its dtype."""
        wide = x.astype(layers.at_least_float32(x.dtype))
        return ((wide - self.mean[...]) / self.std[...]).astype(x.dtype)

    def denormalise(self, x: jax.Array) -> jax.Array:
        """The inverse of `normalise`."""
        wide = x.astype(layers.at_least_float32(x.dtype))
        return (wide * self.std[...] + self.mean[...]).astype(x.dtype)


class Moments:
    """Mean and standard deviation of channels, batch after batch, in float64 on the host."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values: np.ndarray, variance: np.ndarray | float = 0.0) -> None:
        """Values [..., channels]; with `variance` each is a distribution of that one around it."""
        flat = np.asarray(values, np.float64).reshape(-1, values.shape[-1])
        more = np.asarray(variance, np.float64)
        more = more.reshape(-1, flat.shape[1]).sum(0) if more.ndim else 0.0
        count, mean = len(flat), flat.mean(0)
        squares = np.square(flat - mean).sum(0) + more
        total = self.count + count
        apart = mean - self.mean
        self.squares = self.squares + squares + np.square(apart) * self.count * count / total
        self.mean = self.mean + apart * count / total
        self.count = total

    def into(self, statistics: Statistics) -> None:
        """Puts them into a model's; a channel that never changes has deviation 1."""
        std = np.sqrt(self.squares / self.count)
        std = np.where(std > 1e-6, std, 1.0)
        statistics.fill(self.mean, std)


class SingleAttention(nnx.Module):
    """The encoder: act(softmax(q k^T / sqrt(d)) v + W_skip x), then one linear map.

    Queries, keys and values are of the normed x. There is no output matrix between the two: it is
    one with the last map.
    """

    def __init__(self, config: FAEConfig, *, rngs: nnx.Rngs) -> None:
        self.config = c = config.encoder
        inner = c.heads * c.head_dim
        make = lambda: layers.Linear(config.features, inner, rngs=rngs, logical=("embed", "heads"))
        self.q, self.k, self.v, self.skip = make(), make(), make(), make()
        norms = {"rms": layers.RMSNorm, "layer": layers.LayerNorm}
        self.norm = nnx.data(
            None
            if c.norm == "none"
            else norms[c.norm](config.features, rngs=rngs, epsilon=c.norm_epsilon)
        )
        self.q_norm, self.k_norm = (
            nnx.data(
                layers.RMSNorm(c.head_dim, rngs=rngs, epsilon=c.norm_epsilon, logical=(None,))
                if c.qk_norm
                else None
            )
            for _ in "qk"
        )
        self.out = layers.Linear(inner, 2 * config.channels, rngs=rngs, logical=("heads", None))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised features [B, N, D] -> means and log-variances [B, N, 2C], in x's dtype."""
        c = self.config
        normed = x if self.norm is None else self.norm(x)
        heads = lambda y: partition.constrain(
            y.reshape(*y.shape[:2], c.heads, c.head_dim), ("batch", None, "heads", None)
        )
        q, k, v = (heads(linear(normed)) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = attend(q[:, :, :, None], k, v, AttentionSpec(causal=False))
        hidden = mixed.reshape(*x.shape[:2], -1) + self.skip(x)
        return self.out(_ACTIVATIONS[c.activation](hidden))


class GridDecoder(nnx.Module):
    """Tokens of a square raster through a linear map, a position table and a transformer."""

    def __init__(
        self,
        in_features: int,
        side: int,
        stack: decoder.DecoderConfig,
        positions: Positions,
        rotary: bool,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.side, self.rotary = side, rotary
        self.proj_in = layers.Linear(in_features, stack.width, rngs=rngs, logical=(None, "embed"))
        table = jnp.asarray(grid.sincos_table(side, side, stack.width), jnp.float32)
        self.positions = nnx.data(
            nnx.Param(table, logical=(None, "embed")) if positions == "learned" else None
        )
        self.decoder = decoder.Decoder(stack, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, in] -> [B, N, W]; in x's dtype."""
        width = self.decoder.config.width
        table = grid.sincos_table(self.side, self.side, width)
        if self.positions is not None:
            table = self.positions[...]
        hidden = self.proj_in(x) + jnp.asarray(table, x.dtype)
        angles = None
        if self.rotary:
            quarter = self.decoder.config.head_dim // 4
            coordinates = rope.raster_coordinates(self.side, self.side)[:, None]
            wide = layers.at_least_float32(x.dtype)
            angles = rope.angles_ladder_per_axis(coordinates, (quarter, quarter), 1e4, wide)
        return self.decoder(hidden, angles, AttentionSpec(causal=False))[0]


class PixelDecoder(nnx.Module):
    """Features to pixels: `GridDecoder`, then each token's patch."""

    def __init__(self, config: FAEConfig, *, rngs: nnx.Rngs) -> None:
        c = config.pixel_decoder
        self.config = config
        self.grid = GridDecoder(
            config.features, config.side, config.pixels_stack(), c.positions, c.rope, rngs=rngs
        )
        self.head = layers.Linear(
            c.width, c.patch**2 * config.image_channels, rngs=rngs, logical=("embed", None)
        )

    def hidden(self, x: jax.Array) -> jax.Array:
        """Normalised features [B, N, D] -> [B, N, W], what the head takes."""
        return self.grid(x)

    def to_pixels(self, hidden: jax.Array, head: layers.Linear | None = None) -> jax.Array:
        """[B, N, W] -> pixels [B, H, W, channels]; 0 is black and 1 white, and not clipped."""
        patches = (head or self.head)(hidden)
        patches = patches.astype(layers.at_least_float32(patches.dtype))
        side, patch = self.config.side, self.config.pixel_decoder.patch
        return 0.5 + 0.5 * grid.from_patches(patches, side, side, patch)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised features [B, N, D] -> pixels as of `to_pixels`."""
        return self.to_pixels(self.hidden(x))


class FAE(nnx.Module):
    """Encoder, feature decoder and pixel decoder, with the statistics of features and latents."""

    def __init__(self, config: FAEConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        c = config.feature_decoder
        self.encoder = SingleAttention(config, rngs=rngs)
        self.feature_decoder = GridDecoder(
            config.channels, config.side, config.features_stack(), c.positions, c.rope, rngs=rngs
        )
        self.pixel_decoder = PixelDecoder(config, rngs=rngs)
        self.features = Statistics(config.features)
        self.latents = Statistics(config.channels)

    def encode(self, features: jax.Array) -> Posterior:
        """Features [B, N, D] -> the posterior of z [B, N, C]."""
        moments = self.encoder(self.features.normalise(features))
        return self.posterior(moments.astype(layers.at_least_float32(moments.dtype)))

    def posterior(self, moments: jax.Array) -> Posterior:
        """Means, then log-variances [..., N, 2C] -> the posterior."""
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, *_LOGVAR))

    def decode_features(self, z: jax.Array) -> jax.Array:
        """z [B, N, C] -> features [B, N, D], in its dtype."""
        return self.features.denormalise(self.feature_decoder(z))

    def decode_pixels(self, features: jax.Array) -> jax.Array:
        """Features [B, N, D] -> pixels [B, H, W, channels]; 0 is black and 1 white, not clipped."""
        return self.pixel_decoder(self.features.normalise(features))

    def decode(self, z: jax.Array) -> jax.Array:
        """z [B, N, C] -> pixels as of `decode_pixels`."""
        return self.pixel_decoder(self.feature_decoder(z))


class FeatureFAE(nnx.Module):
    """An FAE with what makes its features: a frozen ViT, or nothing but the patches of pixels."""

    def __init__(self, config: FAEConfig, vit: DinoV2Config | None, *, rngs: nnx.Rngs) -> None:
        """A fresh model.

        Args:
            config: of the FAE.
            vit: of the ViT; None: a feature is a patch of pixels, and D = P.
            rngs: of all parameters.

        Raises:
            ValueError: the ViT's width, or P, is not D.
        """
        self.config, self.vit_config = config, vit
        made = config.pixel_decoder.patch**2 * config.image_channels if vit is None else vit.width
        if made != config.features:
            what = "patches have" if vit is None else "the ViT has"
            raise ValueError(f"{what} {made} features, the FAE takes {config.features}")
        self.vit = nnx.data(None if vit is None else DinoV2(vit, rngs=rngs))
        self.fae = FAE(config, rngs=rngs)

    def features_of(self, images: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Features of pictures.

        The ViT sees them resized (bicubic, with antialias) so that it makes side x side tokens.

        Args:
            images: [B, H, W, channels], uint8, or floats in which 1 is white.
            dtype: of the computation.

        Returns:
            [B, N, D] in `dtype`, no gradient.
        """
        wide = layers.at_least_float32(dtype)
        pixels = images.astype(wide)
        if images.dtype == jnp.uint8:
            pixels = pixels / 255.0
        c = self.config
        if self.vit is None:
            pixels = grid.resize(pixels, c.image_size, c.image_size)
            patches = grid.to_patches(2.0 * pixels - 1.0, c.pixel_decoder.patch)
            return jax.lax.stop_gradient(patches.astype(dtype))
        seen = c.side * self.vit_config.patch
        pixels = self.vit.normalise(grid.resize(pixels, seen, seen))
        return jax.lax.stop_gradient(self.vit(pixels.astype(dtype)).patches)

    def encode(self, images: jax.Array, dtype: jnp.dtype) -> Posterior:
        """Pictures as of `features_of` -> the posterior of z [B, N, C], in at least float32."""
        return self.fae.encode(self.features_of(images, dtype))
