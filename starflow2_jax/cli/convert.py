"""Convert weights of other releases to model directories, and back.

qwen2_5_vl: a Hugging Face folder of Qwen2.5-VL to a model directory; a model directory back to a
folder that `transformers` loads.
dinov2: a Hugging Face folder of DINOv2, or a file of the original release, to a model directory.
starflow, tarflow: a checkpoint of the released image models (.pth, which needs torch, or
.safetensors) to a model directory; a model directory back to .safetensors.
starflow2: a STARFlow2 model directory to a folder of safetensors with a model card; such a folder
back to a model directory.
"""

import argparse
import json
import pathlib
from typing import TYPE_CHECKING

from starflow2_jax.errors import UserError

if TYPE_CHECKING:
    from starflow2_jax.models.starflow import StarFlowConfig, TarFlowConfig

SUMMARY = "convert weights to a model directory, and back"

_EPILOG = """\
examples:
  starflow2 convert {family} CHECKPOINT.pth --out DIR --size {size}
  starflow2 convert {family} CHECKPOINT.safetensors --out DIR --config-json arguments.json
  starflow2 convert {family} DIR --out FILE.safetensors

sizes: {sizes}

--config-json holds the arguments of the released model's constructor: {arguments}

exit codes: 0 done; 2 bad input, with nothing written
"""

_QWEN_EPILOG = """\
examples:
  starflow2 convert qwen2_5_vl Qwen2.5-VL-7B-Instruct --out DIR
  starflow2 convert qwen2_5_vl Qwen2.5-VL-7B-Instruct --out DIR --mesh fsdp=8,tensor=2
  starflow2 convert qwen2_5_vl DIR --to hf --out FOLDER

Tensors keep their types. They are read and written one after another: a few are in memory.

exit codes: 0 done; 2 bad input, with nothing written
"""

_DINO_EPILOG = """\
examples:
  starflow2 convert dinov2 dinov2-giant --out DIR
  starflow2 convert dinov2 dinov2_vitg14_pretrain.pth --out DIR

Sizes S, B, L and g, with and without registers. The position table is interpolated to grids of
other sizes when it is used, as the source does it, or by --interpolation: to a size (transformers),
to a scale with an offset (original, without registers), to a size with antialias (with registers).

exit codes: 0 done; 2 bad input, with nothing written
"""

_STARFLOW2_EPILOG = """\
examples:
  starflow2 convert starflow2 RUN --out FOLDER         # a model directory or a finished run
  starflow2 convert starflow2 FOLDER --out DIR         # back: the same model directory, bit for bit

The folder has safetensors (with an index where they are several), config.json, the tokenizer, and
README.md: a model card, in which the licence is left to you. config.json records checksums of the
weights; the way back verifies them. A few tensors at a time are in memory.

exit codes: 0 done; 2 bad input, with nothing written
"""

# Constructor arguments, for the help text; the conversion checks them.
_COMMON = "in_channels, img_size, patch_size, channels, num_blocks, layers_per_block, head_dim"
_STARFLOW = (
    f"{_COMMON} (img_size of the latents), pt_seq_len, sos, txt_size, txt_dim, cond_top_only, "
    "use_softplus, use_final_norm, soft_clip, seq_order"
)
_TARFLOW = f"{_COMMON}, nvp, num_classes"

STARFLOW_SIZES = (
    "starflow_3b_t2i_256",
    "starflow_xl_imagenet256",
    "starflow_xlv2_imagenet256",
    "starflow_xxl_imagenet256",
    "starflow_xxlv2_imagenet256",
)
TARFLOW_SIZES = (
    "tarflow_imagenet64",
    "tarflow_imagenet64_classes",
    "tarflow_imagenet128_classes",
    "tarflow_afhq256",
    "tarflow_mnist",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds one sub-command for each kind of source."""
    kinds = parser.add_subparsers(
        metavar="KIND", required=True, help="whose checkpoint it is; each has a --help of its own"
    )
    for family, sizes, arguments in (
        ("starflow", STARFLOW_SIZES, _STARFLOW),
        ("tarflow", TARFLOW_SIZES, _TARFLOW),
    ):
        kind = kinds.add_parser(
            family,
            help=f"a released {family} checkpoint",
            epilog=_EPILOG.format(
                family=family, size=sizes[0], sizes=", ".join(sizes), arguments=arguments
            ),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        kind.add_argument("checkpoint", metavar="CHECKPOINT", help="file, or model directory")
        kind.add_argument(
            "--out", metavar="PATH", required=True, help="model directory, or .safetensors file"
        )
        shape = kind.add_mutually_exclusive_group()
        shape.add_argument("--size", choices=sizes, metavar="NAME", help="a published model")
        shape.add_argument("--config-json", metavar="FILE", help="the model's arguments")
        kind.set_defaults(family=family, convert=_convert_release)
    qwen = kinds.add_parser(
        "qwen2_5_vl",
        help="a Qwen2.5-VL of any size",
        epilog=_QWEN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    qwen.add_argument("folder", metavar="FOLDER", help="Hugging Face folder, or model directory")
    qwen.add_argument("--out", metavar="DIR", required=True, help="folder to make")
    qwen.add_argument("--to", choices=("hf",), help="back from a model directory")
    qwen.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="store arrays in the pieces that this mesh's devices load (data, fsdp, columns, "
        "tensor, sequence); any other mesh can load them too",
    )
    qwen.set_defaults(convert=_convert_qwen)
    dino = kinds.add_parser(
        "dinov2",
        help="a DINOv2 of any size",
        epilog=_DINO_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    dino.add_argument("source", metavar="SOURCE", help="Hugging Face folder, or file of weights")
    dino.add_argument("--out", metavar="DIR", required=True, help="folder to make")
    dino.add_argument(
        "--interpolation",
        choices=("size", "offset", "antialias"),
        help="of the position table; default: the source's own",
    )
    dino.set_defaults(convert=_convert_dinov2)
    own = kinds.add_parser(
        "starflow2",
        help="a STARFlow2 model directory to safetensors, and back",
        epilog=_STARFLOW2_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    own.add_argument("folder", metavar="FOLDER", help="model directory, or folder of safetensors")
    own.add_argument("--out", metavar="DIR", required=True, help="folder to make")
    own.set_defaults(convert=_convert_starflow2)


def run(args: argparse.Namespace) -> None:
    """Converts; prints what was passed over.

    Raises:
        UserError: see `convert.release`, `convert.qwen2_5_vl`, `convert.dinov2`,
            `convert.starflow2_folder`.
    """
    args.convert(args)


def _convert_qwen(args: argparse.Namespace) -> None:
    from starflow2_jax.convert import qwen2_5_vl
    from starflow2_jax.parallel.mesh import parse_mesh

    folder, out = pathlib.Path(args.folder), pathlib.Path(args.out)
    if args.to == "hf":
        if args.mesh is not None:
            raise UserError("--mesh says how a model directory is stored; --to hf makes none")
        qwen2_5_vl.export_folder(folder, out)
    else:
        mesh = None if args.mesh is None else parse_mesh(args.mesh)
        ignored = qwen2_5_vl.import_folder(folder, out, mesh)
        if ignored:
            print(f"passed over, not used by the model: {', '.join(ignored)}")
    print(f"wrote {out}")


def _convert_dinov2(args: argparse.Namespace) -> None:
    from starflow2_jax.convert import dinov2

    source, out = pathlib.Path(args.source), pathlib.Path(args.out)
    ignored = dinov2.import_weights(source, out, args.interpolation)
    if ignored:
        print(f"passed over, not used by the model: {', '.join(ignored)}")
    print(f"wrote {out}")


def _convert_starflow2(args: argparse.Namespace) -> None:
    from starflow2_jax.convert import starflow2_folder

    folder, out = pathlib.Path(args.folder), pathlib.Path(args.out)
    if starflow2_folder.is_model(folder):
        starflow2_folder.export_folder(folder, out)
        print(f"wrote {out}; its {starflow2_folder.CARD_FILE} leaves the licence to you")
    else:
        starflow2_folder.import_folder(folder, out)
        print(f"wrote {out}")


def _convert_release(args: argparse.Namespace) -> None:
    from starflow2_jax.convert import release

    checkpoint, out = pathlib.Path(args.checkpoint), pathlib.Path(args.out)
    if checkpoint.is_dir():
        if out.suffix != ".safetensors":
            raise UserError(f"{checkpoint} is a directory; --out {out} must end in .safetensors")
        release.export_checkpoint(checkpoint, out)
        print(f"wrote {out}")
        return
    ignored = release.import_checkpoint(_config(args), checkpoint, out)
    if ignored:
        print(f"passed over, not used by the model: {', '.join(ignored)}")
    print(f"wrote {out}")
    print("The released weights are licensed for research purposes only.")


def _config(args: argparse.Namespace) -> "StarFlowConfig | TarFlowConfig":
    from starflow2_jax.convert import starflow as convert
    from starflow2_jax.models import starflow as models

    if args.size is not None:
        return getattr(models, args.size)()
    if args.config_json is None:
        raise UserError("say what model the checkpoint is: --size NAME or --config-json FILE")
    path = pathlib.Path(args.config_json)
    try:
        arguments = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(arguments, dict):
        raise UserError(f"{path} holds no JSON object")
    make = convert.starflow_config if args.family == "starflow" else convert.tarflow_config
    try:
        return make(arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
