"""The host's side of sampling: pads prompts to a shape, runs steps, reads pieces off the rows.

`stream` yields what is new after every few steps; `generate` collects it. Both run the same
compiled step. Letters: B rows, M cache slots, I images, N tokens per image, C latent channels.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Kind, Pretzel, PretzelConfig
from starflow2_jax.parallel.distributed import fetch
from starflow2_jax.sampling import jacobi as parallel
from starflow2_jax.sampling import step
from starflow2_jax.sampling.jacobi import JacobiConfig
from starflow2_jax.sampling.prompts import Image, Piece, Row, Text, padded
from starflow2_jax.sampling.state import LIMITS, Mode, RowSettings, SampleState, check_number
from starflow2_jax.sampling.text import check_stop

Reason = Literal["end", "stop", "tokens", "images", "context", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Stop:
    """Strings that end a row.

    Attributes:
        strings: the row ends with the token that completes one of them.
        decode: token ids to text.
    """

    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]


@dataclasses.dataclass(frozen=True)
class TextEvent:
    """Row `row` wrote these tokens; an end token is among them, an image's frame is not."""

    row: int
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageEvent:
    """Row `row` drew its image `index`, counted from 0: u [N, C]."""

    row: int
    index: int
    u: np.ndarray


@dataclasses.dataclass(frozen=True)
class DoneEvent:
    """Row `row` is finished: by its end token, a stop string, a limit, a full context, or
    because it was cancelled.
    """

    row: int
    reason: Reason


# No prompt, no cache and no room for images is compiled for less.
SHORTEST_PROMPT, SHORTEST_CACHE, FEWEST_IMAGES = 16, 64, 4

Event = TextEvent | ImageEvent | DoneEvent


@dataclasses.dataclass(frozen=True)
class Output:
    """What one row added to its prompt, in order, and why it ended."""

    pieces: tuple[Piece, ...]
    reason: Reason


def bucket(size: int, parts: int) -> int:
    """A size rounded up, by less than one part in `parts`, so that few shapes are ever compiled."""
    grain = 2 ** max(0, (size - 1).bit_length() - 1) // parts or 1
    return -(-size // grain) * grain


def check_settings(
    settings: RowSettings,
    rows: int,
    config: PretzelConfig,
    unconditional: Sequence[int] | None,
    stop: Stop | None,
) -> None:
    """Raises UserError for numbers out of range, ValueError for parts that do not go together."""
    for name in LIMITS:
        values = np.asarray(getattr(settings, name))
        if len(values) != rows:
            raise ValueError(f"settings of {len(values)} rows for {rows} prompts")
        check_number(name, values)
    if stop is not None:
        check_stop(stop.strings)
    if unconditional is None and np.any(np.asarray(settings.guidance) > 0):
        raise ValueError("guidance needs the unconditional row")
    if unconditional is not None and list(unconditional[-1:]) != [config.special.vision_start]:
        raise ValueError("the unconditional row must end with <|vision_start|>")
    images = int(np.max(settings.max_images))
    if settings.noise is not None and settings.noise.shape[1] < images:
        raise ValueError(f"noise for {settings.noise.shape[1]} images of {images}")


def check_prompts(
    rows: Sequence[Row],
    settings: RowSettings,
    config: PretzelConfig,
    unconditional: Sequence[int] | None,
    context: int | None,
    names: Sequence[str] | None = None,
) -> None:
    """Raises UserError for a prompt that cannot be continued; `names`: what to call each."""
    names = names or [f"prompt {b}" for b in range(len(rows))]
    drawing, images = config.flow.tokens + 1, np.asarray(settings.max_images)
    context = np.iinfo(np.int32).max if context is None else context
    for b, (row, name) in enumerate(zip(rows, names, strict=True)):
        if not len(row):
            raise UserError(f"{name} is empty")
        draws = row.tokens[-1] == config.special.vision_start
        if draws and images[b] < 1:
            raise UserError(f"{name} starts an image, but max_images is 0")
        if len(row) > context:
            raise UserError(f"{name} has {len(row)} positions, the context holds {context}")
        if draws and len(row) + drawing > context:
            raise UserError(
                f"{name} and its image need {len(row) + drawing} positions, "
                f"the context holds {context}"
            )
    if unconditional is not None and len(unconditional) + drawing > context:
        raise UserError(
            f"guidance needs {len(unconditional) + drawing} positions, the context holds {context}"
        )


def _padding_row(config: PretzelConfig) -> Row:
    """A prompt of one token that means nothing; its settings let it write nothing."""
    flow = config.flow
    token, kind = np.array([config.special.end]), np.array([Kind.TEXT])
    return Row(token, kind, np.zeros((1, 3)), np.zeros((0, flow.tokens, flow.channels)))


def _more_rows(settings: RowSettings, count: int) -> RowSettings:
    """The settings with `count` rows appended that write and draw nothing."""
    more = jax.tree.map(lambda a: jnp.concatenate([a, jnp.repeat(a[-1:], count, 0)]), settings)
    size = len(settings.seed)
    return dataclasses.replace(
        more,
        max_new_tokens=more.max_new_tokens.at[size:].set(0),
        max_images=more.max_images.at[size:].set(0),
    )


def _begin(
    model: Pretzel,
    rows: Sequence[Row],
    settings: RowSettings,
    unconditional: Sequence[int] | None,
    context: int | None,
) -> tuple[SampleState, RowSettings]:
    """The prefilled state and settings, every size rounded up to its bucket."""
    config, count = model.config, len(rows)
    new = np.asarray(settings.max_new_tokens) + np.asarray(settings.max_images) * (
        config.flow.tokens + 1
    )
    slots = max(len(row) + int(extra) for row, extra in zip(rows, new, strict=True))
    if unconditional is not None:
        slots = max(slots, len(unconditional) + config.flow.tokens)
        unconditional = jnp.asarray(unconditional, jnp.int32)
    slots = bucket(max(slots, SHORTEST_CACHE), parts=4)
    if context is not None:
        slots = min(slots, context)
    length = min(bucket(max(SHORTEST_PROMPT, *map(len, rows)), parts=4), slots)
    extra = bucket(count, parts=8) - count
    settings = _more_rows(settings, extra)
    images = bucket(max(FEWEST_IMAGES, int(np.asarray(settings.max_images).max())), parts=2)
    if settings.noise is not None:
        images = max(images, settings.noise.shape[1])
    prompt = padded([*rows, *[_padding_row(config)] * extra], length, config.vlm.vision)
    state = step.prefill(
        model, prompt, settings, slots=slots, images=images, unconditional=unconditional
    )
    return state, settings


class Reader:
    """Follows one row: turns its new positions into events."""

    def __init__(self, row: int, start: int, config: PretzelConfig, stop: Stop | None) -> None:
        self.row = row
        self.cursor = start
        self.special = config.special
        self.tokens_per_image = config.flow.tokens
        self.stop = stop
        # A stop string spans at most as many tokens as it has bytes, save for tokens without text.
        self.window = 8 + max((len(s.encode()) for s in stop.strings), default=0) if stop else 0
        self.latents = 0
        self.recent: list[int] = []
        self.done = False
        self.stopped = False

    def read(
        self, tokens: np.ndarray, kinds: np.ndarray, length: int, u: Callable[[int], np.ndarray]
    ) -> Iterator[Event]:
        """Events of the positions from the last call's length up to this one.

        Args:
            tokens, kinds: int32 [M], the row.
            length: how much of it exists.
            u: fetches one of the row's images, [N, C].
        """
        written: list[int] = []
        while self.cursor < length and not self.stopped:
            token, kind = int(tokens[self.cursor]), kinds[self.cursor]
            self.cursor += 1
            if kind == Kind.LATENT:
                self.latents += 1
                index, within = divmod(self.latents, self.tokens_per_image)
                if within == 0:
                    yield ImageEvent(self.row, index - 1, u(index - 1))
            elif token == self.special.vision_start:
                if written:
                    yield TextEvent(self.row, tuple(written))
                written, self.recent = [], []
            elif token != self.special.vision_end:
                written.append(token)
                self.stopped = self._completes(token)
        if written:
            yield TextEvent(self.row, tuple(written))

    def _completes(self, token: int) -> bool:
        """Whether the text up to this token holds a stop string; images part texts."""
        if self.stop is None:
            return False
        self.recent = [*self.recent, token][-self.window :]
        text = self.stop.decode(self.recent)
        return any(string in text for string in self.stop.strings)


def reason_of(
    reader: Reader, last: int, texts: int, images: int, max_texts: int, max_images: int
) -> Reason:
    """Why a row is DONE, from its last token (-1: none is new), its counts and its limits."""
    if reader.stopped:
        return "stop"
    if last == reader.special.end:
        return "end"
    if 0 < max_images <= images:
        return "images"
    return "tokens" if texts >= max_texts else "context"


def collect(pieces: list[Piece], event: TextEvent | ImageEvent) -> None:
    """Puts what an event tells of behind the pieces of its row."""
    if isinstance(event, ImageEvent):
        pieces.append(Image(event.u))
    elif pieces and isinstance(pieces[-1], Text):
        pieces[-1] = Text(pieces[-1].tokens + event.tokens)
    else:
        pieces.append(Text(event.tokens))


def stream(
    model: Pretzel,
    rows: Sequence[Row],
    settings: RowSettings,
    *,
    unconditional: Sequence[int] | None = None,
    stop: Stop | None = None,
    context: int | None = None,
    every: int = 1,
    jacobi: JacobiConfig | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[Event]:
    """Samples a batch and yields what is new after every few steps.

    Args:
        model: the model.
        rows: B prompts; see `prompts.extended`. Where one ends with `<|vision_start|>`, an image
            follows at once.
        settings: B rows; see `state.row_settings`.
        unconditional: token ids of the row without content, up to `<|vision_start|>`: samples with
            guidance, each row by its own weight.
        stop: strings that end a row.
        context: most positions that a row may have; default: as many as its limits allow.
        every: steps between two looks at the rows.
        jacobi: draw images by Jacobi iteration, see `jacobi.draw`; None: latent after latent.
        names: what to call each prompt in an error; default: prompt 0, 1, ...

    Yields:
        Events, in order within each row; a row's last one is a `DoneEvent`.

    Raises:
        UserError: a setting out of range, or a prompt that does not fit the context.
        ValueError: parts that do not go together.
    """
    if not rows:
        return
    config = model.config
    check_settings(settings, len(rows), config, unconditional, stop)
    check_prompts(rows, settings, config, unconditional, context, names)
    state, settings = _begin(model, rows, settings, unconditional, context)
    max_texts, max_images = jax.device_get((settings.max_new_tokens, settings.max_images))
    readers = [Reader(b, len(row), config, stop) for b, row in enumerate(rows)]
    while not all(reader.done for reader in readers):
        if jacobi is None:
            state = step.advance(model, state, settings, every)
        else:
            state = parallel.advance(model, state, settings, every, jacobi)
        mode, length, tokens, kinds, texts, images = fetch(
            (state.mode, state.length, state.tokens, state.kinds, state.texts, state.images)
        )
        fetched: list[np.ndarray] = []

        def u(state: SampleState = state, fetched: list[np.ndarray] = fetched) -> np.ndarray:
            if not fetched:
                fetched.append(fetch(state.u))
            return fetched[0]

        for b, reader in enumerate(readers):
            if reader.done:
                continue
            yield from reader.read(tokens[b], kinds[b], length[b], lambda i, b=b: u()[b, i])
            if reader.stopped or mode[b] == Mode.DONE:
                reader.done = True
                last = int(tokens[b, length[b] - 1]) if length[b] > len(rows[b]) else -1
                yield DoneEvent(
                    b, reason_of(reader, last, texts[b], images[b], max_texts[b], max_images[b])
                )
        halted = np.zeros(len(mode), bool)
        halted[: len(readers)] = [reader.stopped for reader in readers]
        if halted.any():
            state = step.stopped(state, jnp.asarray(halted))


def generate(
    model: Pretzel,
    rows: Sequence[Row],
    settings: RowSettings,
    *,
    unconditional: Sequence[int] | None = None,
    stop: Stop | None = None,
    context: int | None = None,
    on_event: Callable[[Event], None] | None = None,
    jacobi: JacobiConfig | None = None,
    names: Sequence[str] | None = None,
) -> list[Output]:
    """Samples a batch to its end.

    Arguments and errors as in `stream`.

    Args:
        on_event: called with each event as it comes, to show progress.

    Returns:
        One `Output` per row.
    """
    pieces: list[list[Piece]] = [[] for _ in rows]
    reasons: list[Reason] = ["context"] * len(rows)
    # Without stop strings nothing has to be looked at before the end, unless someone watches.
    every = 16 if stop is not None or on_event is not None else np.iinfo(np.int32).max
    options = {
        "unconditional": unconditional,
        "stop": stop,
        "context": context,
        "every": int(every),
        "jacobi": jacobi,
        "names": names,
    }
    for event in stream(model, rows, settings, **options):
        if on_event is not None:
            on_event(event)
        if isinstance(event, DoneEvent):
            reasons[event.row] = event.reason
        else:
            collect(pieces[event.row], event)
    return [Output(tuple(p), r) for p, r in zip(pieces, reasons, strict=True)]
