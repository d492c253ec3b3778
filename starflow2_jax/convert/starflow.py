"""STARFlow and TarFlow parameters and the names of the released checkpoints.

The names are those of the released torch state dicts: `blocks.{k}.` with `sos_embed`, `pos_embed`,
`class_embed`, `proj_txt`, `proj_in`, `attn_blocks.{l}.`, `final_norm`, `proj_out`.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from starflow2_jax.convert import table as tables
from starflow2_jax.convert.table import Entry, af_block, by_path, plain
from starflow2_jax.errors import UserError
from starflow2_jax.models.starflow import (
    ImageFlow,
    ImageFlowConfig,
    StarFlowConfig,
    TarFlowConfig,
)

__all__ = ["by_path", "from_tensors", "starflow_config", "table", "tarflow_config", "to_tensors"]

# Constants of the released modules, which nothing reads.
_UNUSED = re.compile(r"var|blocks\.\d+\.attn_mask|feat_rope\.(freqs_cos|freqs_sin)")


def table(config: ImageFlowConfig) -> list[Entry]:
    """Every parameter of an `ImageFlow` and where it comes from."""
    entries = []
    for k, block in enumerate(config.blocks()):
        entries += af_block(f"blocks.{k}", f"blocks.{k}", block)
    if config.scale == "none":
        entries.append(plain("prior_variance", "var"))
    return entries


def unused(config: ImageFlowConfig, names: Sequence[str]) -> list[str]:
    """Those of the source names that are buffers without a meaning."""
    meant = {"var"} if config.scale == "none" else set()
    return [name for name in names if name not in meant and _UNUSED.fullmatch(name)]


def from_tensors(config: ImageFlowConfig, tensors: Mapping[str, np.ndarray]) -> ImageFlow:
    """An `ImageFlow` with these weights, in their dtype; unused buffers are passed over.

    Raises:
        ValueError: names that are missing or unknown, or shapes that differ; all of them at once.
    """
    ignored = set(unused(config, list(tensors)))
    return tables.from_tensors(
        lambda: ImageFlow(config, rngs=nnx.Rngs(0)),
        table(config),
        {name: a for name, a in tensors.items() if name not in ignored},
    )


def to_tensors(config: ImageFlowConfig, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by dotted path (parameters or their gradients) -> arrays by source name."""
    return dict(tables.to_tensors(table(config), params))


def _taken(arguments: Mapping[str, Any], known: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The arguments over their defaults.

    Raises:
        UserError: one that is unknown, or needed and missing.
    """
    for key in arguments:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{model} has no argument {key} that is supported{hint}")
    taken = {**known, **arguments}
    for key, value in taken.items():
        if value is ...:
            raise UserError(f"{model} needs the argument {key}")
    return taken


def _check_depths(depths: Sequence[Any]) -> None:
    """Raises UserError where a block has no layers, which the release takes for the identity."""
    for depth in depths:
        if not isinstance(depth, int) or depth < 1:
            raise UserError(
                f"layers_per_block says {depth!r}: blocks without layers are not supported; "
                "expected at least 1 layer in each block"
            )


def starflow_config(arguments: Mapping[str, Any], dtype: str = "float32") -> StarFlowConfig:
    """The shape of a STARFlow from the release's constructor arguments.

    Args:
        arguments: in_channels, img_size (of the latents), patch_size, channels, num_blocks,
            layers_per_block (a number, or one for each block), head_dim; rope, pt_seq_len, sos,
            txt_size, txt_dim, cond_top_only, use_softplus, use_final_norm, soft_clip, seq_order.
        dtype: of the arithmetic.

    Raises:
        UserError: an argument that is unknown, missing or not supported.
    """
    needed = ("in_channels", "img_size", "patch_size", "channels", "num_blocks", "layers_per_block")
    a = _taken(
        arguments,
        {
            **dict.fromkeys(needed, ...),
            "head_dim": 64,
            "rope": 1,
            "pt_seq_len": None,
            "sos": 0,
            "txt_size": 0,
            "txt_dim": 0,
            "cond_top_only": 0,
            "use_softplus": 0,
            "use_final_norm": 0,
            "soft_clip": 0.0,
            "seq_order": "R2L",
        },
        "STARFlow",
    )
    if not a["rope"]:
        raise UserError("STARFlow without rotary positions (rope = 0) is not supported")
    if a["seq_order"] not in ("L2R", "R2L"):
        raise UserError(f"seq_order is {a['seq_order']!r}; expected 'L2R' or 'R2L'")
    depths = a["layers_per_block"]
    depths = (depths,) * a["num_blocks"] if isinstance(depths, int) else tuple(depths)
    if len(depths) != a["num_blocks"]:
        raise UserError(f"layers_per_block lists {len(depths)} blocks of {a['num_blocks']}")
    _check_depths(depths)
    return StarFlowConfig(
        channels=a["in_channels"],
        side=a["pt_seq_len"] or a["img_size"] // a["patch_size"],
        width=a["channels"],
        deep_width=a["channels"],
        depths=depths,
        head_dim=a["head_dim"],
        patch=a["patch_size"],
        first_order="flip" if a["seq_order"] == "L2R" else "keep",
        text_length=a["txt_size"],
        text_width=a["txt_dim"] if a["txt_size"] else 0,
        text_everywhere=not a["cond_top_only"],
        start=bool(a["sos"]),
        scale="softplus" if a["use_softplus"] else "exp",
        soft_clip=float(a["soft_clip"]) or None,
        final_norm=bool(a["use_final_norm"]),
        dtype=dtype,
    )


def tarflow_config(arguments: Mapping[str, Any], dtype: str = "float32") -> TarFlowConfig:
    """The shape of a TarFlow from the release's constructor arguments.

    Args:
        arguments: in_channels, img_size, patch_size, channels, num_blocks, layers_per_block, nvp,
            num_classes, head_dim.
        dtype: of the arithmetic.

    Raises:
        UserError: an argument that is unknown or missing.
    """
    needed = ("in_channels", "img_size", "patch_size", "channels", "num_blocks", "layers_per_block")
    defaults = {**dict.fromkeys(needed, ...), "nvp": True, "num_classes": 0, "head_dim": 64}
    a = _taken(arguments, defaults, "TarFlow")
    _check_depths([a["layers_per_block"]])
    return TarFlowConfig(
        channels=a["in_channels"],
        size=a["img_size"],
        patch=a["patch_size"],
        width=a["channels"],
        count=a["num_blocks"],
        depth=a["layers_per_block"],
        classes=a["num_classes"],
        scale="exp" if a["nvp"] else "none",
        head_dim=a["head_dim"],
        dtype=dtype,
    )
