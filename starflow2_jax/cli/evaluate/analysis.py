"""What a model does inside, as plots."""

import argparse
import pathlib

from starflow2_jax.cli.arguments import add_model, load_model, positive
from starflow2_jax.cli.evaluate.arguments import add_paths, add_records
from starflow2_jax.cli.evaluate.output import print_summary
from starflow2_jax.errors import UserError

SUMMARY = "skips, log-determinants, attention, latent walks, as plots"
DESCRIPTION = "What a STARFlow2 model does inside, measured on drawings."
EPILOG = """\
data: as of evaluate likelihood, whose records are drawings: a caption, an image

results in --out:
  analysis.json    means over the drawings with standard errors: contribution |s| / (|o| + |s|) of
                   what a skip adds, s, to what is there, o, and their cosine; each block's
                   log-determinant, nats per dim, and its share; where an image's positions look,
                   by layer of the deep block
  skips.png, log_dets.png, attention.png
  words.png        attention of one image's positions to each token before it
  walks.png        drawings while the noise turns from one draw into another

exit codes: 0 done; 2 bad input
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_model(parser)
    add_paths(parser)
    add_records(parser)
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the results; default: analysis/ in the model's"
    )
    parser.add_argument(
        "--count", type=positive, default=50, metavar="N", help="drawings (default 50)"
    )
    parser.add_argument(
        "--rows", type=positive, default=16, metavar="N", help="drawings of a batch (default 16)"
    )
    parser.add_argument(
        "--walks", type=positive, default=4, metavar="N", help="captions to walk on (default 4)"
    )
    parser.add_argument(
        "--steps", type=positive, default=8, metavar="N", help="drawings of a walk (default 8)"
    )
    parser.add_argument("--guidance", type=float, default=0.0, metavar="W", help="of walks (0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")


def run(args: argparse.Namespace) -> None:
    """Evaluates; prints the summary.

    Raises:
        UserError: bad model, data or setting.
    """
    from starflow2_jax.evaluation import analysis, analysis_plots
    from starflow2_jax.evaluation.dataset import drawing, open_dataset
    from starflow2_jax.model_folder import finished
    from starflow2_jax.provenance import write_json

    if args.guidance < 0 or args.seed < 0:
        raise UserError("--guidance and --seed are at least 0")
    folder = pathlib.Path(args.model)
    model = load_model(args)
    dataset = open_dataset(
        args.data,
        model.bundle.image,
        task=args.task,
        fields=dict(args.field),
        images=args.images,
        index=args.index,
        template=args.template,
    )
    out = pathlib.Path(args.out) if args.out else finished(folder) / "analysis"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {out} for results: {error}") from error
    found = analysis.analyse(model, dataset, count=args.count, rows=args.rows)
    analysis_plots.plot_findings(found, out)
    captions = list(dict.fromkeys(drawing(dataset[i])[0] for i in range(min(256, len(dataset)))))
    captions = captions[: args.walks]
    options = {"steps": args.steps, "guidance": args.guidance, "seed": args.seed}
    analysis_plots.plot_walks(analysis.walk(model, captions, **options), captions, out)
    summary = {"model": str(folder), "data": args.data, **found.summary()}
    write_json(out / "analysis.json", summary)
    print_summary(summary, out)
