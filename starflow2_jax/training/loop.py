"""A run: the stages one after another, each resumable, then the model's export.

The work directory holds, for each stage, `STAGE/checkpoints/`; `metrics.jsonl`; TensorBoard files;
samples drawn on the way; and at the end `model/`, see `bundle` and `flow_bundle`.
"""

import dataclasses
import functools
import itertools
import pathlib
import resource
import time
import types
from collections.abc import Callable
from typing import Any

import grain
import jax
import ml_collections
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from starflow2_jax.data.pipeline import HostBatch
from starflow2_jax.errors import Interrupted, UserError
from starflow2_jax.metrics import MetricsWriter, Progress
from starflow2_jax.nn import attention
from starflow2_jax.parallel import mesh as meshes
from starflow2_jax.parallel import rules
from starflow2_jax.parallel.cpu import keep_freed_memory
from starflow2_jax.provenance import git_revision, to_json
from starflow2_jax.training.checkpoint import Checkpoints
from starflow2_jax.training.config_file import make_task, step_config
from starflow2_jax.training.held_out import BEST_BY, held_out_losses
from starflow2_jax.training.interrupt import Interruptible
from starflow2_jax.training.meter import Meter, Profiler
from starflow2_jax.training.step import State, StepConfig, init_state, jitted
from starflow2_jax.training.succession import Succession, handed_on
from starflow2_jax.training.task import Stage, Task


@dataclasses.dataclass
class _Run:
    """What all stages of a run share."""

    config: ml_collections.ConfigDict
    task: Task
    workdir: pathlib.Path
    mesh: Mesh
    constants: Any
    succession: Succession
    metrics: MetricsWriter
    stop: Interruptible
    peak_flops: float | None

    def rows(self, stage: str) -> int:
        """Of a stage's batch, in the whole job."""
        return self.config.stages[stage].batch.rows

    def place(self, stage: str, batch: HostBatch) -> HostBatch:
        """Puts this process's rows of a batch on its devices."""
        return rules.place_batch(batch, self.rows(stage), self.mesh)

    def batches(self, stage: str, held_out: bool, seed: int, placed: bool) -> grain.DatasetIterator:
        """This process's rows of a stage's batches."""
        rows = rules.local_rows(self.rows(stage), self.mesh)
        place = functools.partial(self.place, stage) if placed else None
        return iter(self.task.batches(stage, held_out, seed, rows, place))


def run(
    config: ml_collections.ConfigDict,
    module: types.ModuleType,
    workdir: pathlib.Path,
    peak_flops: float | None = None,
) -> None:
    """Trains all stages of the config, continuing where the work directory stands.

    Args:
        config: `seed`, `mesh`, `stages` (a group for each stage of the task), `checkpoint`,
            `evaluation`; see `configs/digits.py`.
        module: the config file, see `config_file.ConfigFile`.
        workdir: of this run.
        peak_flops: of one device, FLOP/s, for the MFU among the metrics; None: unknown.

    Raises:
        UserError: bad config, damaged checkpoint, changed frozen weights; too many updates in a
            row left out.
        Interrupted: SIGINT or SIGTERM; the state is saved.
    """
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    _check_numbers(config)
    try:
        mesh = meshes.make_mesh(meshes.MeshConfig(**config.mesh))
        for name in config.stages:
            stage = config.stages[name]
            parts = step_config(stage).accumulate
            meshes.check_batch(stage.batch.rows, mesh, parts)
            with rules.use(mesh):
                attention.check_length(stage.batch.get("length", 0))
    except (ValueError, TypeError) as error:
        raise UserError(f"config.mesh: {error}") from error
    if (workdir / "model" / "model.json").is_file():
        print(f"{workdir} is finished: all stages are trained")
        return
    task = make_task(config, module, workdir)
    for stage in task.stages:  # what a later stage's data lack is said now, before anything is read
        if stage.name in config.stages:
            for held_out in (False, True):
                task.batches(stage.name, held_out, config.seed)
    with (
        rules.use(mesh),
        Interruptible() as stop,
        MetricsWriter(
            workdir, enabled=jax.process_index() == 0, wandb=config.get("wandb")
        ) as metrics,
    ):
        constants = jax.device_put(task.constants, NamedSharding(mesh, jax.P()))
        succession = Succession.begin(task, config.seed, mesh)
        this = _Run(config, task, workdir, mesh, constants, succession, metrics, stop, peak_flops)
        ema = None
        for stage in task.stages:
            if stage.name in config.stages:
                ema = None
                ema = _run_stage(this, stage)
        metadata = {
            "config": to_json(config),
            "seed": config.seed,
            "git_revision": git_revision(),
            **succession.frozen_record(),
        }
        task.save(workdir / "model", ema, metadata)


def _check_numbers(config: ml_collections.ConfigDict) -> None:
    """Checks what a stage would only find out when it begins.

    Raises:
        UserError: one of them is wrong.
    """
    counts = {
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "checkpoint.keep_every": config.checkpoint.get("keep_every"),
        "evaluation.every": config.evaluation.every,
        "evaluation.batches": config.evaluation.batches,
        "log_every": config.log_every,
    }
    for name in config.stages:
        stage = config.stages[name]
        counts[f"stages.{name}.batch.rows"] = stage.batch.rows
        try:
            counts[f"stages.{name}.optimizer.accumulate"] = step_config(stage).accumulate
            step_config(stage).optimizer()
        except (ValueError, TypeError) as error:
            raise UserError(f"config.stages.{name}.optimizer: {error}") from error
    for key, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"config.{key} is {count}; it has to be at least 1")


def _run_stage(this: _Run, stage: Stage) -> nnx.Module:
    """Trains (or finishes, or only loads) one stage; the succession goes on to the next.

    Returns:
        The model with the stage's EMA.
    """
    config = stage.steps(step_config(this.config.stages[stage.name]))
    number = list(this.task.stages).index(stage)
    seed = this.config.seed + number
    graphdef, trainable, frozen = this.succession.start(stage)
    make_state = functools.partial(init_state, config=config, seed=seed)
    abstract = rules.abstract(jax.eval_shape(make_state, trainable), this.mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    batches = this.batches(stage.name, False, seed, placed=True)
    folder = this.workdir / stage.name / "checkpoints"
    kept = this.config.checkpoint
    with Checkpoints(
        folder, kept.keep_last, kept.get("keep_every"), best_by=BEST_BY
    ) as checkpoints:
        latest = checkpoints.latest()
        if latest is None:
            state = jax.jit(make_state, out_shardings=shardings)(trainable)
            metadata = {
                "stage": stage.name,
                "seconds": 0.0,
                "frozen_checksum": this.succession.frozen_checksum,
            }
        else:
            state, metadata = checkpoints.restore(latest, abstract, batches)
            this.succession.check(metadata, folder / str(latest))
        # A run that goes on may compute otherwise, and by another revision.
        metadata |= {"config": to_json(this.config), "git_revision": git_revision()}
        del trainable  # the state has copies of its own
        if latest != config.steps:
            later = [s.name for s in this.task.stages[number + 1 :]]
            this.metrics.truncate_after(stage.name, latest or 0, later=later)
            parts = (graphdef, state, frozen, shardings)
            state = _train(this, stage, config, parts, batches, checkpoints, metadata)
    batches.close()  # what is read ahead lies on the devices
    this.succession.go_on(graphdef, state[handed_on(stage)], frozen)
    return nnx.merge(graphdef, state["ema"], frozen)


@dataclasses.dataclass
class _Reports:
    """What is told of each step. A step is reported on when the next one runs already.

    Attributes:
        enough: so many updates left out in a row end the run.
    """

    this: _Run
    stage: str
    meter: Meter
    enough: int
    pending: tuple[int, dict[str, jax.Array]] | None = None
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    diverged: bool = False

    def flush(self) -> None:
        """Waits for the pending step, and reports on it."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self.counts = {name: metrics.pop(name) for name in ("images", "tokens")}
        self.meter.finished(self.counts)
        self.diverged = metrics["skipped_in_a_row"] >= self.enough
        if step % self.this.config.log_every == 0:
            self.this.metrics.write(self.stage, step, metrics | self.meter.row())


def _train(
    this: _Run,
    stage: Stage,
    config: StepConfig,
    parts: tuple[nnx.GraphDef, State, nnx.State, State],
    batches: grain.DatasetIterator,
    checkpoints: Checkpoints,
    metadata: dict[str, Any],
) -> State:
    """The loop of one stage, from the state's step to the last."""
    graphdef, state, frozen, shardings = parts
    every, evaluation = this.config.checkpoint.every, this.config.evaluation
    step_fn = jitted(shardings, NamedSharding(this.mesh, jax.P()))
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
    meter = Meter(this.task.flops(stage.name), this.peak_flops)
    profiler = Profiler(this.workdir / stage.name / "profile", this.config.get("profile"))
    reports = _Reports(this, stage.name, meter, config.most_skipped)
    began, before = time.monotonic(), metadata["seconds"]
    for step in range(first + 1, config.steps + 1):
        with meter.waiting():
            batch = next(batches)
        profiler.before(step)
        state, metrics = step_fn(graphdef, state, frozen, this.constants, batch, loss, config)
        profiler.after(step, metrics)
        progress.update(step, {"loss": metrics["loss"]}, **reports.counts)
        reports.flush()
        reports.pending = (step, metrics)
        last = step == config.steps
        measured: dict[str, float] = {}
        if last or step % evaluation.every == 0:
            reports.flush()
            with meter.paused():
                measured = held_out(state["ema"])
            this.metrics.write(stage.name, step, measured)
        if stage.draws and evaluation.samples and (last or step % evaluation.samples == 0):
            reports.flush()
            with meter.paused():
                model = nnx.merge(graphdef, state["ema"], frozen)
                this.task.draw(model, this.workdir / "samples", f"{stage.name}_{step:06d}")
        stop = this.stop()
        if last or stop or reports.diverged or step % every == 0:
            reports.flush()  # a run that resumes from here does not write it again
            metadata = metadata | {"seconds": before + time.monotonic() - began}
            with meter.paused():
                checkpoints.save(step, state, batches, metadata, measured)
        if reports.diverged:
            checkpoints.wait()
            raise UserError(
                f"stage {stage.name}: {config.most_skipped} updates in a row were left out, up to "
                f"step {step}, since their loss or gradient was no number or a spike; saved. See "
                "metrics.jsonl; go back to an earlier checkpoint, or lower the learning rate in "
                "another workdir"
            )
        if stop and not last:
            checkpoints.wait()
            raise Interrupted(stage.name, step)
    profiler.stop()
    jax.block_until_ready(state)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = before + time.monotonic() - began
    totals = {"stage_seconds": seconds, **meter.total(), "peak_memory_gb": memory}
    this.metrics.write(stage.name, config.steps, totals)
    return state


def _held_out(
    this: _Run, stage: Stage, config: StepConfig, graphdef: nnx.GraphDef, frozen: nnx.State
) -> Callable[[nnx.State], dict[str, float]]:
    """The stage's losses on a few fixed held-out batches."""
    stream = this.batches(stage.name, True, this.config.seed, placed=False)
    batches = list(itertools.islice(stream, this.config.evaluation.batches))
    stream.close()
    place = functools.partial(this.place, stage.name)
    loss = stage.loss(config, training=False)
    return held_out_losses(loss, graphdef, batches, place, frozen, this.constants)
