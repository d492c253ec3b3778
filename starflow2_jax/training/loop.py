"""A run: the stages one after another, each resumable, then the model's export.

The work directory holds, for each stage, `STAGE/checkpoints/`; `metrics.jsonl`; TensorBoard files;
samples drawn on the way; and at the end `model/`, see `bundle`.
"""

import dataclasses
import functools
import os
import pathlib
import resource
import signal
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from starflow2_jax.bundle import Bundle, save_bundle
from starflow2_jax.data.pipeline import BatchShape, HostBatch, packed_batches
from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.data.tokenizer import Tokenizer
from starflow2_jax.errors import Interrupted, UserError
from starflow2_jax.models.patches import PatchCodec
from starflow2_jax.models.pretzel import Pretzel, PretzelConfig
from starflow2_jax.parallel import mesh as meshes
from starflow2_jax.parallel import rules
from starflow2_jax.parallel.host_memory import keep_freed_memory
from starflow2_jax.provenance import git_revision, to_json
from starflow2_jax.training.checkpoint import Checkpoints, checksum
from starflow2_jax.training.metrics import MetricsWriter, Progress
from starflow2_jax.training.stages import PRETRAIN_LM, STAGES, Stage
from starflow2_jax.training.step import (
    State,
    StepConfig,
    init_state,
    loss_and_metrics,
    train_step,
)


class Data(Protocol):
    """What a config file's `make_data(config)` returns."""

    tokenizer: Tokenizer
    image: ImageShape
    codec: PatchCodec

    def documents(self, stage: str, held_out: bool, seed: int) -> grain.IterDataset:
        """An endless stream of packable documents (see `data.pipeline.features`) for a stage."""


class ConfigFile(Protocol):
    """What a config file defines besides `get_config`."""

    def make_data(self, config: ml_collections.ConfigDict) -> Data:
        """The data of the run."""

    def make_model_config(self, config: ml_collections.ConfigDict, data: Data) -> PretzelConfig:
        """The model's shape."""

    def draw_samples(self, bundle: Bundle, folder: pathlib.Path, name: str) -> None:
        """Writes samples of fixed prompts; called while the flow trains."""


@dataclasses.dataclass
class _Run:
    """What all stages of a run share."""

    config: ml_collections.ConfigDict
    module: ConfigFile | types.ModuleType
    workdir: pathlib.Path
    mesh: Mesh
    data: Data
    codec: PatchCodec
    model: Pretzel
    metrics: MetricsWriter
    stop: Callable[[], bool]


def run(config: ml_collections.ConfigDict, module: types.ModuleType, workdir: pathlib.Path) -> None:
    """Trains all stages of the config, continuing where the work directory stands.

    Args:
        config: `seed`, `mesh`, `stages` (a group for each stage, in the order of `STAGES`),
            `checkpoint`, `evaluation`; see `configs/digits.py`.
        module: the config file, see `ConfigFile`.
        workdir: of this run.

    Raises:
        UserError: bad config, damaged checkpoint, changed frozen weights.
        Interrupted: SIGINT or SIGTERM; the state is saved.
    """
    _claim_devices(config.cpu_devices)
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
    data = module.make_data(config)
    model_config = module.make_model_config(config, data)
    with (
        rules.use(mesh),
        _Interruptible() as stop,
        MetricsWriter(workdir, enabled=jax.process_index() == 0) as metrics,
    ):
        model = rules.born_sharded(lambda: Pretzel(model_config, rngs=nnx.Rngs(config.seed)), mesh)
        codec = jax.device_put(data.codec, NamedSharding(mesh, jax.P()))
        this = _Run(config, module, workdir, mesh, data, codec, model, metrics, stop)
        ema = None
        frozen_checksum = ""
        for stage in STAGES:
            if stage.name in config.stages:
                ema = _run_stage(this, stage, frozen_checksum)
            if stage is PRETRAIN_LM:
                frozen_checksum = checksum(nnx.state(this.model.vlm))
        after = checksum(nnx.state(this.model.vlm))
        metadata = {
            "config": to_json(config),
            "seed": config.seed,
            "git_revision": git_revision(),
            "frozen_checksum_before": frozen_checksum,
            "frozen_checksum_after": after,
        }
        save_bundle(workdir / "model", _bundle(this, ema, metadata))


def _claim_devices(count: int | None) -> None:
    """On CPU, one device per core: elementwise work runs on one thread per device."""
    if count is not None and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", count)


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


def _bundle(this: _Run, model: Pretzel, metadata: Mapping[str, Any]) -> Bundle:
    return Bundle(model, this.codec, this.data.tokenizer, this.data.image, metadata)


def _run_stage(this: _Run, stage: Stage, frozen_checksum: str) -> Pretzel:
    """Trains (or finishes, or only loads) one stage; leaves its raw parameters in `this.model`.

    Returns:
        The model with the stage's EMA.
    """
    group = this.config.stages[stage.name]
    config = step_config(group)
    seed = this.config.seed + STAGES.index(stage)
    graphdef, trainable, frozen = nnx.split(this.model, stage.trainable, ...)
    make_state = functools.partial(init_state, config=config, seed=seed)
    abstract = rules.abstract(jax.eval_shape(make_state, trainable), this.mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    shape = BatchShape(**group.batch)
    batches = iter(packed_batches(this.data.documents(stage.name, False, seed), shape))
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
            this.metrics.truncate_after(
                stage.name, latest or 0, later=[s.name for s in STAGES[STAGES.index(stage) + 1 :]]
            )
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
    step_fn = jax.jit(
        train_step,
        static_argnames=("graphdef", "stage", "config"),
        donate_argnames=("state",),
        out_shardings=(shardings, None),
    )
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
        images, tokens = int((batch["image_start"] >= 0).sum()), int((batch["segments"] > 0).sum())
        batch = jax.device_put(batch, rules.batch_shardings(batch, this.mesh))
        state, metrics = step_fn(graphdef, state, frozen, this.codec, batch, stage, config)
        progress.update(step, {"loss": metrics["loss"]}, images=images, tokens=tokens)
        if pending is not None:  # the previous step's: logging never waits for the running one
            this.metrics.write(stage.name, *pending)
        pending = (step, metrics) if step % this.config.log_every == 0 else None
        if rates_from is None:
            rates_from = time.monotonic()  # the first step compiles and is in no rate
        else:
            counts["images"] += images
            counts["tokens"] += tokens
        last = step == config.steps
        if last or step % evaluation.every == 0:
            held = held_out(state["ema"])
            if pending is not None:
                this.metrics.write(stage.name, *pending)
                pending = None
            this.metrics.write(stage.name, step, held)
        if stage.image and evaluation.samples and (last or step % evaluation.samples == 0):
            model = nnx.merge(graphdef, state["ema"], frozen)
            this.module.draw_samples(
                _bundle(this, model, {}), this.workdir / "samples", f"{stage.name}_{step:06d}"
            )
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
    group = this.config.stages[stage.name]
    stream = packed_batches(
        this.data.documents(stage.name, True, this.config.seed), BatchShape(**group.batch)
    )
    iterator: Iterator[HostBatch] = iter(stream)
    batches: Sequence[HostBatch] = [next(iterator) for _ in range(this.config.evaluation.batches)]
    weights = stage.weights(config.text_weight, 0.0)

    @jax.jit
    def losses(
        trainable: nnx.State, frozen: nnx.State, codec: PatchCodec, batch: HostBatch
    ) -> dict[str, jax.Array]:
        return loss_and_metrics(
            graphdef,
            trainable,
            frozen,
            codec,
            batch,
            jnp.uint32(0),
            jnp.float32(0.0),
            stage,
            weights,
        )[1]

    def evaluate(trainable: nnx.State) -> dict[str, float]:
        found = []
        for batch in batches:
            placed = jax.device_put(batch, rules.batch_shardings(batch, this.mesh))
            found.append(losses(trainable, frozen, this.codec, placed))
        return {f"held_out_{k}": sum(float(f[k]) for f in found) / len(found) for k in found[0]}

    return evaluate
