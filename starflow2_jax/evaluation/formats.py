"""The layouts in which public benchmarks of generation want their images, and checks of them.

A scorer drops what it does not find, most of them without a word. Each layout reads the benchmark's
own prompt file, says where the images of a prompt go, writes what stands beside them, and lists
everything that is missing or wrong in a finished folder.

GenEval (github.com/djghosh13/geneval), DPG-Bench (TencentQQGYLab/ELLA), WISE
(PKU-YuanGroup/WISE), lmms-eval's logs (EvolvingLMMs-Lab/lmms-eval).
"""

import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from starflow2_jax.errors import UserError
from starflow2_jax.provenance import write_json


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt of a benchmark: its id, unique in the file, its text, and its record there."""

    id: str
    prompt: str
    record: Any


class Layout(Protocol):
    """One benchmark's way of naming things."""

    @property
    def samples(self) -> int:
        """Images of a prompt."""

    @property
    def whole(self) -> int:
        """Prompts of the whole benchmark; 0: any number."""

    def items(self, prompts: pathlib.Path) -> list[Item]:
        """Reads the benchmark's prompts.

        Raises:
            UserError: they are not what the benchmark has; names the place.
        """

    def finished(self, folder: pathlib.Path, item: Item) -> bool:
        """Whether all of an item's images are there."""

    def write(self, folder: pathlib.Path, item: Item, images: Sequence[np.ndarray]) -> None:
        """Writes an item's images, uint8 [H, W, 1 or 3]."""

    def close(self, folder: pathlib.Path, items: Sequence[Item]) -> None:
        """Writes what a folder has once, at the end."""

    def check(self, folder: pathlib.Path, items: Sequence[Item]) -> list[str]:
        """What is missing or wrong, one line each; empty if a scorer will read everything."""


def save_png(path: pathlib.Path, image: np.ndarray) -> None:
    """Writes uint8 [H, W, 1 or 3] as RGB, under another name first: no file is ever half there.

    Raises:
        UserError: the folder cannot be written to.
    """
    rgb = np.repeat(image, 3, -1) if image.shape[-1] == 1 else image
    hidden = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgb).save(hidden, format="PNG")
        hidden.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def tiled(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Images of one size [H, W, c] side by side without a border, row after row; black at the end.

    Raises:
        ValueError: no image.
    """
    rows = -(-len(images) // columns)
    blank = np.zeros_like(images[0])
    filled = [*images, *[blank] * (rows * columns - len(images))]
    lines = [np.concatenate(filled[r * columns : (r + 1) * columns], 1) for r in range(rows)]
    return np.concatenate(lines, 0)


def json_lines(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """(file:line, value) of each line that is not empty."""
    # Not splitlines: a text may hold other line breaks of Unicode's.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error})") from error


def _json_list(path: pathlib.Path, expected: str) -> Iterator[tuple[str, Any]]:
    """(file[number], value) of each entry of a list."""
    try:
        records = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(records, list):
        raise UserError(f"{path}: expected {expected}")
    yield from ((f"{path}[{n}]", record) for n, record in enumerate(records))


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _unique(items: list[Item], where: pathlib.Path) -> list[Item]:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UserError(f"{where}: id {item.id!r} is there twice")
        seen.add(item.id)
    if not items:
        raise UserError(f"{where}: no prompts")
    return items


def _field(record: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(record, dict) or not isinstance(record.get(name), kind):
        raise UserError(f"{where}: expected an object with {name!r}, {kind.__name__}")
    return record[name]


def _image_size(path: pathlib.Path) -> tuple[int, int] | str:
    """(width, height) of a picture that decodes to its end, or what is wrong with the file."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"{path}: not a readable image ({error})"


def _check_images(paths: Iterable[pathlib.Path]) -> tuple[list[str], set[tuple[int, int]]]:
    """What is wrong with these files, and the sizes that they have."""
    problems, sizes = [], set()
    for path in paths:
        if not path.is_file():
            problems.append(f"{path}: missing")
            continue
        size = _image_size(path)
        if isinstance(size, str):
            problems.append(size)
        else:
            sizes.add(size)
    return problems, sizes


def _check_count(items: Sequence[Item], whole: int) -> list[str]:
    if not whole or len(items) == whole:
        return []
    return [f"{len(items)} prompts, the benchmark has {whole}: a score of these is not its score"]


def _check_single(samples: int, name: str) -> None:
    if samples != 1:
        raise UserError(f"{name} takes one image of a prompt, not {samples}")


def _strangers(folder: pathlib.Path, pattern: str, expected: set[str], what: str) -> list[str]:
    """Entries that match, and that no prompt asks for."""
    found = sorted(p.name for p in folder.glob(pattern) if not p.name.startswith("."))
    return [f"{folder / name}: {what}" for name in found if name not in expected]


@dataclasses.dataclass(frozen=True)
class GenEval:
    """`00000/metadata.jsonl` with one object, `00000/samples/0000.png`, `00000/grid.png`.

    The prompts are `evaluation_metadata.jsonl`, or a file that only rewrites its `prompt` fields.
    """

    samples: int = 4
    whole: int = 553

    def items(self, prompts: pathlib.Path) -> list[Item]:
        """See `Layout`."""
        found = []
        for where, record in json_lines(prompts):
            _field(record, "tag", str, where)
            _field(record, "include", list, where)
            text = _field(record, "prompt", str, where)
            found.append(Item(f"{len(found):05d}", text, record))
        return _unique(found, prompts)

    def _paths(self, folder: pathlib.Path, item: Item) -> list[pathlib.Path]:
        return [folder / item.id / "samples" / f"{k:04d}.png" for k in range(self.samples)]

    def finished(self, folder: pathlib.Path, item: Item) -> bool:
        """See `Layout`."""
        metadata = folder / item.id / "metadata.jsonl"
        return metadata.is_file() and all(p.is_file() for p in self._paths(folder, item))

    def write(self, folder: pathlib.Path, item: Item, images: Sequence[np.ndarray]) -> None:
        """See `Layout`."""
        for path, image in zip(self._paths(folder, item), images, strict=True):
            save_png(path, image)
        save_png(folder / item.id / "grid.png", tiled(images, 2))
        # The scorer reads the whole file as one object.
        write_json(folder / item.id / "metadata.jsonl", item.record)

    def close(self, folder: pathlib.Path, items: Sequence[Item]) -> None:
        """See `Layout`."""

    def check(self, folder: pathlib.Path, items: Sequence[Item]) -> list[str]:
        """See `Layout`."""
        problems = _check_count(items, self.whole)
        for item in items:
            path = folder / item.id / "metadata.jsonl"
            if not path.is_file():
                problems.append(f"{path}: missing")
            else:
                try:
                    if json.loads(_text(path)) != item.record:
                        problems.append(f"{path}: not the prompt file's line {int(item.id) + 1}")
                except (ValueError, UserError) as error:
                    problems.append(f"{path}: not exactly one JSON object ({error})")
            expected = self._paths(folder, item)
            problems += _check_images(expected)[0]
            samples = folder / item.id / "samples"
            named = [p.name for p in samples.glob("*") if re.match(r"\d+\.png", p.name)]
            extra = sorted(set(named) - {p.name for p in expected})
            problems += [f"{samples / name}: scored too, but not expected" for name in extra]
        wanted = {item.id for item in items}
        digits = [p for p in sorted(folder.glob("*")) if p.is_dir() and p.name.isdigit()]
        problems += [f"{p}: of no prompt, but scored" for p in digits if p.name not in wanted]
        return problems


@dataclasses.dataclass(frozen=True)
class Dpg:
    """One flat folder of `STEM.png`: a 2 x 2 sheet of R x R tiles for four samples, or one image.

    The prompts are the folder of `STEM.txt` files, or a JSON list of `prompt_file_name` and
    `prompt`.
    """

    samples: int = 4
    whole: int = 1065

    def items(self, prompts: pathlib.Path) -> list[Item]:
        """See `Layout`."""
        if self.samples not in (1, 4):
            raise UserError(f"DPG-Bench takes 1 or 4 images of a prompt, not {self.samples}")
        found = []
        if prompts.is_dir():
            for path in sorted(prompts.glob("*.txt")):
                found.append(Item(path.stem, _text(path).strip(), None))
        else:
            for where, record in _json_list(prompts, "a list, or a folder of .txt files"):
                name = _field(record, "prompt_file_name", str, where)
                found.append(Item(name, _field(record, "prompt", str, where), record))
        for item in found:
            if "." in item.id or "/" in item.id:
                raise UserError(
                    f"{prompts}: {item.id!r}: the scorer takes a name up to its first dot; "
                    "expected a name without dots and slashes"
                )
        return _unique(found, prompts)

    def finished(self, folder: pathlib.Path, item: Item) -> bool:
        """See `Layout`."""
        return (folder / f"{item.id}.png").is_file()

    def write(self, folder: pathlib.Path, item: Item, images: Sequence[np.ndarray]) -> None:
        """See `Layout`."""
        if len(images) != self.samples:
            raise ValueError(f"{len(images)} images, expected {self.samples}")
        save_png(folder / f"{item.id}.png", tiled(images, 1 if self.samples == 1 else 2))

    def close(self, folder: pathlib.Path, items: Sequence[Item]) -> None:
        """See `Layout`."""

    def check(self, folder: pathlib.Path, items: Sequence[Item]) -> list[str]:
        """See `Layout`."""
        problems = _check_count(items, self.whole)
        wanted = {f"{item.id}.png" for item in items}
        found, sizes = _check_images(folder / name for name in sorted(wanted))
        problems += found
        if len(sizes) > 1:
            problems.append(
                f"{folder}: images of several sizes {sorted(sizes)}; the scorer cuts all of them "
                "by one resolution, and what is missing of a smaller one is black"
            )
        for width, height in sorted(sizes):
            if width != height or (self.samples == 4 and width % 2):
                problems.append(f"{folder}: images of {width} x {height}, expected a square sheet")
        # The scorer opens every file of the folder.
        others = [p for p in sorted(folder.glob("*")) if p.is_file()]
        problems += [
            f"{p}: of no prompt; the scorer opens every file and fails on it"
            for p in others
            if p.name not in wanted
        ]
        return problems


@dataclasses.dataclass(frozen=True)
class Wise:
    """One flat folder of `1.png` to `1000.png`, named by `prompt_id`, one image each.

    The prompts are one of the JSON lists of the benchmark (of either edition: the paper's, or
    WISE_Verified), or the folder of all of them.
    """

    samples: int = 1
    whole: int = 1000

    def items(self, prompts: pathlib.Path) -> list[Item]:
        """See `Layout`."""
        _check_single(self.samples, "WISE")
        files = sorted(prompts.glob("*.json")) if prompts.is_dir() else [prompts]
        if len(files) > 1:
            # WISE_Verified's folder has its three lists once more in one file.
            files = [file for file in files if file.name != "merge.json"]
        found = []
        for file in files:
            for where, record in _json_list(file, "a list of prompts"):
                number = _field(record, "prompt_id", int, where)
                found.append(Item(str(number), _field(record, "Prompt", str, where), record))
        return _unique(sorted(found, key=lambda item: int(item.id)), prompts)

    def finished(self, folder: pathlib.Path, item: Item) -> bool:
        """See `Layout`."""
        return (folder / f"{item.id}.png").is_file()

    def write(self, folder: pathlib.Path, item: Item, images: Sequence[np.ndarray]) -> None:
        """See `Layout`."""
        (image,) = images
        save_png(folder / f"{item.id}.png", image)

    def close(self, folder: pathlib.Path, items: Sequence[Item]) -> None:
        """See `Layout`."""

    def check(self, folder: pathlib.Path, items: Sequence[Item]) -> list[str]:
        """See `Layout`."""
        problems = _check_count(items, self.whole)
        wanted = {f"{item.id}.png" for item in items}
        problems += _check_images(folder / f"{item.id}.png" for item in items)[0]
        return problems + _strangers(folder, "*.png", wanted, "of no prompt_id, never scored")


def write_log(
    folder: pathlib.Path, task: str, responses: Mapping[int, str], model: str = "starflow2_jax"
) -> None:
    """Writes `TASK.json`, which `lmms-eval --model from_log` replays: responses by `doc_id`."""
    log = {
        "args": {"model": model, "model_args": "", "limit": None},
        "model_configs": {"task": task},
        "logs": [{"doc_id": number, "resps": [[text]]} for number, text in responses.items()],
        "time": time.strftime("%m%d_%H%M"),
    }
    write_json(folder / f"{task}.json", log)


@dataclasses.dataclass(frozen=True)
class LmmsEval:
    """`TASK_0.png` by document, and `TASK.json`, a log that `lmms-eval --model from_log` replays.

    A response is the JSON text {"text": "", "images": [absolute path]} of the harness' generation
    tasks. The prompts are JSONL of `doc_id` and `prompt`.
    """

    task: str = "WISE"
    model: str = "starflow2_jax"
    samples: int = 1
    whole: int = 0

    def items(self, prompts: pathlib.Path) -> list[Item]:
        """See `Layout`."""
        _check_single(self.samples, "lmms-eval")
        found = []
        for where, record in json_lines(prompts):
            number = _field(record, "doc_id", int, where)
            found.append(Item(str(number), _field(record, "prompt", str, where), record))
        return _unique(found, prompts)

    def _path(self, folder: pathlib.Path, item: Item) -> pathlib.Path:
        return folder.absolute() / f"{self.task}_{item.id}.png"

    def finished(self, folder: pathlib.Path, item: Item) -> bool:
        """See `Layout`."""
        return self._path(folder, item).is_file()

    def write(self, folder: pathlib.Path, item: Item, images: Sequence[np.ndarray]) -> None:
        """See `Layout`."""
        (image,) = images
        save_png(self._path(folder, item), image)

    def close(self, folder: pathlib.Path, items: Sequence[Item]) -> None:
        """See `Layout`."""

        def response(item: Item) -> str:
            return json.dumps({"text": "", "images": [str(self._path(folder, item))]})

        write_log(folder, self.task, {int(i.id): response(i) for i in items}, self.model)

    def check(self, folder: pathlib.Path, items: Sequence[Item]) -> list[str]:
        """See `Layout`."""
        path = folder / f"{self.task}.json"
        if not path.is_file():
            return [f"{path}: missing"]
        try:
            log = json.loads(_text(path))
            args, logs, task = log["args"], log["logs"], log["model_configs"]["task"]
            problems = [f"{path}: args lacks {n!r}" for n in ("model", "limit") if n not in args]
            if args.get("limit") is not None:
                problems.append(f"{path}: limit is {args['limit']}: the log is passed over")
            if task != self.task:
                problems.append(f"{path}: of task {task!r}, expected {self.task!r}")
            said = {entry["doc_id"]: entry["resps"] for entry in logs}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return [f"{path}: not a log ({error!r}): it is passed over"]
        if not re.fullmatch(r"\d{4}_\d{4}", str(log.get("time", ""))):
            problems.append(f"{path}: time is {log.get('time')!r}, expected MMDD_hhmm")
        for item in items:
            if int(item.id) not in said:
                problems.append(f"{path}: no response to doc_id {item.id}: the task fails")
                continue
            problems += self._check_response(path, item, said[int(item.id)])
        return problems

    def _check_response(self, path: pathlib.Path, item: Item, responses: Any) -> list[str]:
        where = f"{path}: doc_id {item.id}"
        try:
            # A bare string in place of a list of strings is read as its first letter.
            if not isinstance(responses[0], list):
                return [f"{where}: resps is no list of lists of text"]
            picture = pathlib.Path(json.loads(responses[0][0])["images"][0])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            return [f"{where}: not the JSON text of an image ({error!r})"]
        if not picture.is_absolute():
            return [f"{where}: {picture} is no absolute path"]
        return _check_images([picture])[0]


def check_folder(layout: Layout, folder: pathlib.Path, prompts: pathlib.Path) -> list[str]:
    """What a scorer would miss or misread in a folder, for the benchmark's own prompts.

    Raises:
        UserError: the prompts cannot be read, or there is no such folder.
    """
    items = layout.items(prompts)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return layout.check(folder, items)
