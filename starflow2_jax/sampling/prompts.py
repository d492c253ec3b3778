"""Rows on the host: from pieces of text and images, padded into a batch, and as rows to score.

Letters: B rows, T positions, I images, N tokens per image (side^2), C latent channels.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.views import View, pack_views
from starflow2_jax.models.pretzel import Kind, PretzelConfig, Rows
from starflow2_jax.models.qwen2_5_vision import VisionConfig
from starflow2_jax.sampling.state import Prompt


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids."""

    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """One image as latents of the deep stream: u [N, C].

    It stands for its frame too: `<|vision_start|>`, N x `<|image_pad|>`, `<|vision_end|>`.
    """

    u: np.ndarray


Piece = Text | Image


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One row without padding: tokens, kinds int32 [T], positions int32 [T, 3], u [I, N, C].

    `views` are what stands at its VIT positions, in order.
    """

    tokens: np.ndarray
    kinds: np.ndarray
    positions: np.ndarray
    u: np.ndarray
    views: tuple[View, ...] = ()

    def __len__(self) -> int:
        """T."""
        return len(self.tokens)


def extended(row: Row | None, pieces: Sequence[Piece], config: PretzelConfig) -> Row:
    """The row, or an empty one for None, followed by the pieces.

    A row that already ends with `<|vision_start|>` is not given a second one by an image.
    """
    special, side, channels = config.special, config.flow.side, config.flow.channels
    raster, columns = np.divmod(np.arange(side * side), side)
    grid = np.stack([np.zeros_like(raster), raster, columns], axis=1)  # [N, 3]
    one = np.ones((1, 3), int)
    if row is None:
        nothing = np.zeros((0,), np.int32)
        row = Row(nothing, nothing, np.zeros((0, 3), np.int32), np.zeros((0, len(grid), channels)))
    tokens, kinds = [row.tokens], [row.kinds]
    positions, images = [row.positions], [row.u]
    end = int(row.positions[-1].max()) + 1 if len(row) else 0
    last = int(row.tokens[-1]) if len(row) else None

    def write(ids: Sequence[int]) -> None:
        nonlocal end, last
        tokens.append(np.asarray(ids))
        kinds.append(np.full(len(ids), Kind.TEXT))
        positions.append((end + np.arange(len(ids)))[:, None] * one)
        end += len(ids)
        last = ids[-1] if len(ids) else last

    for piece in pieces:
        if isinstance(piece, Text):
            write(piece.tokens)
            continue
        if last != special.vision_start:
            write([special.vision_start])
        tokens.append(np.full(len(grid), special.image_pad))
        kinds.append(np.full(len(grid), Kind.LATENT))
        positions.append(end + grid)
        images.append(np.asarray(piece.u)[None])
        end += side
        write([special.vision_end])
    return Row(
        np.concatenate(tokens).astype(np.int32),
        np.concatenate(kinds).astype(np.int32),
        np.concatenate(positions).astype(np.int32),
        np.concatenate(images),
        row.views,
    )


def shared(old: Row, new: Row) -> int:
    """How many positions at the start of the two rows are the same, images and views too."""
    same = 0
    views, images = iter(range(len(new.views))), iter(range(len(new.u)))
    size = new.u.shape[1] if new.u.ndim > 1 else 0
    inside, latents = False, 0
    for a, b, kind, old_kind in zip(old.tokens, new.tokens, new.kinds, old.kinds, strict=False):
        if kind == Kind.VIT and not inside:
            view = next(views)
            if view >= len(old.views) or old.views[view] is not new.views[view]:
                break
        inside = kind == Kind.VIT
        if a != b or kind != old_kind:
            break
        if kind == Kind.LATENT:
            if not latents:
                image = next(images)
                if not np.array_equal(old.u[image], new.u[image]):
                    break
            latents = (latents + 1) % size
        same += 1
    return same


def rest(row: Row, start: int) -> Row:
    """What comes at `start` and later; no view is cut, and an image that is cut stays whole."""
    starts = np.diff((row.kinds[:start] == Kind.VIT).astype(int), prepend=0) == 1
    tail = slice(start, None)
    latents = int((row.kinds[:start] == Kind.LATENT).sum())
    whole = latents // row.u.shape[1] if latents else 0
    return Row(
        row.tokens[tail],
        row.kinds[tail],
        row.positions[tail],
        row.u[whole:],
        row.views[starts.sum() :],
    )


def padded(
    rows: Sequence[Row], length: int | None = None, tower: VisionConfig | None = None
) -> Prompt:
    """A batch of rows, padded on the right to `length` (default: the longest).

    Args:
        rows: not empty ones.
        length: of the result.
        tower: the vision tower that rows with views need.

    Raises:
        ValueError: an empty row, a row longer than `length`, one whose LATENT or VIT positions are
            not those of its images and views, or views without a tower.
    """
    lengths = [len(row) for row in rows]
    length = length or max(lengths)
    images = max(len(row.u) for row in rows)
    _, size, channels = rows[0].u.shape
    shape = (len(rows), length)
    tokens, kinds = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions = np.zeros((3, *shape), np.int32)
    image_start = np.full((len(rows), images), -1, np.int32)
    u = np.zeros((len(rows), images, size, channels))
    for b, row in enumerate(rows):
        if not 0 < len(row) <= length:
            raise ValueError(f"row {b} has {len(row)} positions, expected 1 to {length}")
        latent = np.flatnonzero(row.kinds == Kind.LATENT)
        if len(latent) != len(row.u) * size:
            raise ValueError(
                f"row {b} has {len(latent)} LATENT positions, but {len(row.u)} images of {size}"
            )
        tokens[b, : len(row)], kinds[b, : len(row)] = row.tokens, row.kinds
        positions[:, b, : len(row)] = row.positions.T
        image_start[b, : len(row.u)] = latent[::size]
        u[b, : len(row.u)] = row.u
    views = None
    if any(row.views for row in rows):
        if tower is None:
            raise ValueError("the rows have views, but the model has no vision tower")
        packed = pack_views([row.views for row in rows], kinds, tower)
        views = jax.tree.map(jnp.asarray, packed)
    return Prompt(
        tokens=jnp.asarray(tokens),
        kinds=jnp.asarray(kinds),
        positions=jnp.asarray(positions),
        lengths=jnp.asarray(lengths, jnp.int32),
        image_start=jnp.asarray(image_start),
        u=jnp.asarray(u) if images else None,
        views=views,
    )


def scored(prompt: Prompt) -> Rows:
    """The rows as `Pretzel.log_prob` takes them, one segment each, nothing in a loss mask."""
    exists = prompt.kinds != Kind.PAD
    return Rows(
        tokens=prompt.tokens,
        kinds=prompt.kinds,
        positions=prompt.positions,
        segments=exists.astype(jnp.int32),
        text_loss_mask=jnp.zeros_like(exists),
        image_start=prompt.image_start,
        image_loss_mask=jnp.zeros(prompt.image_start.shape, bool),
        views=prompt.views,
    )
