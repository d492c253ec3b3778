"""Logical axis names, and the rules in context that map them to mesh axes.

Modules name the axes of their parameters and activations ("batch", "embed", "mlp", ...). Which mesh
axis carries which of them is the caller's choice: `parallel.rules` holds the table, `use_rules`
puts it in context, `constrain` and `spec` read it.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.sharding import PartitionSpec

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
    names = (axes,) if isinstance(axes, str) else (axes or ())
    return math.prod(mesh_shape[name] for name in names)


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
    axes do not divide: replication is always correct.

    Raises:
        KeyError: a name is missing from the rules.
    """
    lead = len(shape) - len(names)
    entries: list[MeshAxes] = [None] * lead
    for name, size in zip(names, shape[lead:], strict=True):
        axes = None if name is None else rules[name]
        entries.append(axes if size % extent(mesh_shape, axes) == 0 else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Constrains an activation's sharding by its logical axis names; no rules, no constraint."""
    rules = _rules.get()
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, rules, mesh.shape))
