"""What the image models of the family are told beside the caption, and sizes of their images.

STARFlow (arXiv 2506.06276); FLAN-T5 reads the text, padded to the model's text length.
"""

import math

ASPECT_RATIOS = ("21:9", "16:9", "3:2", "5:4", "1:1", "4:5", "2:3", "9:16", "9:21")
"""Width to height of the buckets that the released models were trained in."""


def prompt(
    caption: str,
    frames_per_second: float | None = None,
    noise_std: float | None = None,
    aspect_ratio: str | None = None,
) -> str:
    """The text of a caption; the text-to-image model takes it plain, the video model with all.

    Args:
        caption: may be empty: the unconditional text has the same template.
        frames_per_second: of a video, 0 for an image; None: no such line.
        noise_std: that the model was trained with; None: no such line.
        aspect_ratio: "W:H"; None: no such line.
    """
    text = caption
    if frames_per_second is not None:
        of = f"A video with {frames_per_second} fps" if frames_per_second > 0 else "An image"
        text = f"{of}:\n{text}\n"
    if noise_std is not None:
        text = f"Noise Level {int(1000 * noise_std)}:\n{text}"
    if aspect_ratio is not None:
        text = f"{text}\n in a {aspect_ratio} aspect ratio.\n"
    return text


def gemma_prompt(caption: str) -> str:
    """The chat template of the variant whose deep block is a Gemma."""
    return (
        "<start_of_turn>user\n"
        f"Please generate an image about: {caption}<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


def bucket_size(size: int, multiple: int, aspect_ratio: str) -> tuple[int, int]:
    """Height and width, in pixels, of a bucket: about size^2 of area.

    Args:
        size: side of the square bucket.
        multiple: of height and width: the autoencoder's factor times the patch.
        aspect_ratio: "W:H".

    Raises:
        ValueError: not a ratio.
    """
    width, colon, height = aspect_ratio.partition(":")
    if not colon or not (width.isdigit() and height.isdigit()) or not int(width) * int(height):
        raise ValueError(f"{aspect_ratio!r} is not an aspect ratio W:H")
    ratio, area = int(width) / int(height), size * size
    near = lambda edge: round(edge / multiple) * multiple
    return near(math.sqrt(area / ratio)), near(math.sqrt(area * ratio))
