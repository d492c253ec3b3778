"""The data of a run: sources with tasks, mixed by weight, as `training.loop` takes it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import grain
import numpy as np

from starflow2_jax.data.batches import Documents
from starflow2_jax.data.decoding import decode
from starflow2_jax.data.packing import features
from starflow2_jax.data.sequences import Document, ImageShape, Turn, encode_turns
from starflow2_jax.data.sources.record import RecordError, Source
from starflow2_jax.data.tasks import Task
from starflow2_jax.data.tokenizer import Tokenizer
from starflow2_jax.errors import UserError
from starflow2_jax.models.codec import Codec

Name = TypeVar("Name", bound=str)

_BLOCK = 10_000
"""Draws in which the weights hold exactly; they are multiples of one in so many."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One ingredient of a mixture: a source, and the task that its records are used for.

    Attributes:
        source: of the records; several entries may share it.
        task: what is made of a record.
        held_out: how many records, the source's first, are kept from training.
    """

    source: Source
    task: Task
    held_out: int = 0


def exact_counts(weights: Sequence[float]) -> np.ndarray:
    """How many of every `_BLOCK` draws fall on each ingredient: int64, by largest remainder.

    Raises:
        UserError: a weight is not positive, or less than one in `_BLOCK` of all.
    """
    shares = np.asarray(weights, np.float64)
    if not len(shares) or not (np.isfinite(shares).all() and (shares > 0).all()):
        raise UserError(f"the weights of a mixture are positive numbers, not {list(weights)}")
    exact = shares / shares.sum() * _BLOCK
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: _BLOCK - counts.sum()]] += 1
    if not counts.all():
        raise UserError(
            f"a weight of {shares[counts == 0][0]:g} in a mixture of {shares.sum():g} is less than "
            f"one in {_BLOCK}; leave that ingredient out, or give it more"
        )
    return counts


@functools.lru_cache(maxsize=16)
def _block(counts: tuple[int, ...], seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Which ingredient each draw of a block falls on, and as the how-manieth of it in the block."""
    which = np.random.default_rng([seed, number]).permutation(np.repeat(range(len(counts)), counts))
    order = np.argsort(which, kind="stable")
    rank = np.empty_like(which)
    rank[order] = np.concatenate([np.arange(count) for count in counts])
    return which, rank


class Mixed(grain.MapDataset):
    """Endless streams mixed in random order, with exact shares, each read in its own order.

    Grain's own mixture is periodic: dealt to lanes, some ingredients would all go to one lane.
    """

    def __init__(self, streams: Sequence[grain.MapDataset], counts: np.ndarray, seed: int) -> None:
        super().__init__(list(streams))
        self._shares = tuple(int(c) for c in counts)
        self._mix_seed = seed

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int | slice) -> object:
        if isinstance(index, slice):
            return self.slice(index)
        number, at = divmod(index, _BLOCK)
        which, rank = _block(self._shares, self._mix_seed, number)
        stream = int(which[at])
        return self.parents[stream][number * self._shares[stream] + int(rank[at])]


class _Reader:
    """Records of one entry to packable documents."""

    def __init__(
        self,
        name: str,
        entry: Entry,
        tokenizer: Tokenizer,
        shape: ImageShape,
        drop: float,
    ) -> None:
        self._name = name
        self._entry = entry
        self._tokenizer = tokenizer
        self._shape = shape
        self._drop = drop

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, object]:
        source = self._entry.source
        origin = {"source": self._name, "record": source.name(index)}
        pixels = functools.partial(decode, shape=self._shape)
        try:
            turns = self._entry.task.turns(source[index], pixels, rng)
        # Whatever the readers of other people's files raise on damaged ones. A bug ends here too,
        # and then stops the run, with its name, as too many corrupt records.
        except Exception as error:
            return {**origin, "error": _one_line(error)}
        turns = self._dropped(turns, rng)
        try:
            document = encode_turns(turns, self._tokenizer, self._shape, where="record")
        except UserError as error:
            return {**origin, "error": _one_line(error)}
        return {**features(document, rng), **origin}

    def _dropped(self, turns: list[Turn], rng: np.random.Generator) -> list[Turn]:
        """Now and then one drawn image alone, as a document without content."""
        parts = [part for turn in turns if turn.role == "assistant" for part in turn.parts]
        drawn = [part for part in parts if isinstance(part, np.ndarray)]
        if not drawn or rng.random() >= self._drop:
            return turns
        image = drawn[int(rng.integers(len(drawn)))]
        return [Turn("user", ()), Turn("assistant", (image,))]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    known = isinstance(error, RecordError | UserError)
    return text if known and text else f"{type(error).__name__}: {text}"


def first_images(entry: Entry, shape: ImageShape, count: int) -> np.ndarray:
    """The first readable images of an entry's training records, to fit a codec to.

    Args:
        entry: whose task shows or draws images.
        shape: of the images.
        count: how many.

    Returns:
        uint8 [count, H, W, channels].

    Raises:
        UserError: there are not so many.
    """
    rng = np.random.default_rng(0)
    found: list[np.ndarray] = []
    pixels = functools.partial(decode, shape=shape)
    for index in range(entry.held_out, len(entry.source)):
        try:
            turns = entry.task.turns(entry.source[index], pixels, rng)
        except Exception:  # corrupt records are counted and named when they are trained on
            continue
        parts = [part for turn in turns for part in turn.parts]
        found += [part for part in parts if isinstance(part, np.ndarray)]
        if len(found) >= count:
            return np.stack(found[:count])
    raise UserError(f"{len(found)} images can be read, but {count} are needed to fit the codec")


class MixtureData:
    """The data of a run on sources, as `training.loop` takes it."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        image: ImageShape,
        codec: Codec,
        entries: Mapping[str, Entry],
        mixtures: Mapping[str, Mapping[str, float]],
        text_drop: float = 0.1,
        most_corrupt: float = 0.01,
        threads: int = 2,
        workers: int = 0,
    ) -> None:
        """Checks the mixtures against the entries.

        Args:
            tokenizer: of the texts.
            image: what images are brought to.
            codec: of the images.
            entries: ingredients by name; records that are skipped are counted by these names.
            mixtures: for each stage, weights of entries by name.
            text_drop: share of the documents that draw which become an image without a prompt.
            most_corrupt: share of an entry's records that may be corrupt.
            threads: that read, in each lane of the batch.
            workers: processes that read; 0: the training's own.

        Raises:
            UserError: a mixture names no entry, or has weights that are none; an entry without
                records.
        """
        self.tokenizer = tokenizer
        self.image = image
        self.codec = codec
        self._entries = dict(entries)
        self._mixtures = {stage: dict(mixture) for stage, mixture in mixtures.items()}
        self._text_drop = text_drop
        self._most_corrupt = most_corrupt
        self._threads = threads
        self._workers = workers
        for stage, mixture in self._mixtures.items():
            for name in mixture:
                if name not in self._entries:
                    raise UserError(
                        f"the mixture of stage {stage} has {name!r}, but the data sources are "
                        f"{', '.join(self._entries)}"
                    )
            exact_counts(list(mixture.values()))
        for name, entry in self._entries.items():
            if len(entry.source) <= entry.held_out:
                raise UserError(
                    f"data source {name} has {len(entry.source)} records, of which "
                    f"{entry.held_out} are held out; none are left to train on"
                )

    def documents(self, stage: str, held_out: bool, seed: int) -> Documents:
        """An endless stream of a stage's documents, of held-out records or of the others.

        Document i is a function of seed and i alone. Entries that hold nothing out are not in the
        held-out stream.

        Raises:
            UserError: the stage has no mixture; nothing is held out.
        """
        if stage not in self._mixtures:
            raise UserError(
                f"stage {stage} has no mixture; there are mixtures of {', '.join(self._mixtures)}"
            )
        names = sorted(self._mixtures[stage])
        if held_out:
            names = [name for name in names if self._entries[name].held_out]
            if not names:
                raise UserError(
                    f"no data source of stage {stage} holds records out for evaluation; set "
                    "held_out of an entry"
                )
        streams = []
        for name in names:
            entry = self._entries[name]
            # Entries of one source must not run in step: seeds of their own.
            own = int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0])
            first, last = (0, entry.held_out) if held_out else (entry.held_out, len(entry.source))
            drop = 0.0 if held_out else self._text_drop
            reader = _Reader(name, entry, self.tokenizer, self.image, drop)
            order = entry.source.order(first, last, own)
            streams.append(order.seed(own).random_map(reader))
        weights = [self._mixtures[stage][name] for name in names]
        return Documents(
            Mixed(streams, exact_counts(weights), seed),
            threads=self._threads,
            workers=self._workers,
            most_corrupt=self._most_corrupt,
        )


def random_documents(
    mixture: Mapping[Name, float],
    make: Callable[[Name, np.random.Generator], Document],
    seed: int,
) -> Documents:
    """An endless stream of made documents, of kinds that are drawn by weight.

    Document i depends on seed and i alone.

    Args:
        mixture: weight of each kind.
        make: makes a random document of a kind.
        seed: of the stream.
    """
    kinds = sorted(mixture)
    shares = np.array([mixture[kind] for kind in kinds], np.float64)
    shares /= shares.sum()

    def document(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        del index
        kind = kinds[rng.choice(len(kinds), p=shares)]
        return features(make(kind, rng), rng)

    dataset = grain.MapDataset.range(2**31).seed(seed).random_map(document)
    # Made at once from what is in memory: threads would only get in the way.
    return Documents(dataset, threads=0, ahead=0)
