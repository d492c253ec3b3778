"""Exact likelihoods of conversations or of a folder of images."""

import argparse
import pathlib

from starflow2_jax.cli.arguments import add_model, load_model, positive
from starflow2_jax.cli.evaluate.arguments import add_paths, add_records
from starflow2_jax.cli.evaluate.output import print_summary, progress_of
from starflow2_jax.errors import UserError

SUMMARY = "exact log p of images and text"
DESCRIPTION = "Exact log-probabilities of images and text, nats and bits per dim."
EPILOG = """\
data of a STARFlow2 model:
  files of one kind (patterns with * are expanded): JSONL conversations in LLaVA's form, WebDataset
  tar shards, ArrayRecord, Parquet (--task says what a record is); or a folder with a sub-folder of
  images for each class, which is the caption (--template)
data of an image flow (TarFlow): a folder of images, with a sub-folder for each class or none

--score of a STARFlow2 model:
  likelihood  log p of every image and of the assistant's text
  matching    log p(image | text) - log p(image) of every drawing: how well they go together
  retrieval   every image under every caption: the right text for an image, the right image for a
              text (the square of the data's size in work)
  classes     Bayes' rule: each line of --captions is a class, a record's caption is its class (of a
              folder: the folders' names)

results in --out:
  examples.jsonl   for each record: nats (log p, mean over the draws of the noise) with _spread
                   over the draws, _bound (log of the draws' mean: importance weighted), _by_draw;
                   bits_per_dim; text_nats, perplexity; joint_nats of the reply given the prompt
  summary.json     means with standard errors, and the spread over the draws; it comes last

  pixels as latents: bits_per_dim is of the 8-bit image, an upper bound; _bound a tighter one
  latents of an FAE: nats and bits_per_dim are of noisy latents x, one draw from q(x | image) each
                   (the encoder's posterior, normalised, and the noise): no bound on pixels, and
                   without _bound. rate_nats = mean over draws of log q(x | image) - log p(x), an
                   estimate of KL(q || p): what the latents cost beyond their noise, lower is better
  matching's difference is a mean over draws, and no bound with either

With a STARFlow2 model an interrupted command continues where it stopped when it is given again, and
several processes (launch/) share the work; the results are the same to the byte. An image flow's
images are scored in one go, by one process.

exit codes: 0 done; 2 bad input
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_model(parser)
    add_paths(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the results; default: named by the score, in the model's",
    )
    parser.add_argument(
        "--draws", type=positive, default=4, metavar="N", help="of the images' noise (default 4)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    parser.add_argument(
        "--rows", type=positive, default=64, metavar="N", help="records of a batch (default 64)"
    )
    conversations = parser.add_argument_group("STARFlow2 models")
    conversations.add_argument(
        "--score",
        choices=("likelihood", "matching", "retrieval", "classes"),
        default="likelihood",
        help="see below (default likelihood)",
    )
    add_records(conversations)
    conversations.add_argument("--captions", metavar="FILE", help="classes, one a line")
    names = ("score", "task", "field", "images", "index", "template", "captions")
    parser.set_defaults(of_conversations={n: parser.get_default(n) for n in names})
    flows = parser.add_argument_group("image flows")
    flows.add_argument(
        "--no-bayes",
        action="store_true",
        help="score an image's own class and no class, not every class",
    )


def run(args: argparse.Namespace) -> None:
    """Evaluates; prints the summary.

    Raises:
        UserError: bad model, data or setting.
    """
    from starflow2_jax.flow_bundle import is_image_flow

    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}, expected at least 0")
    if is_image_flow(pathlib.Path(args.model)):
        _of_images(args)
    else:
        _of_conversations(args)


def _of_images(args: argparse.Namespace) -> None:
    from starflow2_jax.data.images import open_folder
    from starflow2_jax.evaluation.image_likelihood import SUMMARY as SUMMARY_FILE
    from starflow2_jax.evaluation.image_likelihood import write_likelihoods
    from starflow2_jax.flow_bundle import load_image_flow, read_description
    from starflow2_jax.metrics import Progress
    from starflow2_jax.model_folder import finished
    from starflow2_jax.models.starflow import TarFlowConfig

    folder = pathlib.Path(args.model)
    config, record = read_description(folder)
    if not isinstance(config, TarFlowConfig):
        raise UserError(f"{folder} is a model of latents; expected one of pixels, a TarFlow")
    if len(args.data) != 1:
        raise UserError(f"{len(args.data)} paths in --data; an image flow takes one folder")
    if args.devices != 1 or args.dtype is not None:
        raise UserError(
            f"--devices and --dtype are for STARFlow2 models; {folder} is an image flow"
        )
    for name, default in args.of_conversations.items():
        if getattr(args, name) != default:
            raise UserError(f"--{name} is for STARFlow2 models; {folder} is an image flow")
    # A converted model has classes, but no names for them.
    classes = tuple(record.get("classes") or (str(i) for i in range(config.classes)))
    data = open_folder(args.data[0], config.size, config.channels, classes or None)
    out = pathlib.Path(args.out) if args.out else finished(folder) / "likelihood"
    progress = Progress("likelihood", len(data), unit="images")
    summary = write_likelihoods(
        load_image_flow(folder),
        data,
        out,
        classes=() if args.no_bayes else classes,
        about={"model": str(folder), "data": str(args.data[0]), "seed": args.seed},
        on_progress=lambda done, _: progress.update(done, {}),
        draws=args.draws,
        seed=args.seed,
        rows=args.rows,
    )
    print_summary(summary, out / SUMMARY_FILE)


def _of_conversations(args: argparse.Namespace) -> None:
    import jax

    from starflow2_jax.evaluation import likelihood_job
    from starflow2_jax.model_folder import finished
    from starflow2_jax.parallel.distributed import join_job

    join_job()
    folder = pathlib.Path(args.model)
    if args.no_bayes:
        raise UserError(f"--no-bayes is for image flows; {folder} is a STARFlow2 model")
    model = load_model(args)
    out = pathlib.Path(args.out) if args.out else finished(folder) / args.score
    setting = likelihood_job.Setting(
        score=args.score,
        data=tuple(args.data),
        draws=args.draws,
        seed=args.seed,
        rows=args.rows,
        task=args.task,
        fields=tuple(args.field),
        images=args.images,
        template=args.template,
        captions=args.captions,
    )
    on_progress = progress_of(args.score)
    summary = likelihood_job.run(model, setting, out, index=args.index, on_progress=on_progress)
    if jax.process_index() == 0:
        print_summary(summary, out / likelihood_job.SUMMARY)
