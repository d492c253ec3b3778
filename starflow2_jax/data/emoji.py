"""Emoji as conversations: drawing from a name, telling the category, changing colours.

Pictures are cached latents of an FAE in training, or pixels: whatever `images` holds.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from PIL import Image

from starflow2_jax.data.batches import Documents
from starflow2_jax.data.emoji_archive import TONES, Emoji
from starflow2_jax.data.latents import LatentSource
from starflow2_jax.data.mixture import random_documents
from starflow2_jax.data.sequences import Document, ImageShape, Turn, Words, encode_turns
from starflow2_jax.data.sources import Record, Source
from starflow2_jax.data.tokenizer import Tokenizer, train_tokenizer
from starflow2_jax.errors import UserError
from starflow2_jax.models.codec import Codec

Task = Literal["draw", "nothing", "category", "tone", "restore"]
QUESTION = "what kind of thing is this?"
RESTORE = "restore the colours"
NATURAL = "natural"
_TONE_WORDS = tuple(TONES.values())
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def _grey(image: np.ndarray) -> np.ndarray:
    return np.repeat(np.round(image @ _LUMA).astype(np.uint8)[..., None], 3, -1)


COLOURS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    NATURAL: lambda image: image,
    "grey": _grey,
    "swapped": lambda image: np.ascontiguousarray(image[..., ::-1]),  # red and blue
}
"""A picture uint8 [..., 3] in its own colours and in others, from which those are to be restored.

Any emoji has them, where few have skin tones: to keep a picture's form and change its colours is
learned from all emoji. (Those with skin tones alone are few enough to be learned by heart.)
"""


def category(emoji: Emoji) -> str:
    """The answer to `QUESTION`."""
    return emoji.category.lower()


def tone_request(tone: str) -> str:
    """What a user writes to have a skin tone changed; `tone` is a word of `TONES`."""
    return f"make the skin tone {tone}"


def edit_parts(request: str, picture: np.ndarray | Words) -> tuple[str, np.ndarray | Words]:
    """What a user says to have a picture changed.

    The request comes first: so the two pictures are equally far apart whatever it says, and what a
    place of one is made from lies at the same distance from it.
    """
    return request, picture


@functools.cache
def tokenizer_of(emoji: tuple[Emoji, ...]) -> Tokenizer:
    """A byte-level BPE in which the common words of these emoji are one token each."""
    texts = [QUESTION, RESTORE, *map(tone_request, _TONE_WORDS), *COLOURS] * 100
    for one in emoji:
        texts += [one.caption, category(one)]
    return train_tokenizer(texts, vocab_size=1024)


@dataclasses.dataclass(frozen=True)
class EmojiSet:
    """Emoji of one split and their pictures.

    Attributes:
        emoji: n of them.
        images: uint8 [n, H, W, 3], or cached latents bfloat16 [n, N, 2C].
        recoloured: the same in other colours, by the words of `COLOURS` but for the natural ones.
    """

    emoji: tuple[Emoji, ...]
    images: np.ndarray
    recoloured: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def in_colours(self, colours: str) -> np.ndarray:
        """As `images`, in the colours of a word of `COLOURS`."""
        return self.images if colours == NATURAL else self.recoloured[colours]

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


class RecolouredSource(Source):
    """Pictures of a source, image files, once in each of `COLOURS`.

    The field `file` is the colours' word and the file's own: `grey/1f600.png`.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(COLOURS) * len(self._source)

    def _at(self, index: int) -> tuple[str, int]:
        colours, place = divmod(index, len(self._source))
        return tuple(COLOURS)[colours], place

    def name(self, index: int) -> str:
        """The colours' word and the picture's name."""
        colours, place = self._at(index)
        return f"{colours}/{self._source.name(place)}"

    def __getitem__(self, index: int) -> Record:
        colours, place = self._at(index)
        record = self._source[place]
        data = record.image("image")
        if colours != NATURAL:
            with Image.open(io.BytesIO(data)) as image:
                changed = COLOURS[colours](np.asarray(image.convert("RGB")))
            file = io.BytesIO()
            Image.fromarray(changed).save(file, "PNG")
            data = file.getvalue()
        fields = {"image": data, "file": f"{colours}/{record.text('file')}"}
        return Record(f"{record.name} ({colours})", fields)


def cached_set(emoji: Sequence[Emoji], source: LatentSource) -> EmojiSet:
    """A split with the latents of a cache of a `RecolouredSource` that kept the field `file`.

    Raises:
        UserError: the cache lacks one.
    """
    places = {source[i].text("file"): i for i in range(len(source))}
    images = {}
    for colours in COLOURS:
        missing = [one.file for one in emoji if f"{colours}/{one.file}" not in places]
        if missing:
            raise UserError(f"the cached latents lack {len(missing)} emoji ({missing[0]}, ...)")
        some = [source.moments(places[f"{colours}/{one.file}"]) for one in emoji]
        images[colours] = np.stack(some)
    return EmojiSet(tuple(emoji), images.pop(NATURAL), images)


class Conversations:
    """Makes random documents of the tasks from one split."""

    def __init__(self, emoji: EmojiSet, tokenizer: Tokenizer, shape: ImageShape) -> None:
        self.emoji = emoji
        self.tokenizer = tokenizer
        self.shape = shape

    def _votes(self, shown: Emoji, colours: str, rng: np.random.Generator, drawn: bool) -> Words:
        """A picture in words: each place says a piece of its caption or its category, or nothing.

        Places that show the skin tone or other colours than the natural ones say so; else that
        would be lost among the others.
        """
        told = shown.tones if colours == NATURAL else (colours,)
        places = self.shape.side**2
        said = self.tokenizer.encode(shown.name), self.tokenizer.encode(category(shown))
        ids = np.full(places, self.tokenizer.special.image_pad, np.int32)
        share = rng.uniform(0.3, 0.9)
        for place in np.flatnonzero(rng.random(places) < share):
            words = said[int(rng.random() < 0.4)]
            if told and rng.random() < 0.4:
                words = self.tokenizer.encode(told[rng.integers(len(told))])
            ids[place] = words[rng.integers(len(words))]
        return Words(ids, drawn)

    def turns(self, task: Task, rng: np.random.Generator, in_words: bool) -> list[Turn]:
        """One conversation; pictures as images, or in words for a model without pixels."""

        def picture(index: int, drawn: bool, colours: str = NATURAL) -> np.ndarray | Words:
            if in_words:
                return self._votes(self.emoji.emoji[index], colours, rng, drawn)
            return self.emoji.in_colours(colours)[index]

        if task == "tone":
            toned = self.emoji.toned
            variants = toned[rng.integers(len(toned))]
            before, after = rng.choice(len(_TONE_WORDS), 2, replace=False)
            request = tone_request(_TONE_WORDS[after])
            return [
                Turn("user", edit_parts(request, picture(variants[before], False))),
                Turn("assistant", (picture(variants[after], True),)),
            ]
        index = int(rng.choice(self.emoji.by_base[rng.integers(len(self.emoji.by_base))]))
        shown = self.emoji.emoji[index]
        if task == "restore":
            changed = str(rng.choice([colours for colours in COLOURS if colours != NATURAL]))
            return [
                Turn("user", edit_parts(RESTORE, picture(index, False, changed))),
                Turn("assistant", (picture(index, True),)),
            ]
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
