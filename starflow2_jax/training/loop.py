"""A run: the stages one after another, each resumable, then the model's export.

The work directory holds, for each stage, `STAGE/checkpoints/`; `metrics.jsonl`; TensorBoard files;
samples drawn on the way; and at the end `model/`, see `bundle` and `flow_bundle`.
"""

import dataclasses
import functools
import pathlib
import resource
import signal
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from starflow2_jax.data.pipeline import HostBatch
from starflow2_jax.errors import Interrupted, UserError
from starflow2_jax.parallel import mesh as meshes
from starflow2_jax.parallel import rules
from starflow2_jax.parallel.cpu import keep_freed_memory
from starflow2_jax.provenance import git_revision, to_json
from starflow2_jax.training.checkpoint import Checkpoints, checksum
from starflow2_jax.training.metrics import MetricsWriter, Progress
from starflow2_jax.training.step import State, StepConfig, init_state, jitted
from starflow2_jax.training.task import Stage, Task


class ConfigFile(Protocol):
    """What a config file defines besides `get_config`."""

    def make_task(self, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Task:
        """What is trained; files that it makes for itself go into the work directory."""


@dataclasses.dataclass
class _Run:
    """What all stages of a run share."""

    config: ml_collections.ConfigDict
    task: Task
    workdir: pathlib.Path
    mesh: Mesh
    constants: Any
    model: nnx.Module
    metrics: MetricsWriter
    stop: Callable[[], bool]


def run(config: ml_collections.ConfigDict, module: types.ModuleType, workdir: pathlib.Path) -> None:
    """Trains all stages of the config, continuing where the work directory stands.

    Args:
        config: `seed`, `mesh`, `stages` (a group for each stage of the task), `checkpoint`,
            `evaluation`; see `configs/digits.py`.
        module: the config file, see `ConfigFile`.
        workdir: of this run.

    Raises:
        UserError: bad config, damaged checkpoint, changed frozen weights.
        Interrupted: SIGINT or SIGTERM; the state is saved.
    """
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    try:
        mesh = meshes.make_mesh(meshes.MeshConfig(**config.mesh))
        for name in config.stages:
            meshes.check_batch(config.stages[name].batch.rows, mesh)
    except ValueError as error:
        raise UserError(f"config.mesh: {error}") from error
    if (workdir / "model" / "model.json").is_file():
        print(f"{workdir} is finished: all stages are trained")
        return
    task = module.make_task(config, workdir)
    with (
        rules.use(mesh),
        _Interruptible() as stop,
        MetricsWriter(workdir, enabled=jax.process_index() == 0) as metrics,
    ):
        model = rules.born_sharded(lambda: task.make_model(config.seed), mesh)
        constants = jax.device_put(task.constants, NamedSharding(mesh, jax.P()))
        this = _Run(config, task, workdir, mesh, constants, model, metrics, stop)
        ema = None
        frozen_checksum = ""
        for stage in task.stages:
            if stage.name in config.stages:
                ema = _run_stage(this, stage, frozen_checksum)
            if not frozen_checksum:
                frozen_checksum = _frozen_checksum(this)
        metadata = {
            "config": to_json(config),
            "seed": config.seed,
            "git_revision": git_revision(),
        }
        if frozen_checksum:
            metadata |= {
                "frozen_checksum_before": frozen_checksum,
                "frozen_checksum_after": _frozen_checksum(this),
            }
        task.save(workdir / "model", ema, metadata)


def _frozen_checksum(this: _Run) -> str:
    frozen = this.task.frozen(this.model)
    return "" if frozen is None else checksum(frozen)


class _Interruptible:
    """SIGINT and SIGTERM ask the loop to stop after its step; a second one acts at once."""

    def __enter__(self) -> Callable[[], bool]:
        self._asked = False
        self._before = {}

        def ask(number: int, frame: types.FrameType | None) -> None:
            del frame
            self._asked = True
            signal.signal(number, self._before[number])

        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, ask)
        return lambda: self._asked

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def step_config(group: ml_collections.ConfigDict) -> StepConfig:
    """The hyperparameters of a stage's group in the config."""
    return StepConfig(**group.optimizer)


def _run_stage(this: _Run, stage: Stage, frozen_checksum: str) -> nnx.Module:
    """Trains (or finishes, or only loads) one stage; leaves its raw parameters in `this.model`.

    Returns:
        The model with the stage's EMA.
    """
    config = step_config(this.config.stages[stage.name])
    number = list(this.task.stages).index(stage)
    seed = this.config.seed + number
    graphdef, trainable, frozen = nnx.split(this.model, stage.trainable, ...)
    make_state = functools.partial(init_state, config=config, seed=seed)
    abstract = rules.abstract(jax.eval_shape(make_state, trainable), this.mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    batches = iter(this.task.batches(stage.name, False, seed))
    folder = this.workdir / stage.name / "checkpoints"
    with Checkpoints(folder, this.config.checkpoint.keep_last) as checkpoints:
        latest = checkpoints.latest()
        if latest is None:
            state = jax.jit(make_state, out_shardings=shardings)(trainable)
            metadata = {"stage": stage.name, "seconds": 0.0, "frozen_checksum": frozen_checksum}
        else:
            state, metadata = checkpoints.restore(latest, abstract, batches)
            if metadata["frozen_checksum"] != frozen_checksum:
                raise UserError(
                    f"{folder / str(latest)} was trained on other frozen weights (checksum "
                    f"{metadata['frozen_checksum'][:12]}, now {frozen_checksum[:12]}); restore "
                    "them, or use another workdir"
                )
        if latest != config.steps:
            later = [s.name for s in this.task.stages[number + 1 :]]
            this.metrics.truncate_after(stage.name, latest or 0, later=later)
            state = _train(
                this,
                stage,
                config,
                graphdef,
                state,
                frozen,
                batches,
                checkpoints,
                metadata,
                shardings,
            )
    this.model = nnx.merge(graphdef, state["trainable"], frozen)
    return nnx.merge(graphdef, state["ema"], frozen)


def _train(
    this: _Run,
    stage: Stage,
    config: StepConfig,
    graphdef: nnx.GraphDef,
    state: State,
    frozen: nnx.State,
    batches: grain.DatasetIterator,
    checkpoints: Checkpoints,
    metadata: dict[str, Any],
    shardings: State,
) -> State:
    """The loop of one stage, from the state's step to the last."""
    every = this.config.checkpoint.every
    evaluation = this.config.evaluation
    step_fn = jitted(shardings)
    loss = stage.loss(config, training=True)
    held_out = _held_out(this, stage, config, graphdef, frozen)
    first = int(state["step"])
    progress = Progress(
        stage.name,
        config.steps,
        first,
        this.config.log_seconds,
        enabled=jax.process_index() == 0,
    )
    began, before = time.monotonic(), metadata["seconds"]
    counts = {"images": 0, "tokens": 0}
    pending: tuple[int, dict[str, jax.Array]] | None = None
    rates_from = None
    for step in range(first + 1, config.steps + 1):
        batch = next(batches)
        here = this.task.counts(batch)
        batch = jax.device_put(batch, rules.batch_shardings(batch, this.mesh))
        state, metrics = step_fn(graphdef, state, frozen, this.constants, batch, loss, config)
        progress.update(step, {"loss": metrics["loss"]}, **here)
        if pending is not None:  # the previous step's: logging never waits for the running one
            this.metrics.write(stage.name, *pending)
        pending = (step, metrics) if step % this.config.log_every == 0 else None
        if rates_from is None:
            rates_from = time.monotonic()  # the first step compiles and is in no rate
        else:
            counts = {name: counts[name] + here[name] for name in counts}
        last = step == config.steps
        if last or step % evaluation.every == 0:
            held = held_out(state["ema"])
            if pending is not None:
                this.metrics.write(stage.name, *pending)
                pending = None
            this.metrics.write(stage.name, step, held)
        if stage.draws and evaluation.samples and (last or step % evaluation.samples == 0):
            model = nnx.merge(graphdef, state["ema"], frozen)
            this.task.draw(model, this.workdir / "samples", f"{stage.name}_{step:06d}")
        stop = this.stop()
        if last or stop or step % every == 0:
            if pending is not None:  # a run that resumes from here does not write it again
                this.metrics.write(stage.name, *pending)
                pending = None
            metadata = metadata | {"seconds": before + time.monotonic() - began}
            checkpoints.save(step, state, batches, metadata)
        if stop and not last:
            checkpoints.wait()
            raise Interrupted(stage.name, step)
    jax.block_until_ready(state)
    elapsed = max(time.monotonic() - rates_from, 1e-9) if rates_from else 1e-9
    this.metrics.write(
        stage.name,
        config.steps,
        {
            "stage_seconds": before + time.monotonic() - began,
            "images_per_second": counts["images"] / elapsed,
            "tokens_per_second": counts["tokens"] / elapsed,
            "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        },
    )
    return state


def _held_out(
    this: _Run, stage: Stage, config: StepConfig, graphdef: nnx.GraphDef, frozen: nnx.State
) -> Callable[[nnx.State], dict[str, float]]:
    """The stage's losses on a few fixed held-out batches, without training noise."""
    iterator: Iterator[HostBatch] = iter(this.task.batches(stage.name, True, this.config.seed))
    batches: Sequence[HostBatch] = [next(iterator) for _ in range(this.config.evaluation.batches)]
    loss = stage.loss(config, training=False)

    @jax.jit
    def losses(
        trainable: nnx.State, frozen: nnx.State, constants: Any, batch: HostBatch
    ) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, trainable, frozen)
        return loss(model, constants, batch, jnp.uint32(0), jnp.float32(0.0))[1]

    def evaluate(trainable: nnx.State) -> dict[str, float]:
        found = []
        for batch in batches:
            placed = jax.device_put(batch, rules.batch_shardings(batch, this.mesh))
            found.append(losses(trainable, frozen, this.constants, placed))
        return {f"held_out_{k}": sum(float(f[k]) for f in found) / len(found) for k in found[0]}

    return evaluate
