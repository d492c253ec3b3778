"""Inception-v3 of the Fréchet distance from its public PyTorch file."""

import pathlib

from starflow2_jax.convert import table
from starflow2_jax.convert.table import plain
from starflow2_jax.convert.tensor_files import open_tensors
from starflow2_jax.errors import UserError
from starflow2_jax.models import inception
from starflow2_jax.models.inception import Inception


def load_inception(file: pathlib.Path) -> Inception:
    """The network of a file.

    Args:
        file: `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid) or
            `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity), which are the same and
            need torch to be read; or their tensors as `.safetensors`. The classifier is passed
            over.

    Raises:
        UserError: no such file, damaged, or tensors that do not make up the network.
    """
    wanted = inception.shapes()
    with open_tensors(file) as opened:
        there = {
            name: shape
            for name, shape in opened.shapes.items()
            if not name.startswith("fc.") and not name.endswith(".num_batches_tracked")
        }
        problems = table.misfits([plain(name, name) for name in wanted], wanted, there)
        if problems:
            listed = "; ".join(problems)[:2000]
            raise UserError(f"{file}: no Inception-v3 of the Fréchet distance: {listed}")
        return Inception.from_tensors({name: opened.read(name) for name in wanted})
