"""Prefill, and the decode step that advances every row by its own kind.

A row holds in `y` and `g` what the streams said at its last position; that predicts its next
element: a text token, a latent u, or the `<|vision_end|>` that follows an image by rule. A step
chooses the element of every row, feeds all of them through both streams at once, and moves each
row's mode on. Every element of a row has been fed, an end token too: the caches hold exactly the
row's tokens and latents.

Under guidance P more cache rows, the twins, hold the unconditional prompt. A row that starts to
draw with guidance takes a free one, or waits for it: while the row draws, its twin is fed the same
latents at positions of its own, and is free again behind the image.

Letters: B rows, P twins, R = B + P cache rows, T prompt positions, M cache slots, I images,
N tokens per image, C latent channels, V vocabulary, Dv VLM width, Df flow width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.models.flow import guide, standard_normal_log_prob
from starflow2_jax.models.pretzel import Kind, Pretzel, SpecialTokens, spread_images
from starflow2_jax.nn.attention import AttentionSpec
from starflow2_jax.nn.decoder import Cache, with_slots
from starflow2_jax.nn.layers import at_least_float32
from starflow2_jax.sampling.state import Mode, Prefix, Prompt, Record, RowSettings, SampleState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Element:
    """The next element of each row: token, kind int32 [B] (PAD: none), u [B, C] for LATENT."""

    token: jax.Array
    kind: jax.Array
    u: jax.Array


def _at_end(a: jax.Array, lengths: jax.Array) -> jax.Array:
    """[B, T, ...] at each row's last position: [B, ...]."""
    return a[jnp.arange(a.shape[0]), lengths - 1]


def _settled(mode: jax.Array, state: SampleState, settings: RowSettings, tokens: int) -> jax.Array:
    """The mode after the limits: a row that may write no more, or has no room, is DONE."""
    over = (state.texts >= settings.max_new_tokens) | (
        (settings.max_images > 0) & (state.images >= settings.max_images)
    )
    writes, draws = mode == Mode.WRITE, (mode == Mode.DRAW) & (state.drawn == 0)
    done = (writes & over) | (state.room < 1) | (draws & (state.room < tokens + 1))
    return jnp.where(done, Mode.DONE, mode)


@jax.jit(static_argnames=("slots", "images", "record"))
def prefill(
    model: Pretzel,
    prompt: Prompt,
    settings: RowSettings,
    *,
    slots: int,
    images: int,
    unconditional: jax.Array | None = None,
    record: bool = False,
) -> SampleState:
    """Runs the prompts through both streams and readies every row for its first element.

    Args:
        model: the model.
        prompt: B rows.
        settings: how they sample.
        slots: M, cache slots per row: prompt and everything new.
        images: I, images that a row may draw; at least 1 and every row's `max_images`.
        unconditional: int32 [Tu], a text row that ends with `<|vision_start|>`: the other side of
            guidance. None samples without guidance.
        record: keep a `Record`.

    Returns:
        The state to `advance`. A row that may not begin (no room, no tokens) is DONE.

    Raises:
        ValueError: a prompt is longer than the cache, or the unconditional row and one image are.
    """
    config = model.config
    flow = config.flow
    rows, length = prompt.tokens.shape
    if length > slots:
        raise ValueError(f"a prompt of {length} positions does not fit a cache of {slots}")
    wide = at_least_float32(jnp.dtype(config.dtype))
    if prompt.u is None:
        u = jnp.zeros((rows, length, flow.channels), wide)
    else:
        u = spread_images(prompt.u.astype(wide), prompt.image_start, length)
    spec = AttentionSpec(lengths=prompt.lengths)
    caches = model.empty_caches(rows, 0)
    streams = model.run(
        prompt.tokens, prompt.kinds, prompt.positions, u, spec, caches=caches, views=prompt.views
    )
    caches = _with_slots(streams.caches, slots)
    y, g = _at_end(streams.y, prompt.lengths), _at_end(streams.g, prompt.lengths)
    # Text: its id + 1. An image's last token: the image's first id + side.
    position = _at_end(prompt.positions.max(0), prompt.lengths) + 1
    prefix = None
    if unconditional is not None:
        prefix, twin = prefill_unconditional(model, unconditional, slots)
        spread = lambda a: jnp.broadcast_to(a, (rows, *a.shape))
        y, g = (jnp.concatenate([y, spread(prefix.y)]), jnp.concatenate([g, spread(prefix.g)]))
        position = jnp.concatenate([position, spread(prefix.position)])
        caches = jax.tree.map(lambda a, b: with_twins(a, b, rows), caches, twin)
    exists = jnp.arange(length)[None] < prompt.lengths[:, None]
    whole = lambda a: jnp.pad(jnp.where(exists, a, 0), ((0, 0), (0, slots - length)))
    last = _at_end(prompt.tokens, prompt.lengths), _at_end(prompt.kinds, prompt.lengths)
    mode = mode_behind(*last, config.special)
    zeros = lambda *shape: jnp.zeros((rows, *shape), wide)
    count = lambda: jnp.zeros((rows,), jnp.int32)
    image = (images, flow.tokens, flow.channels)
    state = SampleState(
        caches=caches,
        position=position.astype(jnp.int32),
        y=y,
        g=g,
        mode=mode,
        drawn=count(),
        draws=count(),
        texts=count(),
        images=count(),
        tokens=whole(prompt.tokens).astype(jnp.int32),
        kinds=whole(prompt.kinds).astype(jnp.int32),
        u=zeros(*image),
        prefix=prefix,
        twins=None if prefix is None else jnp.full((rows,), -1, jnp.int32),
        waited=None if prefix is None else count(),
        record=Record(zeros(*image), zeros(*image), zeros(), zeros(images)) if record else None,
    )
    return settled(state, settings, flow.tokens)


def mode_behind(token: jax.Array, kind: jax.Array, special: SpecialTokens) -> jax.Array:
    """What follows rows that end with these tokens of these kinds: int32, values of `Mode`."""
    mode = jnp.where(token == special.vision_start, Mode.DRAW, Mode.WRITE)
    return jnp.where(kind == Kind.LATENT, Mode.CLOSE, mode).astype(jnp.int32)


def settled(state: SampleState, settings: RowSettings, tokens: int) -> SampleState:
    """The state with its limits observed, and twins where they are needed.

    Args:
        state, settings: see `step`.
        tokens: N.
    """
    mode = _settled(state.mode, state, settings, tokens).astype(jnp.int32)
    state = dataclasses.replace(state, mode=mode)
    return state if state.prefix is None else _share_twins(state, settings)


def _with_slots(caches: dict[str, Cache], slots: int) -> dict[str, Cache]:
    """The caches, grown to `slots` slots per row."""
    return {name: with_slots(cache, slots) for name, cache in caches.items()}


def prefill_unconditional(
    model: Pretzel, tokens: jax.Array, slots: int
) -> tuple[Prefix, dict[str, Cache]]:
    """The unconditional prompt int32 [Tu], run once as a row of its own."""
    (length,) = tokens.shape
    flow = model.config.flow
    if length + flow.tokens > slots:
        raise ValueError(
            f"an unconditional row of {length} positions and an image of {flow.tokens} do not fit "
            f"a cache of {slots}"
        )
    streams = model.run(
        tokens[None].astype(jnp.int32),
        jnp.full((1, length), Kind.TEXT, jnp.int32),
        jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (3, 1, length)),
        jnp.zeros((1, length, flow.channels), at_least_float32(jnp.dtype(model.config.dtype))),
        AttentionSpec(),
        caches=model.empty_caches(1, 0),
    )
    end = jnp.int32(length)
    caches = _with_slots(streams.caches, slots)
    return Prefix(streams.y[0, -1], streams.g[0, -1], end, end), caches


def with_twins(stored: jax.Array, twin: jax.Array, twins: int) -> jax.Array:
    """A cache leaf of B rows, followed by P = `twins` copies of the unconditional row."""
    axis = row_axis(stored)
    return jnp.concatenate([stored, jnp.repeat(twin, twins, axis)], axis)


def row_axis(stored: jax.Array) -> int:
    """The axis of the rows of a cache's leaf: of k, v [L, B, K, M, d] the second."""
    return 1 if stored.ndim == 5 else 0


def for_twins(state: SampleState, a: jax.Array, free: jax.Array | float | bool = 0) -> jax.Array:
    """What each twin gets of its row's a [B, ...]: [P, ...]; `free` where it has none."""
    owned = (state.twins >= 0).reshape(-1, *(1,) * (a.ndim - 1))
    return jnp.where(owned, a[jnp.maximum(state.twins, 0)], free)


def with_twins_of(state: SampleState, a: jax.Array, free: Any = 0) -> jax.Array:
    """Of every cache row, from a [B, ...] of the rows: [R, ...]."""
    if state.prefix is None:
        return a
    return jnp.concatenate([a, for_twins(state, a, free).astype(a.dtype)])


def _follows(state: SampleState) -> jax.Array:
    """Whether twin p is row b's: bool [B, P]."""
    return state.twins[None] == jnp.arange(state.mode.shape[0])[:, None]


def waits(state: SampleState, settings: RowSettings) -> jax.Array:
    """Rows that would start to draw, but have no twin yet: bool [B]."""
    if state.prefix is None:
        return jnp.zeros(state.mode.shape, bool)
    begins = (state.mode == Mode.DRAW) & (state.drawn == 0) & (settings.guidance > 0)
    return begins & ~_follows(state).any(1)


def _share_twins(state: SampleState, settings: RowSettings) -> SampleState:
    """Takes twins back from rows that do not draw, and gives them to those that wait.

    Who has waited longest comes first. A twin that is given goes back to the unconditional prompt's
    end.
    """
    prefix = state.prefix
    drawing = for_twins(state, state.mode == Mode.DRAW, free=False)
    state = dataclasses.replace(state, twins=jnp.where(drawing, state.twins, -1))
    wants = waits(state, settings)
    index = jnp.arange(len(wants))
    longer = state.waited[None] > state.waited[:, None]
    longer |= (state.waited[None] == state.waited[:, None]) & (index[None] < index[:, None])
    place = (longer & wants[None]).sum(1)
    free = state.twins < 0
    given = wants[:, None] & free[None] & (place[:, None] == (jnp.cumsum(free) - 1)[None])
    taken = given.any(0)  # [P]
    again = jnp.concatenate([jnp.zeros_like(wants), taken])

    def rewound(cache: Cache) -> Cache:
        # Slots behind the length are never seen: what an earlier image left there is overwritten.
        return cache | {"length": jnp.where(again, prefix.length, cache["length"])}

    return dataclasses.replace(
        state,
        caches={name: rewound(cache) for name, cache in state.caches.items()},
        position=jnp.where(again, prefix.position, state.position),
        y=jnp.where(again[:, None], prefix.y, state.y),
        g=jnp.where(again[:, None], prefix.g, state.g),
        twins=jnp.where(taken, jnp.argmax(given, 0), state.twins).astype(jnp.int32),
        waited=jnp.where(wants & ~given.any(1), state.waited + 1, 0),
    )


def allowed_tokens(model: Pretzel, state: SampleState, settings: RowSettings) -> jax.Array:
    """Which tokens each row may write now: bool [B, V].

    Image tokens never: they follow by rule. `<|vision_start|>` only where the row may have one more
    image and the whole drawing has room: itself, N latents and `<|vision_end|>`.
    """
    special, flow = model.config.special, model.config.flow
    token = jnp.arange(model.config.vlm.vocab_size)
    never = (token == special.image_pad) | (token == special.vision_end)
    if special.video_pad is not None:
        never |= token == special.video_pad
    may_draw = (state.images < settings.max_images) & (state.room >= flow.tokens + 2)
    return ~never[None] & ((token != special.vision_start)[None] | may_draw[:, None])


def _nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Drops, in rows with top_p < 1, the tokens outside the smallest set that holds top_p."""
    probs = jax.nn.softmax(logits, axis=-1)
    ranked = -jnp.sort(-probs, axis=-1)
    above = jnp.cumsum(ranked, axis=-1) - ranked  # what the likelier tokens hold
    inside = (above < top_p[:, None]).at[:, 0].set(True)
    smallest = jnp.where(inside, ranked, jnp.inf).min(-1, keepdims=True)
    # Rounding must not cut the tail of a row that keeps all, whatever its neighbours ask for.
    return jnp.where((probs >= smallest) | (top_p >= 1.0)[:, None], logits, -jnp.inf)


def _largest(x: jax.Array) -> jax.Array:
    """Where the largest number of each row of x, [B, V], is first: int32 [B].

    As `argmax`, which compares pairs of a number and its place, one after another on a CPU.
    """
    size = x.shape[-1]
    places = jnp.where(x == x.max(-1, keepdims=True), jnp.arange(size, dtype=jnp.int32), size - 1)
    return places.min(-1)


def choose_token(
    logits: jax.Array,
    allowed: jax.Array,
    keys: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    needed: jax.Array,
) -> jax.Array:
    """One token per row.

    Args:
        logits: [B, V].
        allowed: bool [B, V].
        keys: [B] random keys.
        temperature, top_p: [B]; see `RowSettings`.
        needed: bool [B]; what the other rows get has no meaning.

    Returns:
        int32 [B].
    """
    logits = jnp.where(allowed, logits, -jnp.inf)
    likeliest = _largest(logits)
    random = needed & (temperature > 0)

    def sampled() -> jax.Array:
        warm = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None].astype(logits.dtype)
        # A sort of the vocabulary, only where a row asks for it.
        warm = jax.lax.cond(
            jnp.any(random & (top_p < 1)), lambda: _nucleus(warm, top_p), lambda: warm
        )
        # As `jax.random.categorical` does (https://arxiv.org/abs/1611.01144, the Gumbel-max trick).
        shape, dtype = warm.shape[1:], warm.dtype
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, shape, dtype))(keys)
        token = _largest(warm + gumbel)
        # A temperature next to 0 may leave nothing finite: then the likeliest, never one that is
        # ruled out.
        there = jnp.take_along_axis(warm, token[:, None], axis=-1)[:, 0] > -jnp.inf
        return jnp.where(random & there, token, likeliest)

    return jax.lax.cond(jnp.any(random), sampled, lambda: likeliest)


@dataclasses.dataclass(frozen=True)
class _Choice:
    """The elements, and what `Record` wants to know of them (log-probs in nats, [B])."""

    element: Element
    mu: jax.Array
    sigma: jax.Array
    text_log_prob: jax.Array
    latent_log_prob: jax.Array


def _keys(state: SampleState, settings: RowSettings, ahead: jax.Array | int = 0) -> jax.Array:
    """The key of each row's next draw, or of the one `ahead` of it: [B]."""
    return jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(
        settings.seed, state.draws + ahead
    )


def latent_noise(
    model: Pretzel, state: SampleState, settings: RowSettings, ahead: jax.Array | int = 0
) -> jax.Array:
    """Noise of each row's next latent, or of the one `ahead` of it in its image: [B, C].

    At the row's image temperature; what rows that do not draw get has no meaning.
    """
    rows, dtype = state.mode.shape[0], state.u.dtype
    if settings.noise is None:
        shape = (model.config.flow.channels,)
        draw = lambda key: jax.random.normal(key, shape, dtype)
        z = jax.vmap(draw)(_keys(state, settings, ahead))
    else:
        at = settings.noise.at[jnp.arange(rows), state.images, state.drawn + ahead]
        z = at.get(mode="clip").astype(dtype)
    return settings.image_temperature[:, None].astype(dtype) * z


@dataclasses.dataclass(frozen=True)
class Gaussians:
    """Of the next latents [B, ..., C]: with guidance, and the conditional ones."""

    mu: jax.Array
    sigma: jax.Array
    mu_c: jax.Array
    sigma_c: jax.Array


def latent_gaussians(
    model: Pretzel, g: jax.Array, settings: RowSettings, state: SampleState
) -> Gaussians:
    """What the deep stream g [R, ..., Df] says of the latents that follow."""
    mu, sigma = model.deep.head(g)
    if state.prefix is None:
        return Gaussians(mu, sigma, mu, sigma)
    rows = state.mode.shape[0]
    follows = _follows(state)
    twin = jnp.argmax(follows, 1)
    spread = lambda a: a.reshape(-1, *(1,) * (g.ndim - 1))
    mu_c, sigma_c = mu[:rows], sigma[:rows]
    weight = spread(settings.guidance.astype(mu.dtype))
    guided = guide(mu_c, sigma_c, mu[rows:][twin], sigma[rows:][twin], weight)
    has = spread(follows.any(1))
    return Gaussians(
        jnp.where(has, guided[0], mu_c), jnp.where(has, guided[1], sigma_c), mu_c, sigma_c
    )


def _choose(model: Pretzel, state: SampleState, settings: RowSettings) -> _Choice:
    """What each row adds next, from its last hidden states."""
    special = model.config.special
    (rows,) = state.mode.shape
    waiting = waits(state, settings)
    writes, draws = state.mode == Mode.WRITE, (state.mode == Mode.DRAW) & ~waiting

    def write() -> tuple[jax.Array, jax.Array]:
        logits = model.logits(state.y[:rows], state.g[:rows])
        token = choose_token(
            logits,
            allowed_tokens(model, state, settings),
            _keys(state, settings),
            settings.temperature,
            settings.top_p,
            writes,
        )
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        return token, jnp.where(writes, log_prob, 0.0).astype(state.u.dtype)

    # The vocabulary is a large part of a step: nothing of it is touched while all rows draw.
    text, text_log_prob = jax.lax.cond(
        jnp.any(writes),
        write,
        lambda: (jnp.zeros((rows,), jnp.int32), jnp.zeros((rows,), state.u.dtype)),
    )

    gaussians = latent_gaussians(model, state.g, settings, state)
    u = gaussians.mu + gaussians.sigma * latent_noise(model, state, settings)
    z = (u - gaussians.mu_c) / gaussians.sigma_c
    density = standard_normal_log_prob(z) - jnp.log(gaussians.sigma_c)

    token = jnp.where(writes, text, jnp.where(draws, special.image_pad, special.vision_end))
    kind = jnp.where(draws, Kind.LATENT, Kind.TEXT)
    kind = jnp.where((state.mode == Mode.DONE) | waiting, Kind.PAD, kind)
    element = Element(token.astype(jnp.int32), kind.astype(jnp.int32), u)
    latent_log_prob = jnp.where(draws, density.sum(-1), 0.0)
    return _Choice(element, gaussians.mu, gaussians.sigma, text_log_prob, latent_log_prob)


def element_positions(state: SampleState, kind: jax.Array, side: int) -> jax.Array:
    """Position ids (time, row, column) of each cache row's next element: int32 [3, R]."""
    raster = jnp.where(kind == Kind.LATENT, state.drawn, 0)
    offset = jnp.stack([jnp.zeros_like(raster), raster // side, raster % side])
    return state.position + with_twins_of(state, offset.T).T


def _at_latent(state: SampleState, kind: jax.Array) -> jax.Array:
    """Where a LATENT of this step belongs in the image buffers: bool [B, I, N, 1], one per row."""
    _, images, tokens, _ = state.u.shape
    image = jnp.arange(images)[None, :, None] == state.images[:, None, None]
    place = jnp.arange(tokens)[None, None] == state.drawn[:, None, None]
    return (image & place & (kind == Kind.LATENT)[:, None, None])[..., None]


def feed(model: Pretzel, state: SampleState, element: Element) -> SampleState:
    """Feeds one element per row through both streams. Rows with kind PAD stay as they are.

    It follows no rule: modes and the count of text tokens are left to `step`.
    """
    side, tokens = model.config.flow.side, model.config.flow.tokens
    text, latent = element.kind == Kind.TEXT, element.kind == Kind.LATENT
    both = lambda a: with_twins_of(state, a)
    alive = text | latent
    if state.prefix is not None:
        # The twins see the drawing only.
        alive = jnp.concatenate([alive, for_twins(state, latent, free=False)])
    streams = model.run(
        both(element.token)[:, None],
        both(element.kind)[:, None],
        element_positions(state, element.kind, side)[..., None],
        both(element.u)[:, None],
        AttentionSpec(lengths=alive.astype(jnp.int32)),
        caches=state.caches,
    )
    complete = latent & (state.drawn + 1 == tokens)
    advanced = jnp.where(text, 1, jnp.where(complete, side, 0))
    if state.prefix is not None:
        # A twin is free behind its image: where that ends matters to the row alone.
        advanced = jnp.concatenate([advanced, jnp.zeros_like(state.twins)])
    # Masked writes: a scatter of a few numbers per row runs row after row on a CPU.
    slot = jnp.arange(state.tokens.shape[1])[None] == state.length[:, None]
    slot &= (text | latent)[:, None]
    return dataclasses.replace(
        state,
        caches=streams.caches,
        position=state.position + advanced.astype(jnp.int32),
        y=jnp.where(alive[:, None], streams.y[:, 0], state.y),
        g=jnp.where(alive[:, None], streams.g[:, 0], state.g),
        drawn=jnp.where(latent, state.drawn + 1, jnp.where(text, 0, state.drawn)),
        images=state.images + complete.astype(jnp.int32),
        tokens=jnp.where(slot, element.token[:, None], state.tokens),
        kinds=jnp.where(slot, element.kind[:, None], state.kinds),
        u=jnp.where(_at_latent(state, element.kind), element.u[:, None, None], state.u),
    )


def _recorded(state: SampleState, choice: _Choice) -> Record:
    here = _at_latent(state, choice.element.kind)
    image = jnp.arange(state.u.shape[1])[None] == state.images[:, None]  # [B, I]
    keep = lambda new, old: jnp.where(here, new[:, None, None], old)
    return Record(
        mu=keep(choice.mu, state.record.mu),
        sigma=keep(choice.sigma, state.record.sigma),
        text_log_prob=state.record.text_log_prob + choice.text_log_prob,
        latent_log_prob=state.record.latent_log_prob
        + jnp.where(image, choice.latent_log_prob[:, None], 0.0),
    )


def step(model: Pretzel, state: SampleState, settings: RowSettings) -> SampleState:
    """Every row that is not DONE adds one element: text, latent, or the end of its image."""
    special, tokens = model.config.special, model.config.flow.tokens
    choice = _choose(model, state, settings)
    token = choice.element.token
    writes, draws = state.mode == Mode.WRITE, choice.element.kind == Kind.LATENT
    begins = writes & (token == special.vision_start)
    fed = feed(model, state, choice.element)
    if state.record is not None:
        fed = dataclasses.replace(fed, record=_recorded(state, choice))
    fed = dataclasses.replace(
        fed,
        texts=fed.texts + writes.astype(jnp.int32),
        draws=fed.draws + (writes | draws).astype(jnp.int32),
    )
    mode = jnp.select(
        [begins, writes & (token == special.end), draws & (fed.drawn == tokens)],
        [Mode.DRAW, Mode.DONE, Mode.CLOSE],
        jnp.where(state.mode == Mode.CLOSE, Mode.WRITE, state.mode),
    )
    return settled(dataclasses.replace(fed, mode=mode), settings, tokens)


def steps_of(
    model: Pretzel,
    state: SampleState,
    settings: RowSettings,
    steps: jax.Array,
    enough: jax.Array | None = None,
) -> SampleState:
    """`advance`, inside a larger program; ends too once `enough` more rows, int32 [], are DONE."""
    done = lambda state: (state.mode == Mode.DONE).sum()
    most = None if enough is None else done(state) + enough

    def goes_on(carry: tuple[SampleState, jax.Array]) -> jax.Array:
        state, left = carry
        more = (left > 0) & jnp.any(state.mode != Mode.DONE)
        return more if most is None else more & (done(state) < most)

    def body(carry: tuple[SampleState, jax.Array]) -> tuple[SampleState, jax.Array]:
        state, left = carry
        return step(model, state, settings), left - 1

    return jax.lax.while_loop(goes_on, body, (state, steps))[0]


run_steps = jax.jit(steps_of, donate_argnames=("state",))
"""The compiled loop of `advance`; steps: int32 []."""


def advance(model: Pretzel, state: SampleState, settings: RowSettings, steps: int) -> SampleState:
    """Up to `steps` steps, fewer if all rows are DONE; any number of steps is one compilation.

    The given state is donated: its arrays may not be used again.
    """
    return run_steps(model, state, settings, jnp.asarray(steps, jnp.int32))


def stopped(state: SampleState, rows: jax.Array) -> SampleState:
    """The state with the rows of a bool mask [B] DONE."""
    return dataclasses.replace(state, mode=jnp.where(rows, Mode.DONE, state.mode).astype(jnp.int32))
