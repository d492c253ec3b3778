"""The autoregressive affine block, the one part that the whole family is made of.

z_n = (u_n - mu(u_<n)) / sigma(u_<n) token by token; the log-determinant is -sum log sigma.
TarFlow (arXiv 2412.06329), STARFlow (arXiv 2506.06276), STARFlow2 (arXiv 2605.08029).
Letters: B rows, N tokens per image, C latent channels, D width, L text positions before the
tokens, R rows of the transformer: B, or 2 B where guided.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from starflow2_jax.models.guidance import Guidance
from starflow2_jax.nn import decoder, layers
from starflow2_jax.nn.attention import AttentionSpec

# softplus(0 + this) = 1: a zero head is the identity.
SOFTPLUS_OF_ONE = 0.541324854612918

Scale = Literal["softplus", "exp", "none"]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Shape and kind of one AF block.

    Attributes:
        channels: C of a token.
        layers: of the transformer.
        flip: the block runs against raster order. Rotary coordinates stay with the slots, learned
            positions go with the tokens.
        start: a learned vector is the first input, and slot n predicts token n. Without one, slot n
            holds token n and predicts the next; token 0 passes unchanged.
        scale: sigma from the head's output a: softplus(a + const) with sigma(0) = 1, exp(a), or 1
            (volume preserving; the head then has no a).
        soft_clip: c of o <- c tanh(o / c) on the head's output, or None.
        final_norm: RMSNorm before the head.
        positions: N of the learned position table; 0: none.
        classes: rows of the class table; 0: none.
        text_width: of text embeddings, which come before the tokens; 0: no text.
    """

    channels: int
    width: int
    head_dim: int
    layers: int
    flip: bool = False
    start: bool = True
    scale: Scale = "softplus"
    soft_clip: float | None = 4.0
    final_norm: bool = True
    positions: int = 0
    classes: int = 0
    text_width: int = 0
    mlp_ratio: int = 4
    layer_norm_epsilon: float = 1e-5
    rms_norm_epsilon: float = 1e-6
    remat: decoder.Remat = "none"

    def __post_init__(self) -> None:
        if self.width % self.head_dim:
            raise ValueError(f"width {self.width} is not a multiple of head_dim {self.head_dim}")
        if self.layers < 1:
            raise ValueError("a block needs at least one layer")

    def decoder(self) -> decoder.DecoderConfig:
        """The family's stack: LayerNorm, full attention, exact GELU, biases."""
        heads = self.width // self.head_dim
        return decoder.DecoderConfig(
            layers=self.layers,
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
            final_norm="rms_unit_offset" if self.final_norm else "none",
            final_norm_epsilon=self.rms_norm_epsilon,
            remat=self.remat,
        )


class HeadConfig(Protocol):
    """What a head needs of a configuration; see `BlockConfig`."""

    @property
    def channels(self) -> int:
        """C."""

    @property
    def width(self) -> int:
        """D."""

    @property
    def scale(self) -> Scale:
        """The scale map."""

    @property
    def soft_clip(self) -> float | None:
        """The clip."""


class GaussianHead(nnx.Module):
    """Hidden states to (mu, sigma) of the next token."""

    def __init__(self, config: HeadConfig, *, rngs: nnx.Rngs) -> None:
        self.soft_clip = config.soft_clip
        self.scale = config.scale
        self.proj = layers.Linear(
            config.width,
            config.channels * (1 if config.scale == "none" else 2),
            rngs=rngs,
            logical=("embed", None),
            kernel_init=layers.zeros,
            bias_init=layers.zeros,
        )

    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[..., D] -> mu, sigma [..., C], at least float32."""
        with layers.full_precision():
            out = self.proj(hidden.astype(layers.at_least_float32(hidden.dtype)))
        if self.soft_clip is not None:
            out = self.soft_clip * jnp.tanh(out / self.soft_clip)
        if self.scale == "none":
            return out, jnp.ones_like(out)
        scale, mu = jnp.split(out, 2, axis=-1)
        if self.scale == "exp":
            return mu, jnp.exp(scale)
        return mu, jax.nn.softplus(scale + SOFTPLUS_OF_ONE)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """What the tokens of an image depend on beside those before them.

    Attributes:
        text: [R, L, text_width] embeddings, or None; blocks without text ignore it.
        labels: int32 [R]; -1, or None for all rows, is no class: the mean of the table.
        temperature: [R] or scalar, or None for 1; divides the scores of every attention.
    """

    text: jax.Array | None = None
    labels: jax.Array | None = None
    temperature: jax.Array | float | None = None

    @property
    def text_length(self) -> int:
        """L."""
        return 0 if self.text is None else self.text.shape[1]

    def beside(self, other: "Given", rows: int) -> "Given":
        """These B = `rows` rows, and behind them the rows of `other`."""

        def join(a: Any, b: Any, absent: Any) -> jax.Array | None:
            if a is None and b is None:
                return None
            fill = lambda x: jnp.broadcast_to(jnp.asarray(absent if x is None else x), (rows,))
            return jnp.concatenate([fill(a), fill(b)])

        if (self.text is None) != (other.text is None):
            raise ValueError("text is given to the rows of one half only")
        text = None if self.text is None else jnp.concatenate([self.text, other.text])
        return Given(
            text,
            join(self.labels, other.labels, -1),
            join(self.temperature, other.temperature, 1.0),
        )


class AFBlock(nnx.Module):
    """One autoregressive affine block over the tokens of one image."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config

        def table(std: float, *shape: int) -> nnx.Param:
            init = lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)
            logical = (*(None,) * (len(shape) - 1), "embed" if shape[-1] == config.width else None)
            return layers.parameter(rngs, init, shape, logical)

        width = config.width
        self.start = nnx.data(table(1.0, config.channels) if config.start else None)
        self.positions = nnx.data(
            table(0.01, config.positions, width) if config.positions else None
        )
        self.classes = nnx.data(table(0.01, config.classes, width) if config.classes else None)
        self.proj_text = nnx.data(
            layers.Linear(config.text_width, width, rngs=rngs, logical=(None, "embed"))
            if config.text_width
            else None
        )
        self.proj_in = layers.Linear(config.channels, width, rngs=rngs, logical=(None, "embed"))
        self.decoder = decoder.Decoder(config.decoder(), rngs=rngs)
        self.head = GaussianHead(config, rngs=rngs)

    @property
    def order(self) -> slice:
        """Takes raster tokens to the block's own order, and back."""
        return slice(None, None, -1 if self.config.flip else 1)

    @property
    def lag(self) -> int:
        """Slot n predicts token n + lag."""
        return 0 if self.config.start else 1

    def start_slot(self, rows: int, dtype: jnp.dtype) -> jax.Array:
        """The start vector as the first slot of each row, [B, 1, C]."""
        return jnp.broadcast_to(self.start[...].astype(dtype), (rows, 1, self.start.shape[-1]))

    def _check(self, tokens: int) -> None:
        if self.positions is not None and tokens != len(self.positions):
            raise ValueError(f"{tokens} tokens, but learned positions for {len(self.positions)}")

    def embed_text(self, given: Given, dtype: jnp.dtype) -> jax.Array | None:
        """The projected text [R, L, D], or None."""
        if self.proj_text is None:
            return None
        if given.text is None:
            raise ValueError("this block is conditioned on text, and none is given")
        return self.proj_text(given.text.astype(dtype))

    def embed(
        self, inputs: jax.Array, first: jax.Array | int, given: Given, dtype: jnp.dtype
    ) -> jax.Array:
        """Inputs [R, n, C] of the slots from `first` on -> [R, n, D]."""
        hidden = self.proj_in(inputs.astype(dtype))
        if self.positions is not None:
            table = self.positions[...][self.order]
            if inputs.shape[1] != len(table):
                table = jax.lax.dynamic_slice_in_dim(table, first, inputs.shape[1])
            hidden = hidden + table.astype(dtype)
        if self.classes is not None:
            table = self.classes[...]
            absent = table.mean(0)
            embedding = absent[None]
            if given.labels is not None:
                label = given.labels[:, None]
                embedding = jnp.where(label < 0, absent, table[jnp.maximum(given.labels, 0)])
            hidden = hidden + embedding[:, None].astype(dtype)
        return hidden

    def gaussians(
        self, hidden: jax.Array, first: jax.Array | int, tokens: int, guidance: Guidance | None
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states [R, n, D] of the slots from `first` on -> mu, sigma [B, n, C]."""
        mu, sigma = self.head(hidden)
        if guidance is None:
            return mu, sigma
        return guidance(mu, sigma, first + self.lag + jnp.arange(mu.shape[1]), tokens)

    def forward(
        self,
        u: jax.Array,
        angles: jax.Array | None,
        dtype: jnp.dtype,
        given: Given = Given(),
        guidance: Guidance | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Data to noise, in parallel.

        Args:
            u: [B, N, C] in the block's own order, at least float32.
            angles: [1, L + N, d/2], those of the text and the slots; None: not rotary.
            dtype: compute dtype of the transformer.
            given: of B rows; where guided of 2 B, the unconditional ones behind.
            guidance: the rule, or None.

        Returns:
            z [B, N, C] and log-det per element, -log sigma [B, N, C], nats.
        """
        tokens = u.shape[1]
        self._check(tokens)
        inputs = u
        if self.start is not None:
            inputs = jnp.concatenate([self.start_slot(len(u), u.dtype), u[:, :-1]], axis=1)
        hidden = self.embed(_doubled(inputs, guidance), 0, given, dtype)
        text = self.embed_text(given, dtype)
        if text is not None:
            hidden = jnp.concatenate([text, hidden], axis=1)
        spec = AttentionSpec(temperature=given.temperature)
        hidden, _ = self.decoder(hidden, angles, spec)
        mu, sigma = self.gaussians(hidden[:, -tokens:], 0, tokens, guidance)
        if self.lag:
            shift = ((0, 0), (1, 0), (0, 0))
            mu = jnp.pad(mu[:, :-1], shift)
            sigma = jnp.pad(sigma[:, :-1], shift, constant_values=1.0)
        return (u - mu) / sigma, -jnp.log(sigma)

    def inversion(
        self,
        z: jax.Array,
        angles: jax.Array | None,
        dtype: jnp.dtype,
        given: Given = Given(),
        guidance: Guidance | None = None,
    ) -> "Inversion":
        """What a sampler needs to solve for u; the text has been read. Arguments of `forward`."""
        rows, tokens, _ = z.shape
        self._check(tokens)
        text = self.embed_text(given, dtype)
        length = 0 if text is None else text.shape[1]
        transformer_rows = rows if guidance is None else 2 * rows
        slots = length + tokens - self.lag
        cache = decoder.empty_cache(self.decoder.config, transformer_rows, slots, dtype)
        if text is not None:
            spec = AttentionSpec(temperature=given.temperature)
            _, cache = self.decoder(
                text, None if angles is None else angles[:, :length], spec, cache
            )
        stack = self.decoder
        if stack.small:
            cache = decoder.in_step(cache, length, stack.config.head_dim)
            stack = stack.unrolled()
        return Inversion(self, stack, z, angles, dtype, given, guidance, cache)

    def inverse(
        self,
        z: jax.Array,
        angles: jax.Array | None,
        dtype: jnp.dtype,
        given: Given = Given(),
        guidance: Guidance | None = None,
    ) -> jax.Array:
        """Noise to data [B, N, C], token after token with a cache; arguments as in `forward`."""
        inversion = self.inversion(z, angles, dtype, given, guidance)

        def step(carry: tuple, inputs: tuple) -> tuple:
            slot, cache = carry
            noise, index = inputs
            mu, sigma, cache = inversion.gaussians(slot, index, cache)
            u = mu[:, 0] + sigma[:, 0] * noise
            return (u[:, None], cache), u

        noise = jnp.moveaxis(inversion.noise, 1, 0)
        slot, cache, drawn = inversion.lead, inversion.cache, [noise[:0]]
        for first, end in stretches(len(noise)):
            cache = inversion.room(cache, end)
            (slot, cache), u = jax.lax.scan(
                step, (slot, cache), (noise[first:end], jnp.arange(first, end))
            )
            drawn.append(u)
        return inversion.whole(jnp.moveaxis(jnp.concatenate(drawn), 0, 1))


# A sampler's cache grows in this many stretches: every step reads all of its slots.
STRETCHES = 4


def stretches(count: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Cuts `count` slots into at most `STRETCHES` [first, end), multiples of `multiple` long."""
    size = max(1, -(-count // (STRETCHES * multiple))) * multiple
    return [(first, min(first + size, count)) for first in range(0, count, size)]


def _doubled(x: jax.Array, guidance: Guidance | None) -> jax.Array:
    return x if guidance is None else jnp.concatenate([x, x])


@dataclasses.dataclass(frozen=True)
class Inversion:
    """An AF block about to be inverted: slots 0..n-1 predict the n tokens that are unknown.

    Attributes:
        stack: the block's decoder, unrolled where it is small.
        cache: keys and values of the text; `room` makes room for the slots.
    """

    block: AFBlock
    stack: decoder.Decoder
    z: jax.Array
    angles: jax.Array | None
    dtype: jnp.dtype
    given: Given
    guidance: Guidance | None
    cache: decoder.Cache

    def room(self, cache: decoder.Cache, slots: int) -> decoder.Cache:
        """The cache with room for the text and the first `slots` slots, at least."""
        if cache["length"].ndim:
            return cache
        text = self.given.text_length if self.block.proj_text is not None else 0
        return decoder.in_step(cache, text + slots, self.block.config.head_dim)

    @property
    def lead(self) -> jax.Array:
        """Input of slot 0, [B, 1, C]: the start vector, or token 0."""
        if self.block.lag:
            return self.z[:, :1]
        return self.block.start_slot(len(self.z), self.z.dtype)

    @property
    def noise(self) -> jax.Array:
        """Noise of the unknown tokens, [B, n, C]."""
        return self.z[:, self.block.lag :]

    def whole(self, u: jax.Array) -> jax.Array:
        """All tokens [B, N, C] of the n that were unknown."""
        return jnp.concatenate([self.z[:, :1], u], axis=1) if self.block.lag else u

    def gaussians(
        self, inputs: jax.Array, first: jax.Array, cache: decoder.Cache
    ) -> tuple[jax.Array, jax.Array, decoder.Cache]:
        """Runs inputs [B, m, C] of the slots from `first` on over what is in the cache.

        Returns:
            mu, sigma [B, m, C], and the cache with these slots in it.
        """
        tokens, size = self.z.shape[1], inputs.shape[1]
        angles = self.angles
        if angles is not None:
            at = self.angles.shape[1] - tokens + first
            angles = jax.lax.dynamic_slice_in_dim(angles, at, size, axis=1)
        hidden = self.block.embed(_doubled(inputs, self.guidance), first, self.given, self.dtype)
        spec = AttentionSpec(temperature=self.given.temperature)
        hidden, cache = self.stack(hidden, angles, spec, cache)
        return *self.block.gaussians(hidden, first, tokens, self.guidance), cache


Inverter = Callable[..., tuple[jax.Array, Any]]
"""Inverts an AF block: (block, z, angles, dtype, given, guidance) -> u and notes on how."""


def sequential(block: AFBlock, *args: Any) -> tuple[jax.Array, None]:
    """`AFBlock.inverse` as an `Inverter`."""
    return block.inverse(*args), None
