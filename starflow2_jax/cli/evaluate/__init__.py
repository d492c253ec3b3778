"""Evaluate a trained model.

likelihood: exact log-probabilities, of conversations with images, or of a folder of images under an
image flow of pixels (TarFlow); image-text matching, retrieval and classification by them.
understanding: questions about pictures, exact match and ANLS.
analysis: what a model does inside, as plots.
generation: FID, KID and CLIP score of folders of images; GenEval's and WISE's scores.
"""

import argparse

from starflow2_jax.cli.evaluate import analysis, generation, likelihood, understanding

SUMMARY = "evaluate a trained model"

# Modules with `SUMMARY`, `DESCRIPTION`, `EPILOG`, `configure(parser)` and `run(args)`, which alone
# imports JAX, as commands do (`cli.main`).
KINDS = {
    "likelihood": likelihood,
    "understanding": understanding,
    "generation": generation,
    "analysis": analysis,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds one sub-command for each kind of evaluation."""
    kinds = parser.add_subparsers(
        metavar="WHAT", required=True, help="what to measure; each has a --help of its own"
    )
    for name, module in KINDS.items():
        kind = kinds.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.configure(kind)
        kind.set_defaults(evaluate=module.run)


def run(args: argparse.Namespace) -> None:
    """Evaluates; prints the summary.

    Raises:
        UserError: bad model, data or setting.
    """
    args.evaluate(args)
