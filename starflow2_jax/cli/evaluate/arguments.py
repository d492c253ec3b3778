"""Arguments that several evaluations take."""

import argparse


def _field(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FIELD")
    return name, value


def add_paths(parser: argparse.ArgumentParser) -> None:
    """Which data: the paths of `open_dataset`."""
    parser.add_argument(
        "--data", metavar="PATH", nargs="+", required=True, help="files, or a folder of images"
    )


def add_records(parser: argparse._ActionsContainer) -> None:
    """What `open_dataset` takes beside the paths."""
    parser.add_argument(
        "--task",
        choices=("conversation", "draw", "read", "edit", "story"),
        help="what a record is (default: conversation for JSONL, else draw)",
    )
    parser.add_argument(
        "--field",
        type=_field,
        action="append",
        default=[],
        metavar="NAME=FIELD",
        help="where the task's parts are in a record, e.g. image=png; repeatable",
    )
    parser.add_argument(
        "--images", metavar="DIR", help="folder that JSONL's image paths start from"
    )
    parser.add_argument(
        "--index", metavar="DIR", help="for the index of the files (default: beside them)"
    )
    parser.add_argument(
        "--template", default="{}", metavar="TEXT", help='of a folder: "a photo of a {}"'
    )
