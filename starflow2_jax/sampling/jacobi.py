"""Jacobi sampling: an autoregressive flow inverted many tokens at a time, by fixed-point iteration.

Several tokens start from the noise. Each pass computes all their Gaussians from the estimate of the
pass before, until the estimate hardly changes: of AF blocks chunk after chunk, as STARFlow (arXiv
2506.06276) does, and of the deep block under the frozen VLM, through both streams.
Letters: B rows, R cache rows (B, and the twins of guidance), N tokens per image, n unknown tokens
(N, or N - 1 where the first one is known), C channels, M cache slots.
"""

import dataclasses
import functools
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from starflow2_jax.models.af_block import AFBlock, Given, Inverter, stretches
from starflow2_jax.models.guidance import Guidance
from starflow2_jax.models.pretzel import Kind, Pretzel
from starflow2_jax.nn.attention import AttentionSpec
from starflow2_jax.sampling import step
from starflow2_jax.sampling.state import Mode, RowSettings, SampleState

Cache = Any
"""A pytree of dictionaries; its entries `length` say how much of it is real."""


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JacobiConfig:
    """When a chunk is done. All thresholds are one compilation.

    Attributes:
        chunk: tokens that are solved for together.
        threshold: a pass that changes the chunk by less than this is the last.
        max_passes: at most this many. None: as many as the chunk has tokens, which is exact.
        measure: of the change, over all rows: "relative", its mean square over that of the result
            (below a threshold of 0 it never is); or "largest", the largest absolute one (where it
            equals the threshold, the chunk is done).
    """

    chunk: int = _static(64)
    threshold: jax.Array | float = 5e-3
    max_passes: int | None = _static(32)
    measure: Literal["relative", "largest"] = _static("relative")

    def __post_init__(self) -> None:
        if self.chunk < 1 or (self.max_passes is not None and self.max_passes < 1):
            raise ValueError("chunk and max_passes are at least 1")

    def done(self, new: jax.Array, old: jax.Array) -> jax.Array:
        """Whether a pass changed little enough; scalar. A change that is no number never is."""
        if self.measure == "largest":
            return jnp.abs(new - old).max() <= self.threshold
        return jnp.square(new - old).mean() / jnp.square(new).mean() < self.threshold


class Unknown(Protocol):
    """Tokens to be solved for: slots 0..n-1 predict them, each from the token before its own."""

    @property
    def lead(self) -> jax.Array:
        """Input of slot 0, [B, 1, C]."""

    @property
    def noise(self) -> jax.Array:
        """Noise of the unknown tokens, [B, n, C]."""

    @property
    def cache(self) -> Cache:
        """Of everything before slot 0."""

    def room(self, cache: Cache, slots: int) -> Cache:
        """The cache with room for the first `slots` slots, at least."""

    def gaussians(
        self, inputs: jax.Array, first: jax.Array, cache: Cache
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """Runs inputs [B, m, C] of the slots from `first` on: their mu, sigma, and the cache."""


def _rewound(cache: Cache, to: Cache) -> Cache:
    """The cache as long as `to` is: what lies behind the end is written over."""

    def leaf(path: tuple, new: jax.Array, old: jax.Array) -> jax.Array:
        return old if path[-1] == jax.tree_util.DictKey("length") else new

    return jax.tree_util.tree_map_with_path(leaf, cache, to)


def _solve_chunk(
    unknown: Unknown,
    config: JacobiConfig,
    first: jax.Array,
    size: int,
    estimate: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache, jax.Array]:
    """Solves for the `size` tokens that the slots from `first` on predict.

    Args:
        unknown, config: what, and how long.
        first: scalar.
        size: of the chunk.
        estimate: [B, n + 1, C], the lead and every unknown token.
        cache: of all slots before.

    Returns:
        The estimate, the cache with the slots of the chunk in it, and the number of passes.
    """
    noise = jax.lax.dynamic_slice_in_dim(unknown.noise, first, size, axis=1)
    before = cache
    most = size if config.max_passes is None else config.max_passes

    def going_on(state: tuple) -> jax.Array:
        _, _, passes, done = state
        return (passes == 0) | ((passes < most) & ~done)

    def one_pass(state: tuple) -> tuple:
        estimate, cache, passes, _ = state
        # The slots that stay were made from the inputs of the last pass, not from its results.
        cache = _rewound(cache, before)
        inputs = jax.lax.dynamic_slice_in_dim(estimate, first, size, axis=1)
        old = jax.lax.dynamic_slice_in_dim(estimate, first + 1, size, axis=1)
        mu, sigma, cache = unknown.gaussians(inputs, first, cache)
        new = mu + sigma * noise
        done = config.done(new, old)
        estimate = jax.lax.dynamic_update_slice_in_dim(estimate, new, first + 1, axis=1)
        return estimate, cache, passes + 1, done

    start = (estimate, cache, jnp.int32(0), jnp.zeros((), bool))
    estimate, cache, passes, _ = jax.lax.while_loop(going_on, one_pass, start)
    return estimate, cache, passes


def solve(unknown: Unknown, config: JacobiConfig) -> tuple[jax.Array, Cache, jax.Array]:
    """Solves for all tokens, chunk after chunk.

    Returns:
        The n tokens [B, n, C], the cache with all slots in it, and the passes of each chunk, int32
        [ceil(n / chunk)].
    """
    estimate = jnp.concatenate([unknown.lead, unknown.noise], axis=1)
    whole, rest = divmod(unknown.noise.shape[1], config.chunk)

    def chunk(carry: tuple, first: jax.Array) -> tuple:
        estimate, cache, passes = _solve_chunk(unknown, config, first, config.chunk, *carry)
        return (estimate, cache), passes

    cache, passes = unknown.cache, [jnp.zeros((0,), jnp.int32)]
    for begin, end in stretches(whole * config.chunk, config.chunk):
        cache = unknown.room(cache, end)
        (estimate, cache), taken = jax.lax.scan(
            chunk, (estimate, cache), jnp.arange(begin, end, config.chunk)
        )
        passes.append(taken)
    if rest:
        cache = unknown.room(cache, unknown.noise.shape[1])
        first = jnp.asarray(whole * config.chunk)
        estimate, cache, last = _solve_chunk(unknown, config, first, rest, estimate, cache)
        passes.append(last[None])
    return estimate[:, 1:], cache, jnp.concatenate(passes)


def inverse(
    block: AFBlock,
    z: jax.Array,
    angles: jax.Array | None,
    dtype: jnp.dtype,
    given: Given = Given(),
    guidance: Guidance | None = None,
    *,
    config: JacobiConfig,
) -> tuple[jax.Array, jax.Array]:
    """Noise to data, chunk after chunk.

    Args:
        block: any AF block.
        z, angles, dtype, given, guidance: see `AFBlock.forward`.
        config: when a chunk is done.

    Returns:
        u [B, N, C], and the passes of each chunk, int32 [ceil(n / chunk)].
    """
    inversion = block.inversion(z, angles, dtype, given, guidance)
    u, _, passes = solve(inversion, config)
    return inversion.whole(u), passes


def inverter(config: JacobiConfig) -> Inverter:
    """The sampler for `ImageFlow.reverse` and `ShallowFlow.inverse_by`; it notes the passes."""

    def invert(block: AFBlock, *args: object) -> tuple[jax.Array, jax.Array]:
        return inverse(block, *args, config=config)

    return invert


@jax.jit
def to_x(model: Pretzel, u: jax.Array, config: JacobiConfig) -> tuple[jax.Array, list[jax.Array]]:
    """`display.to_x` by Jacobi iteration.

    Args:
        model: whose shallow flow is inverted.
        u: [..., N, C], at least float32.
        config: when a chunk is done.

    Returns:
        x [..., N, C], and the passes of each chunk of the shallow blocks, the last block first.
    """
    flat = u.reshape(-1, *u.shape[-2:])
    dtype = jnp.dtype(model.config.dtype)
    x, passes = model.shallow.inverse_by(inverter(config), flat, dtype)
    return x.reshape(u.shape), passes


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """Images under way in both streams: slot k feeds latent k and predicts latent k + 1.

    The cache holds, beside those of both streams, what they say at the last slot fed.

    Attributes:
        draws: bool [B], the rows that draw; the others wait.
        lead: [B, 1, C], latent 0.
        noise: [B, N - 1, C].
    """

    model: Pretzel
    state: SampleState
    settings: RowSettings
    draws: jax.Array
    lead: jax.Array
    noise: jax.Array

    @property
    def cache(self) -> Cache:
        """Before latent 0."""
        return {"caches": self.state.caches, "y": self.state.y, "g": self.state.g}

    def room(self, cache: Cache, slots: int) -> Cache:
        """See `Unknown`; the state's caches have room for the whole context."""
        del slots
        return cache

    def gaussians(
        self, inputs: jax.Array, first: jax.Array, cache: Cache
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """See `Unknown`."""
        config, size = self.model.config, inputs.shape[1]
        both = lambda a: step.with_twins_of(self.state, a)
        u, draws = both(inputs), both(self.draws)
        raster, side = first + jnp.arange(size, dtype=jnp.int32), config.flow.side
        offset = jnp.stack([jnp.zeros_like(raster), raster // side, raster % side])
        streams = self.model.run(
            jnp.full(u.shape[:2], config.special.image_pad, jnp.int32),
            jnp.full(u.shape[:2], Kind.LATENT, jnp.int32),
            self.state.position[None, :, None] + offset[:, None],
            u,
            AttentionSpec(lengths=jnp.where(draws, size, 0)),
            caches=cache["caches"],
        )
        found = step.latent_gaussians(self.model, streams.g, self.settings, self.state)
        # Rows that wait are at rest: they say nothing about the change.
        rest = ~self.draws[:, None, None]
        mu, sigma = jnp.where(rest, 0.0, found.mu), jnp.where(rest, 0.0, found.sigma)
        keep = lambda new, old: jnp.where(draws[:, None], new[:, -1], old)
        return (
            mu,
            sigma,
            {
                "caches": streams.caches,
                "y": keep(streams.y, self.state.y),
                "g": keep(streams.g, self.state.g),
            },
        )


def about_to_draw(state: SampleState, settings: RowSettings) -> jax.Array:
    """Rows whose next element is the first latent of an image: bool [B]."""
    return (state.mode == Mode.DRAW) & (state.drawn == 0) & ~step.waits(state, settings)


def draw(
    model: Pretzel, state: SampleState, settings: RowSettings, config: JacobiConfig
) -> tuple[SampleState, jax.Array]:
    """All rows that are about to draw draw all but the last latent of their image; others wait.

    A pass runs N - 1 latents of each row through adapter, VLM and deep block, over the caches of
    what is before them. The noise is that of `step.step`, whose next step draws the last latent; so
    with `max_passes` None and threshold 0 the image is that of sequential sampling, to rounding.

    Args:
        model, state, settings: see `step.step`; the state may not keep a record.
        config: when a chunk of the image is done. The keys and values that stay are those of its
            last pass.

    Returns:
        The state, and the passes of each chunk, int32 [ceil((N - 1) / chunk)].

    Raises:
        ValueError: the state keeps a record.
    """
    if state.record is not None:
        raise ValueError("only sequential sampling keeps a record")
    special, tokens = model.config.special, model.config.flow.tokens
    ahead = lambda n: step.latent_noise(model, state, settings, n)
    noise = jax.vmap(ahead, out_axes=1)(jnp.arange(tokens))  # [B, N, C]
    draws = about_to_draw(state, settings)
    noise = jnp.where(draws[:, None, None], noise, 0.0)
    found = step.latent_gaussians(model, state.g, settings, state)
    lead = (found.mu + found.sigma * noise[:, 0])[:, None]
    drawing = _Drawing(model, state, settings, draws, lead, noise[:, 1:])
    u, cache, passes = solve(drawing, config)
    fed = jnp.concatenate([lead, u], axis=1)  # the last one has not been fed

    slot = jnp.arange(state.tokens.shape[1])[None] - state.length[:, None]
    inside = draws[:, None] & (slot >= 0) & (slot < tokens - 1)
    image = jnp.arange(state.u.shape[1])[None] == state.images[:, None]
    drawn = (draws[:, None] & image)[..., None, None] & (jnp.arange(tokens) < tokens - 1)[:, None]
    more = jnp.where(draws, tokens - 1, 0).astype(jnp.int32)
    state = dataclasses.replace(
        state,
        **cache,
        drawn=state.drawn + more,
        draws=state.draws + more,
        tokens=jnp.where(inside, special.image_pad, state.tokens),
        kinds=jnp.where(inside, Kind.LATENT, state.kinds),
        u=jnp.where(drawn, fed[:, None], state.u),
    )
    return state, passes


@functools.partial(jax.jit, donate_argnames="state")
def _advance(
    model: Pretzel,
    state: SampleState,
    settings: RowSettings,
    steps: jax.Array,
    config: JacobiConfig,
) -> SampleState:
    def goes_on(carry: tuple[SampleState, jax.Array]) -> jax.Array:
        state, left = carry
        return (left > 0) & jnp.any(state.mode != Mode.DONE)

    def body(carry: tuple[SampleState, jax.Array]) -> tuple[SampleState, jax.Array]:
        state, left = carry
        state = jax.lax.cond(
            jnp.any(about_to_draw(state, settings)),
            lambda: draw(model, state, settings, config)[0],
            lambda: state,
        )
        return step.step(model, state, settings), left - 1

    return jax.lax.while_loop(goes_on, body, (state, steps))[0]


def advance(
    model: Pretzel, state: SampleState, settings: RowSettings, steps: int, config: JacobiConfig
) -> SampleState:
    """`step.advance`, but images are drawn by `draw`; an image's latents but one are one step."""
    return _advance(model, state, settings, jnp.asarray(steps, jnp.int32), config)
