"""Arguments that several commands take."""

import argparse


def positive(text: str) -> int:
    """The type of a whole number from one on.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    parser.add_argument(
        "--model", metavar="DIR", required=True, help="model directory, or a finished run's workdir"
    )
