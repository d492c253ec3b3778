"""Directories of a DINOv2, and of an FAE with the frozen ViT whose features it takes.

Of a ViT: see `model_folder`.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from flax import nnx

from starflow2_jax import model_folder
from starflow2_jax.models import dinov2
from starflow2_jax.models.dinov2 import DinoV2, DinoV2Config
from starflow2_jax.training.checkpoint import save_tree

VIT = "dinov2"


def save_vit(
    folder: pathlib.Path, model: DinoV2, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a ViT's directory.

    Raises:
        UserError: its files cannot be written.
    """
    weights = folder / model_folder.WEIGHTS
    save_tree(weights, nnx.to_pure_dict(nnx.state(model)), {}, overwrite=True)
    model_folder.write_description(folder, VIT, model.config, metadata or {})


def read_vit(folder: pathlib.Path) -> tuple[DinoV2Config, dict[str, Any]]:
    """The shape of a directory's ViT, and all of its `model.json`.

    Raises:
        UserError: no directory of a ViT, or damaged.
    """
    return model_folder.read_description(folder, "a DINOv2", {VIT: dinov2.from_json})


def load_vit(folder: pathlib.Path, dtype: str | None = None) -> DinoV2:
    """Reads a directory that `save_vit` or a conversion wrote, or the workdir of a finished run.

    Args:
        folder: see above.
        dtype: of the parameters; default: as stored.

    Raises:
        UserError: it is none, or damaged.
    """
    folder = model_folder.finished(folder)
    config, _ = read_vit(folder)
    make = lambda: DinoV2(config, rngs=nnx.Rngs(0))
    return model_folder.load_parameters(folder / model_folder.WEIGHTS, make, dtype)
