"""Where results come from: the config as JSON, the git revision, a work directory's record."""

import contextlib
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

import starflow2_jax
from starflow2_jax.errors import UserError

WORKDIR_FORMAT_VERSION = 1

MAY_CHANGE = (
    "config.topology",
    "config.slices",
    "config.mesh",
    "config.remat",
    "config.*.remat",
    "config.stages.*.optimizer.accumulate",
    "config.cpu_devices",
    "config.checkpoint",
    "config.log_every",
    "config.log_seconds",
    "config.data.threads",
    "config.data.workers",
    "config.profile",
    "config.wandb",
    "config.inception",
)
"""Parts of a config that a run may be continued with others of: how, not what it trains.

A `*` stands for any one name.
"""


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()
"""Stands for the value of a key that one of two configs lacks."""


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, ml_collections.ConfigDict):
        return {name: _plain(value[name], f"{key}.{name}") for name in value}
    if isinstance(value, Mapping):
        return {str(name): _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, pathlib.PurePath):
        return str(value)
    # numpy scalars know how to become a Python number, and are no ints or floats themselves.
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise UserError(
        f"{key} is {value!r} of type {type(value).__name__}; a config holds only None, bool, "
        "finite numbers, str, lists, tuples and groups of those"
    )


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A config as plain JSON types: references resolved, tuples as lists.

    Raises:
        UserError: a value that JSON cannot hold (a function, a NaN, ...); names its key.
    """
    return _plain(config, "config")


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        key = f"{prefix}.{name}"
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, key)
        else:
            flat[key] = value
    return flat


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The full keys in which two configs (as `to_json` gives them) differ, in sorted order.

    Returns:
        {"config.a.b": (old value, new value)}; `ABSENT` stands for a key that one side lacks.
    """
    a, b = _flatten(old, "config"), _flatten(new, "config")
    pairs = {key: (a.get(key, ABSENT), b.get(key, ABSENT)) for key in sorted(a | b)}
    # 1 == 1.0 == True in Python; in a config an int is not a bool, but may stand for a float.
    return {
        key: (x, y)
        for key, (x, y) in pairs.items()
        if x != y or isinstance(x, bool) != isinstance(y, bool)
    }


def git_revision() -> str | None:
    """The commit this package runs from, with `-dirty` behind it where tracked files differ.

    None where git or the repository is missing (an installed package), or git fails.
    """
    root = pathlib.Path(starflow2_jax.__file__).resolve().parent.parent

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository, which says nothing.
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON; see `write_text`.

    Raises:
        UserError: the folder cannot be written to.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: pathlib.Path, content: str) -> None:
    """Writes a file beside `path` and renames it, so that the file is never half there.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(content)
            # mkstemp makes files that only their owner reads; results are for everybody.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _may_change(key: str) -> bool:
    names = key.split(".")
    patterns = [pattern.split(".") for pattern in MAY_CHANGE]
    return any(
        len(names) >= len(pattern)
        and all(ours in ("*", name) for ours, name in zip(pattern, names, strict=False))
        for pattern in patterns
    )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _local_folder(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """A work directory's absolute path.

    Raises:
        UserError: it is a remote address.
    """
    if "://" in str(workdir):
        raise UserError(
            f"workdir {workdir} is a remote address; give a folder of a mounted file system"
        )
    return pathlib.Path(workdir).expanduser().absolute()


def _check_record(path: pathlib.Path, text: str, config: Mapping[str, Any], use: str) -> None:
    """Checks that the record of a work directory is this config's; tells of another revision.

    Args:
        path: of the record.
        text: its content.
        config: as `to_json` gives it.
        use: what may be done where it is another one's, for the message.

    Raises:
        UserError: see `claim_workdir`.
    """
    try:
        record = json.loads(text)
        version, old = record["format_version"], dict(record["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the record of a run (JSON with format_version and config); "
            "use another workdir"
        ) from error
    if version != WORKDIR_FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, this package reads {WORKDIR_FORMAT_VERSION}; "
            "use another workdir, or the package version that wrote it "
            f"({record.get('package_version')})"
        )
    differing = {
        key: pair for key, pair in differing_keys(old, config).items() if not _may_change(key)
    }
    if differing:
        listed = [f"{key} ({_show(x)} there, {_show(y)} now)" for key, (x, y) in differing.items()]
        if len(listed) > 20:
            listed[20:] = [f"and {len(listed) - 20} more"]
        raise UserError(
            f"{path.parent} belongs to another config; differing keys: {', '.join(listed)}; {use}"
        )
    revision = git_revision()
    if record.get("git_revision") != revision:
        print(
            f"starflow2: note: {path.parent} was started at revision "
            f"{record.get('git_revision')}, this is {revision}",
            file=sys.stderr,
        )


def check_workdir(
    workdir: str | os.PathLike[str], config: ml_collections.ConfigDict
) -> pathlib.Path:
    """Checks that a work directory is this config's, as `claim_workdir` does, and makes nothing.

    Returns:
        The directory, absolute.

    Raises:
        UserError: no run has begun in it, it belongs to another config or to another format
            version, cannot be read, or is a remote address.
    """
    workdir = _local_folder(workdir)
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is not the work directory of a run: it has no {path.name}")
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot use workdir {workdir}: {error.strerror}") from error
    _check_record(path, text, to_json(config), "give the config that the run was started with")
    return workdir


def claim_workdir(
    workdir: str | os.PathLike[str], config: ml_collections.ConfigDict
) -> pathlib.Path:
    """Makes the work directory this config's own, or checks that it already is.

    A new directory gets `config.json`: format_version, package_version, git_revision (or null) and
    config. It stays as the first run wrote it. Every process of a job may call this. What
    `MAY_CHANGE` names may be another one than there.

    Returns:
        The directory, absolute.

    Raises:
        UserError: the directory belongs to another config (the differing keys are listed) or to
            another format version, cannot be written to, or is a remote address.
    """
    workdir = _local_folder(workdir)
    path = workdir / "config.json"
    resolved = to_json(config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    except OSError as error:
        raise UserError(f"cannot use workdir {workdir}: {error.strerror}") from error
    if text is None:
        record = {
            "format_version": WORKDIR_FORMAT_VERSION,
            "package_version": starflow2_jax.__version__,
            "git_revision": git_revision(),
            "config": resolved,
        }
        write_json(path, record)
    else:
        use = "use another workdir, or the same config to continue"
        _check_record(path, text, resolved, use)
    return workdir


def missing_folders(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Of a folder and those above it the ones that are not there yet, the innermost first."""
    folder = pathlib.Path(folder).expanduser().absolute()
    return [path for path in (folder, *folder.parents) if not path.exists()]


def release_workdir(workdir: pathlib.Path, made: Sequence[pathlib.Path] = ()) -> None:
    """Gives a work directory free for another config, where nothing of a run stands in it yet.

    Args:
        workdir: that `claim_workdir` gave.
        made: folders that were made for it, as `missing_folders` gave them before: they go again.
    """
    path = workdir / "config.json"
    # Every process of a job does this: another one may be ahead. And what is no longer empty stays.
    with contextlib.suppress(OSError):
        if list(workdir.iterdir()) not in ([path], []):
            return
        path.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()
