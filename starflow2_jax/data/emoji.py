"""Emoji as conversations: drawing from a name, telling the category, changing the skin tone.

Pictures are cached latents of an FAE in training, or pixels: whatever `images` holds.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from starflow2_jax.data.batches import Documents
from starflow2_jax.data.emoji_archive import TONES, Emoji
from starflow2_jax.data.latents import LatentSource
from starflow2_jax.data.mixture import random_documents
from starflow2_jax.data.sequences import Document, ImageShape, Turn, Words, encode_turns
from starflow2_jax.data.tokenizer import Tokenizer, train_tokenizer
from starflow2_jax.errors import UserError
from starflow2_jax.models.codec import Codec

Task = Literal["draw", "nothing", "category", "tone"]
QUESTION = "what kind of thing is this?"
_TONE_WORDS = tuple(TONES.values())


def category(emoji: Emoji) -> str:
    """The answer to `QUESTION`."""
    return emoji.category.lower()


def tone_request(tone: str) -> str:
    """What a user writes to have a skin tone changed; `tone` is a word of `TONES`."""
    return f"make the skin tone {tone}"


@functools.cache
def tokenizer_of(emoji: tuple[Emoji, ...]) -> Tokenizer:
    """A byte-level BPE in which the common words of these emoji are one token each."""
    texts = [QUESTION, *map(tone_request, _TONE_WORDS)] * 100
    for one in emoji:
        texts += [one.caption, category(one)]
    return train_tokenizer(texts, vocab_size=1024)


@dataclasses.dataclass(frozen=True)
class EmojiSet:
    """Emoji of one split and their pictures.

    Attributes:
        emoji: n of them.
        images: uint8 [n, H, W, 3], or cached latents bfloat16 [n, N, 2C].
    """

    emoji: tuple[Emoji, ...]
    images: np.ndarray

    @functools.cached_property
    def by_base(self) -> list[np.ndarray]:
        """Indices of each emoji's variants, so that one of many variants is not seen more."""
        bases: dict[str, list[int]] = {}
        for i, one in enumerate(self.emoji):
            bases.setdefault(one.base, []).append(i)
        return [np.array(indices) for indices in bases.values()]

    @functools.cached_property
    def toned(self) -> list[np.ndarray]:
        """The five single-tone variants of each emoji that has all of them, light to dark."""
        found = []
        for indices in self.by_base:
            tones = {self.emoji[i].tones: i for i in indices if len(self.emoji[i].tones) == 1}
            if len(tones) == len(_TONE_WORDS):
                found.append(np.array([tones[(tone,)] for tone in _TONE_WORDS]))
        return found


def cached_set(emoji: Sequence[Emoji], source: LatentSource) -> EmojiSet:
    """A split with the latents of a cache that kept the field `file`.

    Raises:
        UserError: the cache lacks one.
    """
    places = {source[i].text("file").rsplit("/", 1)[-1]: i for i in range(len(source))}
    missing = [one.file for one in emoji if one.file not in places]
    if missing:
        raise UserError(f"the cached latents lack {len(missing)} emoji ({missing[0]}, ...)")
    return EmojiSet(tuple(emoji), np.stack([source.moments(places[one.file]) for one in emoji]))


class Conversations:
    """Makes random documents of the tasks from one split."""

    def __init__(self, emoji: EmojiSet, tokenizer: Tokenizer, shape: ImageShape) -> None:
        self.emoji = emoji
        self.tokenizer = tokenizer
        self.shape = shape

    def _votes(self, shown: Emoji, rng: np.random.Generator, drawn: bool) -> Words:
        """A picture in words: each place says a piece of its caption or its category, or nothing.

        Places that show the skin tone say so; else it would be lost among the others.
        """
        places = self.shape.side**2
        said = self.tokenizer.encode(shown.name), self.tokenizer.encode(category(shown))
        ids = np.full(places, self.tokenizer.special.image_pad, np.int32)
        share = rng.uniform(0.3, 0.9)
        for place in np.flatnonzero(rng.random(places) < share):
            words = said[int(rng.random() < 0.4)]
            if shown.tones and rng.random() < 0.4:
                words = self.tokenizer.encode(shown.tones[rng.integers(len(shown.tones))])
            ids[place] = words[rng.integers(len(words))]
        return Words(ids, drawn)

    def turns(self, task: Task, rng: np.random.Generator, in_words: bool) -> list[Turn]:
        """One conversation; pictures as images, or in words for a model without pixels."""

        def picture(index: int, drawn: bool) -> np.ndarray | Words:
            if in_words:
                return self._votes(self.emoji.emoji[index], rng, drawn)
            return self.emoji.images[index]

        if task == "tone":
            toned = self.emoji.toned
            variants = toned[rng.integers(len(toned))]
            before, after = rng.choice(len(_TONE_WORDS), 2, replace=False)
            request = tone_request(_TONE_WORDS[after])
            return [
                Turn("user", (picture(variants[before], False), request)),
                Turn("assistant", (picture(variants[after], True),)),
            ]
        index = int(rng.choice(self.emoji.by_base[rng.integers(len(self.emoji.by_base))]))
        shown = self.emoji.emoji[index]
        if task == "category":
            return [
                Turn("user", (picture(index, False), QUESTION)),
                Turn("assistant", (category(shown),)),
            ]
        asked = (shown.caption,) if task == "draw" else ()
        return [Turn("user", asked), Turn("assistant", (picture(index, True),))]

    def document(self, task: Task, rng: np.random.Generator, in_words: bool) -> Document:
        """One random conversation as a document."""
        return encode_turns(self.turns(task, rng, in_words), self.tokenizer, self.shape, where=task)

    def stream(self, mixture: Mapping[Task, float], in_words: bool, seed: int) -> Documents:
        """An endless stream of packable documents; document i depends on seed and i alone."""
        make = lambda task, rng: self.document(task, rng, in_words)
        return random_documents(mixture, make, seed)


class EmojiData:
    """The data of a run on emoji, as `training.pretzel` takes it."""

    def __init__(
        self,
        *,
        train: EmojiSet,
        held_out: EmojiSet,
        image: ImageShape,
        codec: Codec,
        mixtures: Mapping[str, Mapping[Task, float]],
    ) -> None:
        """Prepares both splits.

        Args:
            train, held_out: with images of the shape.
            image: of an image as the batches hold it.
            codec: from images to the flow's latents.
            mixtures: shares of the tasks, by stage.
        """
        self.tokenizer = tokenizer_of(train.emoji)
        self.image = image
        self.codec = codec
        self._mixtures = mixtures
        self._sets = {False: train, True: held_out}

    def documents(self, stage: str, held_out: bool, seed: int) -> Documents:
        """An endless stream of a stage's documents."""
        conversations = Conversations(self._sets[held_out], self.tokenizer, self.image)
        return conversations.stream(self._mixtures[stage], stage == "pretrain_lm", seed)


def varied(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture uint8 [H, W, 3] mirrored, moved by a pixel, in other colours; or not.

    For what must show any picture well, and need not know what it shows. No more than a pixel: the
    emoji all have the same place in the frame, and that is worth knowing.
    """
    if rng.random() < 0.5:
        image = image[:, ::-1]
    if rng.random() < 0.2:
        image = image[..., rng.permutation(3)]
    if rng.random() < 0.2:
        top, left = rng.integers(0, 3, 2)
        height, width, _ = image.shape
        edges = ((1, 1), (1, 1), (0, 0))
        image = np.pad(image, edges, constant_values=255)[top : top + height, left : left + width]
    return np.ascontiguousarray(image)
