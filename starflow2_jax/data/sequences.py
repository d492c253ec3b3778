"""Turns of text and images to one row's tokens, kinds, positions and loss masks.

An image is `<|vision_start|>` + N x `<|image_pad|>` + `<|vision_end|>`, and so is a view of the
vision tower, with as many places as it has tokens. What is to be both, understood by the tower and
part of the likelihood, is written twice: the view, then the image.

Letters: T positions of one document, I its images, N = side^2 tokens per image.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import ml_dtypes
import numpy as np

from starflow2_jax.data.tokenizer import Tokenizer
from starflow2_jax.data.views import View
from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Kind


@dataclasses.dataclass(frozen=True)
class Words:
    """A picture's content in words, for a language model that has no pixels.

    One token id for each of the N places of the image; the places are TEXT, with the positions that
    the image would have.
    """

    ids: np.ndarray
    predicted: bool


Part = str | np.ndarray | Words | View


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn: text pieces, images (uint8 [H, W, channels]) and views in any order."""

    role: Literal["user", "assistant"]
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class ImageShape:
    """What an image must be, and how many tokens it takes: side x side.

    Attributes:
        moments: 0, or numbers per token of images that come as cached latents in place of pixels:
            means, then log-variances.
    """

    height: int
    width: int
    channels: int
    side: int
    moments: int = 0

    @property
    def array(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and type of an image: uint8 [H, W, channels], or bfloat16 [N, moments]."""
        if self.moments:
            return (self.side**2, self.moments), np.dtype(ml_dtypes.bfloat16)
        return (self.height, self.width, self.channels), np.dtype(np.uint8)

    def check(self, image: np.ndarray, where: str) -> None:
        """Raises UserError when the image has another size or type."""
        shape, dtype = self.array
        if image.shape != shape or image.dtype != dtype:
            axes = "(tokens, moments)" if self.moments else "(height, width, channels)"
            raise UserError(
                f"{where}: image of shape {image.shape} {image.dtype}, "
                f"expected {shape} {axes} {dtype}"
            )


@dataclasses.dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        tokens, kinds: int32 [T].
        positions: int32 [T, 3] (time, row, column).
        text_loss: bool [T], at the target.
        images: uint8 [I, H, W, channels], in order; or cached latents, see `ImageShape`.
        views: what the vision tower sees, in order.
    """

    tokens: np.ndarray
    kinds: np.ndarray
    positions: np.ndarray
    text_loss: np.ndarray
    images: np.ndarray
    views: tuple[View, ...] = ()


def _grid(rows: int, columns: int) -> np.ndarray:
    """(time, row, column) of the places of an image, from its own first one: int32 [N, 3]."""
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), columns)
    return np.stack([np.zeros_like(row), row, column], axis=1)


class Writer:
    """Appends tokens and images to a document while it counts positions."""

    def __init__(self, tokenizer: Tokenizer, shape: ImageShape) -> None:
        self.special = tokenizer.special
        self.shape = shape
        self._grid = _grid(shape.side, shape.side)
        self._tokens: list[np.ndarray] = []
        self._kinds: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._loss: list[np.ndarray] = []
        self._images: list[np.ndarray] = []
        self._views: list[View] = []
        self._next = 0

    def _add(self, tokens: np.ndarray, kind: Kind, positions: np.ndarray, loss: bool) -> None:
        self._tokens.append(np.asarray(tokens, np.int32))
        self._kinds.append(np.full(len(tokens), kind, np.int32))
        self._positions.append(positions.astype(np.int32))
        self._loss.append(np.full(len(tokens), loss))

    def text(self, ids: Sequence[int], loss: bool) -> None:
        """Text tokens: the same id on all axes."""
        ids = np.asarray(ids, np.int32)
        positions = np.repeat(self._next + np.arange(len(ids))[:, None], 3, axis=1)
        self._add(ids, Kind.TEXT, positions, loss)
        self._next += len(ids)

    def image(self, image: np.ndarray | Words, loss: bool) -> None:
        """Start token (with loss if the model is to choose it), N places, end token (never)."""
        self.text([self.special.vision_start], loss)
        if isinstance(image, Words):
            self._add(image.ids, Kind.TEXT, self._next + self._grid, image.predicted)
        else:
            pads = np.full(len(self._grid), self.special.image_pad, np.int32)
            self._add(pads, Kind.LATENT, self._next + self._grid, loss=False)
            self._images.append(image)
        self._next += self.shape.side
        self.text([self.special.vision_end], loss=False)

    def view(self, view: View) -> None:
        """Start token, one place for each token of the view, end token; none is ever trained."""
        grid = _grid(*view.tokens)
        self.text([self.special.vision_start], loss=False)
        pads = np.full(len(grid), self.special.image_pad, np.int32)
        self._add(pads, Kind.VIT, self._next + grid, loss=False)
        self._views.append(view)
        self._next += max(view.tokens)
        self.text([self.special.vision_end], loss=False)

    def document(self) -> Document:
        """What was written."""
        loss = np.concatenate(self._loss)
        loss[0] = False  # nothing stands before it
        shape, dtype = self.shape.array
        images = np.zeros((len(self._images), *shape), dtype)
        for i, image in enumerate(self._images):
            images[i] = image
        return Document(
            np.concatenate(self._tokens),
            np.concatenate(self._kinds),
            np.concatenate(self._positions),
            loss,
            images,
            tuple(self._views),
        )


def encode_turns(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    shape: ImageShape,
    *,
    reply: bool = False,
    draw: bool = False,
    context: int | None = None,
    where: str = "prompt",
) -> Document:
    """A conversation as a document.

    Args:
        turns: in order. Loss falls on assistant turns: their text, image starts and end token.
        tokenizer: with its chat template.
        shape: what images must be.
        reply: open an assistant turn at the end, for the model to write.
        draw: and start an image in it.
        context: longest document allowed, in positions.
        where: what to call the document in an error.

    Raises:
        UserError: special tokens in a text, an image of another size, a view in an assistant's
            turn, or too many positions.
    """
    writer, template = Writer(tokenizer, shape), tokenizer.turns
    writer.text(tokenizer.encode_template(template.begin), loss=False)
    for i, turn in enumerate(turns):
        assistant = turn.role == "assistant"
        opening = template.assistant_open if assistant else template.user_open
        closing = template.assistant_close if assistant else template.user_close
        if i and turns[i - 1].role == "assistant":
            opening = template.between + opening
        writer.text(tokenizer.encode_template(opening), loss=False)
        for part in turn.parts:
            if isinstance(part, str):
                writer.text(tokenizer.encode(part, where), loss=assistant)
            elif isinstance(part, View):
                if assistant:
                    raise UserError(
                        f"{where}: turn {i + 1} is the assistant's and holds a view; what the "
                        "assistant draws is an image, only a user shows views"
                    )
                writer.view(part)
            else:
                if isinstance(part, np.ndarray):
                    shape.check(part, where)
                writer.image(part, loss=assistant)
        writer.text(tokenizer.encode_template(closing), loss=assistant)
    if reply or draw:
        writer.text(tokenizer.encode_template(template.assistant_open), loss=False)
    if draw:
        writer.text([tokenizer.special.vision_start], loss=False)
    document = writer.document()
    if context is not None and len(document.tokens) > context:
        raise UserError(
            f"{where}: {len(document.tokens)} positions, but the context holds {context}; "
            "shorten the text or give fewer images"
        )
    return document


def unconditional_prompt(tokenizer: Tokenizer, shape: ImageShape) -> Document:
    """The row without content: one empty user turn, up to `<|vision_start|>`."""
    return encode_turns([Turn("user", ())], tokenizer, shape, draw=True)
