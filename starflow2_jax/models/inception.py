"""Inception-v3 as the Fréchet distance uses it: features of pictures, [2048] each.

Specification: arXiv 1512.00567; the network of 2015-12-05, whose graph differs from others of the
name: average pools leave out the border, and the last block's pool takes the largest. Parts have
the names of its public PyTorch files. Letters: B images, H, W pixels, C channels.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIDE = 299
"""Pixels along the edge of the pictures that the network takes."""
FEATURES = 2048
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
    "": (_STEM,),
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


def _steps(name: str, block: _Block, before: int) -> Iterator[tuple[str, int, _Conv]]:
    """The convolutions of a block: public name, input channels, what it is."""
    prefix = f"{name}." if name else ""
    for branch in block:
        width = before
        for step in branch:
            if not isinstance(step, _Pool):
                for way in _ways(step):
                    yield f"{prefix}{way.name}", width, way
                width = sum(way.width for way in _ways(step))


def _ways(step: _Conv | _Fork) -> tuple[_Conv, ...]:
    return step.ways if isinstance(step, _Fork) else (step,)


def _width(block: _Block, before: int) -> int:
    """Output channels of a block."""
    total = 0
    for branch in block:
        maps = [step for step in branch if not isinstance(step, _Pool)]
        total += sum(way.width for way in _ways(maps[-1])) if maps else before
    return total


def _convolutions() -> Iterator[tuple[str, int, _Conv]]:
    width = 3
    for name, block in _BLOCKS.items():
        yield from _steps(name, block, width)
        width = _width(block, width)


def shapes() -> dict[str, tuple[int, ...]]:
    """Of every tensor that the features need, under the public names and in PyTorch's layout."""
    found: dict[str, tuple[int, ...]] = {}
    for name, before, conv in _convolutions():
        found[f"{name}.conv.weight"] = (conv.width, before, *conv.size)
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.bn.{part}"] = (conv.width,)
    return found


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inception:
    """The network up to its features, frozen.

    Attributes:
        kernels: by name, [h, w, in, out], times the gain of the normalisation behind it.
        shifts: by name, [out], of the same.
    """

    kernels: dict[str, jax.Array]
    shifts: dict[str, jax.Array]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> "Inception":
        """Of tensors that have the names and `shapes`; float32."""
        kernels, shifts = {}, {}
        for name, _, _ in _convolutions():
            wide = lambda part, n=name: np.asarray(tensors[f"{n}.{part}"], np.float64)
            gain = wide("bn.weight") / np.sqrt(wide("bn.running_var") + _EPSILON)
            kernel = wide("conv.weight").transpose(2, 3, 1, 0) * gain
            shift = wide("bn.bias") - wide("bn.running_mean") * gain
            kernels[name], shifts[name] = (jnp.asarray(a, jnp.float32) for a in (kernel, shift))
        return cls(kernels, shifts)

    def _convolved(self, x: jax.Array, name: str, conv: _Conv) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernels[name].astype(x.dtype),
            window_strides=(conv.stride, conv.stride),
            padding="SAME" if conv.same else "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(y + self.shifts[name].astype(x.dtype))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, 299, 299, 3] in [0, 255] -> features [B, 2048], in their dtype."""
        x = (pixels - 128.0) / 128.0
        for block_name, block in _BLOCKS.items():
            prefix = f"{block_name}." if block_name else ""

            def step(y: jax.Array, one: _Conv | _Fork | _Pool, prefix: str = prefix) -> jax.Array:
                if isinstance(one, _Pool):
                    return _pooled(y, one)
                ways = [self._convolved(y, prefix + way.name, way) for way in _ways(one)]
                return jnp.concatenate(ways, -1)

            x = jnp.concatenate([functools.reduce(step, branch, x) for branch in block], -1)
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
