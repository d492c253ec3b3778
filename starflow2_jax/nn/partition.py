"""Logical axis names, and the rules in context that map them to mesh axes.

Modules name the axes of their parameters and activations ("batch", "embed", "mlp", ...). Which mesh
axis carries which of them is the caller's choice: `parallel.rules` holds the table, `use_rules`
puts it in context, `constrain` and `spec` read it.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

STATIONARY = "stationary"
"""Key of a table of rules whose weights stay where they are and whose activations travel."""

MeshAxes = str | tuple[str, ...] | None
_rules: contextvars.ContextVar[Mapping[str, MeshAxes] | None] = contextvars.ContextVar(
    "logical_rules", default=None
)


@contextlib.contextmanager
def use_rules(rules: Mapping[str, MeshAxes]) -> Iterator[None]:
    """Puts a table of logical axis -> mesh axis (or axes, or None) in context."""
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def extent(mesh_shape: Mapping[str, int], axes: MeshAxes) -> int:
    """How many shards these mesh axes make of an array's axis."""
    return math.prod(mesh_shape[name] for name in _names(axes))


def axis_extent(name: str) -> int:
    """How many shards the logical axis `name` is cut into under the mesh and rules in context."""
    rules = _rules.get()
    if rules is None:
        return 1
    return extent(jax.sharding.get_abstract_mesh().shape, rules.get(name))


def spec(
    names: Sequence[str | None],
    shape: Sequence[int],
    rules: Mapping[str, MeshAxes],
    mesh_shape: Mapping[str, int],
) -> PartitionSpec:
    """The PartitionSpec of an array of `shape` whose trailing axes have these logical names.

    Leading axes without a name (stacked layers) are replicated, and so is an axis that its mesh
    axes do not divide: replication is always correct. A mesh axis that cuts one axis cuts no later
    one: where the batch lies over `columns`, heads lie over `tensor` alone.

    Raises:
        KeyError: a name is missing from the rules.
    """
    lead = len(shape) - len(names)
    entries: list[MeshAxes] = [None] * lead
    taken: set[str] = set()
    for name, size in zip(names, shape[lead:], strict=True):
        axes = () if name is None else _names(rules[name])
        axes = tuple(axis for axis in axes if axis not in taken)
        if size % extent(mesh_shape, axes):
            axes = ()
        taken.update(axes)
        entries.append(axes if len(axes) > 1 else (axes[0] if axes else None))
    return PartitionSpec(*entries)


def _names(axes: MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else (axes or ())


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Constrains an activation's sharding by its logical axis names; no rules, no constraint."""
    rules = _rules.get()
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, rules, mesh.shape))


def gathered(kernel: jax.Array, names: Sequence[str | None], dtype: jnp.dtype) -> jax.Array:
    """Weights in the compute dtype, whole but for what activations are cut along, too.

    The mesh axes that carry the batch cannot cut a matrix in a product with it: the shards are
    cast, and then gathered.

    Args:
        kernel: a parameter, cut by the rules of `names`.
        names: logical names of its axes.
        dtype: of the product.
    """
    rules, mesh = _rules.get(), jax.sharding.get_abstract_mesh()
    kernel = kernel.astype(dtype)
    if rules is None or mesh.empty:
        return kernel
    stored = spec(names, kernel.shape, rules, mesh.shape)
    batch = _names(rules["batch"])
    kept = [tuple(a for a in _names(axes) if a not in batch) for axes in stored]
    kernel = jax.lax.with_sharding_constraint(kernel, stored)
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(*(k or None for k in kept)))


def platform() -> str:
    """tpu, cuda or cpu: of the mesh in context, of devices that may not be here, or else ours."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "cuda" if name == "gpu" else name


def product(
    x: jax.Array,
    kernel: jax.Array,
    names: tuple[str | None, str | None],
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """x [B, ..., D] @ kernel [D, F], the kernel cast to x's dtype and its shards gathered for it.

    Where the batch lies on the devices that the kernel is cut over, each device gathers the shards,
    cast, and its gradient is summed over the devices and scattered in the compute dtype, axis by
    axis: over two axes at once, TPUs would reduce the whole gradient everywhere, and so would the
    partitioner if the product were left to it.

    Args:
        x: activations, the batch first.
        kernel: a parameter, cut by the rules of `names`.
        names: logical names of its axes.
        dtype: of the result; default x's.
    """
    rules, mesh = _rules.get(), jax.sharding.get_abstract_mesh()
    matmul = functools.partial(jnp.matmul, preferred_element_type=dtype)
    if rules is None or mesh.empty:
        return matmul(x, kernel.astype(x.dtype))
    stored = spec(names, kernel.shape, rules, mesh.shape)
    rows = _names(spec(("batch",), x.shape[:1], rules, mesh.shape)[0])
    if rules.get(STATIONARY):
        return _stationary_product(matmul, x, kernel.astype(x.dtype), stored, rows)
    cut = [tuple(a for a in _names(axes) if a in rows) for axes in stored]
    if not any(extent(mesh.shape, axes) > 1 for axes in cut):
        return matmul(x, gathered(kernel, names, x.dtype))

    def local(x: jax.Array, shard: jax.Array) -> jax.Array:
        # The second axis first: what moves in the larger step lies together.
        whole = shard.astype(x.dtype)
        for axis in (1, 0):
            if extent(mesh.shape, cut[axis]) > 1:
                whole = jax.lax.all_gather(whole, cut[axis], axis=axis, tiled=True)
        return matmul(x, whole)

    by_rows = PartitionSpec(rows)
    return jax.shard_map(
        local,
        in_specs=(by_rows, PartitionSpec(*(axes or None for axes in cut))),
        out_specs=by_rows,
        axis_names=frozenset(rows),
        check_vma=False,
    )(x, kernel)


def _stationary_product(
    matmul: Callable, x: jax.Array, kernel: jax.Array, stored: PartitionSpec, rows: tuple[str, ...]
) -> jax.Array:
    """`product` where the shards of the kernel stay and the few rows of a decode step travel.

    A kernel cut along its second axis gives a result that is cut there; one cut along its first
    takes such an x and gives rows.
    """
    first, second = _names(stored[0]), _names(stored[1])
    lead = (None,) * (x.ndim - 2)
    by_rows = PartitionSpec(rows or None)

    def columns(x: jax.Array, shard: jax.Array) -> jax.Array:
        return matmul(jax.lax.all_gather(x, rows, axis=0, tiled=True) if rows else x, shard)

    def sums(x: jax.Array, shard: jax.Array) -> jax.Array:
        if not rows:
            return jax.lax.psum(matmul(x, shard), first)
        return jax.lax.psum_scatter(matmul(x, shard), rows, scatter_dimension=0, tiled=True)

    if second:
        local, taken, given = columns, by_rows, PartitionSpec(None, *lead, second)
    elif first and (not rows or first == rows):
        local, taken, given = sums, PartitionSpec(None, *lead, first), by_rows
    else:
        return matmul(x, kernel)
    return jax.shard_map(local, in_specs=(taken, stored), out_specs=given, check_vma=False)(
        x, kernel
    )


def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows [B, T, D] of a table [V, D], stored by the rule of "table", for ids [B, T].

    Where the table's columns lie on the devices that share out the batch, each looks up its columns
    for all rows of the batch, and they exchange: the ids and the result travel, not the table.
    """
    rules, mesh = _rules.get(), jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return table[ids]
    stored = spec((None, "table"), table.shape, rules, mesh.shape)
    rows = spec(("batch", "length"), ids.shape, rules, mesh.shape)
    columns = _names(stored[1])
    if extent(mesh.shape, columns) == 1 or not set(columns) <= set(_names(rows[0])):
        whole = jax.lax.with_sharding_constraint(table, PartitionSpec(None, None))
        return constrain(whole[ids], ("batch", "length", None))

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        ids = jax.lax.all_gather(ids, columns, axis=0, tiled=True)
        return jax.lax.all_to_all(table[ids], columns, split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(
        local, in_specs=(stored, rows), out_specs=PartitionSpec(*rows, None), check_vma=False
    )(table, ids)


def on_each_device(
    function: Callable[..., jax.Array],
    arrays: Sequence[jax.Array | None],
    names: Sequence[Sequence[str | None]],
    result: Sequence[str | None],
) -> jax.Array:
    """Runs a function on each device's shards: for kernels, which the partitioner cannot cut.

    Args:
        function: of the arrays; what it gives has the axes of the first.
        arrays: None is handed on as it is.
        names: logical names of each array's axes; each is cut as the rules in context say.
        result: names of the result's axes; it has the first array's shape.
    """
    rules, mesh = _rules.get(), jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty or mesh.size == 1:
        return function(*arrays)
    of = lambda a, n: None if a is None else spec(n, a.shape, rules, mesh.shape)
    return jax.shard_map(
        function,
        in_specs=tuple(of(a, n) for a, n in zip(arrays, names, strict=True)),
        out_specs=of(arrays[0], result),
        check_vma=False,
    )(*arrays)
