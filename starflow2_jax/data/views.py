"""Pictures as the vision tower looks at them: read, resized, cut into patches, packed.

Letters: B rows, K tower rows per row, S places for patches in a tower row, P numbers of a patch,
T positions.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import PIL.ExifTags
import PIL.Image

from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Kind
from starflow2_jax.models.qwen2_5_vision import Views, VisionConfig, grid_layout

# Of the pixels in [0, 1], red, green, blue: CLIP's, as Qwen2.5-VL was trained.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711])
LARGEST_ASPECT = 200
# By the EXIF orientation: what turns a stored picture upright.
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
# Where Pillow finds an orientation.
_ORIENTED = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


@dataclasses.dataclass(frozen=True)
class Limits:
    """How large a picture may be after it is resized, in pixels."""

    min_pixels: int = 56 * 56
    max_pixels: int = 12_845_056


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """One picture for the tower.

    Attributes:
        patches: float32 [rows * columns, P], normalised, token by token: the merge x merge patches
            of one token stand together.
        rows, columns: of patches.
        tokens: rows and columns of tokens.
    """

    patches: np.ndarray
    rows: int
    columns: int
    tokens: tuple[int, int]


def load_limits(folder: pathlib.Path) -> Limits:
    """The limits of a Hugging Face folder; the published ones where it says nothing of them.

    Raises:
        UserError: a file that is not JSON, or limits that are no numbers.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            record = record.get("image_processor", record)
            size = record.get("size") or {}
            smallest = record.get("min_pixels", size.get("shortest_edge"))
            largest = record.get("max_pixels", size.get("longest_edge"))
            if smallest is not None and largest is not None:
                return Limits(int(smallest), int(largest))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} does not describe image processing ({error})") from error
    return Limits()


def smart_resize(height: int, width: int, factor: int, limits: Limits) -> tuple[int, int]:
    """The size to resize to: sides that `factor` divides, area within the limits, like aspect.

    Args:
        height, width: of the picture, pixels.
        factor: edge of a token, pixels.
        limits: of the area.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > LARGEST_ASPECT * min(height, width):
        raise ValueError(
            f"{width} x {height} pixels: one side is more than {LARGEST_ASPECT} times the other"
        )
    sides = [round(side / factor) * factor for side in (height, width)]
    if math.prod(sides) > limits.max_pixels:
        shrink = math.sqrt(height * width / limits.max_pixels)
        sides = [
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        ]
    elif math.prod(sides) < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    """An opened picture turned as its EXIF orientation says; as it is stored where that is damaged.

    A turned picture is not turned once more by what its file said.

    Raises:
        Exception: what Pillow raises on damaged pixels: OSError, ValueError, SyntaxError, others.
    """
    try:
        orientation = picture.getexif().get(PIL.ExifTags.Base.Orientation)
    except Exception:  # Pillow's reader raises anything; the picture does not depend on it
        orientation = None
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return picture
    turned = picture.transpose(turn)
    for key in _ORIENTED:
        turned.info.pop(key, None)
    return turned


def read_picture(path: str | os.PathLike[str]) -> PIL.Image.Image:
    """A picture file, upright.

    Raises:
        UserError: no such file, or one that is no whole picture.
    """
    try:
        with PIL.Image.open(path) as picture:
            return upright(picture).convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"{os.fspath(path)}: no such image") from error
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise UserError(
            f"{os.fspath(path)}: cannot be read as an image ({' '.join(str(error).split())}); "
            "give a whole PNG, JPEG or WebP file"
        ) from error


def view(
    picture: PIL.Image.Image | np.ndarray,
    config: VisionConfig,
    limits: Limits = Limits(),
    where: str = "image",
) -> View:
    """A picture, resized, normalised and cut into patches.

    Args:
        picture: of any mode, or uint8 [H, W, 3].
        config: of the tower.
        limits: of the size.
        where: what to call the picture in an error.

    Raises:
        UserError: an aspect ratio over 200, or an array of another shape or type.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.shape[2:] != (3,) or not picture.size:
            raise UserError(
                f"{where}: array of shape {picture.shape} {picture.dtype}, "
                "expected uint8 [height, width, 3]"
            )
        picture = PIL.Image.fromarray(picture)
    try:
        height, width = smart_resize(
            picture.height, picture.width, config.patch * config.merge, limits
        )
    except ValueError as error:
        raise UserError(f"{where}: {error}; crop it or give another image") from error
    resized = picture.convert("RGB").resize((width, height), PIL.Image.Resampling.BICUBIC)
    # The steps and types of the published processor, so that the numbers are the same to the bit.
    pixels = (np.asarray(resized).astype(np.float64) * (1 / 255)).astype(np.float32)
    pixels = (pixels - MEAN.astype(np.float32)) / DEVIATION.astype(np.float32)
    rows, columns = height // config.patch, width // config.patch
    merge = config.merge
    patches = pixels.reshape(
        rows // merge, merge, config.patch, columns // merge, merge, config.patch, config.channels
    ).transpose(0, 3, 1, 4, 6, 2, 5)
    patches = np.ascontiguousarray(patches).reshape(rows * columns, -1)
    return View(patches, rows, columns, (rows // merge, columns // merge))


def places_of(view: View, config: VisionConfig) -> int:
    """Places that the tower needs for the view: whole windows."""
    window = config.window_tokens
    rows, columns = view.tokens
    return -(-rows // window) * -(-columns // window) * config.window_places


@dataclasses.dataclass(frozen=True)
class ViewShape:
    """K tower rows of S places for each row. S is a multiple of a window's places."""

    tower_rows: int
    places: int


def _assign(views: Sequence[View], config: VisionConfig, places: int) -> list[tuple[int, int]]:
    """The tower row and first place of each view: first fit, the largest first."""
    used: list[int] = []
    assigned = [(0, 0)] * len(views)
    for i in sorted(range(len(views)), key=lambda i: -places_of(views[i], config)):
        size = places_of(views[i], config)
        row = next((r for r, u in enumerate(used) if u + size <= places), len(used))
        if row == len(used):
            used.append(0)
        assigned[i] = (row, used[row])
        used[row] += size
    return assigned


def _rounded(size: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: few shapes are ever compiled."""
    power = 1 << max(0, (size - 1).bit_length() - 1)
    return next(s for s in (power, power * 3 // 2, power * 2) if s >= size)


def view_shape(rows: Iterable[Sequence[View]], config: VisionConfig) -> ViewShape:
    """The bucket of shapes that holds the views of these rows."""
    rows = list(rows)
    largest = max((places_of(v, config) for views in rows for v in views), default=0)
    places = _rounded(max(1, largest // config.window_places)) * config.window_places
    needed = [1 + max((r for r, _ in _assign(v, config, places)), default=0) for v in rows]
    return ViewShape(_rounded(max(needed, default=1)), places)


def laid_out(one: View, config: VisionConfig) -> tuple[np.ndarray, ...]:
    """A view as the tower holds it.

    Returns:
        patches [s, P], coordinates [s, 2], exists bool [s], first: the place of the first patch of
        each token.
    """
    layout = grid_layout(config, one.rows, one.columns)
    exists = layout.patches >= 0
    patches = np.zeros((len(exists), one.patches.shape[1]), np.float32)
    patches[exists] = one.patches[layout.patches[exists]]
    found = np.flatnonzero(layout.tokens >= 0)
    first = np.empty(len(found), np.int32)
    first[layout.tokens[found]] = found * config.merge**2
    return patches, layout.coordinates, exists, first


def pack_views(
    rows: Sequence[Sequence[View]],
    kinds: np.ndarray,
    config: VisionConfig,
    shape: ViewShape | None = None,
) -> Views:
    """The views of B rows as arrays of one shape, which the sizes of the pictures do not change.

    Args:
        rows: the views of each row, in the order in which they stand in it.
        kinds: int32 [B, T], values of `Kind`.
        config: of the tower.
        shape: of the result; default: `view_shape`.

    Raises:
        ValueError: a row's VIT positions are not those of its views, or they exceed the shape.
    """
    shape = view_shape(rows, config) if shape is None else shape
    lead = (len(rows), shape.tower_rows, shape.places)
    patches = np.zeros((*lead, config.patch_numbers), np.float32)
    coordinates = np.zeros((*lead, 2), np.int32)
    segments = np.zeros(lead, np.int32)
    index = np.full(kinds.shape, -1, np.int32)
    for b, views in enumerate(rows):
        tokens = [np.zeros(0, np.int32)]
        assigned = _assign(views, config, shape.places)
        for i, (one, (row, start)) in enumerate(zip(views, assigned, strict=True)):
            values, places, exists, first = laid_out(one, config)
            here = slice(start, start + len(exists))
            if row >= shape.tower_rows or here.stop > shape.places:
                raise ValueError(f"the views of row {b} do not fit {shape}")
            patches[b, row, here], coordinates[b, row, here] = values, places
            segments[b, row, here] = np.where(exists, i + 1, 0)
            tokens.append(row * shape.places + start + first)
        _place(index[b], np.concatenate(tokens), kinds[b], f"row {b}")
    return Views(patches=patches, coordinates=coordinates, segments=segments, index=index)


def _place(index: np.ndarray, tokens: np.ndarray, kinds: np.ndarray, where: str) -> None:
    """Writes the tokens of a row's views at its VIT positions."""
    positions = np.flatnonzero(kinds == Kind.VIT)
    if len(positions) != len(tokens):
        raise ValueError(
            f"{where} has {len(positions)} VIT positions, but its views are {len(tokens)} tokens"
        )
    index[positions] = tokens


def view_features(
    views: Sequence[View], kinds: np.ndarray, config: VisionConfig
) -> dict[str, np.ndarray]:
    """The views of one document as arrays that can be packed with those of other documents.

    Args:
        views: of the document, in order.
        kinds: int32 [T], of the document.
        config: of the tower.

    Returns:
        `view_patches` float32 [s, P], `view_coordinates` int32 [s, 2], `view_pictures` int32 [s]
        (from 1; 0 where there is no patch), `view_index` int32 [T]: 1 + the place among the
        document's own that stands at a position, 0: none.
    """
    out = {
        "view_patches": [np.zeros((0, config.patch_numbers), np.float32)],
        "view_coordinates": [np.zeros((0, 2), np.int32)],
        "view_pictures": [np.zeros(0, np.int32)],
    }
    tokens, start = [np.zeros(0, np.int32)], 0
    for i, one in enumerate(views):
        patches, coordinates, exists, first = laid_out(one, config)
        out["view_patches"].append(patches)
        out["view_coordinates"].append(coordinates)
        out["view_pictures"].append(np.where(exists, i + 1, 0).astype(np.int32))
        tokens.append(start + first)
        start += len(exists)
    index = np.full(len(kinds), -1, np.int32)
    _place(index, np.concatenate(tokens), kinds, "the document")
    return {name: np.concatenate(parts) for name, parts in out.items()} | {"view_index": index + 1}


def packed_views(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of `view_features` packed into rows, what is left to say: whose places are whose.

    Args:
        batch: packed arrays [B, S, ...] and [B, T], with `view_patches_segment_ids` [B, S] and
            `tokens_segment_ids` [B, T], the document of each place and position.

    Returns:
        `view_segments` int32 [B, S], `view_index` int32 [B, T] as `Views` has it.
    """
    owners, documents = batch["view_patches_segment_ids"], batch["tokens_segment_ids"]
    pictures = batch["view_pictures"]
    segments = np.where(pictures > 0, owners * (pictures.max(initial=0) + 1) + pictures, 0)
    index = np.full(documents.shape, -1, np.int32)
    for row, (own, document) in enumerate(zip(owners, documents, strict=True)):
        # The first place of each document; 0 for those without any.
        start = np.array([int(np.argmax(own == d)) for d in range(document.max(initial=0) + 1)])
        relative = batch["view_index"][row] - 1
        index[row] = np.where(relative >= 0, start[document] + relative, -1)
    return {"view_segments": segments.astype(np.int32), "view_index": index}
