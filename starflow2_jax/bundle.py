"""A model directory: weights, shapes, tokenizer and codec, all that sampling and evaluation need.

DIR/model.json   shapes, image size, and where the weights come from
DIR/weights/     every parameter, and the codec's arrays
DIR/fae/         the FAE, see `fae_bundle`, where images are its latents
DIR/tokenizer/   see `data.tokenizer`
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from starflow2_jax import model_folder
from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.data.tokenizer import Tokenizer, load_tokenizer
from starflow2_jax.errors import UserError
from starflow2_jax.fae_bundle import load_fae, save_fae
from starflow2_jax.models import qwen2_5_vl
from starflow2_jax.models.codec import Codec
from starflow2_jax.models.fae_codec import FAECodec
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.patches import PatchCodec
from starflow2_jax.models.pretzel import Pretzel, PretzelConfig, SpecialTokens
from starflow2_jax.parallel import rules
from starflow2_jax.parallel.distributed import fetch
from starflow2_jax.provenance import write_json
from starflow2_jax.training.checkpoint import checksum, load_tree, save_tree

__all__ = [
    "Bundle",
    "checksum",
    "codec_shapes",
    "config_from_json",
    "load_bundle",
    "save_bundle",
]

MODEL_FILE = "model.json"
FAE_FOLDER = "fae"
FORMAT_VERSION = 2
CODEC_ARRAYS = ("order", "basis", "waves", "divisors")


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What a model directory holds."""

    model: Pretzel
    codec: Codec
    tokenizer: Tokenizer
    image: ImageShape
    metadata: Mapping[str, Any]

    def checksum(self) -> str:
        """Of all that scores depend on: the model's weights, and the codec's with its noise.

        SHA-256 in hexadecimal, see `training.digest.checksum`.
        """
        tree = {"model": nnx.to_pure_dict(nnx.state(self.model))}
        if isinstance(self.codec, FAECodec):
            noise = np.array(self.codec.noise_std)
            tree["codec"] = {"fae": nnx.to_pure_dict(nnx.state(self.codec.model)), "noise": noise}
        else:
            tree["codec"] = _codec_arrays(self.codec)
        return checksum(tree)


def _codec_arrays(codec: PatchCodec) -> dict[str, jax.Array]:
    return {name: getattr(codec, name) for name in CODEC_ARRAYS}


def codec_shapes(
    config: PretzelConfig, sharding: jax.sharding.Sharding | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the arrays of a model's patch codec are, by name."""
    patches, values = config.flow.channels, config.flow.tokens
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    return {
        "order": struct((patches * values,), jnp.int32),
        "basis": struct((values, values), jnp.float32),
        "waves": struct((values, patches, patches), jnp.float32),
        "divisors": struct((values, patches), jnp.float32),
    }


def config_from_json(record: Mapping[str, Any]) -> PretzelConfig:
    """The inverse of `dataclasses.asdict` of a `PretzelConfig`."""
    flow = dict(record["flow"])
    for key in ("shallow_layers", "shallow_orders"):
        flow[key] = tuple(flow[key])
    return PretzelConfig(
        vlm=qwen2_5_vl.from_json(record["vlm"]),
        flow=FlowConfig(**flow),
        special=SpecialTokens(**record["special"]),
        dtype=record["dtype"],
    )


def save_bundle(folder: pathlib.Path, bundle: Bundle) -> None:
    """Writes the directory; `model.json` comes last: without it the directory is no model."""
    bundle.tokenizer.save(folder / "tokenizer")
    tree = {"model": nnx.to_pure_dict(nnx.state(bundle.model))}
    of_codec: dict[str, Any] = {}
    if isinstance(bundle.codec, FAECodec):
        save_fae(folder / FAE_FOLDER, bundle.codec.model)
        of_codec["fae"] = {"noise_std": bundle.codec.noise_std, "dtype": bundle.codec.dtype}
    else:
        tree["codec"] = fetch(_codec_arrays(bundle.codec))
    save_tree(folder / model_folder.WEIGHTS, tree, {}, overwrite=True)
    record = {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(bundle.model.config),
        # Whoever loads the model has pixels.
        "image": dataclasses.asdict(dataclasses.replace(bundle.image, moments=0)),
        **of_codec,
        **bundle.metadata,
    }
    write_json(folder / MODEL_FILE, record)


def _description(folder: pathlib.Path) -> pathlib.Path:
    """The `model.json` of a model directory or of a finished run's, there or not."""
    if not (folder / MODEL_FILE).is_file() and (folder / "model" / MODEL_FILE).is_file():
        folder = folder / "model"
    return folder / MODEL_FILE


def is_bundle(folder: pathlib.Path) -> bool:
    """Whether a folder is a model of this kind, or a finished run's: one that draws."""
    try:
        record = json.loads(_description(folder).read_text(encoding="utf-8"))
        return "flow" in record["model"] and "special" in record["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_bundle(folder: pathlib.Path, dtype: str | None = None, mesh: Mesh | None = None) -> Bundle:
    """Reads a model directory, or the work directory of a finished run.

    Args:
        folder: see above.
        dtype: of the model's parameters; default: as stored.
        mesh: the model is cut over it by `rules.SERVING`, each process reads what its devices hold;
            the codec is on every device. Default: all on the first device.

    Raises:
        UserError: it is neither, or damaged.
    """
    path = _description(folder)
    folder = path.parent
    if not path.is_file():
        raise UserError(f"{folder}: no {MODEL_FILE}; expected a model or a finished run's workdir")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format_version"]
        if version != FORMAT_VERSION:  # what it holds may be anything
            raise UserError(
                f"{path} has format version {version}, this package reads {FORMAT_VERSION}"
            )
        config = config_from_json(record["model"])
        image = ImageShape(**record["image"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a model description ({error})") from error
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Pretzel(config, rngs=nnx.Rngs(0))))
    shape = (image.height, image.width, image.channels)
    weights, part = folder / model_folder.WEIGHTS, ("model",)
    wanted = {
        "model": model_folder.stored_parameters(weights, abstract, dtype, mesh, rules.SERVING, part)
    }
    everywhere: jax.sharding.Sharding = (
        SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else NamedSharding(mesh, P())
    )
    if "fae" not in record:
        wanted["codec"] = codec_shapes(config, everywhere)
    arrays, _ = load_tree(weights, wanted)
    nnx.replace_by_pure_dict(abstract, arrays["model"])
    if "fae" in record:
        try:
            fae = jax.device_put(load_fae(folder / FAE_FOLDER), everywhere)
            codec = FAECodec(fae, shape, **record["fae"])
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} does not fit {folder / FAE_FOLDER} ({error})") from error
    else:
        codec = PatchCodec(**arrays["codec"], shape=shape)
    return Bundle(
        model=nnx.merge(graphdef, abstract),
        codec=codec,
        tokenizer=load_tokenizer(folder / "tokenizer"),
        image=image,
        metadata=record,
    )
