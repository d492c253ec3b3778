"""A folder of image files as a source, in the order of their names."""

import os
import pathlib

from starflow2_jax.data.images import SUFFIXES
from starflow2_jax.data.sources.record import Record, Source
from starflow2_jax.errors import UserError


class FolderSource(Source):
    """A record for each image file in a folder and its sub-folders.

    Its fields: `image`, the file's bytes, and `file`, its path below the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Finds the files; reads none.

        Raises:
            UserError: no such folder, or no images in it.
        """
        self._root = pathlib.Path(folder).expanduser().absolute()
        if not self._root.is_dir():
            raise UserError(f"data source: there is no folder {self._root}")
        self._files = sorted(
            path.relative_to(self._root).as_posix()
            for path in self._root.rglob("*")
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        )
        if not self._files:
            raise UserError(f"{self._root} holds no image files ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The path below the folder."""
        return self._files[index]

    def __getitem__(self, index: int) -> Record:
        file = self._files[index]
        data = (self._root / file).read_bytes()
        return Record(str(self._root / file), {"image": data, "file": file})
