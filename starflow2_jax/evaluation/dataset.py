"""Datasets to evaluate on: files of records, read in order, each one a conversation.

In training a damaged record is skipped; here it stops the job with its name.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from starflow2_jax.data import tasks
from starflow2_jax.data.decoding import decode
from starflow2_jax.data.images import NO_CLASS, ImageFolder, open_folder
from starflow2_jax.data.sequences import ImageShape, Part, Turn
from starflow2_jax.data.sources import (
    ArrayRecordSource,
    ConversationSource,
    ParquetSource,
    Source,
    WebDatasetSource,
)
from starflow2_jax.data.sources.record import Record
from starflow2_jax.data.tasks import Decode, Task
from starflow2_jax.errors import UserError

TASKS: dict[str, type] = {
    "conversation": tasks.Conversation,
    "draw": tasks.Draw,
    "read": tasks.Read,
    "edit": tasks.Edit,
    "story": tasks.Story,
}

_SOURCES: dict[str, type[Source]] = {
    ".jsonl": ConversationSource,
    ".tar": WebDatasetSource,
    ".array_record": ArrayRecordSource,
    ".parquet": ParquetSource,
}


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation of a dataset.

    Attributes:
        id: its own, where it has one, or its number.
        turns: what was said, shown and drawn.
    """

    id: str | int
    turns: tuple[Turn, ...]


class FolderSource(Source):
    """A folder of images, see `data.images`: the caption is the name of the class."""

    def __init__(self, folder: ImageFolder, template: str = "{}") -> None:
        self.folder = folder
        self._template = template

    def __len__(self) -> int:
        return len(self.folder)

    def name(self, index: int) -> str:
        """The file."""
        return str(self.folder.root / self.folder.files[index])

    def caption(self, label: int) -> str:
        """The class's name, without underlines, in the template; "" for no class."""
        if label == NO_CLASS:
            return ""
        return self._template.replace("{}", self.folder.classes[label].replace("_", " "))

    def __getitem__(self, index: int) -> Record:
        fields = {
            "id": self.folder.files[index],
            "jpg": (self.folder.root / self.folder.files[index]).read_bytes(),
            "txt": self.caption(int(self.folder.labels[index])),
        }
        return Record(self.name(index), fields)


class Dataset:
    """Examples by number."""

    def __init__(self, source: Source, task: Task, shape: ImageShape) -> None:
        self.source = source
        self._task = task
        self._decode = functools.partial(decode, shape=shape)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        """Reads an example.

        Raises:
            UserError: it is damaged, or lacks a field; names it.
        """
        return self._example(index, self._decode)

    def digest(self) -> str:
        """What the records say: SHA-256, in hexadecimal, of ids, roles, texts and encoded images.

        Of every byte that is scored, and of nothing else: files that lie elsewhere, have other
        times, or are packed in another way have the same digest. Everything is read once, and no
        image is decoded, which is little beside scoring it.

        Raises:
            UserError: as `dataset[index]`, but for images that cannot be decoded.
        """
        found = hashlib.sha256()
        for index in range(len(self)):
            example = self._example(index, _image_digest)
            turns = [(turn.role, [*map(_written, turn.parts)]) for turn in example.turns]
            found.update(json.dumps([example.id, turns]).encode() + b"\n")
        return found.hexdigest()

    def _example(self, index: int, decode: Decode) -> Example:
        try:
            record = self.source[index]
            # What is random in a task (the wording of a question) goes by the record's number.
            rng = np.random.default_rng(index)
            turns = self._task.turns(record, decode, rng)
            given = record.value("id") if "id" in record else index
        # Whatever the readers of other people's files raise on damaged ones.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.source.name(index)}: {reason}") from error
        return Example(given if isinstance(given, str | int) else index, tuple(turns))


def _image_digest(data: bytes) -> np.ndarray:
    """In the place of an image: uint8 [32]."""
    return np.frombuffer(hashlib.sha256(data).digest(), np.uint8)


def _written(part: Part) -> Any:
    return part if isinstance(part, str) else {"image": part.tobytes().hex()}


class _Unnamed(tasks.Draw):
    """Draw, where a record without a class has an empty caption."""

    def turns(self, record: Record, decode: Any, rng: np.random.Generator) -> list[Turn]:
        """See `Task`."""
        if record.value(self.caption):
            return super().turns(record, decode, rng)
        image = decode(record.image(self.image))
        return [Turn("user", ()), Turn("assistant", (image,))]


def open_dataset(
    paths: Sequence[str | os.PathLike[str]],
    shape: ImageShape,
    *,
    task: str | None = None,
    fields: Mapping[str, str] | None = None,
    images: str | os.PathLike[str] | None = None,
    index: str | os.PathLike[str] | None = None,
    template: str = "{}",
) -> Dataset:
    """Opens files of one kind (JSONL, tar, ArrayRecord, Parquet), or one folder of images.

    Args:
        paths: of the files, patterns with `*` among them; or of the folder.
        shape: that images are made to have.
        task: of `TASKS`; default: conversation for JSONL, else draw.
        fields: of the task, by the task's own names for them.
        images: of JSONL: folder that image paths start from.
        index: folder for the index of the files; default: beside them.
        template: of a folder: the caption, with {} where the class is to stand.

    Raises:
        UserError: no such files, files of several kinds or of an unknown one, no such task or
            field.
    """
    if len(paths) == 1 and pathlib.Path(paths[0]).is_dir():
        folder = open_folder(paths[0], shape.height, shape.channels)
        if "{}" not in template:
            raise UserError(f"the template {template!r} has no {{}} where the class is to stand")
        return Dataset(FolderSource(folder, template), _Unnamed(), shape)
    kinds = {pathlib.Path(path).suffix for path in paths}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind not in _SOURCES:
        raise UserError(
            f"data {', '.join(map(str, paths))}: expected a folder of images, or files of one of "
            f"the kinds {', '.join(_SOURCES)}"
        )
    options: dict[str, Any] = {"index": index}
    if kind == ".jsonl":
        options["images"] = images
    name = task or ("conversation" if kind == ".jsonl" else "draw")
    known = [f.name for f in dataclasses.fields(TASKS[name]) if f.type is str or f.type == "str"]
    if unknown := set(fields or ()) - set(known):
        raise UserError(
            f"task {name} has no field {sorted(unknown)[0]!r}; it has {', '.join(known)}"
        )
    return Dataset(_SOURCES[kind](list(paths), **options), TASKS[name](**(fields or {})), shape)


def drawing(example: Example) -> tuple[str, np.ndarray]:
    """The caption and the image of an example that is one drawing.

    Raises:
        UserError: it is something else.
    """
    parts = [(turn.role, part) for turn in example.turns for part in turn.parts]
    match parts:
        case [("user", str(caption)), ("assistant", np.ndarray() as image)]:
            return caption, image
    raise UserError(
        f"record {example.id} is not one caption of the user's and one image of the assistant's"
    )
