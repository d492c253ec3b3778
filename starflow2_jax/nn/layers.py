"""Linear maps, embeddings, norms and MLPs.

Every parameter may carry leading `stack` axes, so that layers of one kind live in one array that
`jax.lax.scan` walks over. Axis names in `logical` metadata are those of the trailing axes.
Letters: D model width, F MLP width.
"""

import contextlib
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from starflow2_jax.nn import partition

MLP_PRODUCTS = ("up", "gate")
"""Names of the MLPs' first products, for rematerialisation policies."""

BY_ROWS_BYTES = 2**20
"""Of at least so many bytes kernels are stored by rows to sample on CPU.

Of smaller ones the copy that a product of two matrices makes stays in a processor's cache.
"""

FEW_VECTORS = 32
"""Of so many at most `product_by_rows` is faster on CPU as one of batches."""

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def check_compute_dtype(name: str) -> None:
    """Checks the name of a type to compute in.

    Raises:
        ValueError: it is none of floating-point numbers.
    """
    try:
        known = jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"dtype {name!r} is unknown; expected for example bfloat16 or float32")


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for narrower types; float64 stays float64."""
    return jnp.promote_types(dtype, jnp.float32)


def full_precision() -> contextlib.AbstractContextManager[None]:
    """A context in which accelerators multiply float32 as float32, as CPUs always do.

    By default TPUs round the factors to bfloat16, and GPUs to TensorFloat-32.
    """
    if partition.platform() == "cpu":
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


def uniform_fan_in(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the family's default for weights and biases."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Zero initialiser."""
    del key
    return jnp.zeros(shape, dtype)


def parameter(
    rngs: nnx.Rngs,
    init: Initializer,
    shape: tuple[int, ...],
    logical: tuple[str | None, ...],
    stack: tuple[int, ...] = (),
) -> nnx.Param:
    """A float32 parameter of shape `stack + shape` with logical names for the axes of `shape`."""
    return nnx.Param(init(rngs.params(), (*stack, *shape), jnp.float32), logical=logical)


class Linear(nnx.Module):
    """y = x W + b, W stored [in, out], computed in x's dtype."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        logical: tuple[str | None, str | None],
        bias: bool = True,
        stack: tuple[int, ...] = (),
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
    ) -> None:
        default = uniform_fan_in(in_features)
        self.logical = logical
        self.kernel = parameter(
            rngs, kernel_init or default, (in_features, out_features), logical, stack
        )
        self.bias = nnx.data(
            parameter(rngs, bias_init or default, (out_features,), logical[1:], stack)
            if bias
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        kernel = self.kernel[...]
        # The weight gradient of a product over several leading axes is several times slower on CPU
        # than over one; only a sharded length forbids merging them.
        if partition.axis_extent("length") == 1:
            flat = partition.product(x.reshape(-1, x.shape[-1]), kernel, self.logical)
            y = flat.reshape(*x.shape[:-1], -1)
        else:
            y = partition.product(x, kernel, self.logical)
        if self.bias is None:
            return y
        return y + partition.gathered(self.bias[...], self.logical[1:], x.dtype)


def rows_are_faster() -> bool:
    """Whether weights that are only sampled from are best stored and read by rows: on CPU.

    See `product_by_rows`.
    """
    return partition.platform() == "cpu"


def product_by_rows(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """x W^T of a kernel that is stored by rows, fast on CPU where x has few vectors.

    For a few vectors the CPU's product of two matrices first copies all of the kernel; that of two
    batches of matrices reads it once. (`docs/performance.md` has the timings.)

    Args:
        x: [..., D].
        kernel: [F, D], cast to x's dtype.
        dtype: of the result; default x's.

    Returns:
        [..., F].
    """
    features, width = kernel.shape
    flat, kernel = x.reshape(-1, width), kernel.astype(x.dtype)
    if len(flat) > FEW_VECTORS:
        y = jnp.einsum("rd,fd->rf", flat, kernel, preferred_element_type=dtype)
    else:
        parts = 2 if features % 2 == 0 else 1  # for two threads
        # What made x would be computed again for each part.
        flat = jax.lax.optimization_barrier(flat)
        y = jnp.einsum(
            "pfd,prd->pfr",
            kernel.reshape(parts, -1, width),
            jnp.broadcast_to(flat, (parts, *flat.shape)),
            preferred_element_type=dtype,
        )
        y = y.transpose(2, 0, 1)
    return y.reshape(*x.shape[:-1], features)


class LinearByRows(nnx.Module):
    """`Linear` of weights that are only sampled from, W stored [out, in]."""

    def __init__(self, linear: Linear) -> None:
        self.kernel = nnx.Param(linear.kernel[...].T)
        self.bias = nnx.data(linear.bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        y = product_by_rows(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Affine LayerNorm over the last axis, statistics in at least float32."""

    def __init__(
        self, features: int, *, rngs: nnx.Rngs, epsilon: float = 1e-5, stack: tuple[int, ...] = ()
    ) -> None:
        del rngs
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((*stack, features), jnp.float32), logical=(None,))
        self.bias = nnx.Param(jnp.zeros((*stack, features), jnp.float32), logical=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D], in x's dtype."""
        wide = x.astype(at_least_float32(x.dtype))
        centred = wide - wide.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        y = centred * inverse * self.scale[...].astype(wide.dtype)
        return (y + self.bias[...].astype(wide.dtype)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) times a gain: `weight` (Qwen) or 1 + weight (`unit_offset`, the flow family)."""

    def __init__(
        self,
        features: int,
        *,
        rngs: nnx.Rngs,
        epsilon: float = 1e-6,
        unit_offset: bool = False,
        stack: tuple[int, ...] = (),
        logical: tuple[str | None] = (None,),
    ) -> None:
        del rngs
        self.epsilon = epsilon
        self.unit_offset = unit_offset
        start = jnp.zeros if unit_offset else jnp.ones
        self.weight = nnx.Param(start((*stack, features), jnp.float32), logical=logical)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D], in x's dtype."""
        wide = x.astype(at_least_float32(x.dtype))
        inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        gain = self.weight[...].astype(wide.dtype) + float(self.unit_offset)
        return (wide * inverse * gain).astype(x.dtype)


class LayerScale(nnx.Module):
    """A gain for each channel of what a sublayer adds (arXiv 2103.17239)."""

    def __init__(self, features: int, *, start: float, stack: tuple[int, ...] = ()) -> None:
        self.gain = nnx.Param(jnp.full((*stack, features), start, jnp.float32), logical=("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D], in x's dtype."""
        return x * self.gain[...].astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU; of narrow types, with a derivative of its own: see `_narrow_gelu`."""
    if x.dtype == at_least_float32(x.dtype):
        return jax.nn.gelu(x, approximate=False)
    return _narrow_gelu(x)


@jax.custom_jvp
def _narrow_gelu(x: jax.Array) -> jax.Array:
    """GELU whose derivative is worked out in float32, from x alone.

    JAX's own shares the erf with the value: a backward pass that works both out would write it to
    memory between the two, and could not do them in one go.
    """
    return jax.nn.gelu(x, approximate=False)


@_narrow_gelu.defjvp
def _narrow_gelu_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (change,) = primals, tangents
    wide = x.astype(at_least_float32(x.dtype))
    below = 0.5 * jax.lax.erfc(-math.sqrt(0.5) * wide)
    density = jnp.exp(-0.5 * jnp.square(wide)) / math.sqrt(2.0 * math.pi)
    return _narrow_gelu(x), change * (below + wide * density).astype(x.dtype)


class GeluMLP(nnx.Module):
    """Linear D -> F, exact (erf) GELU or with `quick` x sigmoid(1.702 x), Linear F -> D."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        bias: bool,
        stack: tuple[int, ...] = (),
        quick: bool = False,
    ) -> None:
        self.quick = quick
        self.up = Linear(width, hidden, rngs=rngs, logical=("embed", "mlp"), bias=bias, stack=stack)
        self.down = Linear(
            hidden, width, rngs=rngs, logical=("mlp", "embed"), bias=bias, stack=stack
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        hidden = checkpoint_name(self.up(x), "up")
        hidden = partition.constrain(hidden, ("batch_in_mlp", "length", "mlp"))
        if self.quick:
            return self.down(hidden * jax.nn.sigmoid(1.702 * hidden))
        return self.down(gelu(hidden))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self, width: int, hidden: int, *, rngs: nnx.Rngs, bias: bool, stack: tuple[int, ...] = ()
    ) -> None:
        make = functools.partial(Linear, rngs=rngs, bias=bias, stack=stack)
        self.gate = make(width, hidden, logical=("embed", "mlp"))
        self.up = make(width, hidden, logical=("embed", "mlp"))
        self.down = make(hidden, width, logical=("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        gate, up = checkpoint_name(self.gate(x), "gate"), checkpoint_name(self.up(x), "up")
        hidden = jax.nn.silu(gate) * up
        return self.down(partition.constrain(hidden, ("batch_in_mlp", "length", "mlp")))
