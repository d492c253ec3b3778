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
