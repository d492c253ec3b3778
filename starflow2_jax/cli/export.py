"""Write the model of a run's checkpoint, while the run trains or afterwards.

The folder of --out is then a model directory for `sample`, `evaluate`, `chat` and `load`, with the
average (EMA) of the weights. The work directory stays as it is. Beside a training that holds the
accelerators, set JAX_PLATFORMS=cpu.
"""

import argparse
import pathlib

from starflow2_jax.cli.arguments import OVERRIDES, add_run, load_run

SUMMARY = "write a model directory from a checkpoint of a run"

_EPILOG = f"""\
{OVERRIDES}
The config is that of the run; its mesh may be another one.

examples:
  starflow2 export --config configs/digits.py --workdir runs/digits --out models/digits
  starflow2 export --config configs/digits.py --workdir runs/digits --out models/best --step best
  starflow2 export --config configs/digits.py --workdir runs/digits --out models/drawing \\
      --stage text_to_image --step 500

exit codes: 0 done; 2 bad input, with nothing written
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_run(parser, "folder of the run, which is only read")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to make")
    parser.add_argument(
        "--stage", metavar="S", help="of the checkpoint (default: the last that has one)"
    )
    parser.add_argument(
        "--step",
        metavar="N",
        type=_step,
        default="latest",
        help="of the checkpoint, or `best`: the smallest held-out loss (default: the newest)",
    )
    parser.usage = (
        "starflow2 export --config FILE --workdir DIR --out DIR [--stage S] [--step N|best] "
        "[--vlm DIR] [--fae DIR] [--config.KEY=VALUE ...]"
    )
    parser.epilog = _EPILOG


def _step(text: str) -> int | str:
    """The type of `--step`.

    Raises:
        argparse.ArgumentTypeError: it is neither a step nor a name of one.
    """
    if text in ("latest", "best"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of a step, nor best or latest")
    return int(text)


def run(args: argparse.Namespace) -> None:
    """Writes the directory; says of which checkpoint.

    Raises:
        UserError: see `training.export.export`.
    """
    config, module = load_run(args)

    from starflow2_jax.parallel.cpu import claim_devices
    from starflow2_jax.training.export import export

    claim_devices(config.get("cpu_devices"))
    out = pathlib.Path(args.out)
    stage, step = export(config, module, pathlib.Path(args.workdir), out, args.stage, args.step)
    print(f"wrote {out}: stage {stage}, step {step}")
