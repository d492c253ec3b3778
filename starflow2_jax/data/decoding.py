"""Encoded images to pixels of one size: upright, aspect kept, centre cropped."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.data.views import upright

_MODES = {1: "L", 3: "RGB"}


def decode(data: bytes, shape: ImageShape) -> np.ndarray:
    """An encoded image (JPEG, PNG, WebP, ...) as uint8 [H, W, channels].

    Or, where images come as cached latents, their bytes as bfloat16 [N, moments].

    The image is turned as its EXIF orientation says, scaled until it covers the shape, and cropped
    in the middle. Transparency is laid over white.

    Args:
        data: the file's bytes.
        shape: height, width and channels (1 or 3) of the result.

    Raises:
        Exception: what Pillow raises on damaged data: OSError (a truncated file among them),
            ValueError, SyntaxError, DecompressionBombError, and others of its readers' own.
    """
    if shape.moments:
        return np.frombuffer(data, shape.array[1]).reshape(shape.array[0])
    try:
        opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # its message names an object in memory
        raise ValueError(f"{len(data)} bytes that are no image of a known format") from None
    with opened as image:
        target = (shape.width, shape.height)
        # A JPEG can be decoded at a half, a quarter or an eighth of its size: never below twice
        # the target, so that the resize still does the filtering. (Sides may be swapped by EXIF.)
        longest = 2 * max(target)
        image.draft(None, (longest, longest))
        image = upright(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        mode = _MODES[shape.channels]
        image = image if image.mode == mode else image.convert(mode)  # which would copy
        pixels = np.asarray(_cover(image, *target))
    return pixels.reshape(shape.height, shape.width, shape.channels)


def decode_still(data: bytes, shape: ImageShape) -> np.ndarray:
    """`decode`, for images that are there to stay: nothing is guessed, and nothing passed over.

    Raises:
        ValueError: an animation, or more than 8 bits per channel; and what `decode` raises.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            frames, mode = getattr(image, "n_frames", 1), image.mode
            # A JPEG with others of the same scene behind it, as of phones.
            if image.format == "MPO":
                frames = 1
    except UnidentifiedImageError:
        raise ValueError(f"{len(data)} bytes that are no image of a known format") from None
    if frames > 1:
        raise ValueError(f"animated ({frames} frames); expected one picture")
    if mode.startswith(("I", "F")):
        raise ValueError(f"of mode {mode}; expected 8 bits per channel")
    return decode(data, shape)


def _cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scales so that the image covers width x height, and cuts what stands out on two sides."""
    scale = min(image.width / width, image.height / height)
    left = (image.width - width * scale) / 2
    top = (image.height - height * scale) / 2
    # Only what is kept is filtered.
    box = (left, top, left + width * scale, top + height * scale)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=None)
