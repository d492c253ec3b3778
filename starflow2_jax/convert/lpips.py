"""LPIPS from files: torchvision's VGG-16 and the linear weights of the LPIPS release."""

import contextlib
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
from flax import nnx

from starflow2_jax.convert import table
from starflow2_jax.convert.table import Entry, plain
from starflow2_jax.convert.tensor_files import open_tensors
from starflow2_jax.errors import UserError
from starflow2_jax.models.lpips import LPIPS, VGG_PARTS

_UNUSED = re.compile(r"classifier\..*|scaling_layer\..*")


def entries() -> Iterator[Entry]:
    """Every parameter and its tensor."""
    place = 0  # in torchvision's list of convolutions, activations and pools
    for p, widths in enumerate(VGG_PARTS):
        for c in range(len(widths)):
            yield plain(
                f"parts.{p}.{c}.kernel",
                f"features.{place}.weight",
                lambda w: w.transpose(2, 3, 1, 0),
                lambda k: k.transpose(3, 2, 0, 1),
            )
            yield plain(f"parts.{p}.{c}.bias", f"features.{place}.bias")
            place += 2
        place += 1
        yield plain(
            f"weights.{p}",
            f"lin{p}.model.1.weight",
            np.ravel,
            lambda a: a.reshape(1, -1, 1, 1),
        )


def load_lpips(files: Sequence[pathlib.Path]) -> LPIPS:
    """The network that some files hold together.

    Args:
        files: `.pth` (which needs torch) or `.safetensors`: `features.*` of torchvision's VGG-16
            and `lin*.model.1.weight` of LPIPS 0.1 on VGG, in one file or in several.

    Raises:
        UserError: no such file, damaged, or tensors that do not make up the network.
    """
    tensors: dict[str, np.ndarray] = {}
    with contextlib.ExitStack() as opened:
        for path in files:
            file = opened.enter_context(open_tensors(path))
            for name in file.shapes:
                if not _UNUSED.fullmatch(name):
                    tensors[name] = np.array(file.read(name), np.float32)
    try:
        return table.from_tensors(lambda: LPIPS(rngs=nnx.Rngs(0)), list(entries()), tensors)
    except ValueError as error:
        where = ", ".join(map(str, files))
        raise UserError(f"{where}: no LPIPS on VGG-16: {' '.join(str(error).split())}") from error
