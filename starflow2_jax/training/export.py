"""A model directory from a checkpoint of a run, which may still be training.

The stages before the checkpoint's hand on their last weights, as in training: the directory is the
one that a run which ended with that checkpoint would have written.
"""

import contextlib
import difflib
import io
import os
import pathlib
import tempfile
from collections.abc import Collection, Sequence
from typing import Any, Literal

import ml_collections
from flax import nnx
from jax.sharding import Mesh

from starflow2_jax.convert.stored import check_absent, complete_or_nothing
from starflow2_jax.errors import UserError
from starflow2_jax.parallel import mesh as meshes
from starflow2_jax.parallel import rules
from starflow2_jax.provenance import check_workdir
from starflow2_jax.training.checkpoint import Checkpoints
from starflow2_jax.training.config_file import ConfigFile, make_task, step_config
from starflow2_jax.training.held_out import BEST_BY
from starflow2_jax.training.succession import Succession, handed_on
from starflow2_jax.training.task import Stage, Task

Step = int | Literal["latest", "best"]
"""A step's number, the newest one, or the one with the smallest held-out loss."""


def export(
    config: ml_collections.ConfigDict,
    module: ConfigFile,
    workdir: pathlib.Path,
    out: pathlib.Path,
    stage: str | None = None,
    step: Step = "latest",
) -> tuple[str, int]:
    """Writes the model of a checkpoint, with the average (EMA) of what its stage trains.

    Only weights are read, by each device what it holds of them. Nothing in the work directory is
    made or changed. `model.json` has the config and the git revision that the checkpoint was
    trained with, its `stage` and `step`, and the checksums of the frozen weights.

    Args:
        config: that the run was started with; how it computes (`provenance.MAY_CHANGE`) may differ.
        module: the config file.
        workdir: of the run.
        out: directory to make; it is there when it is complete.
        stage: of the checkpoint; None: the last one that has a checkpoint.
        step: of the checkpoint.

    Returns:
        The stage and the step of what was written.

    Raises:
        UserError: the work directory is not one of this config; no such stage, or no checkpoint of
            it; no such step; nothing measured, of which one would be the best; a stage before it is
            not finished; frozen weights that differ from the checkpoint's; damaged files; `out`
            exists, lies in the work directory, or cannot be written.
    """
    workdir = check_workdir(workdir, config)
    out = out.expanduser().absolute()
    check_absent(out)
    if out.resolve().is_relative_to(workdir.resolve()):
        raise UserError(f"{out} lies in the run's work directory; choose another place")
    _check_begun(config, workdir, stage)
    try:
        mesh = meshes.make_mesh(meshes.MeshConfig(**config.mesh))
    except (ValueError, TypeError) as error:
        raise UserError(f"config.mesh: {error}") from error
    with tempfile.TemporaryDirectory(prefix="starflow2_export_") as scratch:
        # A task makes files of its own in the work directory; here they go into a copy.
        copy = pathlib.Path(scratch) / "workdir"
        try:
            _mirror(workdir, copy, frozenset({pathlib.Path(scratch).resolve()}), config.stages)
        except OSError as error:
            raise UserError(f"cannot make links to the files of {workdir}: {error}") from error
        with contextlib.redirect_stdout(io.StringIO()):  # it would tell of the copy
            task = make_task(config, module, copy)
        stages = _stages(config, workdir, task, stage)
        with rules.use(mesh):
            model, metadata = _model(config, workdir, task, stages, step, mesh)
            with complete_or_nothing(out) as partial:
                task.save(partial, model, metadata)
    return metadata["stage"], metadata["step"]


def _folder(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    return workdir / stage / "checkpoints"


def _open(workdir: pathlib.Path, stage: str) -> Checkpoints:
    return Checkpoints(_folder(workdir, stage), read_only=True, best_by=BEST_BY)


def _latest(workdir: pathlib.Path, stage: str) -> int | None:
    """A stage's newest step; None where it has not begun, or not saved yet."""
    if not _folder(workdir, stage).is_dir():
        return None
    with _open(workdir, stage) as checkpoints:
        return checkpoints.latest()


def _check_begun(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, stage: str | None
) -> None:
    """Checks that there is a checkpoint of a stage, or of any.

    Before the task is made: where there is one, whatever a task makes first (another model, say,
    that it trains) is in the work directory.

    Raises:
        UserError: there is none, or no such stage.
    """
    names = list(config.stages)
    if stage is not None and stage not in names:
        near = difflib.get_close_matches(stage, names, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]}? (there are {', '.join(names)})" if near else ""
        raise UserError(f"the config has no stage {stage}{hint}")
    begun = [name for name in names if _latest(workdir, name) is not None]
    if not begun:
        raise UserError(f"{workdir} has no checkpoint yet")
    if stage is not None and stage not in begun:
        raise UserError(
            f"{workdir} has no checkpoint of stage {stage} yet, only of {', '.join(begun)}"
        )


def _mirror(
    folder: pathlib.Path,
    copy: pathlib.Path,
    above: frozenset[pathlib.Path],
    leave: Collection[str] = (),
) -> None:
    """Makes folders like those of a folder, with links in the place of its files.

    A link to a folder becomes a folder, too: through a link, what a task makes in it would go into
    the original.

    Args:
        folder: absolute.
        copy: to make.
        above: folders that are left out, without links in their paths: a link may lead back.
        leave: names of the folder's entries that are not copied.

    Raises:
        OSError: a folder or a link cannot be made.
    """
    copy.mkdir()
    above |= {folder.resolve()}
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, PermissionError):
        return  # a training beside this has deleted it; or a task cannot read it either
    for entry in entries:
        if entry.name in leave:
            continue
        path, target = pathlib.Path(entry.path), copy / entry.name
        if entry.is_dir():
            if path.resolve() not in above:
                _mirror(path, target, above)
        elif not entry.is_symlink() or path.exists():
            target.symlink_to(path)


def _stages(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, task: Task, stage: str | None
) -> list[Stage]:
    """The run's stages up to the one whose checkpoint is wanted; those before it are finished.

    Raises:
        UserError: one of them is not.
    """
    stages = [one for one in task.stages if one.name in config.stages]
    latest = {one.name: _latest(workdir, one.name) for one in stages}
    wanted = stage or [name for name, step in latest.items() if step is not None][-1]
    stages = stages[: list(latest).index(wanted) + 1]
    for one in stages[:-1]:
        last, at = _last(config, one), latest[one.name]
        if at != last:
            at = "no checkpoint" if at is None else f"step {at}"
            raise UserError(
                f"stage {one.name}, from which {wanted} goes on, is not finished: "
                f"{_folder(workdir, one.name)} has {at} of {last}"
            )
    return stages


def _last(config: ml_collections.ConfigDict, stage: Stage) -> int:
    """The number of a stage's last step."""
    return stage.steps(step_config(config.stages[stage.name])).steps


def _model(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    task: Task,
    stages: Sequence[Stage],
    step: Step,
    mesh: Mesh,
) -> tuple[nnx.Module, dict[str, Any]]:
    """The model of the last one of some stages at a step, and its metadata.

    Raises:
        UserError: see `export`.
    """
    with _open(workdir, stages[-1].name) as checkpoints:
        _find(checkpoints, step)  # said now, not when all the others are read
    succession = Succession.begin(task, config.seed, mesh)
    for stage in stages:
        last = stage is stages[-1]
        entry = "ema" if last else handed_on(stage)
        graphdef, trainable, frozen = succession.start(stage)
        abstract = rules.abstract(trainable, mesh)
        del trainable  # what is read takes its place
        with _open(workdir, stage.name) as checkpoints:
            at, trained, about = _read(
                checkpoints, step if last else _last(config, stage), entry, abstract
            )
        succession.check(about, _folder(workdir, stage.name) / str(at))
        succession.go_on(graphdef, trained, frozen)
        del trained, frozen
    metadata = {
        "config": about["config"],
        "seed": config.seed,
        "git_revision": about["git_revision"],
        "stage": stages[-1].name,
        "step": at,
        **succession.frozen_record(),
    }
    return succession.model, metadata


def _find(checkpoints: Checkpoints, step: Step) -> int:
    """The number of a step that is there.

    Raises:
        UserError: there is none.
    """
    if isinstance(step, int):
        checkpoints.check(step)
        return step
    found = checkpoints.latest() if step == "latest" else checkpoints.best()
    if found is None:
        what = "checkpoint"
        if step == "best":
            what += " that knows its held-out loss: config.evaluation.every divides no step of them"
        raise UserError(f"{checkpoints.directory} has no {what}")
    return found


def _read(
    checkpoints: Checkpoints, step: Step, entry: str, abstract: nnx.State
) -> tuple[int, nnx.State, dict[str, Any]]:
    """One entry of the state at a step.

    Returns:
        The step's number, the entry, and the checkpoint's metadata.

    Raises:
        UserError: no such step, another tree, damaged files.
    """
    while True:
        found = _find(checkpoints, step)
        try:
            read, metadata = checkpoints.restore_weights_only(
                found, entry, abstract={entry: abstract}
            )
            return found, read[entry], metadata
        except UserError:
            # A training beside this may have deleted it, for a newer or a better one.
            if _find(checkpoints, step) == found:
                raise
