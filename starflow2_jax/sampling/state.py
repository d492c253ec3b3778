"""What sampling carries: how rows sample, what they start from, and where they are.

Letters: B rows, P twins, R = B + P cache rows, T prompt positions, M cache slots, I images,
N tokens per image, C latent channels, Dv VLM width, Df flow width.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.errors import UserError
from starflow2_jax.models.qwen2_5_vision import Views
from starflow2_jax.nn.decoder import Cache

# What the numbers of a row's settings may be; all of them are finite.
LIMITS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "temperature": ("at least 0", lambda a: a >= 0),
    "top_p": ("above 0 and at most 1", lambda a: (a > 0) & (a <= 1)),
    "image_temperature": ("at least 0", lambda a: a >= 0),
    "guidance": ("at least 0", lambda a: a >= 0),
    "max_new_tokens": ("at least 0", lambda a: a >= 0),
    "max_images": ("at least 0", lambda a: a >= 0),
}


def check_number(name: str, value: Any) -> None:
    """Raises UserError where numbers of a field of `LIMITS` are out of range or not finite."""
    limit, inside = LIMITS[name]
    values = np.atleast_1d(np.asarray(value))
    bad = ~(inside(values) & (np.abs(values) < np.inf)).astype(bool)
    if bad.any():
        raise UserError(f"{name} is {values[bad][0]}, expected a finite number, {limit}")


def check_seed(seed: Any) -> None:
    """Raises UserError for seeds below 0."""
    values = np.atleast_1d(np.asarray(seed))
    if (values < 0).any():
        raise UserError(f"seed is {values[values < 0][0]}, expected at least 0")


def fitted(name: str, value: Any, dtype: np.dtype) -> np.ndarray:
    """One or several numbers as `dtype`, on the host.

    Raises:
        UserError: a number, of the setting `name`, that the dtype does not hold.
    """
    given, dtype = np.asarray(value), np.dtype(dtype)
    whole = dtype.kind in "iu"
    limits = np.iinfo(dtype) if whole else np.finfo(dtype)
    # As numbers of Python, which may be compared with whole ones of any size.
    least, most = (int(n) if whole else float(n) for n in (limits.min, limits.max))
    beyond = np.atleast_1d((given < least) | (given > most) | (whole & (given != given)))
    beyond = beyond.astype(bool)
    if beyond.any():
        raise UserError(
            f"{name} is {np.atleast_1d(given)[beyond][0]}, expected a number from {least} to {most}"
        )
    return given.astype(dtype)


class Mode(enum.IntEnum):
    """What a row does next."""

    WRITE = 0  # chooses a text token
    DRAW = 1  # draws the next latent of its image
    CLOSE = 2  # its image is complete: `<|vision_end|>` follows
    DONE = 3  # waits; nothing of it changes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSettings:
    """How each row samples; see `row_settings` for a batch of equal rows.

    Attributes:
        seed: uint32 [B]; a row's random stream depends on nothing else.
        temperature: [B], of text; 0 takes the likeliest token.
        top_p: [B], of text: the likeliest tokens that hold this much probability; 1 keeps all.
        image_temperature: [B], scales the noise of the deep block.
        guidance: [B], the weight w; 0 is exactly the conditional row.
        max_new_tokens: int32 [B]; `<|vision_start|>` counts, `<|vision_end|>` and latents do not.
        max_images: int32 [B]; the row ends behind its last image. 0: it only writes.
        noise: [B, I, N, C] standard normal noise to draw with in place of the random stream, or
            None.
    """

    seed: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    image_temperature: jax.Array
    guidance: jax.Array
    max_new_tokens: jax.Array
    max_images: jax.Array
    noise: jax.Array | None = None


def row_settings(
    rows: int,
    *,
    seed: Any = 0,
    temperature: Any = 1.0,
    top_p: Any = 1.0,
    image_temperature: Any = 1.0,
    guidance: Any = 0.0,
    max_new_tokens: Any = 256,
    max_images: Any = 1,
    noise: jax.Array | None = None,
) -> RowSettings:
    """Settings of B rows, on the host; each argument is one value or B of them.

    One `seed` gives row b the seed `seed + b`; B seeds are taken as they are.

    Raises:
        UserError: a number that its type does not hold.
    """
    if np.ndim(seed) == 0:
        seed = fitted("seed", seed, np.uint32) + np.arange(rows, dtype=np.uint32)

    def spread(name: str, value: Any, dtype: np.dtype) -> np.ndarray:
        return np.broadcast_to(fitted(name, value, dtype), (rows,))

    wide = jnp.result_type(float)  # float32 unless float64 is enabled
    return RowSettings(
        seed=spread("seed", seed, np.uint32),
        temperature=spread("temperature", temperature, wide),
        top_p=spread("top_p", top_p, wide),
        image_temperature=spread("image_temperature", image_temperature, wide),
        guidance=spread("guidance", guidance, wide),
        max_new_tokens=spread("max_new_tokens", max_new_tokens, np.int32),
        max_images=spread("max_images", max_images, np.int32),
        noise=noise,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """What rows start from, padded on the right.

    Attributes:
        tokens, kinds: int32 [B, T]; `Kind.PAD` behind a row's length.
        positions: int32 [3, B, T] (time, row, column).
        lengths: int32 [B], at least 1. A row that ends with `<|vision_start|>` starts to draw.
        image_start: int32 [B, I], index of an image's first LATENT; -1 = no such image.
        u: [B, I, N, C], the images as latents of the deep stream; None if there are none.
        views: what stands at VIT positions; None if there is none.
    """

    tokens: jax.Array
    kinds: jax.Array
    positions: jax.Array
    lengths: jax.Array
    image_start: jax.Array
    u: jax.Array | None = None
    views: Views | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """The unconditional prompt's end: y [Dv], g [Df]; its length and next position id, int32 []."""

    y: jax.Array
    g: jax.Array
    length: jax.Array
    position: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """What may be kept of a sampling run beside the rows.

    Attributes:
        mu, sigma: [B, I, N, C], the heads that the latents were drawn with, after guidance.
        text_log_prob: [B], nats: chosen tokens under the model, at temperature 1, none ruled out.
        latent_log_prob: [B, I], nats: each u under the conditional deep block, without the shallow
            blocks' log-determinants.
    """

    mu: jax.Array
    sigma: jax.Array
    text_log_prob: jax.Array
    latent_log_prob: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleState:
    """Everything that a step reads and changes.

    Attributes:
        caches: of both streams, R rows of M slots; see `Pretzel.empty_caches`.
        position: int32 [R], the next text position id; while a row draws, its image's first id.
        y, g: [R, Dv], [R, Df], the streams at each row's last position.
        mode: int32 [B], values of `Mode`.
        drawn: int32 [B], latents of the image being drawn.
        draws: int32 [B], how often the row's random stream was read.
        texts: int32 [B], text tokens chosen, as `RowSettings.max_new_tokens` counts them.
        images: int32 [B], images completed.
        tokens, kinds: int32 [B, M], the row as it stands in the cache, prompt included.
        u: [B, I, N, C], the images drawn, at least float32.
        prefix: the unconditional prompt's end; None without guidance.
        twins: int32 [P], the row that draws with cache row B + p as its unconditional side; -1: the
            twin is free. None without guidance.
        waited: int32 [B], steps that a row has waited for a twin.
        record: see `Record`; None where nothing is recorded.
    """

    caches: dict[str, Cache]
    position: jax.Array
    y: jax.Array
    g: jax.Array
    mode: jax.Array
    drawn: jax.Array
    draws: jax.Array
    texts: jax.Array
    images: jax.Array
    tokens: jax.Array
    kinds: jax.Array
    u: jax.Array
    prefix: Prefix | None = None
    twins: jax.Array | None = None
    waited: jax.Array | None = None
    record: Record | None = None

    @property
    def length(self) -> jax.Array:
        """Positions of each row, prompt included: int32 [B]."""
        return self.caches["vlm"]["length"][: self.mode.shape[0]]

    @property
    def room(self) -> jax.Array:
        """Cache slots that each row has left: int32 [B]."""
        return self.tokens.shape[1] - self.length
