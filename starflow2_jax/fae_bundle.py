"""Directories of a DINOv2, and of an FAE with the frozen ViT whose features it takes.

Of a ViT: see `model_folder`. Of an FAE:

DIR/model.json        shape, checksum of all arrays, and where they come from
DIR/weights/          every parameter of the FAE
DIR/statistics.json   mean and standard deviation of each feature and each latent channel
DIR/vit/              the ViT's directory; none where features are bare patches
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from starflow2_jax import model_folder
from starflow2_jax.errors import UserError
from starflow2_jax.models import dinov2, fae
from starflow2_jax.models.dinov2 import DinoV2, DinoV2Config
from starflow2_jax.models.fae import FAE, FAEConfig, FeatureFAE, Statistics
from starflow2_jax.models.latents import LatentCodec
from starflow2_jax.parallel.distributed import fetch
from starflow2_jax.provenance import write_json
from starflow2_jax.training.checkpoint import checksum, save_tree

VIT, FAMILY = "dinov2", "fae"
VIT_FOLDER = "vit"
STATISTICS_FILE = "statistics.json"


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


def load_vit(folder: pathlib.Path, dtype: str | None = None, mesh: Mesh | None = None) -> DinoV2:
    """Reads a directory that `save_vit` or a conversion wrote, or the workdir of a finished run.

    Args:
        folder: see above.
        dtype: of the parameters; default: as stored.
        mesh: each process reads what its devices hold of it; default: all on the first device.

    Raises:
        UserError: it is none, or damaged.
    """
    folder = model_folder.finished(folder)
    config, _ = read_vit(folder)
    make = lambda: DinoV2(config, rngs=nnx.Rngs(0))
    return model_folder.load_parameters(folder / model_folder.WEIGHTS, make, dtype, mesh)


def save_statistics(path: pathlib.Path, model: FAE) -> None:
    """Writes the statistics of features and latents as JSON.

    Raises:
        UserError: it cannot be written.
    """
    parts = {"features": model.features, "latents": model.latents}
    record = {
        name: {key: fetch(getattr(part, key)[...]).tolist() for key in ("mean", "std")}
        for name, part in parts.items()
    }
    write_json(path, record)


def _read_statistics(
    path: pathlib.Path, channels: Mapping[str, int]
) -> dict[str, dict[str, np.ndarray]]:
    """float32 `mean` and `std` of a file's parts, of which each must have so many channels."""
    if not path.is_file():
        raise UserError(
            f"there is no statistics file {path}: without mean and standard deviation of the "
            "latents an FAE cannot be used; train it to the end, or copy its whole directory"
        )
    parts = {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for name, count in channels.items():
            found = {key: np.asarray(record[name][key], np.float32) for key in ("mean", "std")}
            for key, value in found.items():
                if value.shape != (count,):
                    raise UserError(
                        f"{path}: {name}.{key} has {value.size} channels, the FAE has {count}"
                    )
                if not np.isfinite(value).all() or (key == "std" and (value <= 0).any()):
                    raise UserError(f"{path}: {name}.{key} has numbers that are none it can have")
            parts[name] = found
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no statistics of an FAE ({error!r})") from error
    return parts


def load_statistics(path: pathlib.Path, model: FAE) -> None:
    """Puts the statistics of a file into a model.

    Raises:
        UserError: no such file, damaged, or of another number of channels.
    """
    parts: dict[str, Statistics] = {"features": model.features, "latents": model.latents}
    channels = {name: part.mean.shape[0] for name, part in parts.items()}
    for name, found in _read_statistics(path, channels).items():
        parts[name].fill(**found)


def load_latent_codec(folder: pathlib.Path, noise_std: float) -> LatentCodec:
    """What training on an FAE's cached latents needs of it: its statistics, and no parameters.

    Args:
        folder: that `save_fae` wrote, or the work directory of a finished run.
        noise_std: of the noise on the normalised latents.

    Raises:
        UserError: it is none, damaged, or its statistics are missing.
    """
    folder = model_folder.finished(folder)
    config, _ = read_fae(folder)
    found = _read_statistics(folder / STATISTICS_FILE, {"latents": config.channels})["latents"]
    mean, std = jnp.asarray(found["mean"]), jnp.asarray(found["std"])
    return LatentCodec(mean, std, config.tokens, noise_std)


def save_fae(
    folder: pathlib.Path, model: FeatureFAE, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes an FAE's directory, its ViT in it.

    Raises:
        UserError: its files cannot be written.
    """
    params = nnx.to_pure_dict(nnx.state(model.fae, nnx.Param))
    save_tree(folder / model_folder.WEIGHTS, params, {}, overwrite=True)
    if model.vit is not None:
        save_vit(folder / VIT_FOLDER, model.vit)
    save_statistics(folder / STATISTICS_FILE, model.fae)
    record = {"checksum": checksum(nnx.to_pure_dict(nnx.state(model))), **(metadata or {})}
    model_folder.write_description(folder, FAMILY, model.config, record)


def read_fae(folder: pathlib.Path) -> tuple[FAEConfig, dict[str, Any]]:
    """The shape of a directory's FAE, and all of its `model.json`.

    Raises:
        UserError: no directory of an FAE, or damaged.
    """
    return model_folder.read_description(folder, "an FAE", {FAMILY: fae.from_json})


def load_fae(
    folder: pathlib.Path, dtype: str | None = None, mesh: Mesh | None = None
) -> FeatureFAE:
    """Reads a directory that `save_fae` wrote, or the work directory of a finished run.

    Args:
        folder: see above.
        dtype: of the parameters; default: as stored.
        mesh: each process reads what its devices hold of it; default: all on the first device.

    Raises:
        UserError: it is none, damaged, its statistics are missing, or its ViT has another width.
    """
    folder = model_folder.finished(folder)
    config, _ = read_fae(folder)
    vit = read_vit(folder / VIT_FOLDER)[0] if (folder / VIT_FOLDER).is_dir() else None
    try:
        graphdef, state = nnx.split(
            nnx.eval_shape(lambda: FeatureFAE(config, vit, rngs=nnx.Rngs(0)))
        )
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    model = nnx.merge(graphdef, state)
    make = lambda: FAE(config, rngs=nnx.Rngs(0))
    model.fae = model_folder.load_parameters(folder / model_folder.WEIGHTS, make, dtype, mesh)
    for part, channels in (("features", config.features), ("latents", config.channels)):
        setattr(model.fae, part, Statistics(channels))
    load_statistics(folder / STATISTICS_FILE, model.fae)
    if vit is not None:
        model.vit = load_vit(folder / VIT_FOLDER, dtype, mesh)
    return model
