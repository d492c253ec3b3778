"""Small files that say where records lie, made once and mapped into memory afterwards."""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from starflow2_jax.errors import UserError

FOLDER = ".starflow2_index"
"""Beside the first file of a source, unless another folder is given."""

Arrays = Mapping[str, np.ndarray]


def cached_index(
    files: Sequence[pathlib.Path],
    folder: str | os.PathLike[str] | None,
    version: str,
    build: Callable[[], Arrays],
) -> Arrays:
    """The index of these files, from disk where it was built before.

    It belongs to the names, sizes and modification times of the files. Several processes may build
    it at once: each writes its own and renames it, and the first stays.

    Args:
        files: of the source, in order.
        folder: for indices; default `FOLDER` beside the first file.
        version: of what `build` makes.
        build: makes the arrays.

    Returns:
        The arrays, mapped read-only: worker processes share them.

    Raises:
        UserError: the folder cannot be written to.
    """
    stats = [(file, file.stat()) for file in files]
    key = [version, *([str(f.absolute()), s.st_size, s.st_mtime_ns] for f, s in stats)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    base = pathlib.Path(folder).expanduser() if folder else files[0].absolute().parent / FOLDER
    place = base / digest
    if not place.is_dir():
        arrays = build()
        try:
            base.mkdir(parents=True, exist_ok=True)
            fresh = pathlib.Path(tempfile.mkdtemp(dir=base, prefix=".new-"))
            try:
                for name, array in arrays.items():
                    np.save(fresh / f"{name}.npy", array)
                fresh.chmod(0o755)
                fresh.rename(place)
            except OSError:
                shutil.rmtree(fresh, ignore_errors=True)
                if not place.is_dir():  # else another process was first
                    raise
        except OSError as error:
            raise UserError(
                f"cannot write the index of {files[0]} to {base}: {error.strerror}; give a folder "
                "that can be written to with index= (of `starflow2 data latents`: --index)"
            ) from error
    return {f.stem: np.load(f, mmap_mode="r") for f in sorted(place.glob("*.npy"))}
