"""Many conversations with one model at once, and one conversation that goes on.

    service = Service(load("runs/digits"))
    number = service.ask([Turn("user", ("a handwritten three",))], Sampling(guidance=2.0))
    while service.busy:
        for answer in service.poll(): ...

    chat = load("runs/digits").chat(Sampling(guidance=2.0))
    for part in chat.say("a handwritten three"): ...

An image that was drawn is never encoded again: its latents lie in the caches, and are remembered
for as long as a conversation may hand its pixels back.

Letters: B images, N tokens per image, C latent channels.
"""

import collections
import dataclasses
import hashlib
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from starflow2_jax.data.decoding import decode
from starflow2_jax.data.sequences import Document, Turn, unconditional_prompt
from starflow2_jax.data.views import View
from starflow2_jax.errors import UserError
from starflow2_jax.model import Conversation, Model, Sampling
from starflow2_jax.sampling.engine import Engine, EngineConfig, Request
from starflow2_jax.sampling.generate import DoneEvent, ImageEvent, Stop, TextEvent, collect
from starflow2_jax.sampling.prompts import Image, Piece, Row, Text, extended
from starflow2_jax.sampling.text import TextPieces

# Images are made of latents this many at a time: always the same program, and the same bits.
SHOWN_TOGETHER = 4
# Drawn images whose latents are remembered.
REMEMBERED = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """Something new of a request.

    Attributes:
        number: of the request.
        part: a piece of text, an image uint8 [H, W, channels]; None at the end.
        reason: why it ended; None before.
        u: [N, C], the latents of an image in the deep stream; None for text.
        pieces: at the end, all that was added to the prompt.
    """

    number: int
    part: str | np.ndarray | None
    reason: str | None = None
    u: np.ndarray | None = None
    pieces: tuple[Piece, ...] = ()


class Service:
    """A model behind an engine. `ask` and `cancel` may be called from any thread."""

    def __init__(
        self,
        model: Model,
        config: EngineConfig = EngineConfig(),
    ) -> None:
        """Allocates the caches, on the model's mesh if it has one; see `Engine`."""
        self.model = model
        empty = unconditional_prompt(model.tokenizer, model.bundle.image).tokens
        self.engine = Engine(model.pretzel, config, unconditional=empty, mesh=model.mesh)
        self._lock = threading.Lock()
        self._texts: dict[int, TextPieces] = {}
        self._pieces: dict[int, list[Piece]] = collections.defaultdict(list)
        self._latents: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
        self.encoded = 0
        """Images that were encoded so far."""

    @property
    def busy(self) -> bool:
        """Whether any request is queued or under way."""
        return self.engine.busy

    def ask(
        self,
        conversation: Conversation,
        sampling: Sampling = Sampling(),
        *,
        draw: bool = False,
        keep: bool = False,
    ) -> int:
        """Queues a reply to a conversation; its number is that of its answers.

        Args:
            conversation: ends with a user's turn. Images that this service drew are known by their
                pixels, where the conversation holds a reply already.
            sampling: how; every field is one number.
            draw: the reply starts with an image, whatever the model would choose.
            keep: the caches stay for the next turn, until the row is needed; and a conversation
                that holds a reply already goes on from what is there of it. One that does not is
                read from its start: its bits depend on nothing that was asked before.

        Raises:
            UserError: special tokens in a text, an image of another size, a prompt too long.
        """
        if not conversation or conversation[-1].role != "user":
            raise UserError("a conversation must end with a user's turn")
        row, reuse = self.row(conversation, draw=draw), keep and goes_on(conversation)
        return self.submit(row, sampling, keep=keep, reuse=reuse)

    def submit(
        self, row: Row, sampling: Sampling, *, keep: bool = False, reuse: bool = False
    ) -> int:
        """`ask` for a row; `keep`, `reuse`: see `engine.Request`."""
        request = self._request(row, sampling, keep=keep, reuse=reuse)
        with self._lock:  # so that no event comes before it is known how to read it
            number = self.engine.submit(request)
            self._texts[number] = TextPieces(self.model.tokenizer.decode, sampling.stop)
        return number

    def check(
        self,
        conversation: Conversation,
        sampling: Sampling,
        *,
        draw: bool = False,
        where: str = "prompt",
    ) -> None:
        """Raises UserError where `ask` would; no image is encoded. `where`: see `row`."""
        flow = self.model.pretzel.config.flow
        document = self._document(conversation, draw, where)
        u = np.zeros((0, flow.tokens, flow.channels), np.float32)
        row = Row(document.tokens, document.kinds, document.positions, u, document.views)
        self.engine.check(self._request(row, sampling), where)

    def _request(self, row: Row, sampling: Sampling, **options: bool) -> Request:
        stop = Stop(sampling.stop, self.model.tokenizer.decode) if sampling.stop else None
        fields = {f.name: getattr(sampling, f.name) for f in dataclasses.fields(sampling)}
        for name, value in fields.items():
            if name != "stop" and np.ndim(value):
                raise ValueError(f"{name} of several requests at once")
        return Request(row, **fields | {"stop": stop}, **options)

    def _document(self, conversation: Conversation, draw: bool, where: str) -> Document:
        context = self.engine.config.context
        return self.model.encode(conversation, draw=draw, context=context, where=where)

    def row(self, conversation: Conversation, *, draw: bool = False, where: str = "prompt") -> Row:
        """The conversation up to the reply; `where`: what to call it in an error.

        Raises:
            UserError: see `ask`; no image is encoded of a conversation that is too long.
        """
        document = self._document(conversation, draw, where)
        u = self.latents(list(document.images), known=goes_on(conversation))
        return Row(document.tokens, document.kinds, document.positions, u, document.views)

    def latents(
        self, images: Sequence[np.ndarray], before: int = 0, known: bool = True
    ) -> np.ndarray:
        """Latents [B, N, C] of a conversation's images uint8 [H, W, channels].

        Args:
            images: in order.
            before: images of the conversation that come before these.
            known: those that were drawn here are not encoded.
        """
        flow = self.model.pretzel.config.flow
        found = np.zeros((len(images), flow.tokens, flow.channels), np.float32)
        seeds = self.model.reading_seeds(before + len(images))[before:]
        for n, image in enumerate(images):
            u = self._latents.get(_digest(image)) if known else None
            if u is None:
                self.encoded += 1
                u = self.model.latents(image[None], seeds[n : n + 1])[0]
            found[n] = u
        return found

    def cancel(self, number: int) -> None:
        """Ends a request; its last answer has the reason "cancelled"."""
        self.engine.cancel(number)

    def poll(self) -> list[Answer]:
        """One round of the engine: what is new, in order within each request."""
        events = self.engine.poll()
        drawn = [event.u for event in events if isinstance(event, ImageEvent)]
        images = iter(self._pixels(drawn))
        answers = []
        for event in events:
            with self._lock:
                text = self._texts[event.row]
            if not isinstance(event, DoneEvent):
                collect(self._pieces[event.row], event)
            if isinstance(event, TextEvent):
                more = text.more(event.tokens)
            else:
                more = text.end()
            if more:
                answers.append(Answer(event.row, more))
            if isinstance(event, ImageEvent):
                image = next(images)
                self._remember(image, event.u)
                answers.append(Answer(event.row, image, u=event.u))
            elif isinstance(event, DoneEvent):
                del self._texts[event.row]
                pieces = tuple(self._pieces.pop(event.row, ()))
                answers.append(Answer(event.row, None, event.reason, pieces=pieces))
        return answers

    def _pixels(self, drawn: Sequence[np.ndarray]) -> list[np.ndarray]:
        images: list[np.ndarray] = []
        for start in range(0, len(drawn), SHOWN_TOGETHER):
            some = np.stack(drawn[start : start + SHOWN_TOGETHER])
            full = np.resize(some, (SHOWN_TOGETHER, *some.shape[1:]))
            images += list(self.model.pixels(full)[: len(some)])
        return images

    def _remember(self, image: np.ndarray, u: np.ndarray) -> None:
        if not np.isfinite(u).all():
            return  # its pixels may be those of a proper image
        digest = _digest(image)
        self._latents[digest] = u
        self._latents.move_to_end(digest)  # one that was drawn before is as new as any
        while len(self._latents) > REMEMBERED:
            self._latents.popitem(last=False)


def goes_on(conversation: Conversation) -> bool:
    """Whether a conversation holds a reply already: it may take up what an earlier one left."""
    return any(turn.role == "assistant" for turn in conversation)


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()


def read_image(model: Model, file: str | pathlib.Path) -> np.ndarray:
    """A picture file as uint8 [H, W, channels] of the model's size, cropped in the middle.

    Raises:
        UserError: no such file, or one that is no whole picture.
    """
    try:
        return decode(pathlib.Path(file).read_bytes(), model.bundle.image)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such image") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: cannot be read as an image ({reason})") from error


class Chat:
    """One conversation of text and images, which keeps its caches from turn to turn.

    Of what was said before nothing is read again, and no image that was drawn is encoded. While a
    reply is read, the service has no other client.
    """

    def __init__(self, service: Service, sampling: Sampling = Sampling()) -> None:
        """`sampling`: of every reply; each has a random stream of its own."""
        self.service = service
        self.sampling = sampling
        self.turns: list[Turn] = []
        """What was said."""
        self.row: Row | None = None
        """The conversation as it was read and sampled, to the end of the last reply."""
        self.reason = ""
        """Why the last reply ended."""

    def say(
        self, *parts: str | np.ndarray, draw: bool = False, **changes: Any
    ) -> Iterator[str | np.ndarray]:
        """Yields the reply as it comes: pieces of text, and images uint8 [H, W, channels].

        Bad input leaves the conversation as it was.

        Args:
            parts: of the user's turn: text, and images of the model's size.
            draw: the reply starts with an image, whatever the model would choose.
            changes: fields of `Sampling` for this reply alone.

        Raises:
            UserError: special tokens in a text, an image of another size, more than the context
                holds; a number out of range.
        """
        prompt = self._prompt(Turn("user", parts), draw)
        sampling = dataclasses.replace(self.sampling, **changes)
        sampling.check()
        # Another stream of random numbers for each reply.
        seed = np.random.SeedSequence([sampling.seed, len(self.turns)]).generate_state(1)[0]
        sampling = dataclasses.replace(sampling, seed=int(seed))
        reuse = self.row is not None
        number = self.service.submit(prompt, sampling, keep=True, reuse=reuse)
        self.turns.append(Turn("user", parts))
        said: list[str | np.ndarray] = []
        answers = self._answers(number)
        try:
            for answer in answers:
                self._note(answer, prompt, said)
                if answer.part is not None:
                    yield answer.part
        finally:
            if not self.reason:  # nobody reads on
                self.service.cancel(number)
                for answer in answers:
                    self._note(answer, prompt, said)
            self.turns.append(Turn("assistant", tuple(said)))

    def _answers(self, number: int) -> Iterator[Answer]:
        """The answers to one request, up to its last."""
        self.reason = ""
        while not self.reason:
            yield from (answer for answer in self.service.poll() if answer.number == number)

    def _note(self, answer: Answer, prompt: Row, said: list[str | np.ndarray]) -> None:
        if answer.part is not None:
            said.append(answer.part)
            return
        self.reason = answer.reason or ""
        config = self.service.model.pretzel.config
        self.row = extended(prompt, answer.pieces, config)

    def _prompt(self, turn: Turn, draw: bool) -> Row:
        """The row so far with the user's turn behind it, up to the reply."""
        service, model = self.service, self.service.model
        if self.row is None:
            return service.row([turn], draw=draw)
        tokenizer, special = model.tokenizer, model.pretzel.config.special
        template, text = tokenizer.turns, lambda s: Text(tuple(tokenizer.encode_template(s)))
        pieces: list[Piece] = []
        if self.row.tokens[-1] != special.end:
            pieces.append(text(template.assistant_close))
        pieces.append(text(template.between + template.user_open))
        before = len(self.row.u)
        for part in turn.parts:
            if isinstance(part, str):
                where = f"turn {len(self.turns) + 1}"
                pieces.append(Text(tuple(tokenizer.encode(part, where))))
            elif isinstance(part, View):
                raise UserError("only the first turn of this conversation may show views")
            else:
                model.bundle.image.check(part, f"turn {len(self.turns) + 1}")
                pieces.append(Image(service.latents([part], before)[0]))
                before += 1
        pieces += [text(template.user_close), text(template.assistant_open)]
        if draw:
            pieces.append(Text((special.vision_start,)))
        return extended(self.row, pieces, model.pretzel.config)
