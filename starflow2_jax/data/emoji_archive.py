"""The 64x64 Noto emoji of the npm package emoji-datasource-google, as a folder of pictures.

    DIR/emoji.json               licence, checksum of the archive, and what each picture shows
    DIR/train, tune, test/*.png  red, green, blue, on white

The pictures are Google's, under the Apache License 2.0; names and categories are the package's,
under the MIT License.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from starflow2_jax.errors import UserError
from starflow2_jax.provenance import write_json

PACKAGE = "emoji-datasource-google"
MANIFEST = "emoji.json"
FORMAT_VERSION = 1
SIZE = 64
SPLITS = ("train", "tune", "test")
LICENCE = "pictures: Noto Emoji, Apache-2.0; names and categories: emoji-datasource, MIT"
TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}

_PICTURES = "package/img/google/64/"
_NAMES = "package/emoji.json"
_PACKAGE_FILE = "package/package.json"
_MODES = ("RGBA", "LA", "RGB", "L", "P")
# What tells forms of one emoji apart and not emoji: joiner, variation selector, genders, adults,
# and the arrow of a person that faces right.
_FORMS = frozenset(("200D", "FE0F", "2640", "2642", "1F468", "1F469", "1F9D1", "27A1"))
_TUNE, _HELD_OUT = 5, 15  # of a hundred groups: below the first tune, below the second test


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One picture.

    Attributes:
        file: its name, code points joined by dashes.
        split: one of `SPLITS`.
        name: what it shows, in lower case, without skin tones.
        category: of ten.
        base: code points of the emoji without skin tones; variants share it.
        tones: words of the skin tones, one for each person; () where the emoji has none.
    """

    file: str
    split: str
    name: str
    category: str
    base: str
    tones: tuple[str, ...]

    @property
    def caption(self) -> str:
        """Name and skin tones."""
        if not self.tones:
            return self.name
        return f"{self.name}, {' and '.join(dict.fromkeys(self.tones))} skin tone"


def group_of(code: str) -> str:
    """The emoji that are kept in one split: forms of one thing, whoever does it.

    Args:
        code: code points in capital hexadecimal, joined by dashes.

    Returns:
        The code points without skin tones, genders, adults, joiners and selectors, sorted.
    """
    points = [p for p in code.split("-") if p not in _FORMS and p not in TONES]
    # The two letters of a flag stand in order: they are one code, and not two.
    flag = all(0x1F1E6 <= int(p, 16) <= 0x1F1FF for p in points)
    return "-".join(points if flag else sorted(set(points))) or "adult"


def split_of(code: str) -> str:
    """The split of an emoji, a function of its group alone."""
    place = int.from_bytes(hashlib.sha256(group_of(code).encode()).digest()[:4], "big") % 100
    return "tune" if place < _TUNE else "test" if place < _HELD_OUT else "train"


def read_picture(data: bytes, where: str) -> np.ndarray:
    """A PNG file of the package on white, uint8 [64, 64, 3].

    Args:
        data: of the file.
        where: what to call it in an error.

    Raises:
        UserError: broken, animated, of another size, or of a mode without 8-bit colours.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                raise UserError(f"{where} is animated ({picture.n_frames} frames), expected one")
            if picture.mode not in _MODES:
                raise UserError(
                    f"{where} is of mode {picture.mode}, expected one of {', '.join(_MODES)}"
                )
            if picture.size != (SIZE, SIZE):
                width, height = picture.size
                raise UserError(f"{where} is {width}x{height}, expected {SIZE}x{SIZE}")
            rgba = picture.convert("RGBA")
    # Pillow raises these, by the kind of damage.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where} is not a whole PNG file: {reason}") from error
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


def _read_archive(path: pathlib.Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The package's table of emoji, and its 64x64 files by name."""
    wrong = f"{path} is not the archive of {PACKAGE} (`npm pack {PACKAGE}` writes it)"
    if not path.is_file():
        raise UserError(f"{path}: no such file; `npm pack {PACKAGE}` writes one")
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                wanted = member.name in (_NAMES, _PACKAGE_FILE)
                if wanted or (member.isfile() and member.name.startswith(_PICTURES)):
                    files[member.name] = archive.extractfile(member).read()
        package = json.loads(files.get(_PACKAGE_FILE, b"{}"))
        table = json.loads(files.get(_NAMES, b"[]"))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{wrong}, or damaged: {error}") from error
    if not isinstance(package, Mapping) or package.get("name") != PACKAGE or not table:
        raise UserError(wrong)
    pictures = {n.removeprefix(_PICTURES): d for n, d in files.items() if n.startswith(_PICTURES)}
    return table, pictures


def _emoji_of(entry: Mapping[str, Any]) -> list[Emoji]:
    """An entry of the package's table: the emoji and its skin-tone variants."""
    base = entry["unified"]
    name, split = entry["name"].lower(), split_of(base)
    found = [Emoji(entry["image"], split, name, entry["category"], base, ())]
    for tones, variant in entry.get("skin_variations", {}).items():
        words = tuple(TONES[tone] for tone in tones.split("-"))
        found.append(
            dataclasses.replace(found[0], file=variant["image"], tones=words),
        )
    return found


def write_emoji(archive: str | os.PathLike[str], folder: str | os.PathLike[str]) -> dict[str, int]:
    """Unpacks the archive into a folder; `emoji.json` comes last.

    Returns:
        Pictures of each split.

    Raises:
        UserError: it is no such archive, a picture is missing or bad (see `read_picture`), the
            folder cannot be written to.
    """
    archive, folder = pathlib.Path(archive).expanduser(), pathlib.Path(folder).expanduser()
    table, files = _read_archive(archive)
    try:
        emoji = [one for entry in table if entry["has_img_google"] for one in _emoji_of(entry)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{archive}: {_NAMES} has another form ({error!r})") from error
    missing = [one.file for one in emoji if one.file not in files]
    if missing:
        raise UserError(f"{archive}: {len(missing)} pictures are missing ({missing[0]}, ...)")
    pictures = {one.file: read_picture(files[one.file], f"{archive}: {one.file}") for one in emoji}
    with archive.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    about = {"package": PACKAGE, "licence": LICENCE, "archive_sha256": checksum}
    _write(folder, emoji, pictures, about)
    return {split: sum(one.split == split for one in emoji) for split in SPLITS}


def _write(
    folder: pathlib.Path,
    emoji: Sequence[Emoji],
    pictures: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
) -> None:
    try:
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)
        for one in emoji:
            Image.fromarray(pictures[one.file]).save(folder / one.split / one.file)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    listed = [dataclasses.asdict(one) for one in emoji]
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, **about, "emoji": listed})


def write_made(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """A folder as `write_emoji` makes it, of discs and bars; written once.

    For a test of an installation that has no archive.
    """
    if (folder / MANIFEST).is_file():
        return folder
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    emoji, pictures = [], {}
    for split in SPLITS:
        for shape, inside in (("disc", row**2 + column**2 < 600), ("bar", abs(row) < 12)):
            for colour in ("red", "blue"):
                base = f"{split}-{shape}-{colour}"
                for tone in ((), *((tone,) for tone in TONES.values())):
                    name = "-".join([base, *tone]) + ".png"
                    emoji.append(Emoji(name, split, f"{colour} {shape}", "Shapes", base, tone))
                    made = np.full((SIZE, SIZE, 3), 255, np.uint8)
                    made[inside] = rng.integers(0, 200, 3)
                    pictures[name] = made
    _write(folder, emoji, pictures, {"package": "", "licence": "", "archive_sha256": ""})
    return folder


def read_manifest(folder: str | os.PathLike[str]) -> tuple[Emoji, ...]:
    """What the pictures of a folder show, in the order of the package.

    Raises:
        UserError: `write_emoji` did not write the folder.
    """
    path = pathlib.Path(folder).expanduser() / MANIFEST
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {record['format_version']}")
        return tuple(Emoji(**{**one, "tones": tuple(one["tones"])}) for one in record["emoji"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the list that `starflow2 data emoji` writes ({error}); run it first"
        ) from error


def load_pictures(folder: str | os.PathLike[str], emoji: Sequence[Emoji]) -> np.ndarray:
    """The pictures uint8 [n, 64, 64, 3] of these emoji.

    Raises:
        UserError: one is missing or bad.
    """
    root = pathlib.Path(folder).expanduser()
    paths = [root / one.split / one.file for one in emoji]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise UserError(f"{missing}: no such file; run `starflow2 data emoji` again")
    return np.stack([read_picture(path.read_bytes(), str(path)) for path in paths])
