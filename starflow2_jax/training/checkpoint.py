"""Checkpoints of a run.

A checkpoint is one directory per step with three items: `state` (arrays), `metadata` (JSON) and
`data` (the data iterator of each process). Orbax writes it under a temporary name and renames it
when it is complete, so a step directory is never half written. On disk, trees are nested dicts of
arrays with string keys; any pytree may be passed in, and comes back as itself where an abstract one
is given.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import grain
import jax
import orbax.checkpoint as ocp

from starflow2_jax.errors import UserError
from starflow2_jax.training.digest import TreeDigest, checksum
from starflow2_jax.training.tree_files import (
    FORMAT_VERSION,
    check_same,
    flatten,
    listed,
    load_tree,
    nest,
    reading,
    rebuild,
    restore_args,
    save_tree,
    stored_leaves,
    stored_tree,
    with_version,
    without_version,
)

__all__ = [
    "FORMAT_VERSION",
    "Checkpoints",
    "Elastic",
    "TreeDigest",
    "checksum",
    "load_tree",
    "save_tree",
    "stored_tree",
]


@runtime_checkable
class Elastic(Protocol):
    """A data iterator whose position may be restored by other processes than those that saved it.

    They may be more or fewer, or as many that hold other rows, since the mesh is another one.
    """

    def set_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Moves to the position at which the processes of a job saved these states, in any order.

        Raises:
            UserError: the states are of other data, or not all there.
        """


def _measured(name: str, measured: Mapping[str, float]) -> float:
    """A value by which checkpoints are sorted: what is no number is the worst."""
    value = measured.get(name, math.inf)
    return math.inf if math.isnan(value) else value


_LOOKS = 10
_Found = TypeVar("_Found")


def _look(look: Callable[[], _Found]) -> _Found:
    """What `look` finds among the steps, of which a training beside this may delete one meanwhile.

    Raises:
        FileNotFoundError: time and again: it is not that.
    """
    for _ in range(_LOOKS - 1):
        with contextlib.suppress(FileNotFoundError):
            return look()
    return look()


class Checkpoints:
    """The checkpoints of one directory, by step. Saving is asynchronous.

    In a job of several processes all of them make the same calls, and share the directory.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep_last: int = 3,
        keep_every: int | None = None,
        read_only: bool = False,
        best_by: str | None = None,
    ) -> None:
        """Opens the directory, and makes it where it is missing.

        Args:
            directory: of the step directories.
            keep_last: how many of the newest steps stay, at least 1.
            keep_every: steps that this divides stay as well.
            read_only: for readers beside a running training: nothing is made, saved or deleted.
            best_by: name of a measured value; the step that was saved with the smallest stays.

        Raises:
            UserError: it cannot be made, or, with `read_only`, is not there.
        """
        self.directory = pathlib.Path(directory).expanduser().absolute()
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; at least 1 checkpoint has to stay")
        if read_only and not self.directory.is_dir():
            raise UserError(f"there is no checkpoint directory {self.directory}")
        managers = ocp.checkpoint_managers
        policies = [managers.LatestN(keep_last)]
        if keep_every is not None:
            policies.append(managers.EveryNSteps(keep_every))
        if best_by is not None:
            policies.append(
                managers.BestN(
                    get_metric_fn=functools.partial(_measured, best_by),
                    reverse=True,  # it keeps the last one
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._read_only = read_only
        self._best_by = best_by

        def manager() -> ocp.CheckpointManager:
            return ocp.CheckpointManager(
                self.directory,
                item_names=("state", "metadata", "data"),
                item_handlers={
                    "state": ocp.PyTreeCheckpointHandler(),
                    "metadata": ocp.JsonCheckpointHandler(),
                    "data": grain.checkpoint.CheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=managers.AnyPreservationPolicy(policies),
                    best_fn=None if best_by is None else functools.partial(_measured, best_by),
                    best_mode="min",
                    create=not read_only,
                    # A killed writer leaves its temporary directory; only a writer may remove it.
                    cleanup_tmp_directories=not read_only,
                ),
            )

        with self._writing():
            self._manager = _look(manager) if read_only else manager()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """All complete steps, ascending; waits for a running save."""
        self.wait()
        # Somebody may have deleted a damaged step, or a training beside this reader gone on.
        _look(self._manager.reload)
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest complete step; None where there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step that was saved with the smallest value of `best_by`; None where none was."""
        measured = {step: self._manager.metrics(step) or {} for step in self.steps()}
        known = [step for step in measured if self._best_by in measured[step]]
        return min(known, key=lambda step: _measured(self._best_by, measured[step]), default=None)

    def check(self, step: int) -> None:
        """Checks that there is a complete checkpoint of a step.

        Raises:
            UserError: there is none.
        """
        steps = self.steps()
        if step not in steps:
            has = f"of {listed([str(s) for s in steps])}" if steps else "none"
            raise UserError(f"{self.directory} has no checkpoint of step {step}; it has {has}")

    def save(
        self,
        step: int,
        state: Any,
        iterator: grain.DatasetIterator | None = None,
        metadata: Mapping[str, Any] | None = None,
        measured: Mapping[str, float] | None = None,
    ) -> bool:
        """Starts to save a step; waits for the save before it, and returns before this one is done.

        The state may be donated, and the iterator may move on, as soon as this returns.

        Args:
            step: its number.
            state: pytree of arrays.
            iterator: this process's data iterator.
            metadata: JSON types.
            measured: values by name, for `best_by`; empty or None: nothing was measured.

        Returns:
            False where this step exists already; it stays as it is.

        Raises:
            UserError: the files of this save or of the one before cannot be written.
        """
        if self._read_only:
            raise ValueError(f"the checkpoints in {self.directory} are open for reading only")
        if step in self._manager.all_steps():
            return False
        items: dict[str, Any] = {
            "state": ocp.args.PyTreeSave(nest(flatten(state))),
            "metadata": ocp.args.JsonSave(with_version(metadata or {})),
        }
        if iterator is not None:
            items["data"] = grain.checkpoint.CheckpointSave(iterator)
        with self._writing():
            # Forced: Orbax would skip, without a word, a step below the newest one.
            return self._manager.save(
                step,
                args=ocp.args.Composite(**items),
                metrics=dict(measured or {}),
                force=True,
            )

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata of a step, without reading arrays.

        Raises:
            UserError: no such step, another format version, damaged files.
        """
        self.check(step)
        with self._reading(step):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
            )
        return without_version(self._where(step), restored.metadata)

    def restore(
        self,
        step: int,
        abstract: Any,
        iterator: grain.DatasetIterator | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Reads a whole step, onto whatever mesh the abstract state names.

        Args:
            step: an existing one.
            abstract: pytree like the saved state: arrays, or `jax.ShapeDtypeStruct` with a sharding
                (without one the leaf comes back as a numpy array).
            iterator: a fresh data iterator; it is moved to the saved position. Unless it is
                `Elastic`, as many processes, with the same rows each, have to have saved it.

        Returns:
            The state, and the metadata as saved.

        Raises:
            UserError: no such step, another format version, another tree (all differences of names,
                shapes and dtypes are listed), damaged files, no iterator state for this process.
        """
        metadata = self.metadata(step)
        wanted = flatten(abstract)
        with self._reading(step):
            stored = stored_leaves(self._manager.metadata(step).item_metadata.state)
            check_same(self._where(step), stored, wanted, same_dtype=True)
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=restore_args(wanted))
            )
            state = rebuild(abstract, restored.state)
        if iterator is not None:
            self._restore_iterator(step, iterator)
        return state, metadata

    def restore_weights_only(
        self, step: int, *names: str, abstract: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads some of the state's top-level entries (`"ema"`, `"trainable"`) and nothing else.

        Args:
            step: an existing one.
            names: of the entries.
            abstract: {name: pytree} with shardings; a dtype that differs is cast. Without it the
                entries come back as nested dicts of numpy arrays.

        Returns:
            {name: tree}, and the metadata.

        Raises:
            UserError: as for `restore`; a name is not in the checkpoint.
        """
        metadata = self.metadata(step)
        where = self._where(step)
        with self._reading(step):
            stored = stored_leaves(self._manager.metadata(step).item_metadata.state)
            entries = sorted({path[0] for path in stored})
            for name in names:
                if name not in entries:
                    raise UserError(f"{where} has no {name}; it has {', '.join(entries)}")
            wanted = {path: leaf for path, leaf in stored.items() if path[0] in names}
            if abstract is None:
                leaves = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in wanted.items()}
            else:
                leaves = flatten({name: abstract[name] for name in names})
                check_same(where, wanted, leaves, same_dtype=False)
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=restore_args(leaves))
            )
        if abstract is None:
            return {name: restored.state[name] for name in names}, metadata
        return {n: rebuild(abstract[n], restored.state[n]) for n in names}, metadata

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
            UserError: its files cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and releases the threads."""
        with self._writing():
            self._manager.close()

    def _where(self, step: int) -> str:
        return f"checkpoint {self.directory / str(step)}"

    def _reading(self, step: int) -> contextlib.AbstractContextManager[None]:
        below = [s for s in self.steps() if s < step]
        fall_back = f"to fall back to step {below[-1]}" if below else "to start anew"
        return reading(
            self.directory / str(step), "checkpoint", f"delete that step directory {fall_back}"
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.directory}: {error}") from error

    def _restore_iterator(self, step: int, iterator: grain.DatasetIterator) -> None:
        folder = self.directory / str(step) / "data"
        where = self._where(step)
        index, count = jax.process_index(), jax.process_count()
        if not folder.is_dir():
            raise UserError(f"{where} holds no data iterator; it was saved without one")
        files = sorted(folder.glob("process_*-of-*.json"))
        processes = files[0].stem.rpartition("-")[2] if files else str(count)
        if isinstance(iterator, Elastic):
            # Always from all files: on another mesh, the same number of processes hold other rows.
            with self._reading(step):
                if not files or len(files) != int(processes):
                    raise FileNotFoundError(f"{len(files)} of {processes} positions of the data")
                states = [json.loads(file.read_text("utf-8")) for file in files]
                iterator.set_states(states)
            return
        if files and not (folder / f"process_{index}-of-{count}.json").exists():
            raise UserError(
                f"{where} was saved by {processes} processes, and its data iterator cannot "
                f"continue in {count}; start {processes} processes"
            )
        with self._reading(step):
            restore = grain.checkpoint.CheckpointRestore(iterator)
            self._manager.restore(step, args=ocp.args.Composite(data=restore))
