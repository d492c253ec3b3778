"""Talk with a STARFlow2 model, which writes and draws, or with a converted VLM.

With --prompt one reply; with --batch a reply of a VLM to each line of a JSONL file; else a
conversation: each line is a turn, `/image FILE` adds a picture to the next one, and `/draw TEXT`
asks a STARFlow2 model for a picture at once.
"""

import argparse
import contextlib
import itertools
import json
import pathlib
import sys
from typing import TextIO

from starflow2_jax.cli.arguments import add_model, load_model, positive
from starflow2_jax.errors import UserError

SUMMARY = "talk with a model, in text and images"

_EPILOG = """\
examples:
  starflow2 chat --model DIR
  starflow2 chat --model runs/digits --guidance 2 --images-to drawn
  starflow2 chat --model DIR --image cat.png --prompt "What is this?"
  starflow2 chat --model DIR --batch questions.jsonl --out answers.jsonl

a line of --batch: {"prompt": "What is this?", "images": ["cat.png"]}, or
  {"messages": [{"role": "user", "text": "...", "images": ["a.png"]}, ...]}
image files are relative to the JSONL file; the reply's line has "reply" and "reason" added

exit codes: 0 done; 2 bad input
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_model(parser, "model directory, finished run's workdir, or a converted VLM's")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="one turn, one reply")
    what.add_argument("--batch", metavar="FILE", help="JSONL file of conversations")
    parser.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="of the first turn; repeatable"
    )
    parser.add_argument("--out", metavar="FILE", help="of --batch; default: standard output")
    parser.add_argument("--rows", metavar="N", type=positive, default=8, help="of a batch (8)")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=512, help="(512)")
    parser.add_argument(
        "--guidance", metavar="W", type=float, default=0.0, help="of images that are drawn (0)"
    )
    parser.add_argument("--image-temperature", metavar="T", type=float, default=1.0, help="(1)")
    parser.add_argument("--max-images", metavar="N", type=int, default=4, help="of a reply (4)")
    parser.add_argument(
        "--images-to", metavar="DIR", default="chat", help="where drawn images are saved (chat)"
    )
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0: the likeliest token (0)"
    )
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="(1)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="(0)")
    parser.add_argument(
        "--context",
        metavar="N",
        type=positive,
        help="most positions; default: 1024, or what the VLM's config.json says",
    )
    parser.epilog = _EPILOG


def _opened(path: str | None) -> contextlib.AbstractContextManager[TextIO]:
    if path is None:
        return contextlib.nullcontext(sys.stdout)
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def run(args: argparse.Namespace) -> None:
    """Talks.

    Raises:
        UserError: bad input; see `vlm`.
    """
    import jax

    from starflow2_jax.bundle import is_bundle
    from starflow2_jax.parallel.cpu import keep_freed_memory

    if jax.default_backend() == "cpu":
        keep_freed_memory()
    if is_bundle(pathlib.Path(args.model)):
        _with_images(args)
    else:
        _with_vlm(args)


def _with_images(args: argparse.Namespace) -> None:
    from starflow2_jax import conversation
    from starflow2_jax.model import Sampling
    from starflow2_jax.service import read_image

    if args.batch is not None or args.out is not None:
        raise UserError(
            "--batch and --out go with a converted VLM; for many prompts see starflow2 sample"
        )
    sampling = Sampling(
        guidance=args.guidance,
        image_temperature=args.image_temperature,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        max_images=args.max_images,
        seed=args.seed,
    )
    sampling.check()
    model = load_model(args)
    chat = model.chat(sampling, context=args.context or 1024)
    folder = conversation.Folder(
        pathlib.Path(args.images_to), conversation.shows_images(sys.stdout)
    )
    if args.prompt is None:
        pieces = conversation.converse(chat, sys.stdin, folder, args.image)
    else:
        pictures = [read_image(model, file) for file in args.image]
        pieces = conversation.replies(chat, folder, *pictures, args.prompt, draw=False)
    for piece in pieces:
        print(piece, end="", flush=True)


def _with_vlm(args: argparse.Namespace) -> None:
    from starflow2_jax import vlm

    if args.batch is None and args.out is not None:
        raise UserError("--out goes with --batch; a conversation is shown in the terminal")
    if args.devices != 1:
        raise UserError("--devices goes with a STARFlow2 model; a converted VLM lies on one")
    writing = vlm.Writing(args.temperature, args.top_p, args.max_new_tokens, args.seed)
    writing.check()
    assistant = vlm.Assistant.load(args.model, args.dtype, args.context)
    if args.batch is not None:
        if args.image:
            raise UserError("--image goes with a conversation; a batch names images in its lines")
        answers = vlm.answer_file(assistant, pathlib.Path(args.batch), writing, args.rows)
        with _opened(args.out) as out:
            for answer in answers:
                print(json.dumps(answer, ensure_ascii=False), file=out, flush=True)
        return
    chat = assistant.chat(writing)
    if args.prompt is None:
        pieces = vlm.converse(chat, sys.stdin, args.image)
    else:
        pieces = itertools.chain(chat.say(args.prompt, args.image), ["\n"])
    for piece in pieces:
        print(piece, end="", flush=True)
