"""The one table of logical axis -> mesh axes, and the shardings that follow from it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from starflow2_jax.nn import partition
from starflow2_jax.parallel.mesh import BATCH_AXES, check_batch

Model = TypeVar("Model", bound=nnx.Module)

RULES: dict[str, partition.MeshAxes] = {
    "batch": BATCH_AXES,
    "length": "sequence",
    # Of parameters: each layer's weights are gathered over fsdp and columns when the layer runs.
    "embed": "fsdp",
    "heads": ("columns", "tensor"),
    "mlp": ("columns", "tensor"),
    "vocab": ("columns", "tensor"),
    # The embedding's width: a row is looked up where its columns are.
    "table": ("fsdp", "columns"),
    # The other width of a square matrix.
    "embed_out": "columns",
    # Of activations: fsdp already carries their batch.
    "embed_activation": None,
}

# Of the hidden state of an MLP, whose second axis may be the one that is cut.
RULES["batch_in_mlp"] = RULES["batch"]

# To sample: a step has a few rows, and would gather all weights for each. Weights stay, cut over
# all devices, rows travel; each device keeps the caches of its rows.
SERVING: dict[str, partition.MeshAxes] = {
    "batch": BATCH_AXES,
    "batch_in_mlp": None,
    "length": None,
    "embed": None,
    "heads": BATCH_AXES,
    "mlp": BATCH_AXES,
    "vocab": BATCH_AXES,
    "table": BATCH_AXES,
    "embed_out": BATCH_AXES,
    "embed_activation": None,
    partition.STATIONARY: BATCH_AXES,
}


@contextlib.contextmanager
def use(mesh: Mesh, table: Mapping[str, partition.MeshAxes] = RULES) -> Iterator[Mesh]:
    """Puts the mesh and a table in context: sharding constraints inside the models take effect.

    Call it around, not inside, jitted functions.

    Args:
        mesh: see `mesh.make_mesh`.
        table: `RULES`, or `SERVING` to sample.
    """
    with jax.set_mesh(mesh), partition.use_rules(table):
        yield mesh


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _sharding(leaf: Any, mesh: Mesh, table: Mapping[str, partition.MeshAxes]) -> Any:
    if not _is_variable(leaf):
        return NamedSharding(mesh, PartitionSpec())
    names = leaf.get_metadata().get("logical", ())
    return leaf.replace(NamedSharding(mesh, partition.spec(names, leaf.shape, table, mesh.shape)))


def shardings(tree: Any, mesh: Mesh, table: Mapping[str, partition.MeshAxes] = RULES) -> Any:
    """The sharding of every array of a state of parameters, gradients or an optimiser.

    Args:
        tree: an nnx.State, or any pytree with nnx variables in it (an optax state made from an
            nnx.State keeps them); arrays or shapes. A variable is cut by its `logical` names,
            anything else (step, seed, counters) is on every device.
        mesh: see `mesh.make_mesh`.
        table: see `use`.

    Returns:
        The same structure with a NamedSharding for each array.

    Raises:
        KeyError: a logical name that the table does not have.
    """
    return jax.tree.map(lambda leaf: _sharding(leaf, mesh, table), tree, is_leaf=_is_variable)


def shards(state: nnx.State, mesh_shape: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Into how many parts each axis of each parameter is cut on a mesh of these sizes.

    Args:
        state: of parameters or their shapes.
        mesh_shape: mesh axis -> size; no devices are needed.

    Returns:
        By dotted path, a number for each axis.
    """
    cut = {}
    for path, leaf in nnx.to_flat_state(state):
        names = leaf.get_metadata().get("logical", ())
        spec = partition.spec(names, leaf.shape, RULES, mesh_shape)
        cut[".".join(map(str, path))] = tuple(partition.extent(mesh_shape, a) for a in spec)
    return cut


def abstract(tree: Any, mesh: Mesh, table: Mapping[str, partition.MeshAxes] = RULES) -> Any:
    """ShapeDtypeStructs with the shardings of `shardings`: what a restore needs."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh, table),
    )


def born_sharded(
    make_model: Callable[[], Model], mesh: Mesh, given: Mapping[str, nnx.State] | None = None
) -> Model:
    """Makes a model whose parameters never exist unsharded on any one device.

    Args:
        make_model: builds the model, without arguments: `lambda: Pretzel(config, rngs=...)`.
        mesh: see `mesh.make_mesh`.
        given: parameters that there are already, by the model's part; they are not made.

    Returns:
        The model; its values are those of `make_model()` but for the given ones.
    """
    given = given or {}
    is_given = lambda path, _: path[0] in given
    graphdef, _, shapes = nnx.split(nnx.eval_shape(make_model), is_given, ...)
    make_state = jax.jit(
        lambda: nnx.split(make_model(), is_given, ...)[2], out_shardings=shardings(shapes, mesh)
    )
    return nnx.merge(graphdef, nnx.State(dict(given)), make_state())


def _batch_axis(path: tuple) -> int:
    # Only `Rows` has positions axis-first; a host's dictionary of arrays has all rows first.
    field = path[-1] if path else None
    is_positions = isinstance(field, jax.tree_util.GetAttrKey) and field.name == "positions"
    return 1 if is_positions else 0


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """The sharding of a batch: rows over data, fsdp and columns, the rest everywhere.

    Positions inside a row are cut by the models' own constraints, not here: so each process reads
    whole rows.

    Args:
        batch: pytree of arrays or shapes (`Rows`, images, ...), the batch axis first; only a
            dataclass' field `positions` (of `Rows`) is [3, B, T].
        mesh: see `mesh.make_mesh`.

    Returns:
        The same structure with a NamedSharding for each array.

    Raises:
        ValueError: the mesh does not divide the number of rows.
    """

    def one(path: tuple, leaf: Any) -> NamedSharding:
        if not leaf.shape:
            return NamedSharding(mesh, PartitionSpec())
        axis = _batch_axis(path)
        check_batch(leaf.shape[axis], mesh)
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, RULES["batch"]))

    return jax.tree_util.tree_map_with_path(one, batch)


def row_shardings(tree: Any, mesh: Mesh) -> Any:
    """Of a sampler's state: rows over the devices, what they do not divide on every device.

    Args:
        tree: pytree of arrays or shapes; caches [L, B, K, M, d], anything else the rows first.
        mesh: see `mesh.make_mesh`.

    Returns:
        The same structure with a NamedSharding for each array.
    """

    def one(leaf: Any) -> NamedSharding:
        names = [None, "batch"] if leaf.ndim == 5 else ["batch"][: leaf.ndim]
        names += [None] * (leaf.ndim - len(names))
        return NamedSharding(mesh, partition.spec(names, leaf.shape, SERVING, mesh.shape))

    return jax.tree.map(one, tree)


def local_rows(rows: int, mesh: Mesh) -> slice:
    """The rows of a batch that this process's devices need, from the first to the last.

    Args:
        rows: of the whole batch, B.
        mesh: see `mesh.make_mesh`.

    Raises:
        ValueError: the mesh does not divide the number of rows.
    """
    check_batch(rows, mesh)
    sharding = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    runs = [i[0].indices(rows) for i in sharding.addressable_devices_indices_map((rows,)).values()]
    return slice(min(run[0] for run in runs), max(run[1] for run in runs))


def place_batch(batch: Any, rows: int, mesh: Mesh) -> Any:
    """Puts a batch on the devices, of which each process has only its `local_rows`.

    Args:
        batch: pytree of numpy arrays with the rows first, those of `local_rows`.
        rows: of the whole batch, B.
        mesh: see `mesh.make_mesh`.

    Returns:
        The same structure with arrays of B rows, sharded as `batch_shardings` says.
    """
    here = local_rows(rows, mesh)
    sharding = NamedSharding(mesh, PartitionSpec(RULES["batch"]))

    def place(leaf: Any) -> jax.Array:
        def piece(index: tuple[slice, ...]) -> Any:
            start, stop, _ = index[0].indices(rows)
            return leaf[start - here.start : stop - here.start]

        return jax.make_array_from_callback((rows, *leaf.shape[1:]), sharding, piece)

    return jax.tree.map(place, batch)
