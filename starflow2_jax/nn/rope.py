"""Rotary position tables over several coordinate axes, and the rotation.

A head of width d has d/2 angles; each turns one pair of channels. Pairs are (k, k + d/2)
everywhere: attention does not change when q and k share a permutation of their channels, so a
model whose own pairs are (2k, 2k + 1) has the rows of its q and k weights permuted once, when they
are loaded (`convert.layout`). Letters: A coordinate axes, B rows, T positions, d head width.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def ladder(count: int, theta: float, dtype: jnp.dtype) -> jax.Array:
    """One ladder of frequencies: theta^(-k / count) for k < count, [count]."""
    return theta ** (-jnp.arange(count, dtype=dtype) / count)


def angles_ladder_per_axis(
    coordinates: jax.Array, counts: Sequence[int], theta: float, dtype: jnp.dtype
) -> jax.Array:
    """Angles when each axis has a ladder of its own (the flow family).

    Args:
        coordinates: [A, ...], any real type.
        counts: angles of each axis, A of them; their sum is d/2.
        theta: base of the ladders.
        dtype: of the result; at least float32.

    Returns:
        [..., d/2], the axes' angles one after another.
    """
    parts = [
        coordinates[axis].astype(dtype)[..., None] * ladder(count, theta, dtype)
        for axis, count in enumerate(counts)
    ]
    return jnp.concatenate(parts, axis=-1)


def angles_shared_ladder(
    coordinates: jax.Array, counts: Sequence[int], theta: float, dtype: jnp.dtype
) -> jax.Array:
    """Angles when one ladder of sum(counts) frequencies is cut among the axes (M-RoPE).

    Arguments and result as in `angles_ladder_per_axis`.
    """
    frequencies = ladder(sum(counts), theta, dtype)
    axis_of = jnp.repeat(
        jnp.arange(len(counts)), jnp.array(counts), total_repeat_length=sum(counts)
    )
    spread = jnp.moveaxis(coordinates, 0, -1).astype(dtype)[..., axis_of]  # [..., d/2]
    return spread * frequencies


def multimodal_counts(head_dim: int) -> tuple[int, int, int]:
    """Angles for (time, row, column): d/8, 3d/16, 3d/16.

    Raises:
        ValueError: head_dim is not a multiple of 16.
    """
    if head_dim % 16:
        raise ValueError(f"head width {head_dim}: the rotary split needs a multiple of 16")
    return head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16


def raster_coordinates(rows: int, columns: int) -> jax.Array:
    """The (row, column) of each position of a raster: [2, rows * columns]."""
    return jnp.stack([jnp.repeat(jnp.arange(rows), columns), jnp.tile(jnp.arange(columns), rows)])


def area_coordinates(
    rows: int,
    columns: int,
    side: float,
    dtype: jnp.dtype,
    text_length: int = 0,
    frames: int = 1,
) -> jax.Array:
    """(row, column, time) of text and pictures of any shape, as STARFlow places them.

    A grid of any shape and size covers the area of a side x side square; text runs along time from
    0 to `side`, whatever its length; time counts frames.

    Args:
        rows, columns: tokens along the edges of one frame.
        side: of the square, in tokens: that of the training images.
        dtype: of the result.
        text_length: L, positions of text in front.
        frames: pictures one after another; one is an image.

    Returns:
        [3, L + frames * rows * columns].
    """
    grid = raster_coordinates(rows, columns).astype(dtype) / math.sqrt(rows * columns) * side
    time = jnp.repeat(jnp.arange(frames, dtype=dtype), rows * columns)
    pictures = jnp.concatenate([jnp.tile(grid, (1, frames)), time[None]])
    text = jnp.arange(text_length, dtype=dtype) / max(text_length, 1) * side
    return jnp.concatenate([jnp.zeros((3, text_length), dtype).at[2].set(text), pictures], axis=1)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (k, k + d/2) of x [B, T, ..., d] by angles given as cos, sin [B, T, d/2]."""
    shape = (*cos.shape[:2], *(1,) * (x.ndim - 3), cos.shape[-1])
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
