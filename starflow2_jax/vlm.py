"""A converted VLM for Python: what `starflow2 chat` is made of.

    from starflow2_jax.vlm import Assistant
    assistant = Assistant.load("qwen")
    chat = assistant.chat()
    for piece in chat.say("What is this?", ["cat.png"]):
        print(piece, end="", flush=True)

No flow and no drawing: see `model` for those.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from starflow2_jax.data.sequences import ImageShape, Turn, encode_turns
from starflow2_jax.data.views import View, load_limits, read_picture, view
from starflow2_jax.errors import UserError
from starflow2_jax.sampling.generate import DoneEvent, TextEvent
from starflow2_jax.sampling.prompts import Row
from starflow2_jax.sampling.write import Session, WriteSettings, for_decoding, write_settings
from starflow2_jax.vlm_bundle import VlmBundle, load_vlm


@dataclasses.dataclass(frozen=True)
class Writing:
    """How to write.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: the likeliest tokens that hold this much probability.
        max_new_tokens: of a reply.
        seed: of the random stream; of several replies, one number (row b has `seed + b`) or one of
            each.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | Sequence[int] = 0

    def check(self) -> None:
        """Raises UserError for a number out of range."""
        write_settings(1, (), **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Answer:
    """A reply, and why it ended: "end", "tokens" or "context"."""

    text: str
    reason: str


class Assistant:
    """A model that answers, with its tokenizer and its carried-along settings."""

    def __init__(self, bundle: VlmBundle, context: int | None = None) -> None:
        """`context`: most positions of a conversation; default: what `config.json` says."""
        self.model = for_decoding(bundle.model)
        self.record = bundle.record
        """The model directory's description."""
        self.tokenizer = bundle.tokenizer
        self.limits = load_limits(bundle.files)
        config = _record(bundle.files / "config.json")
        longest = config.get("text_config", config).get("max_position_embeddings")
        self.context = context or longest or 32768
        ends = _record(bundle.files / "generation_config.json").get("eos_token_id")
        ends = [ends] if isinstance(ends, int) else ends
        self.ends = tuple(ends or (self.tokenizer.special.end,))

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        dtype: str | None = None,
        context: int | None = None,
    ) -> "Assistant":
        """Reads a directory that a conversion wrote; `dtype` of the arithmetic, default: as stored.

        Raises:
            UserError: it is no such directory, or damaged.
        """
        return cls(load_vlm(pathlib.Path(folder), dtype), context)

    def view(self, file: str | os.PathLike[str]) -> View:
        """A picture file as the model sees it.

        Raises:
            UserError: unreadable, or of an aspect ratio over 200; names the file. A model without a
                vision tower.
        """
        if self.model.config.vision is None:
            raise UserError(f"{os.fspath(file)}: this model has no vision tower")
        picture = read_picture(file)
        return view(picture, self.model.config.vision, self.limits, where=os.fspath(file))

    def turn(self, text: str, images: Sequence[str | os.PathLike[str]] = ()) -> Turn:
        """A user's turn: the images, then the text."""
        return Turn("user", (*(self.view(file) for file in images), text))

    def row(self, turns: Sequence[Turn], where: str = "prompt") -> Row:
        """A conversation up to the reply.

        Raises:
            UserError: special tokens in a text, or more than the context holds.
        """
        none = ImageShape(0, 0, 0, 0)
        d = encode_turns(
            turns, self.tokenizer, none, reply=True, context=self.context - 1, where=where
        )
        return Row(d.tokens, d.kinds, d.positions, np.zeros((0, 1, 1), np.float32), d.views)

    def chat(self, writing: Writing = Writing()) -> "Chat":
        """A new conversation."""
        return Chat(self, writing)

    def answers(
        self,
        conversations: Sequence[Sequence[Turn]],
        writing: Writing = Writing(),
        names: Sequence[str] | None = None,
    ) -> list[Answer]:
        """The replies to several conversations, in one batch.

        Args:
            conversations: each ends with a user's turn.
            writing: how; each has a random stream of its own.
            names: what to call each in an error.

        Raises:
            UserError: see `row`.
        """
        names = names or [f"prompt {i}" for i in range(len(conversations))]
        rows = [self.row(turns, name) for turns, name in zip(conversations, names, strict=True)]
        tokens: list[list[int]] = [[] for _ in rows]
        reasons = [""] * len(rows)
        session = Session(self.model, self.context)
        for event in session.stream(rows, self.settings(len(rows), writing), every=32):
            if isinstance(event, TextEvent):
                tokens[event.row] += event.tokens
            else:
                reasons[event.row] = event.reason
        texts = [self.tokenizer.decode(ids) for ids in tokens]
        return [Answer(text, reason) for text, reason in zip(texts, reasons, strict=True)]

    def settings(self, rows: int, writing: Writing) -> WriteSettings:
        """Of `rows` rows."""
        return write_settings(rows, self.ends, **dataclasses.asdict(writing))


class Chat:
    """One conversation, which keeps its cache from turn to turn."""

    def __init__(self, assistant: Assistant, writing: Writing) -> None:
        self._assistant = assistant
        self._writing = writing
        self._session = Session(assistant.model, assistant.context)
        self.turns: list[Turn] = []
        """What was said."""
        self.reason = ""
        """Why the last reply ended."""

    @property
    def fed(self) -> int:
        """Positions of prompts that the model has read so far."""
        return self._session.fed

    def say(self, text: str, images: Sequence[str | os.PathLike[str]] = ()) -> Iterator[str]:
        """Yields the reply in pieces as it comes. Bad input leaves the conversation as it was.

        Raises:
            UserError: an image that cannot be read, special tokens in the text, more than the
                context holds.
        """
        assistant = self._assistant
        turns = [*self.turns, assistant.turn(text, images)]
        row = assistant.row(turns, where=f"turn {len(turns)}")
        written: list[int] = []
        shown = ""
        # Another stream of random numbers for each reply.
        writing = dataclasses.replace(self._writing, seed=self._writing.seed + len(turns))
        events = self._session.stream([row], assistant.settings(1, writing), every=1)
        try:
            for event in events:
                if isinstance(event, TextEvent):
                    written += event.tokens
                else:
                    self.reason = event.reason
                whole = assistant.tokenizer.decode(written)
                # Bytes of one character may come in several tokens: show what is complete, and at
                # the end the rest.
                complete = isinstance(event, DoneEvent) or not whole.endswith("\ufffd")
                if complete and whole.startswith(shown) and whole != shown:
                    yield whole[len(shown) :]
                    shown = whole
        finally:
            reply = assistant.tokenizer.decode(written)
            self.turns = [*turns, Turn("assistant", (reply,) if reply else ())]


def _record(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file; an empty record where there is none."""
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} holds no JSON object")
    return record


def _conversation(
    assistant: Assistant, record: Mapping[str, Any], folder: pathlib.Path
) -> list[Turn]:
    """The turns of one record.

    Raises:
        KeyError, TypeError, ValueError: it is not of the form that `answer_file` describes.
    """
    if "messages" not in record:
        files = [folder / name for name in record.get("images", ())]
        return [assistant.turn(_text(record["prompt"]), files)]
    turns = []
    for message in record["messages"]:
        if message["role"] == "user":
            files = [folder / name for name in message.get("images", ())]
            turns.append(assistant.turn(_text(message["text"]), files))
        elif message["role"] == "assistant":
            turns.append(Turn("assistant", (_text(message["text"]),)))
        else:
            raise ValueError(f"role {message['role']!r}, expected user or assistant")
    if not turns or turns[-1].role != "user":
        raise ValueError("the last message must be the user's")
    return turns


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def answer_file(
    assistant: Assistant, file: pathlib.Path, writing: Writing = Writing(), rows: int = 8
) -> Iterator[dict[str, Any]]:
    """Answers each line of a JSONL file, in order.

    A line is {"prompt": text, "images": [files]}, or {"messages": [{"role", "text", "images"}]}.
    Names of images are relative to the file's folder.

    Args:
        assistant: the model.
        file: to answer.
        writing: how.
        rows: lines of a batch.

    Yields:
        Each record with `reply` and `reason`.

    Raises:
        UserError: the file cannot be read; a bad line, named, before anything is answered.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # JSON may hold other line breaks
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    records, conversations, names = [], [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
            conversations.append(_conversation(assistant, record, file.parent))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{where}: {error!r}; expected {{"prompt": text}} or {{"messages": [...]}}'
            ) from error
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        assistant.row(conversations[-1], where)
        records.append(record)
        names.append(where)
    return _answered(assistant, records, conversations, names, writing, rows)


def _answered(
    assistant: Assistant,
    records: Sequence[Mapping[str, Any]],
    conversations: Sequence[Sequence[Turn]],
    names: Sequence[str],
    writing: Writing,
    rows: int,
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(records), rows):
        here = slice(start, start + rows)
        batch = dataclasses.replace(writing, seed=writing.seed + start)
        answers = assistant.answers(conversations[here], batch, names[here])
        for record, answer in zip(records[here], answers, strict=True):
            yield {**record, "reply": answer.text, "reason": answer.reason}


def converse(chat: Chat, lines: Iterable[str], images: Sequence[str] = ()) -> Iterator[str]:
    """Pieces to show in a terminal, for the lines of a user: each line is a turn.

    `/image FILE` adds a picture to the next turn. A turn that cannot be read is told of and left
    out; the conversation goes on.
    """
    waiting = list(images)
    for line in lines:
        text = line.rstrip("\n")
        if text.startswith("/image "):
            waiting.append(text.removeprefix("/image ").strip())
            continue
        if not text.strip():
            continue
        try:
            yield from chat.say(text, waiting)
            yield "\n"
        except UserError as error:
            yield f"[{error}]\n"
        waiting = []
