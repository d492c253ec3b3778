"""Inception-v3 as the Fréchet distance uses it: features of pictures, [2048] each.

Specification: arXiv 1512.00567; the network of 2015-12-05, whose graph differs from others of the
name: average pools leave out the border, the last block's pool takes the largest, there are 1008
classes. Parts have the names of its public PyTorch files. Letters: B images, H, W pixels, C
channels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from starflow2_jax.nn import layers

SIDE = 299
"""Pixels along the edge of the pictures that the network takes."""
FEATURES = 2048
CLASSES = 1008
_EPSILON = 1e-3


class _Conv(NamedTuple):
    """A convolution, its batch normalisation at rest, and a ReLU."""

    name: str
    width: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True


class _Fork(NamedTuple):
    """Convolutions of one input, side by side."""

    ways: tuple[_Conv, ...]


class _Pool(NamedTuple):
    """Over 3 x 3."""

    largest: bool
    stride: int = 1


_MEAN, _LARGEST, _HALVED = _Pool(False), _Pool(True), _Pool(True, 2)
_Branch = tuple[_Conv | _Fork | _Pool, ...]
_Block = tuple[_Branch, ...]


def _block_35(pool: int) -> _Block:
    return (
        (_Conv("branch1x1", 64),),
        (_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, (5, 5))),
        (
            _Conv("branch3x3dbl_1", 64),
            _Conv("branch3x3dbl_2", 96, (3, 3)),
            _Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
        (_MEAN, _Conv("branch_pool", pool)),
    )


def _block_17(width: int) -> _Block:
    row, column = (1, 7), (7, 1)
    return (
        (_Conv("branch1x1", 192),),
        (
            _Conv("branch7x7_1", width),
            _Conv("branch7x7_2", width, row),
            _Conv("branch7x7_3", 192, column),
        ),
        (
            _Conv("branch7x7dbl_1", width),
            _Conv("branch7x7dbl_2", width, column),
            _Conv("branch7x7dbl_3", width, row),
            _Conv("branch7x7dbl_4", width, column),
            _Conv("branch7x7dbl_5", 192, row),
        ),
        (_MEAN, _Conv("branch_pool", 192)),
    )


def _block_8(pool: _Pool) -> _Block:
    def fork(name: str) -> _Fork:
        return _Fork((_Conv(f"{name}a", 384, (1, 3)), _Conv(f"{name}b", 384, (3, 1))))

    return (
        (_Conv("branch1x1", 320),),
        (_Conv("branch3x3_1", 384), fork("branch3x3_2")),
        (
            _Conv("branch3x3dbl_1", 448),
            _Conv("branch3x3dbl_2", 384, (3, 3)),
            fork("branch3x3dbl_3"),
        ),
        (pool, _Conv("branch_pool", 192)),
    )


_TO_17: _Block = (
    (_Conv("branch3x3", 384, (3, 3), 2, False),),
    (
        _Conv("branch3x3dbl_1", 64),
        _Conv("branch3x3dbl_2", 96, (3, 3)),
        _Conv("branch3x3dbl_3", 96, (3, 3), 2, False),
    ),
    (_HALVED,),
)
_TO_8: _Block = (
    (_Conv("branch3x3_1", 192), _Conv("branch3x3_2", 320, (3, 3), 2, False)),
    (
        _Conv("branch7x7x3_1", 192),
        _Conv("branch7x7x3_2", 192, (1, 7)),
        _Conv("branch7x7x3_3", 192, (7, 1)),
        _Conv("branch7x7x3_4", 192, (3, 3), 2, False),
    ),
    (_HALVED,),
)
_STEM: _Branch = (
    _Conv("Conv2d_1a_3x3", 32, (3, 3), 2, False),
    _Conv("Conv2d_2a_3x3", 32, (3, 3), 1, False),
    _Conv("Conv2d_2b_3x3", 64, (3, 3)),
    _HALVED,
    _Conv("Conv2d_3b_1x1", 80),
    _Conv("Conv2d_4a_3x3", 192, (3, 3), 1, False),
    _HALVED,
)
_BLOCKS: dict[str, _Block] = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": _TO_17,
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": _TO_8,
    "Mixed_7b": _block_8(_MEAN),
    "Mixed_7c": _block_8(_LARGEST),
}


class Unit(nnx.Module):
    """Convolution without a bias, batch normalisation with fixed statistics, ReLU."""

    def __init__(self, before: int, spec: _Conv, *, rngs: nnx.Rngs) -> None:
        self.spec = spec
        init = layers.uniform_fan_in(before * spec.size[0] * spec.size[1])
        shape = (*spec.size, before, spec.width)
        self.kernel = layers.parameter(rngs, init, shape, (None,) * 4)
        ones = lambda key, shape, dtype: jnp.ones(shape, dtype)
        vector = lambda init: layers.parameter(rngs, init, (spec.width,), (None,))
        self.scale, self.variance = vector(ones), vector(ones)
        self.bias, self.mean = vector(layers.zeros), vector(layers.zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', width], in x's dtype."""
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(self.spec.stride, self.spec.stride),
            padding="SAME" if self.spec.same else "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        gain = self.scale[...] * jax.lax.rsqrt(self.variance[...] + _EPSILON)
        shift = self.bias[...] - self.mean[...] * gain
        return jax.nn.relu(y * gain.astype(x.dtype) + shift.astype(x.dtype))


def _pooled(x: jax.Array, pool: _Pool) -> jax.Array:
    window, strides = (1, 3, 3, 1), (1, pool.stride, pool.stride, 1)
    padding = "SAME" if pool.stride == 1 else "VALID"
    if pool.largest:
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)
    total = functools.partial(
        jax.lax.reduce_window,
        init_value=0.0,
        computation=jax.lax.add,
        window_dimensions=window,
        window_strides=strides,
        padding=padding,
    )
    # The mean is over the places inside the picture.
    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


class _Parts(nnx.Module):
    """The convolutions of some branches, as attributes of their own names."""

    def __init__(self, before: int, branches: _Block, *, rngs: nnx.Rngs) -> None:
        self.branches = branches
        self.width = 0
        for branch in branches:
            width = before
            for step in branch:
                ways = step.ways if isinstance(step, _Fork) else (step,)
                if not isinstance(step, _Pool):
                    for way in ways:
                        setattr(self, way.name, Unit(width, way, rngs=rngs))
                    width = sum(way.width for way in ways)
            self.width += width

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> the branches side by side [B, H', W', width]."""

        def step(y: jax.Array, one: _Conv | _Fork | _Pool) -> jax.Array:
            if isinstance(one, _Pool):
                return _pooled(y, one)
            ways = one.ways if isinstance(one, _Fork) else (one,)
            return jnp.concatenate([getattr(self, way.name)(y) for way in ways], -1)

        return jnp.concatenate([functools.reduce(step, b, x) for b in self.branches], -1)


class Inception(nnx.Module):
    """The network up to its classes."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.stem = _Parts(3, (_STEM,), rngs=rngs)
        width = self.stem.width
        for name, block in _BLOCKS.items():
            setattr(self, name, _Parts(width, block, rngs=rngs))
            width = getattr(self, name).width
        self.fc = layers.Linear(width, CLASSES, rngs=rngs, logical=(None, None))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, 299, 299, 3] in [0, 255] -> features [B, 2048], in their dtype."""
        x = self.stem((pixels - 128.0) / 128.0)
        for name in _BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((1, 2))


def resized(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [299, 299, 3] in [0, 255], as the network's first graph does it.

    Bilinear without antialias, and the corners of the grids of pixels together, not their centres.
    """

    def matrix(size: int) -> np.ndarray:
        place = np.arange(SIDE) * (size / SIDE)
        low = place.astype(int)
        high = np.minimum(low + 1, size - 1)
        weights = np.zeros((SIDE, size))
        np.add.at(weights, (np.arange(SIDE), low), 1.0 - (place - low))
        np.add.at(weights, (np.arange(SIDE), high), place - low)
        return weights

    if image.shape[:2] == (SIDE, SIDE):
        return image.astype(np.float32)
    rows, columns = (matrix(size) for size in image.shape[:2])
    wide = np.einsum("ph,hwc->pwc", rows, image.astype(np.float64), optimize=True)
    return np.einsum("qw,pwc->pqc", columns, wide, optimize=True).astype(np.float32)
