"""Array layouts: torch Linear weights and this package's.

Ours: kernels [in, out]; q, k and v in one kernel, grouped by kv head (its G queries, its k, its v);
rotary pairs (k, k + d/2). Torch: weights [out, in]; q, k, v apart, or stacked [q | k | v].
Letters: H heads, K kv heads, G = H / K, d head width, D width.
"""

import numpy as np


def _pairs_to_halves(head_dim: int) -> np.ndarray:
    """Channel order that turns rotary pairs (2k, 2k + 1) into (k, k + d/2)."""
    return np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])


def join_qkv(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, head_dim: int, adjacent_pairs: bool
) -> np.ndarray:
    """q [H d, ...], k, v [K d, ...] (torch rows) -> rows grouped by kv head [K (G + 2) d, ...].

    `adjacent_pairs`: the source rotates channels (2k, 2k + 1); rows of q and k are permuted so that
    (k, k + d/2) rotates them alike. Attention scores do not change.
    """
    kv_heads = k.shape[0] // head_dim
    tail = q.shape[1:]
    q = q.reshape(kv_heads, -1, head_dim, *tail)
    k = k.reshape(kv_heads, 1, head_dim, *tail)
    v = v.reshape(kv_heads, 1, head_dim, *tail)
    if adjacent_pairs:
        order = _pairs_to_halves(head_dim)
        q, k = q[:, :, order], k[:, :, order]
    return np.concatenate([q, k, v], axis=1).reshape(-1, *tail)


def split_qkv(
    joined: np.ndarray, heads: int, kv_heads: int, head_dim: int, adjacent_pairs: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The inverse of `join_qkv`."""
    tail = joined.shape[1:]
    grouped = joined.reshape(kv_heads, heads // kv_heads + 2, head_dim, *tail)
    q, k, v = grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]
    if adjacent_pairs:
        order = np.argsort(_pairs_to_halves(head_dim))
        q, k = q[:, :, order], k[:, :, order]
    return tuple(part.reshape(-1, *tail) for part in (q, k, v))


# Rows and columns of the tiles in which `contiguous` turns a matrix over.
_TILE = 128


def contiguous(a: np.ndarray) -> np.ndarray:
    """`np.ascontiguousarray`, two to three times as fast for transposed matrices [..., R, C].

    Turned over in tiles, both sides of the copy stay in the processor's cache; and 16-bit floats
    that are no type of numpy's own are moved as the integers of their bits.
    """
    if a.ndim < 2 or a.flags.c_contiguous or a.strides[-2] != a.itemsize:
        return np.ascontiguousarray(a)
    bits = np.dtype(f"u{a.itemsize}")
    out = np.empty(a.shape, a.dtype)
    source, target = a.view(bits), out.view(bits)
    rows, columns = a.shape[-2:]
    # Columns outside: they are the rows of the source, read one run after another.
    for column in range(0, columns, _TILE):
        for row in range(0, rows, _TILE):
            part = (..., slice(row, row + _TILE), slice(column, column + _TILE))
            target[part] = source[part]
    return out
