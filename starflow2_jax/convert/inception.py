"""Inception-v3 of the Fréchet distance from its public PyTorch file."""

import pathlib
from collections.abc import Iterator

import numpy as np
from flax import nnx

from starflow2_jax.convert import table
from starflow2_jax.convert.table import Entry, plain
from starflow2_jax.convert.tensor_files import open_tensors
from starflow2_jax.errors import UserError
from starflow2_jax.models.inception import Inception

_UNIT = {
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}


def entries() -> Iterator[Entry]:
    """Every parameter and its tensor."""
    yield from table.linear("fc", "fc")
    for path in table.shapes_of(lambda: Inception(rngs=nnx.Rngs(0))):
        part, _, leaf = path.rpartition(".")
        name = part.removeprefix("stem.")
        if part == "fc":
            continue
        if leaf == "kernel":
            forth = lambda w: w.transpose(2, 3, 1, 0)
            yield plain(path, f"{name}.conv.weight", forth, lambda k: k.transpose(3, 2, 0, 1))
        else:
            yield plain(path, f"{name}.{_UNIT[leaf]}")


def load_inception(file: pathlib.Path) -> Inception:
    """The network of a file.

    Args:
        file: `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid) or
            `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity), which are the same and
            need torch to be read; or their tensors as `.safetensors`.

    Raises:
        UserError: no such file, damaged, or tensors that do not make up the network.
    """
    with open_tensors(file) as opened:
        tensors = {
            name: np.array(opened.read(name), np.float32)
            for name in opened.shapes
            if not name.endswith(".num_batches_tracked")
        }
    try:
        return table.from_tensors(lambda: Inception(rngs=nnx.Rngs(0)), list(entries()), tensors)
    except ValueError as error:
        reason = " ".join(str(error).split())[:2000]
        raise UserError(f"{file}: no Inception-v3 of the Fréchet distance: {reason}") from error
