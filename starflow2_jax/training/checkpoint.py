"""Checkpoints of a run, and stand-alone exports of a tree of arrays.

A checkpoint is one directory per step with three items: `state` (arrays), `metadata` (JSON) and
`data` (the data iterator of each process). Orbax writes it under a temporary name and renames it
when it is complete, so a step directory is never half written. On disk, trees are nested dicts of
arrays with string keys; any pytree may be passed in, and comes back as itself where an abstract one
is given.
"""

import contextlib
import gc
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from starflow2_jax.errors import UserError
from starflow2_jax.training.piecewise import Pieces, piecewise_checkpointer

FORMAT_VERSION = 1
"""Of checkpoints and exports; raised when what they hold changes its meaning."""

_VERSION_KEY = "format_version"
_CHUNK_BYTES = 64 * 2**20

Path = tuple[str, ...]
Flat = dict[Path, Any]


# Trees


def _flatten(tree: Any) -> Flat:
    """Leaves by their path of string keys; works on any pytree.

    Raises:
        ValueError: the tree is a single leaf, or two keys have one name (1 and "1").
    """
    flat: Flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        if not names or names in flat:
            raise ValueError(f"no unique path to the leaf at {jax.tree_util.keystr(path)!r}")
        flat[names] = leaf
    return flat


def _nest(flat: Flat) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def _stored(metadata: Any) -> Flat:
    """Orbax's metadata of a tree: leaves with `shape` and `dtype`."""
    return _flatten(metadata.tree)


def _list(items: Sequence[str]) -> str:
    return ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")


def _check(where: str, stored: Flat, wanted: Flat, same_dtype: bool) -> None:
    """All differences between what is stored and what is wanted, in one UserError."""
    wrong = [f"{'/'.join(p)} is missing" for p in wanted if p not in stored]
    wrong += [f"{'/'.join(p)} is not wanted" for p in stored if p not in wanted]
    for path in (p for p in wanted if p in stored):
        was, want = stored[path], wanted[path]
        shapes, dtypes = (tuple(was.shape), tuple(want.shape)), (was.dtype, want.dtype)
        if shapes[0] != shapes[1]:
            wrong.append(f"{'/'.join(path)} has shape {shapes[0]}, wanted {shapes[1]}")
        elif same_dtype and dtypes[0] != dtypes[1]:
            wrong.append(f"{'/'.join(path)} is {dtypes[0]}, wanted {dtypes[1]}")
    if wrong:
        raise UserError(f"{where} holds another tree: {_list(wrong)}; use the config that wrote it")


def _restore_args(wanted: Any) -> ocp.args.PyTreeRestore:
    """What Orbax needs to read these leaves, and no others.

    A leaf with a sharding is read by each process as far as its own devices need it; one without
    becomes a numpy array.
    """

    def one(leaf: Any) -> ocp.RestoreArgs:
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        return ocp.ArrayRestoreArgs(
            sharding=sharding, global_shape=tuple(leaf.shape), dtype=leaf.dtype
        )

    item = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in wanted.items()}
    return ocp.args.PyTreeRestore(
        _nest(item),
        restore_args=_nest({path: one(leaf) for path, leaf in wanted.items()}),
        partial_restore=True,
    )


def _rebuild(abstract: Any, nested: Any) -> Any:
    """The restored leaves in the abstract tree's own structure."""
    flat = _flatten(nested)
    return jax.tree.unflatten(
        jax.tree.structure(abstract), [flat[path] for path in _flatten(abstract)]
    )


def _with_version(metadata: Mapping[str, Any]) -> dict[str, Any]:
    if _VERSION_KEY in metadata:
        raise ValueError(f"the metadata key {_VERSION_KEY!r} is taken")
    return {_VERSION_KEY: FORMAT_VERSION, **metadata}


def _without_version(where: str, metadata: Any) -> dict[str, Any]:
    version = metadata.get(_VERSION_KEY) if isinstance(metadata, Mapping) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {version}, this package reads {FORMAT_VERSION}; "
            "use the package version that wrote it"
        )
    return {key: value for key, value in metadata.items() if key != _VERSION_KEY}


def _not_a_pending_read(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "never retrieved" not in message or "tensorstore" not in message


def _drop_pending_reads(error: BaseException) -> None:
    """Collects the reads that were under way beside the one that failed, without a word."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        gc.collect()
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def _reading(folder: pathlib.Path, what: str, advice: str) -> Iterator[None]:
    """What Orbax raises on damaged files becomes one line with advice.

    Orbax reads arrays side by side. Where several fail, one is raised, and every other one would
    print its own traceback when it is collected: that is kept off the terminal.
    """
    logging.getLogger("asyncio").addFilter(_not_a_pending_read)
    try:
        yield
    # Too little memory says nothing about the files.
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        _drop_pending_reads(error)
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{what} {folder} cannot be read, its files are damaged or missing; {advice} "
            f"({type(error).__name__}: {lines[0][:200]})"
        ) from error


# Checkpoints of a run


@runtime_checkable
class Elastic(Protocol):
    """A data iterator whose position may be restored in another number of processes."""

    def set_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Moves to the position at which the processes of a job saved these states, in any order.

        Raises:
            UserError: the states are of other data, or not all there.
        """


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
    ) -> None:
        """Opens the directory, and makes it where it is missing.

        Args:
            directory: of the step directories.
            keep_last: how many of the newest steps stay, at least 1.
            keep_every: steps that this divides stay as well.
            read_only: for readers beside a running training: nothing is made, saved or deleted.

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
        self._read_only = read_only
        with self._writing():
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_names=("state", "metadata", "data"),
                item_handlers={
                    "state": ocp.PyTreeCheckpointHandler(),
                    "metadata": ocp.JsonCheckpointHandler(),
                    "data": grain.checkpoint.CheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=managers.AnyPreservationPolicy(policies),
                    create=not read_only,
                    # A killed writer leaves its temporary directory; only a writer may remove it.
                    cleanup_tmp_directories=not read_only,
                ),
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """All complete steps, ascending; waits for a running save."""
        self.wait()
        # Somebody may have deleted a damaged step, or a training beside this reader gone on.
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest complete step; None where there is none."""
        return max(self.steps(), default=None)

    def save(
        self,
        step: int,
        state: Any,
        iterator: grain.DatasetIterator | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> bool:
        """Starts to save a step; waits for the save before it, and returns before this one is done.

        The state may be donated, and the iterator may move on, as soon as this returns.

        Args:
            step: its number.
            state: pytree of arrays.
            iterator: this process's data iterator.
            metadata: JSON types.

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
            "state": ocp.args.PyTreeSave(_nest(_flatten(state))),
            "metadata": ocp.args.JsonSave(_with_version(metadata or {})),
        }
        if iterator is not None:
            items["data"] = grain.checkpoint.CheckpointSave(iterator)
        with self._writing():
            # Forced: Orbax would skip, without a word, a step below the newest one.
            return self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata of a step, without reading arrays.

        Raises:
            UserError: no such step, another format version, damaged files.
        """
        steps = self.steps()
        if step not in steps:
            has = f"of {_list([str(s) for s in steps])}" if steps else "none"
            raise UserError(f"{self.directory} has no checkpoint of step {step}; it has {has}")
        with self._reading(step):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
            )
        return _without_version(self._where(step), restored.metadata)

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
            iterator: a fresh data iterator; it is moved to the saved position. Where another number
                of processes saved, it has to be `Elastic`.

        Returns:
            The state, and the metadata as saved.

        Raises:
            UserError: no such step, another format version, another tree (all differences of names,
                shapes and dtypes are listed), damaged files, no iterator state for this process.
        """
        metadata = self.metadata(step)
        wanted = _flatten(abstract)
        with self._reading(step):
            stored = _stored(self._manager.metadata(step).item_metadata.state)
            _check(self._where(step), stored, wanted, same_dtype=True)
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=_restore_args(wanted))
            )
            state = _rebuild(abstract, restored.state)
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
            stored = _stored(self._manager.metadata(step).item_metadata.state)
            entries = sorted({path[0] for path in stored})
            for name in names:
                if name not in entries:
                    raise UserError(f"{where} has no {name}; it has {', '.join(entries)}")
            wanted = {path: leaf for path, leaf in stored.items() if path[0] in names}
            if abstract is None:
                leaves = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in wanted.items()}
            else:
                leaves = _flatten({name: abstract[name] for name in names})
                _check(where, wanted, leaves, same_dtype=False)
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=_restore_args(leaves))
            )
        if abstract is None:
            return {name: restored.state[name] for name in names}, metadata
        return {n: _rebuild(abstract[n], restored.state[n]) for n in names}, metadata

    def reached_preemption(self, step: int) -> bool:
        """Whether the cluster has announced the end of this job (needs `jax.distributed`)."""
        return self._manager.reached_preemption(step)

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
        return _reading(
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
        files = list(folder.glob("process_*-of-*.json"))
        if not files or (folder / f"process_{index}-of-{count}.json").exists():
            with self._reading(step):
                restore = grain.checkpoint.CheckpointRestore(iterator)
                self._manager.restore(step, args=ocp.args.Composite(data=restore))
            return
        processes = files[0].stem.rpartition("-")[2]
        if not isinstance(iterator, Elastic):
            raise UserError(
                f"{where} was saved by {processes} processes, and its data iterator cannot "
                f"continue in {count}; start {processes} processes"
            )
        with self._reading(step):
            iterator.set_states([json.loads(file.read_text("utf-8")) for file in files])


# Stand-alone exports


def _tree_checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            tree=ocp.PyTreeCheckpointHandler(), metadata=ocp.JsonCheckpointHandler()
        )
    )


def save_tree(
    path: str | os.PathLike[str],
    tree: Any,
    metadata: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes a tree of arrays (final weights, a frozen model) as one directory.

    It is written under a temporary name beside `path` and renamed, so `path` is never half there.
    In a job of several processes all of them make the call.

    Args:
        path: of the directory to make.
        tree: pytree of arrays; or of `piecewise.Pieces`, which are read and written one after
            another, by their paths in sorted order.
        metadata: JSON types.
        overwrite: replaces what is at `path`, once the new tree is complete.

    Raises:
        UserError: `path` exists and is not to be replaced; the files cannot be written.
    """
    path = pathlib.Path(path).expanduser().absolute()
    if path.exists() and not overwrite:
        raise UserError(f"{path} already exists; delete it first, or choose another place")
    fresh = path.with_name(f".{path.name}.new") if path.exists() else path
    nested = _nest(_flatten(tree))
    in_pieces = any(isinstance(leaf, Pieces) for leaf in jax.tree.leaves(nested))
    make = piecewise_checkpointer if in_pieces else _tree_checkpointer
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(make()) as checkpointer:
            checkpointer.save(
                fresh,
                args=ocp.args.Composite(
                    tree=ocp.args.PyTreeSave(nested),
                    metadata=ocp.args.JsonSave(_with_version(metadata)),
                ),
                force=overwrite,
            )
        if fresh != path:
            if jax.process_index() == 0:
                old = path.with_name(f".{path.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
                fresh.rename(path)
                shutil.rmtree(old)
            multihost_utils.sync_global_devices("save_tree")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def stored_tree(path: str | os.PathLike[str]) -> Flat:
    """Path of keys -> leaf with `shape` and `dtype` of what `save_tree` wrote; reads no array.

    Raises:
        UserError: nothing there, damaged files.
    """
    path = pathlib.Path(path).expanduser().absolute()
    if not path.is_dir():
        raise UserError(f"there is no directory {path}")
    with contextlib.closing(_tree_checkpointer()) as checkpointer:
        with _reading(path, "weights", "write or convert them again"):
            return _stored(checkpointer.metadata(path).item_metadata.tree)


def load_tree(path: str | os.PathLike[str], abstract: Any = None) -> tuple[Any, dict[str, Any]]:
    """Reads what `save_tree` wrote.

    Args:
        path: of the directory.
        abstract: pytree like the saved one, of arrays or `jax.ShapeDtypeStruct` with shardings; a
            dtype that differs is cast. Without it: a nested dict of numpy arrays.

    Returns:
        The tree, and the metadata.

    Raises:
        UserError: nothing there, another format version, another tree, damaged files.
    """
    path = pathlib.Path(path).expanduser().absolute()
    where = f"weights {path}"
    if not path.is_dir():
        raise UserError(f"there is no directory {path}")
    with contextlib.closing(_tree_checkpointer()) as checkpointer:
        with _reading(path, "weights", "write or convert them again"):
            restored = checkpointer.restore(
                path, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
            )
            metadata = _without_version(where, restored.metadata)
            stored = _stored(checkpointer.metadata(path).item_metadata.tree)
        if abstract is None:
            wanted = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in stored.items()}
        else:
            wanted = _flatten(abstract)
            _check(where, stored, wanted, same_dtype=False)
        with _reading(path, "weights", "write or convert them again"):
            restored = checkpointer.restore(
                path, args=ocp.args.Composite(tree=_restore_args(wanted))
            )
    tree = restored.tree
    return (tree if abstract is None else _rebuild(abstract, tree)), metadata


def _is_local(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _chunks(leaf: Any) -> Iterator[np.ndarray]:
    """The rows of an array in order, on this host.

    All at once, or, where parts lie on other hosts, at most `_CHUNK_BYTES` (or one row) at a time.
    """
    if _is_local(leaf):
        yield np.asarray(leaf)
        return
    mesh = leaf.sharding.mesh
    everywhere = jax.NamedSharding(mesh, jax.P())
    rows = leaf.shape[0] if leaf.ndim else 1
    step = max(1, min(rows, _CHUNK_BYTES * rows // max(leaf.nbytes, 1)))
    cut = jax.jit(jax.lax.dynamic_slice_in_dim, static_argnums=2, out_shardings=everywhere)
    for start in range(0, rows, step):
        part = cut(leaf, start, min(step, rows - start)) if leaf.ndim else leaf
        yield np.asarray(part.addressable_data(0))


class TreeDigest:
    """SHA-256 of a tree's paths, shapes, dtypes and bytes, leaf after leaf in sorted order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._last: Path = ()

    def start(self, path: Path, shape: Sequence[int], dtype: np.dtype) -> None:
        """The next leaf.

        Raises:
            ValueError: its path does not follow the last one's.
        """
        if path <= self._last:
            raise ValueError(f"{path} does not follow {self._last}")
        self._last = path
        self._digest.update(json.dumps([path, list(shape), np.dtype(dtype).name]).encode())

    def add(self, part: np.ndarray) -> None:
        """The leaf's next rows."""
        # As bytes, since the buffer protocol knows no bfloat16.
        self._digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8))

    def hexdigest(self) -> str:
        """In hexadecimal."""
        return self._digest.hexdigest()


def checksum(tree: Any) -> str:
    """SHA-256, in hexadecimal, of a tree's paths, shapes, dtypes and bytes.

    The same for numpy and JAX arrays, on any mesh and host count, and for keys 1 and "1". At most
    one leaf at a time is on the host. In a job of several processes all of them make the call.
    """
    digest = TreeDigest()
    for path, leaf in sorted(_flatten(tree).items(), key=lambda item: item[0]):
        digest.start(path, leaf.shape, leaf.dtype)
        for part in _chunks(leaf):
            digest.add(part)
    return digest.hexdigest()
