"""How good drawn pictures are: FID and KID against others, CLIP score against their captions.

The networks' weights are files of the user's; nothing is downloaded.

DIR/examples.jsonl  with captions: one line for each picture, with its CLIP score
DIR/summary.json    what was measured, of what
"""

import collections
import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from starflow2_jax.convert.clip import load_clip
from starflow2_jax.convert.inception import load_inception
from starflow2_jax.data.images import image_files, read_pixels
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.clip_score import clip_scores
from starflow2_jax.evaluation.distances import (
    Statistics,
    frechet_distance,
    inception_features,
    kernel_distance,
    statistics,
)
from starflow2_jax.evaluation.formats import json_lines
from starflow2_jax.evaluation.job import EXAMPLES, SUMMARY, mean, standard_error
from starflow2_jax.models.inception import FEATURES
from starflow2_jax.provenance import write_json, write_text

OnProgress = Callable[[str, int, int], None]
"""Called with what is read, and pictures done and to do."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        images: folder of the pictures, of any sizes, in any sub-folders.
        reference: folder of those to compare with; or an `.npz` of their `mu` and `sigma`, as
            pytorch-fid writes it (then there is no KID).
        inception: file, see `load_inception`; with a reference.
        clip: folder, see `load_clip`.
        captions: JSONL of {"image": FILE, "caption": TEXT}, files relative to `images`; None with
            `clip`: the pictures lie as GenEval has them.
        rows: pictures of a batch.
        seed: of KID's subsets.
    """

    images: str
    reference: str | None = None
    inception: str | None = None
    clip: str | None = None
    captions: str | None = None
    rows: int = 32
    seed: int = 0


def _files(folder: str) -> list[pathlib.Path]:
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    files = image_files(root)
    if not files:
        raise UserError(f"{root} holds no image files")
    return files


def _read(
    files: Sequence[pathlib.Path], what: str, on_progress: OnProgress | None
) -> Iterator[np.ndarray]:
    for done, file in enumerate(files, 1):
        yield read_pixels(file, 3)
        if on_progress:
            on_progress(what, done, len(files))


def read_statistics(path: pathlib.Path, width: int) -> Statistics:
    """`mu` [D] and `sigma` [D, D] of an `.npz`.

    Raises:
        UserError: unreadable, or others than a mean and covariance of this width.
    """
    try:
        with np.load(path) as data:
            found = Statistics(*(np.asarray(data[name], np.float64) for name in ("mu", "sigma")))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no statistics mu and sigma: {error}") from error
    if found.mean.shape != (width,) or found.covariance.shape != (width, width):
        raise UserError(
            f"{path}: mu is {found.mean.shape} and sigma {found.covariance.shape}, expected "
            f"({width},) and ({width}, {width})"
        )
    return found


def captioned(images: pathlib.Path, captions: pathlib.Path | None) -> list[tuple[str, str]]:
    """Pictures, relative to their folder, and their captions.

    Args:
        images: the folder.
        captions: see `Setting`.

    Raises:
        UserError: no captions, an unreadable file, a picture that is not there or is there twice.
    """
    pairs: list[tuple[str, str]] = []
    if captions is not None:
        for where, record in json_lines(captions):
            match record:
                case {"image": str(image), "caption": str(caption)}:
                    pairs.append((image, caption))
                case _:
                    raise UserError(f'{where}: expected {{"image": FILE, "caption": TEXT}}')
            if not (images / pairs[-1][0]).is_file():
                raise UserError(f"{where}: there is no picture {images / pairs[-1][0]}")
    else:
        for path in sorted(images.glob("*/metadata.jsonl")):
            match [record for _, record in json_lines(path)]:
                case [{"prompt": str(prompt)}]:
                    files = image_files(path.parent / "samples")
                    pairs += [(file.relative_to(images).as_posix(), prompt) for file in files]
                case _:
                    raise UserError(f"{path}: expected one object with a prompt")
    if not pairs:
        where = captions or f"{images}/*/metadata.jsonl"
        raise UserError(f"{where}: no captions; give --captions FILE")
    twice = [name for name, n in collections.Counter(image for image, _ in pairs).items() if n > 1]
    if twice:
        raise UserError(f"{captions}: {twice[0]} is there twice")
    return pairs


def _distances(setting: Setting, on_progress: OnProgress | None) -> dict[str, Any]:
    if setting.inception is None:
        raise UserError("FID and KID need --inception FILE, the network's weights")
    files, reference = _files(setting.images), pathlib.Path(setting.reference)
    if len(files) < 2:
        raise UserError(f"{setting.images} holds one picture; a distance needs at least two")
    model = load_inception(pathlib.Path(setting.inception))
    theirs = None
    if reference.suffix == ".npz":
        others = read_statistics(reference, FEATURES)
        summary: dict[str, Any] = {"images": len(files)}
    else:
        their_files = _files(setting.reference)
        if len(their_files) < 2:
            raise UserError(f"{reference} holds one picture; a distance needs at least two")
        pictures = _read(their_files, "reference", on_progress)
        theirs = inception_features(model, pictures, setting.rows)
        others = statistics(theirs)
        summary = {"images": len(files), "reference_images": len(their_files)}
    ours = inception_features(model, _read(files, "images", on_progress), setting.rows)
    summary["fid"] = frechet_distance(statistics(ours), others)
    if theirs is not None:
        kid, deviation = kernel_distance(ours, theirs, seed=setting.seed)
        summary |= {"kid": kid, "kid_standard_deviation": deviation}
    return summary


def _clip(setting: Setting, out: pathlib.Path, on_progress: OnProgress | None) -> dict[str, Any]:
    images = pathlib.Path(setting.images)
    pairs = captioned(images, pathlib.Path(setting.captions) if setting.captions else None)
    clip = load_clip(pathlib.Path(setting.clip))
    files = [images / name for name, _ in pairs]
    pictures = _read(files, "captioned", on_progress)
    scores = clip_scores(clip, pictures, [caption for _, caption in pairs], setting.rows).tolist()
    lines = [
        {"image": name, "caption": caption, "clip_score": score}
        for (name, caption), score in zip(pairs, scores, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(out / EXAMPLES, text)
    return {
        "captioned_images": len(pairs),
        "clip_score": mean(scores),
        "clip_score_standard_error": standard_error(scores),
    }


def measure(
    setting: Setting, out: pathlib.Path, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Measures what the setting has the files for, and writes it.

    Args:
        setting: see `Setting`.
        out: folder of the results.
        on_progress: see `OnProgress`.

    Returns:
        The summary: `fid`, `kid` (mean over subsets) with `kid_standard_deviation` over them,
        `clip_score` (100 max(cos, 0), mean over pictures) with its standard error.

    Raises:
        UserError: missing or damaged files, or nothing to measure.
    """
    for name, needed in (("inception", "reference"), ("captions", "clip")):
        if getattr(setting, name) is not None and getattr(setting, needed) is None:
            raise UserError(f"--{name} is used with --{needed}, which is missing")
    if setting.reference is None and setting.clip is None:
        raise UserError("nothing to measure: give --reference for FID and KID, --clip for captions")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {out} for results: {error}") from error
    summary: dict[str, Any] = dict(dataclasses.asdict(setting))
    summary["folder"] = summary.pop("images")
    if setting.reference is not None:
        summary |= _distances(setting, on_progress)
    if setting.clip is not None:
        summary |= _clip(setting, out, on_progress)
    write_json(out / SUMMARY, summary)
    return summary
