"""Answers to questions about pictures."""

import argparse
import pathlib

from starflow2_jax.cli.arguments import add_model, positive
from starflow2_jax.cli.evaluate.output import print_summary, progress_of

SUMMARY = "questions about pictures: exact match, ANLS"
DESCRIPTION = "Answers to questions about pictures, and captions."
EPILOG = """\
data: JSONL, one object a line
  {"image": FILE or [FILE, ...], "question": TEXT, "answer": TEXT or "answers": [TEXT, ...]}
  <image> in the question stands where a picture is shown, by default before it; without a question
  the picture is to be described (--question); id and doc_id are optional

results in --out:
  examples.jsonl   for each record: question, answers, reply, exact_match, anls
  summary.json     means with standard errors; it comes last
  TASK.json        with --task: lmms-eval --model from_log scores it as its own task of that name,
                   whose documents are told by doc_id

exact_match: in lower case, without blanks and punctuation at the ends. anls: 1 - edits over the
longer length, 0 from a half on; for the nearest answer. An interrupted command continues where it
stopped when it is given again; several processes (launch/) share the work.

exit codes: 0 done; 2 bad input
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_model(parser, "STARFlow2 model or run, or a converted VLM")
    parser.add_argument("--data", metavar="FILE", nargs="+", required=True, help="JSONL, see below")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the results")
    parser.add_argument(
        "--images", metavar="DIR", help="folder that image paths start from (default: the file's)"
    )
    parser.add_argument(
        "--path",
        choices=("vit", "latent"),
        help="pictures through the vision tower (default), or as the model's own latents",
    )
    parser.add_argument(
        "--question", metavar="TEXT", default="describe this image", help="of records without one"
    )
    parser.add_argument("--suffix", metavar="TEXT", default="", help="behind every question")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=32, metavar="N", help="of a reply (default 32)"
    )
    parser.add_argument(
        "--rows", type=positive, default=16, metavar="N", help="records of a batch (default 16)"
    )
    parser.add_argument("--task", metavar="NAME", help="write a log for this task of lmms-eval")
    parser.add_argument(
        "--index", metavar="DIR", help="for the index of the files (default: beside them)"
    )


def run(args: argparse.Namespace) -> None:
    """Evaluates; prints the summary.

    Raises:
        UserError: bad model, data or setting.
    """
    import jax

    from starflow2_jax.evaluation import understanding
    from starflow2_jax.evaluation.job import SUMMARY as SUMMARY_FILE
    from starflow2_jax.evaluation.responder import Responder
    from starflow2_jax.parallel.distributed import join_job

    join_job()
    setting = understanding.Setting(
        data=tuple(args.data),
        images=args.images,
        question=args.question,
        suffix=args.suffix,
        max_new_tokens=args.max_new_tokens,
        rows=args.rows,
    )
    responder = Responder(args.model, args.path, dtype=args.dtype, devices=args.devices)
    out = pathlib.Path(args.out)
    summary = understanding.run(
        responder,
        setting,
        out,
        task=args.task,
        index=args.index,
        on_progress=progress_of("understanding"),
    )
    if jax.process_index() == 0:
        print_summary(summary, out / SUMMARY_FILE)
