"""Scores of drawn images."""

import argparse
import pathlib

from starflow2_jax.cli.arguments import positive
from starflow2_jax.cli.evaluate.output import print_summary
from starflow2_jax.errors import UserError

SUMMARY = "FID, KID, CLIP score; GenEval's and WISE's scores"
DESCRIPTION = "Scores of drawn images."
EPILOG = """\
examples:
  starflow2 evaluate generation --out scores --images drawn --reference photographs \\
    --inception pt_inception-2015-12-05-6726825d.pth
  starflow2 evaluate generation --out scores --images drawn --clip clip-vit-base-patch32 \\
    --captions captions.jsonl
  starflow2 evaluate generation --out scores --geneval results.jsonl

weights are yours to bring: pytorch-fid's or torch-fidelity's Inception (.pth needs torch), a CLIP's
Hugging Face folder. Pictures are resized as the first release of FID did it: numbers compare with
torch-fidelity's, and not with those of other resizing (pytorch-fid, clean-fid).

results in --out:
  examples.jsonl   with --clip: for each picture its CLIP score, 100 max(cos, 0)
  summary.json     fid; kid, over 100 pairs of subsets of up to 1,000, with their deviation;
                   clip_score, the mean, with its standard error; geneval: overall is the mean of
                   the six tasks' means; wise: overall by the published weights of the edition
                   (original or verified) that was judged. notes name what is missing for a number
                   that compares with published ones

exit codes: 0 done; 2 bad input
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the results")
    pictures = parser.add_argument_group("folders of images")
    pictures.add_argument("--images", metavar="DIR", help="what is scored; sub-folders too")
    pictures.add_argument(
        "--reference", metavar="PATH", help="FID and KID: folder, or .npz of mu and sigma (FID)"
    )
    pictures.add_argument("--inception", metavar="FILE", help="weights of the Inception of FID")
    pictures.add_argument("--clip", metavar="DIR", help="CLIP score: Hugging Face folder")
    pictures.add_argument(
        "--captions",
        metavar="FILE",
        help='JSONL of {"image": FILE, "caption": TEXT}; default: of GenEval\'s layout, its own',
    )
    pictures.add_argument(
        "--rows", type=positive, default=32, metavar="N", help="images of a batch (default 32)"
    )
    pictures.add_argument("--seed", type=int, default=0, metavar="N", help="of KID's subsets (0)")
    results = parser.add_argument_group("results of public scorers")
    results.add_argument("--geneval", metavar="FILE", help="results.jsonl of evaluate_images.py")
    results.add_argument(
        "--wise", metavar="FILE", nargs="+", help="score files of its judge, JSONL"
    )


def run(args: argparse.Namespace) -> None:
    """Evaluates; prints the summary.

    Raises:
        UserError: bad images, weights, results or setting.
    """
    from starflow2_jax.evaluation import benchmark_scores, generation
    from starflow2_jax.evaluation.job import SUMMARY as SUMMARY_FILE
    from starflow2_jax.metrics import Progress
    from starflow2_jax.provenance import write_json

    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}, expected at least 0")
    if not (args.images or args.geneval or args.wise):
        raise UserError("nothing to score: give --images, --geneval or --wise")
    out = pathlib.Path(args.out)
    summary: dict = {}
    if args.geneval:
        summary["geneval"] = benchmark_scores.geneval_summary(pathlib.Path(args.geneval))
    if args.wise:
        summary["wise"] = benchmark_scores.wise_summary([pathlib.Path(p) for p in args.wise])
    if args.images:
        progress: dict[str, Progress] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in progress:
                progress[what] = Progress(what, total, unit="images")
            progress[what].update(done, {})

        names = ("images", "reference", "inception", "clip", "captions", "rows", "seed")
        setting = generation.Setting(**{name: getattr(args, name) for name in names})
        summary |= generation.measure(setting, out, on_progress)
    for name in ("geneval", "wise"):
        for note in summary.get(name, {}).get("notes", ()):
            print(f"note: {name}: {note}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SUMMARY_FILE, summary)
    except OSError as error:
        raise UserError(f"cannot use {out} for results: {error}") from error
    print_summary(summary, out / SUMMARY_FILE)
