"""The autoregressive normalizing flow: Gaussian head, AF blocks, the shallow flow, the deep block.

z_n = (u_n - mu(u_<n)) / sigma(u_<n) token by token; the log-determinant is -sum log sigma.
Specification: TarFlow (arXiv 2412.06329), STARFlow (arXiv 2506.06276).
Letters: B rows, N tokens per image, C latent channels, D width (of the flow), S shallow blocks.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from starflow2_jax.nn import decoder, layers, rope
from starflow2_jax.nn.attention import AttentionSpec

# softplus(0 + this) = 1: a zero head is the identity.
SOFTPLUS_OF_ONE = 0.541324854612918
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
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self) -> None:
        if len(self.shallow_layers) != len(self.shallow_orders):
            raise ValueError("shallow_layers and shallow_orders differ in length")
        if self.width % self.head_dim:
            raise ValueError(f"width {self.width} is not a multiple of head_dim {self.head_dim}")

    @property
    def tokens(self) -> int:
        """N."""
        return self.side * self.side

    def decoder(self, depth: int) -> decoder.DecoderConfig:
        """The family's stack: LayerNorm, full attention, exact GELU, biases, final RMSNorm."""
        heads = self.width // self.head_dim
        return decoder.DecoderConfig(
            layers=depth,
            width=self.width,
            heads=heads,
            kv_heads=heads,
            head_dim=self.head_dim,
            mlp_width=self.mlp_ratio * self.width,
            norm="layer",
            mlp="gelu",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            norm_epsilon=self.layer_norm_epsilon,
            final_norm="rms_unit_offset",
            final_norm_epsilon=self.rms_norm_epsilon,
            remat=self.remat,
        )


class GaussianHead(nnx.Module):
    """Hidden states to (mu, sigma) of the next token."""

    def __init__(self, config: FlowConfig, *, rngs: nnx.Rngs) -> None:
        self.soft_clip = config.soft_clip
        self.proj = layers.Linear(
            config.width,
            2 * config.channels,
            rngs=rngs,
            logical=("embed", None),
            kernel_init=layers.zeros,
            bias_init=layers.zeros,
        )

    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[..., D] -> mu, sigma [..., C], at least float32."""
        out = self.proj(hidden.astype(layers.at_least_float32(hidden.dtype)))
        out = self.soft_clip * jnp.tanh(out / self.soft_clip)
        scale, mu = jnp.split(out, 2, axis=-1)
        return mu, jax.nn.softplus(scale + SOFTPLUS_OF_ONE)


def guide(
    mu_c: jax.Array, sigma_c: jax.Array, mu_u: jax.Array, sigma_u: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Classifier-free guidance of two Gaussians: (1 + w) log p_c - w log p_u, elementwise.

    Args:
        mu_c, sigma_c, mu_u, sigma_u: [..., C], conditional and unconditional.
        weight: w >= 0, broadcastable.

    Returns:
        Guided mu, sigma; with w = 0 exactly the conditional ones.
    """
    s = jnp.square(jnp.minimum(sigma_c / sigma_u, 1.0))
    q = 1.0 + weight - weight * s
    return ((1.0 + weight) * mu_c - weight * s * mu_u) / q, sigma_c / jnp.sqrt(q)


class AFBlock(nnx.Module):
    """One autoregressive affine block over the tokens of one image, with a start vector."""

    def __init__(self, config: FlowConfig, depth: int, *, rngs: nnx.Rngs) -> None:
        self.decoder_config = config.decoder(depth)
        self.start = layers.parameter(
            rngs,
            lambda key, shape, dtype: jax.random.normal(key, shape, dtype),
            (config.channels,),
            (None,),
        )
        self.proj_in = layers.Linear(
            config.channels, config.width, rngs=rngs, logical=(None, "embed")
        )
        self.decoder = decoder.Decoder(self.decoder_config, rngs=rngs)
        self.head = GaussianHead(config, rngs=rngs)

    def _start(self, rows: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.broadcast_to(self.start[...].astype(dtype), (rows, 1, self.start.shape[-1]))

    def forward(
        self, u: jax.Array, angles: jax.Array, dtype: jnp.dtype
    ) -> tuple[jax.Array, jax.Array]:
        """Data to noise, in parallel.

        Args:
            u: [B, N, C] in the block's own order, at least float32.
            angles: [1, N, d/2], those of the slots.
            dtype: compute dtype of the transformer.

        Returns:
            z [B, N, C] and log-det per element, -log sigma [B, N, C], nats.
        """
        slots = jnp.concatenate([self._start(len(u), u.dtype), u[:, :-1]], axis=1)
        hidden, _ = self.decoder(self.proj_in(slots.astype(dtype)), angles, AttentionSpec())
        mu, sigma = self.head(hidden)
        return (u - mu) / sigma, -jnp.log(sigma)

    def inverse(self, z: jax.Array, angles: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Noise to data, token after token with a cache; shapes as in `forward`."""
        rows, tokens, _ = z.shape
        cache = decoder.empty_cache(self.decoder_config, rows, tokens, dtype)

        def step(carry: tuple, inputs: tuple) -> tuple:
            slot, cache = carry
            noise, angle = inputs
            hidden, cache = self.decoder(
                self.proj_in(slot.astype(dtype)), angle[None, None], AttentionSpec(), cache
            )
            mu, sigma = self.head(hidden[:, 0])
            u = mu + sigma * noise
            return (u[:, None], cache), u

        start = (self._start(rows, z.dtype), cache)
        _, u = jax.lax.scan(step, start, (jnp.moveaxis(z, 1, 0), angles[0]))
        return jnp.moveaxis(u, 0, 1)


class ShallowFlow(nnx.Module):
    """f_S: a few AF blocks over each image alone, without text; u = f_S(x)."""

    def __init__(self, config: FlowConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.blocks = nnx.List(
            [AFBlock(config, depth, rngs=rngs) for depth in config.shallow_layers]
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
        for block, order in zip(self.blocks, self.config.shallow_orders, strict=True):
            flip = slice(None, None, -1 if order == "flip" else 1)
            z, log_det = block.forward(x[:, flip], angles, dtype)
            x = z[:, flip]
            outputs.append(x)
            log_dets.append(log_det[:, flip])
        return outputs, log_dets

    def inverse(self, u: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """u [B, N, C] back to x [B, N, C]."""
        angles = self._angles(u.dtype)
        for block, order in reversed(
            list(zip(self.blocks, self.config.shallow_orders, strict=True))
        ):
            flip = slice(None, None, -1 if order == "flip" else 1)
            u = block.inverse(u[:, flip], angles, dtype)[:, flip]
        return u


class DeepBlock(nnx.Module):
    """The deep block: one causal stack over the whole row, and the Gaussian head.

    It has no start vector: the position before an image predicts its first token.
    """

    def __init__(self, config: FlowConfig, text_width: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.proj_text = layers.Linear(text_width, config.width, rngs=rngs, logical=("embed", None))
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
