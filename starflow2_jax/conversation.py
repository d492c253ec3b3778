"""A conversation in a terminal: lines of a user in, text and images out."""

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TextIO

import numpy as np
from PIL import Image

from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.formats import save_png
from starflow2_jax.service import Chat, read_image


def shows_images(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a terminal shows 24-bit colours."""
    return stream.isatty() and environment.get("COLORTERM") in ("truecolor", "24bit")


def as_text(image: np.ndarray, columns: int = 48) -> str:
    """An image uint8 [H, W, 1 or 3] in half blocks: two pixels of a column are one character.

    Args:
        image: to show.
        columns: most characters of a line; a wider image is made smaller.
    """
    rgb = np.repeat(image, 3, -1) if image.shape[-1] == 1 else image
    height, width = rgb.shape[:2]
    if width > columns:
        size = (columns, max(1, round(height * columns / width)))
        rgb = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS))
    if len(rgb) % 2:
        rgb = np.concatenate([rgb, rgb[-1:]])
    lines = []
    for upper, lower in zip(rgb[::2], rgb[1::2], strict=True):
        cells = (
            "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*a, *b)
            for a, b in zip(upper.tolist(), lower.tolist(), strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


class Folder:
    """Where the images of a conversation are saved: 0001.png, 0002.png, ..."""

    def __init__(self, path: pathlib.Path, show: bool) -> None:
        """`show`: draw each image in the terminal too."""
        self.path = path
        self._show = show

    def save(self, image: np.ndarray) -> str:
        """Saves an image under the next free number; returns what to print.

        Raises:
            UserError: the folder cannot be written to.
        """
        taken = [int(p.stem) for p in self.path.glob("*.png") if p.stem.isdecimal()]
        file = self.path / f"{max(taken, default=0) + 1:04d}.png"
        save_png(file, image)
        shown = f"{as_text(image)}\n" if self._show else ""
        return f"{shown}[{file}]\n"


def replies(chat: Chat, folder: Folder, *parts: str | np.ndarray, draw: bool) -> Iterator[str]:
    """What to print of one reply, as it comes.

    Raises:
        UserError: see `Chat.say`.
    """
    inside = False
    for part in chat.say(*parts, draw=draw):
        if isinstance(part, str):
            yield part
        else:
            yield ("\n" if inside else "") + folder.save(part)
        inside = isinstance(part, str)
    if inside:
        yield "\n"


def converse(
    chat: Chat, lines: Iterable[str], folder: Folder, images: Iterable[str] = ()
) -> Iterator[str]:
    """What to print, for the lines of a user: each line is a turn.

    `/image FILE` adds a picture to the next turn, `/draw TEXT` asks for a picture at once. A turn
    that cannot be read is told of and left out; the conversation goes on.

    Args:
        chat: the conversation.
        lines: of the user.
        folder: for the images of the replies.
        images: files that the first turn starts with.
    """
    waiting = list(images)
    for line in lines:
        text = line.strip()
        if text.startswith("/image "):
            waiting.append(text.removeprefix("/image ").strip())
            continue
        draw = text.startswith("/draw ")
        text = text.removeprefix("/draw ").strip()
        if not text and not waiting:
            continue
        try:
            pictures = [read_image(chat.service.model, file) for file in waiting]
            parts = (*pictures, text) if text else tuple(pictures)
            yield from replies(chat, folder, *parts, draw=draw)
        except UserError as error:
            yield f"[{error}]\n"
        waiting = []
