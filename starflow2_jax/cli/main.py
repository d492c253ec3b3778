"""Entry of the `starflow2` command.

A command is a module of `starflow2_jax.cli` with `SUMMARY`, `configure(parser)` and `run(args)`. It
imports JAX, and anything that imports JAX, only inside `run`: `--help` stays quick.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

import starflow2_jax
from starflow2_jax.cli import chat, convert, data, evaluate, export, plan, sample, serve, train
from starflow2_jax.cli.config import split_overrides
from starflow2_jax.errors import Interrupted, UserError

COMMANDS = {
    "train": train,
    "export": export,
    "plan": plan,
    "sample": sample,
    "evaluate": evaluate,
    "convert": convert,
    "data": data,
    "chat": chat,
    "serve": serve,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="starflow2",
        description=(
            "STARFlow2: one causal mechanism that writes text and draws images, with exact "
            "likelihoods."
        ),
        epilog="starflow2 COMMAND --help describes a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=starflow2_jax.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.configure(command)
        command.set_defaults(run=module.run, parser=command)
    return parser


def _run(argv: Sequence[str]) -> None:
    rest, overrides = split_overrides(argv)
    args = build_parser().parse_args(rest)
    # A command that reads a config file says so with an `overrides` default.
    if overrides and not hasattr(args, "overrides"):
        args.parser.error(f"unrecognized arguments: --config.{overrides[0][0]}")
    args.overrides = overrides
    args.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's own).

    Returns:
        The exit code: 0; 2 after bad input, with one line on stderr; 130 after an interruption.
        A bug raises.
    """
    try:
        _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if os.environ.get("STARFLOW2_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"starflow2: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        print(f"starflow2: {interrupted}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("starflow2: interrupted", file=sys.stderr)
        return 130
    return 0
