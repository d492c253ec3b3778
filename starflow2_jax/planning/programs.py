"""The programs that a run compiles, lowered for devices that are not here: shapes, no arrays."""

import dataclasses
import functools
import pathlib
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from starflow2_jax.data.packing import BatchShape
from starflow2_jax.errors import UserError
from starflow2_jax.parallel import mesh as meshes
from starflow2_jax.parallel import rules
from starflow2_jax.planning import topology as topologies
from starflow2_jax.sampling import step as sampling
from starflow2_jax.sampling.state import Prompt, row_settings
from starflow2_jax.training.config_file import step_config
from starflow2_jax.training.step import init_state, jitted

# A chat template with an empty user turn, about.
_UNCONDITIONAL = 16


@dataclasses.dataclass(frozen=True)
class Program:
    """A lowered program.

    Attributes:
        lowered: `jax.stages.Lowered`.
        mesh: that it is for.
        parts: bytes of a device's memory that its arguments take, by what they are.
        model_flops: of all devices; NaN where nothing is to be compared.
        needed: bytes that each device must read at least in one turn of a decode loop; 0 otherwise.
        open_loop: the program's cost is that of one turn of its loop.
    """

    lowered: Any
    mesh: Mesh
    parts: Mapping[str, float]
    model_flops: float = float("nan")
    needed: float = 0.0
    open_loop: bool = False

    def slice_of(self) -> list[int] | None:
        """The slice, or node, of each device in the mesh's order; None: there is one."""
        devices = list(self.mesh.devices.flat)
        found = [
            d.process_index if d.platform == "gpu" else getattr(d, "slice_index", 0) or 0
            for d in devices
        ]
        return found if len(set(found)) > 1 else None


def make_mesh(config: ml_collections.ConfigDict, topology: topologies.Topology) -> Mesh:
    """The config's mesh over a topology.

    Raises:
        UserError: they do not fit.
    """
    devices = topologies.devices(topology)
    try:
        return meshes.make_mesh(meshes.MeshConfig(**config.mesh), devices)
    except ValueError as error:
        raise UserError(f"config.mesh on {topology.name}: {error}") from error


def batch_shapes(shape: BatchShape, image: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Shapes of the arrays of `data.pipeline.packed_batches`.

    Args:
        shape: of the batch, without places for views.
        image: of one image as it is stored.
    """
    b, t, i = shape.rows, shape.length, shape.images
    struct = jax.ShapeDtypeStruct
    found = {name: struct((b, t), jnp.int32) for name in ("tokens", "kinds", "segments")}
    found |= {
        "positions": struct((b, t, 3), jnp.int32),
        "text_loss": struct((b, t), jnp.bool_),
        "images": struct((b, i, *image.shape), image.dtype),
        "image_seeds": struct((b, i), jnp.uint32),
        "image_start": struct((b, i), jnp.int32),
    }
    if shape.targets:
        found["text_targets"] = struct((b, shape.targets), jnp.int32)
    if shape.prefix:
        found["prefix"] = struct((b, shape.prefix), jnp.int32)
    return found


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _bytes(tree: Any) -> float:
    """Of one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shard = leaf.sharding.shard_shape(leaf.shape)
        total += int(jnp.dtype(leaf.dtype).itemsize * jnp.prod(jnp.array(shard, float)))
    return float(total)


def train_program(
    config: ml_collections.ConfigDict,
    module: types.ModuleType,
    topology: topologies.Topology,
    stage_name: str,
) -> Program:
    """The train step of a stage, as `training.loop` runs it.

    Args:
        config: of the run.
        module: the config file.
        topology: to compile for.
        stage_name: of the config.

    Raises:
        UserError: a stage that the config does not have; a mesh that does not fit.
    """
    if stage_name not in config.stages:
        raise UserError(
            f"the config has no stage {stage_name}; its stages are {', '.join(config.stages)}"
        )
    mesh = make_mesh(config, topology)
    task = module.make_task(config, pathlib.Path())
    [stage] = [one for one in task.stages if one.name == stage_name]
    step = step_config(config.stages[stage_name])
    shape = BatchShape(**config.stages[stage_name].batch)
    try:
        meshes.check_batch(shape.rows, mesh, step.accumulate)
    except ValueError as error:
        raise UserError(f"stage {stage_name}: {error}") from error
    with rules.use(mesh):
        model = nnx.eval_shape(lambda: task.make_model(config.seed))
        graphdef, trainable, frozen = nnx.split(model, stage.trainable, ...)
        frozen = _as_stored(frozen, task.model_config.dtype)
        state = jax.eval_shape(functools.partial(init_state, config=step, seed=0), trainable)
        state, frozen = rules.abstract(state, mesh), rules.abstract(frozen, mesh)
        batch = batch_shapes(shape, jax.ShapeDtypeStruct(*task.data.image.array))
        batch = _placed(batch, rules.batch_shardings(batch, mesh))
        everywhere = NamedSharding(mesh, jax.P())
        constants = _placed(task.constants, jax.tree.map(lambda _: everywhere, task.constants))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        loss = stage.loss(step, training=True)
        lowered = _lower(
            jitted(shardings, everywhere),
            topology,
            (graphdef, state, frozen, constants, batch, loss, step),
        )
    parts = {
        "trained parameters": _bytes(state["trainable"]),
        "optimiser": _bytes(state["opt_state"]),
        "EMA": _bytes(state["ema"]),
        "frozen parameters": _bytes(frozen),
        "batch": _bytes(batch),
    }
    return Program(lowered, mesh, parts, task.flops(stage_name))


def _as_stored(frozen: nnx.State, dtype: str) -> nnx.State:
    """The VLM in the compute dtype, as a converted one is stored; the rest as it is."""

    def one(path: tuple, leaf: Any) -> Any:
        if path[0] != "vlm":
            return leaf
        return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)))

    flat = nnx.to_flat_state(frozen)
    return nnx.from_flat_state([(path, one(path, leaf)) for path, leaf in flat])


def _lower(function: Any, topology: topologies.Topology, args: tuple) -> Any:
    if topology.chip.platform == "cuda":
        return function.trace(*args).lower(lowering_platforms=("cuda",))
    return function.lower(*args)


def decode_program(
    config: ml_collections.ConfigDict,
    module: types.ModuleType,
    topology: topologies.Topology,
) -> Program:
    """The decode loop of `sampling.step.advance` with guidance, all weights in the compute dtype.

    Args:
        config: `config.sample` has `rows` and `positions`, prompt included.
        module: the config file.
        topology: to compile for.

    Raises:
        UserError: a config without `sample`.
    """
    if "sample" not in config:
        raise UserError("the config has no group `sample` with rows and positions")
    rows, slots = config.sample.rows, config.sample.positions
    mesh = make_mesh(config, topology)
    task = module.make_task(config, pathlib.Path())
    struct = jax.ShapeDtypeStruct
    with rules.use(mesh, rules.SERVING):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: task.make_model(config.seed)))
        dtype = jnp.dtype(task.model_config.dtype)
        state = jax.tree.map(lambda leaf: struct(leaf.shape, dtype), state)
        state = rules.abstract(state, mesh, rules.SERVING)
        model = nnx.merge(graphdef, state)
        text = struct((rows, slots // 2), jnp.int32)
        prompt = Prompt(
            tokens=text,
            kinds=text,
            positions=struct((3, *text.shape), jnp.int32),
            lengths=struct((rows,), jnp.int32),
            image_start=struct((rows, 0), jnp.int32),
        )
        settings = jax.eval_shape(lambda: row_settings(rows, guidance=2.0))
        sampled = jax.eval_shape(
            functools.partial(sampling.prefill, slots=slots, images=1),
            model,
            prompt,
            settings,
            unconditional=struct((_UNCONDITIONAL,), jnp.int32),
        )
        place = lambda tree: _placed(tree, rules.row_shardings(tree, mesh))
        sampled, settings = place(sampled), place(settings)
        steps = struct((), jnp.int32, sharding=NamedSharding(mesh, jax.P()))
        lowered = _lower(sampling.run_steps, topology, (model, sampled, settings, steps))
    # The shallow flow is for display, and the vision tower has seen what there is to see.
    weights = _without(state, ("shallow",), ("vlm", "tower"))
    parts = {"parameters": _bytes(weights), "caches": _bytes(sampled.caches)}
    # Of the embedding a step reads a few rows, unless it is the head as well.
    read = weights if task.model_config.vlm.tied else _without(weights, ("vlm", "embedding"))
    needed = _bytes(read) + parts["caches"]
    return Program(lowered, mesh, parts, needed=needed, open_loop=True)


def _without(state: nnx.State, *parts: tuple[str, ...]) -> nnx.State:
    kept = lambda path: not any(path[: len(part)] == part for part in parts)
    return nnx.from_flat_state([pair for pair in nnx.to_flat_state(state) if kept(pair[0])])
