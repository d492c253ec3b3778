"""Pictures as grids of tokens: patches, bicubic resizing, fixed tables of positions.

Letters: B pictures, H, W pixels, N patches (raster), P numbers of a patch, D width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.nn.layers import at_least_float32


def to_patches(images: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, channels] -> [B, N, P], the numbers of a patch by row, column, channel.

    Raises:
        ValueError: the patches do not fill the pictures.
    """
    b, height, width, channels = images.shape
    if height % patch or width % patch:
        raise ValueError(f"{patch}x{patch} patches do not fill {height}x{width} pixels")
    grid = images.reshape(b, height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * channels)


def from_patches(patches: jax.Array, rows: int, columns: int, patch: int) -> jax.Array:
    """The inverse of `to_patches`, of rows x columns patches."""
    grid = patches.reshape(len(patches), rows, columns, patch, patch, -1)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(len(patches), rows * patch, columns * patch, -1)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel."""
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = ((x - 5.0) * x + 8.0) * x * a - 4.0 * a
    return np.where(x <= 1.0, near, np.where(x < 2.0, far, 0.0))


def bicubic_matrix(
    size: int, out: int, antialias: bool = False, scale: float | None = None
) -> np.ndarray:
    """Bicubic resampling of one axis as a matrix, as PyTorch's `interpolate` does it.

    Half-pixel centres. Plain: Keys' kernel with a = -0.75, taps beyond the edge are the edge's.
    With antialias: a = -0.5, widened by the reduction, taps beyond the edge are left out.

    Args:
        size, out: of the axis before and after.
        antialias: see above.
        scale: output places per input place; default: out / size.

    Returns:
        float64 [out, size]; its rows sum to 1.
    """
    step = 1.0 / scale if scale is not None else size / out
    centre = (np.arange(out) + 0.5) * step - 0.5
    if antialias:
        wide = max(step, 1.0)
        weights = _cubic((np.arange(size) - centre[:, None]) / wide, a=-0.5)
        return weights / weights.sum(1, keepdims=True)
    first = np.floor(centre).astype(int)
    matrix = np.zeros((out, size))
    for tap in range(-1, 3):
        place = first + tap
        np.add.at(
            matrix,
            (np.arange(out), np.clip(place, 0, size - 1)),
            _cubic(place - centre, a=-0.75),
        )
    return matrix


def resample(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """[..., H, W, D] by the matrices of its rows and columns; in at least float32, x's dtype."""
    wide = at_least_float32(x.dtype)
    y = jnp.einsum(
        "ph,...hwd,qw->...pqd",
        jnp.asarray(rows, wide),
        x.astype(wide),
        jnp.asarray(columns, wide),
        precision="highest",
    )
    return y.astype(x.dtype)


def resize(images: jax.Array, height: int, width: int) -> jax.Array:
    """[..., H, W, channels] to another size, bicubic with antialias; their own size: unchanged."""
    if images.shape[-3:-1] == (height, width):
        return images
    rows = bicubic_matrix(images.shape[-3], height, antialias=True)
    return resample(images, rows, bicubic_matrix(images.shape[-2], width, antialias=True))


def sincos_table(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed positions of a raster, float64 [rows * columns, D].

    A quarter of the channels each: sine and cosine of the row, sine and cosine of the column, at
    frequencies 10000^(-4k / D).

    Raises:
        ValueError: 4 does not divide the width.
    """
    if width % 4:
        raise ValueError(f"a width of {width}: sines and cosines of two axes need a multiple of 4")
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    parts = [f(axis[:, None] * frequencies) for axis in (row, column) for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1)


def square_side(tokens: int) -> int:
    """The side of a square grid of so many tokens.

    Raises:
        ValueError: there is none.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens are no square grid")
    return side
