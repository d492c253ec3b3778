"""Sampling as a job: a file of prompts in, a folder of images and replies out, resumable.

OUT/run.json        what was asked for: config, weights' checksum, seed, settings, prompts' sha256
OUT/samples.jsonl   one line per sample: id, sample, seed, reason, parts (text, or an image's file)
OUT/images/         the images, laid out as a benchmark wants them, or ID/SAMPLE_IMAGE.png
OUT/grids/          plain prompts: the images of each prompt side by side

Every sample's random stream comes from the seed, its prompt's id and its number alone: the order of
the prompts, the others in the engine and interruptions change nothing.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import starflow2_jax
from starflow2_jax.data.sequences import Turn, unconditional_prompt
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.formats import Layout, save_png, tiled
from starflow2_jax.model import Model, Sampling
from starflow2_jax.provenance import differing_keys, git_revision, write_json
from starflow2_jax.sampling.engine import EngineConfig
from starflow2_jax.sampling.generate import SHORTEST_CACHE, bucket
from starflow2_jax.service import Service, read_image

# In the names of files: separators, and surrogates, which are no characters.
_UNNAMEABLE = re.compile(r"[/\\\0\ud800-\udfff]")

RUN, SAMPLES, IMAGES, GRIDS = "run.json", "samples.jsonl", "images", "grids"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One conversation to reply to.

    Attributes:
        id: unique, and can be part of a file's name.
        turns: what was said.
        where: it stands, in a file.
    """

    id: str
    turns: tuple[Turn, ...]
    where: str = ""

    @property
    def name(self) -> str:
        """What to call it in an error."""
        return self.where or f"prompt {self.id}"


def from_texts(texts: Sequence[str]) -> list[Prompt]:
    """Prompts of one line of text each; their ids are their numbers, from 00000."""
    return [Prompt(f"{n:05d}", (Turn("user", (text,)),)) for n, text in enumerate(texts)]


def from_file(path: pathlib.Path, model: Model) -> list[Prompt]:
    """The prompts of a text file, one a line, or of a JSONL file.

    A JSONL line is {"prompt": TEXT} or {"prompt": [PART, ...]}, where a part is a text or
    {"image": FILE}, relative to the JSONL file; or {"messages": [{"role": "user" or "assistant",
    "content": TEXT or [PART, ...]}, ...]}. An "id" is optional.

    Raises:
        UserError: unreadable, or not of this form; names the line.
    """
    try:
        # Not splitlines: a text may hold other line breaks of Unicode's.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    found: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            found.append(_prompt(where, line, len(found), path.parent, model))
        else:
            turns = (Turn("user", (line.strip(),)),)
            found.append(Prompt(f"{len(found):05d}", turns, where))
    if not found:
        raise UserError(f"{path}: no prompts")
    twice = [i for i, n in collections.Counter(p.id for p in found).items() if n > 1]
    if twice:
        raise UserError(f"{path}: id {twice[0]!r} is there twice")
    return found


def _prompt(where: str, line: str, index: int, folder: pathlib.Path, model: Model) -> Prompt:
    def part(value: Any) -> str | np.ndarray:
        if isinstance(value, str):
            return value
        if isinstance(value, dict) and isinstance(value.get("image"), str):
            return read_image(model, folder / value["image"])
        raise TypeError(f'{value!r} is neither a text nor {{"image": FILE}}')

    def turn(role: Any, content: Any) -> Turn:
        if role not in ("user", "assistant"):
            raise ValueError(f"role {role!r}, expected user or assistant")
        content = content if isinstance(content, list) else [content]
        return Turn(role, tuple(part(value) for value in content))

    try:
        record = json.loads(line)
        identity = str(record.get("id", f"{index:05d}"))
        if "messages" in record:
            turns = tuple(turn(m["role"], m["content"]) for m in record["messages"])
        else:
            turns = (turn("user", record["prompt"]),)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{where}: {error!r}; expected {{"prompt": ...}} or {{"messages": [...]}}'
        ) from error
    if not identity or identity.startswith(".") or _UNNAMEABLE.search(identity):
        raise UserError(f"{where}: id {identity!r} cannot name a file")
    if not turns or turns[-1].role != "user":
        raise UserError(f"{where}: the last message must be the user's")
    return Prompt(identity, turns, where)


def sha256(path: pathlib.Path) -> str:
    """Of a file, or of the names and contents of a folder's files; hexadecimal."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            if path.is_dir():
                digest.update(f"{file.relative_to(path)}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def claim(out: pathlib.Path, run: Mapping[str, Any], resume: bool) -> None:
    """Makes a folder this run's own, or checks that it already is.

    Raises:
        UserError: another run's, or this one's without `resume`.
    """
    path = out / RUN
    record = {
        "format_version": FORMAT_VERSION,
        "package_version": starflow2_jax.__version__,
        "git_revision": git_revision(),
        **run,
    }
    try:
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot use {out}: {error}") from error
    if old is None:
        if resume and (out / SAMPLES).is_file():
            raise UserError(f"{out} has samples, but no {RUN}: nothing to go on from")
        write_json(path, record)
        return
    if not resume:
        raise UserError(f"{out} holds a run already: --resume goes on with it")
    quiet = ("git_revision", "package_version")
    fresh = json.loads(json.dumps(record))
    keys = [
        key.removeprefix("config.")
        for key in differing_keys(old, fresh)
        if key.removeprefix("config.") not in quiet
    ]
    if keys:
        raise UserError(f"{out} is another run's; it differs in {', '.join(keys)}")


def _finished(path: pathlib.Path, samples: int, there: Callable[[str], bool]) -> set[str]:
    """The prompts that an interrupted run finished; lines of others are taken out of its file."""
    if not path.is_file():
        return set()
    data = path.read_bytes()
    lines: dict[str, list[bytes]] = collections.defaultdict(list)
    # Not splitlines, as above; what follows the last line's end is torn, within a character even.
    for line in data.split(b"\n")[:-1]:
        try:
            lines[json.loads(line)["id"]].append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            break  # torn
    kept = {i: some for i, some in lines.items() if len(some) == samples and there(i)}
    whole = b"".join(line for some in kept.values() for line in some)
    if whole != data:
        hidden = path.with_name(f".{path.name}.part")
        hidden.write_bytes(whole)
        hidden.replace(path)
    return set(kept)


def seed_of(seed: int, identity: str, sample: int) -> int:
    """The seed of one sample."""
    words = np.random.SeedSequence([seed, zlib.crc32(identity.encode()), sample])
    return int(words.generate_state(1)[0])


@dataclasses.dataclass
class _Under:
    """A prompt under way: what its samples said so far, by number."""

    prompt: Prompt
    left: set[int]
    parts: dict[int, list[str | np.ndarray]]
    reasons: dict[int, str]


class Job:
    """Replies to prompts; see the module."""

    def __init__(
        self,
        service: Service,
        out: pathlib.Path,
        sampling: Sampling,
        *,
        samples: int,
        draw: bool,
        layout: Layout | None = None,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Prepares a job.

        Args:
            service: with the model.
            out: the folder, see the module.
            sampling: of every sample, but for its seed.
            samples: of each prompt.
            draw: replies start with an image.
            layout: of a benchmark; None: plain.
            on_progress: called with the number of finished samples.
        """
        self._service = service
        self._out = out
        self._sampling = sampling
        self._samples = samples
        self._draw = draw
        self._layout = layout
        self._on_progress = on_progress

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Raises UserError for a setting out of range, or a prompt that does not fit; names it."""
        sampling = dataclasses.replace(self._sampling, seed=0)  # each sample has its own
        for prompt in prompts:
            self._service.check(prompt.turns, sampling, draw=self._draw, where=prompt.name)

    def run(self, prompts: Sequence[Prompt], items: Mapping[str, Any] | None = None) -> int:
        """Samples what is not there yet.

        Args:
            prompts: all of them.
            items: the layout's items, by id.

        Returns:
            How many samples were drawn now.

        Raises:
            UserError: a prompt that does not fit, or a folder that cannot be written to.
        """
        layout, images = self._layout, self._out / IMAGES

        def there(identity: str) -> bool:
            return layout is None or layout.finished(images, items[identity])

        done = _finished(self._out / SAMPLES, self._samples, there)
        todo = collections.deque(p for p in prompts if p.id not in done)
        finished = len(done) * self._samples
        drawn = 0
        under: dict[int, tuple[_Under, int]] = {}
        with open(self._out / SAMPLES, "a", encoding="utf-8") as record:
            while todo or under:
                # No more is queued than the engine can take soon: prompts may hold images.
                while todo and self._service.engine.queued < self._samples:
                    self._ask(todo.popleft(), under)
                for answer in self._service.poll():
                    prompt, sample = under[answer.number]
                    if answer.part is not None:
                        prompt.parts[sample].append(answer.part)
                        continue
                    prompt.reasons[sample] = answer.reason
                    prompt.left.remove(sample)
                    del under[answer.number]
                    if not prompt.left:
                        self._write(prompt, record, items)
                        drawn += self._samples
                        self._on_progress(finished + drawn)
        if layout is not None:
            layout.close(images, list(items.values()))
        return drawn

    def _ask(self, prompt: Prompt, under: dict[int, tuple[_Under, int]]) -> None:
        numbers = range(self._samples)
        mine = _Under(prompt, set(numbers), {k: [] for k in numbers}, {})
        row = self._service.row(prompt.turns, draw=self._draw, where=prompt.name)
        for k in numbers:
            seed = seed_of(self._sampling.seed, prompt.id, k)
            sampling = dataclasses.replace(self._sampling, seed=seed)
            try:
                under[self._service.submit(row, sampling)] = mine, k
            except UserError as error:
                raise UserError(f"{prompt.name}: {error}") from error

    def _write(self, done: _Under, record: Any, items: Mapping[str, Any] | None) -> None:
        """Images first, then the lines that say that they are there."""
        identity, images = done.prompt.id, self._out / IMAGES
        pictures = [
            [part for part in done.parts[k] if isinstance(part, np.ndarray)]
            for k in range(self._samples)
        ]
        if self._layout is not None:
            firsts = [some[0] for some in pictures if some]
            if len(firsts) < self._samples:
                raise UserError(
                    f"prompt {identity}: a reply without an image ({done.reasons}); the context is "
                    "too small"
                )
            self._layout.write(images, items[identity], firsts)
        elif any(pictures):
            flat = [picture for some in pictures for picture in some]
            columns = max(map(len, pictures)) if max(map(len, pictures)) > 1 else 4
            grid = tiled(flat, min(columns, len(flat)))
            save_png(self._out / GRIDS / f"{identity}.png", grid)
        lines = []
        for k in range(self._samples):
            parts, count = [], 0
            for part in done.parts[k]:
                if isinstance(part, str):
                    parts.append({"text": part})
                    continue
                if self._layout is None:
                    name = f"{identity}/{k:04d}_{count}.png"
                    save_png(images / name, part)
                    parts.append({"image": f"{IMAGES}/{name}"})
                count += 1
            lines.append(
                {
                    "id": identity,
                    "sample": k,
                    "seed": seed_of(self._sampling.seed, identity, k),
                    "reason": done.reasons[k],
                    "parts": parts,
                }
            )
        record.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        record.flush()


def layout_prompts(layout: Layout, path: pathlib.Path) -> tuple[list[Prompt], dict[str, Any]]:
    """A benchmark's prompts, and its items by id.

    Raises:
        UserError: see `Layout.items`.
    """
    items = {item.id: item for item in layout.items(path)}
    prompts = [
        Prompt(i.id, (Turn("user", (i.prompt,)),), f"{path}: prompt {i.id}") for i in items.values()
    ]
    return prompts, items


def needed(model: Model, prompts: Iterable[Prompt], sampling: Sampling, draw: bool) -> int:
    """Positions that the longest prompt and any reply to it take, rounded up."""
    longest = max(len(model.encode(p.turns, draw=draw, where=p.name).tokens) for p in prompts)
    image = model.pretzel.config.flow.tokens + 2
    empty = len(unconditional_prompt(model.tokenizer, model.bundle.image).tokens)
    reply = int(sampling.max_new_tokens) + int(sampling.max_images) * image
    return bucket(max(longest + reply, empty + image, SHORTEST_CACHE), parts=4)


def describe(
    model: Model,
    sampling: Sampling,
    config: EngineConfig,
    samples: int,
    draw: bool,
    prompts: Sequence[Prompt],
    path: pathlib.Path | None,
) -> dict[str, Any]:
    """What `run.json` says of a run: all that its samples depend on."""
    if path is None:
        texts = [part for prompt in prompts for turn in prompt.turns for part in turn.parts]
        source = {"texts": texts}
    else:
        source = {"file": path.name, "sha256": sha256(path)}
    return {
        "model": dict(model.bundle.metadata),
        "weights_sha256": model.bundle.checksum(),
        "prompts": source,
        "samples": samples,
        "draw": draw,
        "sampling": dataclasses.asdict(sampling),
        "engine": dataclasses.asdict(config),
        **({"devices": model.devices} if model.devices > 1 else {}),
    }
