"""Evaluate a trained model.

likelihood: exact log-probabilities of a folder of images under an image flow of pixels (TarFlow).
"""

import argparse
import pathlib

from starflow2_jax.errors import UserError

SUMMARY = "evaluate a trained model"

_EPILOG = """\
The folder has a sub-folder of images for each class (of the model, if it has classes), or images
only. Other sizes are cropped to the square in their middle and resized.

results:
  examples.jsonl   for each image: file, class, nats (log p of the dequantised image, pixels in
                   [-1, 1), mean over the draws), bits_per_dim (of the 8-bit image, an upper bound),
                   their spread over the draws; with classes, the nats given each class, given none,
                   and of the mixture, and the class predicted by Bayes' rule
  summary.json     means with standard errors, the spread over the draws, Bayes' accuracy

exit codes: 0 done; 2 bad input
"""


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds one sub-command for each kind of evaluation."""
    kinds = parser.add_subparsers(
        metavar="WHAT", required=True, help="what to measure; each has a --help of its own"
    )
    likelihood = kinds.add_parser(
        "likelihood",
        help="exact log p of images",
        description="Exact log-probabilities of images, nats and bits per dim.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    likelihood.add_argument(
        "--model", metavar="DIR", required=True, help="model directory, or a finished run's workdir"
    )
    likelihood.add_argument("--data", metavar="FOLDER", required=True, help="folder of images")
    likelihood.add_argument(
        "--out", metavar="DIR", help="folder of the results; default: likelihood/ in the model's"
    )
    likelihood.add_argument(
        "--draws", type=_positive, default=4, metavar="N", help="dequantisation draws (default 4)"
    )
    likelihood.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draws (default 0)"
    )
    likelihood.add_argument(
        "--rows", type=_positive, default=64, metavar="N", help="images of a batch (default 64)"
    )
    likelihood.add_argument(
        "--no-bayes",
        action="store_true",
        help="score an image's own class and no class, not every class",
    )
    likelihood.set_defaults(evaluate=_likelihood)


def run(args: argparse.Namespace) -> None:
    """Evaluates; prints the summary.

    Raises:
        UserError: bad model, folder or image.
    """
    args.evaluate(args)


def _likelihood(args: argparse.Namespace) -> None:
    from starflow2_jax.data.images import open_folder
    from starflow2_jax.evaluation.image_likelihood import SUMMARY as SUMMARY_FILE
    from starflow2_jax.evaluation.image_likelihood import write_likelihoods
    from starflow2_jax.flow_bundle import load_image_flow, model_folder, read_description
    from starflow2_jax.models.starflow import TarFlowConfig
    from starflow2_jax.training.metrics import Progress

    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}, expected at least 0")
    folder = pathlib.Path(args.model)
    config, record = read_description(folder)
    if not isinstance(config, TarFlowConfig):
        raise UserError(f"{folder} is a model of latents; expected one of pixels, a TarFlow")
    # A converted model has classes, but no names for them.
    classes = tuple(record.get("classes") or (str(i) for i in range(config.classes)))
    data = open_folder(args.data, config.size, config.channels, classes or None)
    out = pathlib.Path(args.out) if args.out else model_folder(folder) / "likelihood"
    progress = Progress("likelihood", len(data), unit="images")
    summary = write_likelihoods(
        load_image_flow(folder),
        data,
        out,
        classes=() if args.no_bayes else classes,
        about={"model": str(folder), "data": str(args.data), "seed": args.seed},
        on_progress=lambda done, _: progress.update(done, {}),
        draws=args.draws,
        seed=args.seed,
        rows=args.rows,
    )
    for name, value in summary.items():
        if isinstance(value, float):
            print(f"{name} {value:.5g}")
    print(f"wrote {out / SUMMARY_FILE}")
