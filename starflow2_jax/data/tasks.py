"""Records to conversations: captions to draw, images to read, edits, interleaved stories.

A task names the fields it needs, and nothing of where they come from.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from starflow2_jax.data.sequences import Part, Turn
from starflow2_jax.data.sources.record import Record, RecordError, as_text

Decode = Callable[[bytes], np.ndarray]
"""Encoded image -> uint8 [H, W, channels]."""


class Task(Protocol):
    """How a record becomes a conversation; picklable."""

    def turns(self, record: Record, decode: Decode, rng: np.random.Generator) -> list[Turn]:
        """The conversation of a record.

        Raises:
            RecordError: a field is missing, empty or of another kind; or what `decode` raises.
        """


@dataclasses.dataclass(frozen=True)
class Draw:
    """Caption -> image. The defaults are img2dataset's."""

    image: str = "jpg"
    caption: str = "txt"

    def turns(self, record: Record, decode: Decode, rng: np.random.Generator) -> list[Turn]:
        """See `Task`."""
        del rng
        caption = record.text(self.caption)
        return [
            Turn("user", (caption,)),
            Turn("assistant", (decode(record.image(self.image)),)),
        ]


@dataclasses.dataclass(frozen=True)
class Read:
    """Image -> text, asked for in one of a few ways."""

    image: str = "jpg"
    text: str = "txt"
    questions: tuple[str, ...] = ("describe this image",)

    def turns(self, record: Record, decode: Decode, rng: np.random.Generator) -> list[Turn]:
        """See `Task`."""
        text = record.text(self.text)
        question = self.questions[int(rng.integers(len(self.questions)))]
        return [
            Turn("user", (decode(record.image(self.image)), question)),
            Turn("assistant", (text,)),
        ]


@dataclasses.dataclass(frozen=True)
class Edit:
    """Image and instruction -> another image."""

    source: str = "source.jpg"
    instruction: str = "txt"
    target: str = "target.jpg"

    def turns(self, record: Record, decode: Decode, rng: np.random.Generator) -> list[Turn]:
        """See `Task`."""
        del rng
        instruction = record.text(self.instruction)
        shown, drawn = (decode(record.image(key)) for key in (self.source, self.target))
        return [Turn("user", (shown, instruction)), Turn("assistant", (drawn,))]


@dataclasses.dataclass(frozen=True)
class Story:
    """Text and images in turns: all that comes up to the first text is asked, the rest answered.

    The record has two lists of one length, with a text, an image or nothing at each place.
    """

    texts: str = "texts"
    images: str = "images"

    def turns(self, record: Record, decode: Decode, rng: np.random.Generator) -> list[Turn]:
        """See `Task`."""
        del rng
        texts, images = (_list(record, key) for key in (self.texts, self.images))
        if len(texts) != len(images):
            raise RecordError(
                f"fields {self.texts!r} and {self.images!r} hold {len(texts)} and {len(images)} "
                "places; they go together"
            )
        parts: list[Part] = []
        asked = 0
        for text, image in zip(texts, images, strict=True):
            if text:
                parts.append(as_text(text, self.texts))
                asked = asked or len(parts)
            if image:
                parts.append(decode(record.encoded(image, self.images)))
        if not asked or asked == len(parts):
            raise RecordError("a story needs a text, and something that follows it")
        return [Turn("user", tuple(parts[:asked])), Turn("assistant", tuple(parts[asked:]))]


def _list(record: Record, key: str) -> list[Any]:
    value = record.value(key)
    if isinstance(value, bytes):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RecordError(f"field {key!r} is not JSON ({error})") from error
    if not isinstance(value, list) or not value:
        raise RecordError(f"field {key!r} holds no list, or an empty one")
    return value


_PLACE = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation in the LLaVA form: `<image>` stands where an image is shown or drawn.

    With `<image>` in an answer, it is drawing, editing or a story.
    """

    conversations: str = "conversations"
    image: str = "image"

    def turns(self, record: Record, decode: Decode, rng: np.random.Generator) -> list[Turn]:
        """See `Task`."""
        del rng
        said = _list(record, self.conversations)
        value = record.value(self.image) if self.image in record else []
        images = value if isinstance(value, list) else [value]
        turns, used = [], 0
        for i, turn in enumerate(said):
            if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
                raise RecordError(f"turn {i} is no object with a text in `value`")
            role = _ROLES.get(turn.get("from"))
            if role is None:
                raise RecordError(f"turn {i} is from {turn.get('from')!r}, not human or gpt")
            pieces = turn["value"].split(_PLACE)
            parts: list[Part] = []
            for piece in pieces[:-1]:
                if used == len(images):
                    raise RecordError(f"more places {_PLACE} than images ({len(images)})")
                parts += [piece.strip(), decode(record.encoded(images[used], self.image))]
                used += 1
            parts = [p for p in [*parts, pieces[-1].strip()] if not isinstance(p, str) or p]
            if not parts:
                raise RecordError(f"turn {i} is empty")
            turns.append(Turn(role, tuple(parts)))
        if used != len(images):
            raise RecordError(f"{len(images)} images, but {used} places {_PLACE}")
        if all(turn.role == "user" for turn in turns):
            raise RecordError("nobody answers")
        return turns
