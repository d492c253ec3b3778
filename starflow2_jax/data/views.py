"""Pictures as the vision tower looks at them: read, resized, cut into patches, packed.

Letters: B rows, K tower rows per row, S places for patches in a tower row, P numbers of a patch,
T positions.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image
import PIL.ImageOps

from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Kind
from starflow2_jax.models.qwen2_5_vision import Views, VisionConfig, grid_layout

# Of the pixels in [0, 1], red, green, blue: CLIP's, as Qwen2.5-VL was trained.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711])
LARGEST_ASPECT = 200


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


def read_picture(path: str | os.PathLike[str]) -> PIL.Image.Image:
    """A picture file, upright.

    Raises:
        UserError: no such file, or one that is no whole picture.
    """
    try:
        with PIL.Image.open(path) as picture:
            return PIL.ImageOps.exif_transpose(picture).convert("RGB")
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
    per_token = config.merge**2
    patches = np.zeros((*lead, config.patch_numbers), np.float32)
    coordinates = np.zeros((2, *lead), np.int32)
    segments = np.zeros(lead, np.int32)
    index = np.full(kinds.shape, -1, np.int32)
    for b, views in enumerate(rows):
        order = []
        for i, ((row, first), one) in enumerate(
            zip(_assign(views, config, shape.places), views, strict=True)
        ):
            layout = grid_layout(config, one.rows, one.columns)
            here = slice(first, first + len(layout.patches))
            if row >= shape.tower_rows or here.stop > shape.places:
                raise ValueError(f"the views of row {b} do not fit {shape}")
            exists = layout.patches >= 0
            patches[b, row, here][exists] = one.patches[layout.patches[exists]]
            coordinates[:, b, row, here] = layout.coordinates.T
            segments[b, row, here] = np.where(exists, i + 1, 0)
            place = np.empty(layout.tokens.max() + 1, np.int32)
            found = np.flatnonzero(layout.tokens >= 0)
            place[layout.tokens[found]] = found
            order.append((row * shape.places + first) // per_token + place)
        positions = np.flatnonzero(kinds[b] == Kind.VIT)
        tokens = np.concatenate(order) if order else np.zeros(0, np.int32)
        if len(positions) != len(tokens):
            raise ValueError(
                f"row {b} has {len(positions)} VIT positions, but its views are "
                f"{len(tokens)} tokens"
            )
        index[b, positions] = tokens
    return Views(patches=patches, coordinates=coordinates, segments=segments, index=index)
