"""Arguments that several commands take."""

import argparse
import types
from typing import TYPE_CHECKING

import ml_collections

from starflow2_jax.cli.config import load_config
from starflow2_jax.errors import UserError

if TYPE_CHECKING:
    from starflow2_jax.model import Model

OVERRIDES = """\
overrides:
  --config.a.b=VALUE    replace an entry of the config; may be repeated. VALUE is read as the
                        type of the entry: True, 3, 1e-4, words, (1, 2), None
  --config.smoke=True   the same code at tiny sizes on made data, for a test of the installation
"""
"""Of a config, for the help text of commands that take a run."""


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


def add_run(parser: argparse.ArgumentParser, workdir: str) -> None:
    """Which run: its config and its work directory, of which `workdir` tells what it is for."""
    parser.add_argument(
        "--config", metavar="FILE", required=True, help="Python file with get_config()"
    )
    parser.add_argument("--workdir", metavar="DIR", required=True, help=workdir)
    for name, what in (("vlm", "VLM"), ("fae", "FAE")):
        parser.add_argument(
            f"--{name}",
            metavar="DIR",
            help=f"converted {what} to start from: sets config.{name}",
        )
    parser.set_defaults(overrides=[])


def load_run(args: argparse.Namespace) -> tuple[ml_collections.ConfigDict, types.ModuleType]:
    """The config that the options of `add_run` say, and the file's module.

    Raises:
        UserError: see `config.load_config`; an option that the config has no entry for.
    """
    given = [(name, getattr(args, name)) for name in ("vlm", "fae") if getattr(args, name)]
    config, module = load_config(args.config, args.overrides, given)
    for name, _ in given:
        if name not in config:
            raise UserError(
                f"--{name}: {args.config} takes none; it has no entry config.{name} to set"
            )
    return config, module
