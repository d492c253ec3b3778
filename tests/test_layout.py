"""Copies in another order of memory."""

import ml_dtypes
import numpy as np
import pytest

from starflow2_jax.convert.layout import contiguous


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(300, 200), (2, 129, 257), (0, 4), (7,), ()])
def test_contiguous(shape, dtype):
    a = np.random.default_rng(0).normal(size=shape).astype(dtype)
    views = [a, a.T, np.broadcast_to(a[:1] if a.ndim else a, a.shape)]
    if a.ndim > 1:
        views += [np.swapaxes(a, -1, -2), np.swapaxes(a, -1, -2)[..., 1:, ::2]]
    for view in views:
        copy = contiguous(view)
        assert copy.flags.c_contiguous and copy.dtype == a.dtype
        np.testing.assert_array_equal(copy, view)
