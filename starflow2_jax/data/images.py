"""A folder of images as data: the class of an image is the name of its sub-folder.

As torchvision's ImageFolder has it; a folder without sub-folders holds images without classes.
Letters: B images, H = W = size.
"""

import dataclasses
import itertools
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from starflow2_jax.data.pipeline import HostBatch
from starflow2_jax.errors import UserError

SUFFIXES = (
    ".bmp",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
NO_CLASS = -1

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""uint8 [H, W, channels] and randomness -> an image of the same shape."""


def _opened(path: pathlib.Path, channels: int) -> Image.Image:
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise UserError(f"{path} is of mode {file.mode}; expected 8 bits per channel")
            return file.convert("L" if channels == 1 else "RGB")
    # Pillow raises these, by the kind of damage.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not a readable image: {reason}") from error


def read_pixels(path: pathlib.Path, channels: int) -> np.ndarray:
    """An image file as it is, uint8 [H, W, channels]; errors as of `read_image`."""
    picture = _opened(path, channels)
    return np.asarray(picture).reshape(picture.height, picture.width, channels)


def read_image(path: pathlib.Path, size: int, channels: int) -> np.ndarray:
    """An image file as uint8 [size, size, channels].

    The largest square in its middle, resized (bilinear, antialiased) where it is not of the size
    already: what resizing the shorter side and cropping the middle gives.

    Args:
        path: of the file.
        size: side of the result.
        channels: 1 (grey) or 3 (red, green, blue).

    Raises:
        UserError: it cannot be read, or has more than 8 bits per channel.
    """
    picture = _opened(path, channels)
    side = min(picture.size)
    if picture.size != (size, size):
        left, top = ((edge - side) / 2 for edge in picture.size)
        box = (left, top, left + side, top + side)
        picture = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(picture).reshape(size, size, channels)


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image, or its mirror image."""
    return image[:, ::-1] if rng.random() < 0.5 else image


class _Unreadable:
    """The files that could not be read; each is named once."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self._lock = threading.Lock()

    def add(self, file: str, error: UserError) -> None:
        with self._lock:
            if file not in self.files:
                self.files.add(file)
                print(f"starflow2: note: left out: {error}", file=sys.stderr, flush=True)


def _permuted(count: int, rng: np.random.Generator) -> Iterator[int]:
    """All indices in random order; draws nothing before the first is asked for."""
    yield from rng.permutation(count).tolist()


class _SomeRows(grain.MapDataset):
    """Of each `rows` elements, those from `start` to `stop`; the first `skipped` batches left out.

    A batch keeps its elements, and their randomness, whatever is left out before it.
    """

    def __init__(
        self, parent: grain.MapDataset, rows: int, start: int, stop: int, skipped: int
    ) -> None:
        super().__init__(parent)
        self._rows, self._start, self._stop, self._skipped = rows, start, stop, skipped

    def __len__(self) -> int:
        # The parent repeats without an end.
        batches = len(self.parents[0]) // self._rows - self._skipped
        return batches * (self._stop - self._start)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._stop - self._start)
        return self.parents[0][(self._skipped + batch) * self._rows + self._start + row]


class _FolderBatches(grain.IterDataset):
    """Some rows of each batch, in an endless stream."""

    def __init__(self, rows: int, stream: Callable[[int], grain.IterDataset]) -> None:
        """Nothing is read yet.

        Args:
            rows: of a whole batch.
            stream: number of the first batch -> the stream from there on.
        """
        super().__init__()
        self._rows = rows
        self._stream = stream

    def __iter__(self) -> "_FolderIterator":
        return _FolderIterator(self._rows, self._stream)


class _FolderIterator(grain.DatasetIterator):
    """Batches in order. The position is a number of whole batches, the same in every process.

    So it holds whatever rows of them a process has, before and after.
    """

    def __init__(self, rows: int, stream: Callable[[int], grain.IterDataset]) -> None:
        super().__init__()
        self._rows = rows
        self._stream = stream
        self._done = 0
        self._source: grain.DatasetIterator | None = None

    def __next__(self) -> Any:
        if self._source is None:
            self._source = iter(self._stream(self._done))
        batch = next(self._source)
        self._done += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"rows": self._rows, "batches": self._done}

    def set_state(self, state: dict[str, Any]) -> None:
        self.set_states([state])

    def set_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Moves to the position that the processes of a job saved; see `checkpoint.Elastic`.

        Raises:
            UserError: it is of batches of other sizes, or of an older version of this package.
        """
        found = {(state.get("rows"), state.get("batches")) for state in states}
        [(rows, done), *others] = sorted(found, key=str)
        if others or done is None:
            raise UserError(
                "the data's position counts no whole batches: it is damaged, or of an older "
                "version of this package; start anew, or continue with that version"
            )
        if rows != self._rows:
            raise UserError(
                f"the data's position is of batches of {rows} rows, but now they have "
                f"{self._rows}; use the config that wrote it"
            )
        self.close()
        self._done = done

    def close(self) -> None:
        """Ends the threads; the next batch starts them again."""
        if self._source is not None:
            self._source.close()
            self._source = None


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, in the order of their names.

    Attributes:
        root: the folder.
        files: paths below it.
        labels: int32 [n], index into `classes`; `NO_CLASS` where there are none.
        classes: names.
        size, channels: what the images are made to be.
    """

    root: pathlib.Path
    files: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    size: int
    channels: int
    unreadable: _Unreadable = dataclasses.field(default_factory=_Unreadable, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> np.ndarray:
        """Image `index`, uint8 [size, size, channels].

        Raises:
            UserError: see `read_image`.
        """
        return read_image(self.root / self.files[index], self.size, self.channels)

    def training_batches(
        self,
        rows: int,
        seed: int,
        augment: Augment | None = None,
        part: slice | None = None,
        place: Callable[[HostBatch], Any] | None = None,
    ) -> grain.IterDataset:
        """An endless stream of shuffled batches; batch i depends on seed, rows and i alone.

        A file that cannot be read is named once on stderr, and counted in `unreadable`; a
        random one that can be stands in for it, so that the other rows keep their places.

        Args:
            rows: B.
            seed: of the order, of what is random in `augment`, and of the images' noise.
            augment: applied to each image, or None.
            part: the rows of each batch that are wanted; default all.
            place: is applied to each batch in the thread that reads ahead.

        Returns:
            Batches of `images` uint8 [B, H, W, channels], `labels` int32 [B], `image_seeds` uint32
            [B].
        """

        def load(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
            index, image = self._readable(index, rng)
            return {
                "images": image if augment is None else augment(image, rng),
                "labels": self.labels[index],
                "image_seeds": rng.integers(0, 2**32, dtype=np.uint32),
            }

        start, stop, _ = (part or slice(None)).indices(rows)
        order = grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat()
        loaded = order.random_map(load)

        def stream(first: int) -> grain.IterDataset:
            wanted = _SomeRows(loaded, rows, start, stop, first)
            reading = grain.ReadOptions(num_threads=4, prefetch_buffer_size=64)
            batches = wanted.to_iter_dataset(reading).batch(stop - start, drop_remainder=True)
            if place is not None:
                batches = batches.map(place)
            return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=4)

        return _FolderBatches(rows, stream)

    def _readable(self, index: int, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """This image, or, where it cannot be read, a random one that can; and its index."""
        for at in itertools.chain([index], _permuted(len(self), rng)):
            try:
                return at, self.read(at)
            except UserError as error:
                self.unreadable.add(self.files[at], error)
        raise UserError(f"none of the images in {self.root} is readable")

    def batch(self, indices: Sequence[int]) -> HostBatch:
        """These images as they are; an image's noise seed is its index.

        Raises:
            UserError: see `read_image`.
        """
        return {
            "images": np.stack([self.read(int(i)) for i in indices]),
            "labels": self.labels[np.asarray(indices)],
            "image_seeds": np.asarray(indices, np.uint32),
        }


def image_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The image files in a folder and its sub-folders, hidden ones left out."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            pathlib.Path(parent, name)
            for name in sorted(files)
            if not name.startswith(".") and name.lower().endswith(SUFFIXES)
        ]
    return found


def open_folder(
    folder: str | os.PathLike[str],
    size: int,
    channels: int,
    classes: Sequence[str] | None = None,
) -> ImageFolder:
    """Finds the images of a folder; reads none.

    Args:
        folder: with a sub-folder for each class, or with images only.
        size, channels: what the images are made to be.
        classes: those that a model knows, in its order; default: the sub-folders, sorted.

    Raises:
        UserError: no such folder, no images, a class without images or that the model does not
            know, or both images and sub-folders at the top.
    """
    root = pathlib.Path(folder).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; expected one with a sub-folder for each class")
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    by_class = {name: image_files(root / name) for name in names}
    loose = [path for path in image_files(root) if path.parent == root]
    if names and loose:
        raise UserError(
            f"{root} has sub-folders and images ({loose[0].name}, ...) beside them; expected every "
            "image in the sub-folder of its class, or no sub-folders"
        )
    empty = [name for name in names if not by_class[name]]
    if empty or not (names or loose):
        where = f"{root / empty[0]}" if empty else f"{root}"
        raise UserError(f"{where} holds no image files ({', '.join(SUFFIXES)})")
    known = tuple(names if classes is None else classes)
    unknown = [name for name in names if name not in known]
    if unknown:
        shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        raise UserError(f"{root / unknown[0]} is of no class of the model; it has {shown}")
    paths, labels = loose, [NO_CLASS] * len(loose)
    for name in names:
        paths = paths + by_class[name]
        labels += [known.index(name)] * len(by_class[name])
    files = tuple(path.relative_to(root).as_posix() for path in paths)
    return ImageFolder(root, files, np.asarray(labels, np.int32), known, size, channels)


def write_folder(
    folder: pathlib.Path, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> None:
    """Writes images as PNG files, a sub-folder for each class; what is there already stays.

    Args:
        folder: to make.
        images: uint8 [n, H, W, channels].
        labels: [n], index into `classes`.
        classes: names of the sub-folders.
    """
    if folder.is_dir():
        return
    fresh = folder.with_name(f".{folder.name}.new")
    for name in classes:
        (fresh / name).mkdir(parents=True, exist_ok=True)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        picture.save(fresh / classes[label] / f"{i:06d}.png")
    fresh.rename(folder)
