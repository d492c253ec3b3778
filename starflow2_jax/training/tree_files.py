"""Trees of arrays on disk: what checkpoints and stand-alone exports have in common; the exports.

On disk, trees are nested dicts of arrays with string keys; any pytree may be passed in, and comes
back as itself where an abstract one is given.
"""

import contextlib
import gc
import logging
import os
import pathlib
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from starflow2_jax.errors import UserError
from starflow2_jax.training.piecewise import Pieces, piecewise_checkpointer

FORMAT_VERSION = 1
"""Of checkpoints and exports; raised when what they hold changes its meaning."""

_VERSION_KEY = "format_version"

Path = tuple[str, ...]
Flat = dict[Path, Any]


# Trees


def flatten(tree: Any) -> Flat:
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


def nest(flat: Flat) -> dict[str, Any]:
    """The inverse of `flatten`, as nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def stored_leaves(metadata: Any) -> Flat:
    """Orbax's metadata of a tree: leaves with `shape` and `dtype`."""
    return flatten(metadata.tree)


def listed(items: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    return ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")


def check_same(where: str, stored: Flat, wanted: Flat, same_dtype: bool) -> None:
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
        raise UserError(
            f"{where} holds another tree: {listed(wrong)}; use the config that wrote it"
        )


def restore_args(wanted: Any) -> ocp.args.PyTreeRestore:
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
        nest(item),
        restore_args=nest({path: one(leaf) for path, leaf in wanted.items()}),
        partial_restore=True,
    )


def rebuild(abstract: Any, nested: Any) -> Any:
    """The restored leaves in the abstract tree's own structure."""
    flat = flatten(nested)
    return jax.tree.unflatten(
        jax.tree.structure(abstract), [flat[path] for path in flatten(abstract)]
    )


def with_version(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with the format's version in it."""
    if _VERSION_KEY in metadata:
        raise ValueError(f"the metadata key {_VERSION_KEY!r} is taken")
    return {_VERSION_KEY: FORMAT_VERSION, **metadata}


def without_version(where: str, metadata: Any) -> dict[str, Any]:
    """The inverse of `with_version`.

    Raises:
        UserError: another version, or none.
    """
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
def reading(folder: pathlib.Path, what: str, advice: str) -> Iterator[None]:
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
    nested = nest(flatten(tree))
    in_pieces = any(isinstance(leaf, Pieces) for leaf in jax.tree.leaves(nested))
    make = piecewise_checkpointer if in_pieces else _tree_checkpointer
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(make()) as checkpointer:
            checkpointer.save(
                fresh,
                args=ocp.args.Composite(
                    tree=ocp.args.PyTreeSave(nested),
                    metadata=ocp.args.JsonSave(with_version(metadata)),
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
        with reading(path, "weights", "write or convert them again"):
            return stored_leaves(checkpointer.metadata(path).item_metadata.tree)


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
        with reading(path, "weights", "write or convert them again"):
            restored = checkpointer.restore(
                path, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
            )
            metadata = without_version(where, restored.metadata)
            stored = stored_leaves(checkpointer.metadata(path).item_metadata.tree)
        if abstract is None:
            wanted = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in stored.items()}
        else:
            wanted = flatten(abstract)
            check_same(where, stored, wanted, same_dtype=False)
        with reading(path, "weights", "write or convert them again"):
            restored = checkpointer.restore(
                path, args=ocp.args.Composite(tree=restore_args(wanted))
            )
    tree = restored.tree
    return (tree if abstract is None else rebuild(abstract, tree)), metadata
