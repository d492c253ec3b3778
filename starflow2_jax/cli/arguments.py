"""Arguments that several commands take."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starflow2_jax.model import Model


def positive(text: str) -> int:
    """The type of a whole number from one on.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def add_model(
    parser: argparse.ArgumentParser, what: str = "model directory, or a finished run's workdir"
) -> None:
    """Which model, and how it lies on the devices."""
    parser.add_argument("--model", metavar="DIR", required=True, help=what)
    parser.add_argument(
        "--devices",
        metavar="N",
        type=positive,
        default=1,
        help="of this process, which share out a STARFlow2 model's weights and rows (1)",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of the weights; default: as stored"
    )


def load_model(args: argparse.Namespace) -> "Model":
    """The STARFlow2 model that the options of `add_model` say.

    Raises:
        UserError: see `model.load`.
    """
    from starflow2_jax.model import load

    return load(args.model, dtype=args.dtype, devices=args.devices)
