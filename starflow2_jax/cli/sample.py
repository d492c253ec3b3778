"""Draw and write: replies of a STARFlow2 model to prompts, as files.

Prompts are texts on the command line, the lines of a text file, a JSONL file whose prompts may hold
images, or the prompt file of a benchmark. Every reply starts with an image, unless --free is given.
"""

import argparse
import pathlib

from starflow2_jax.cli.arguments import add_model, load_model, positive
from starflow2_jax.errors import UserError

SUMMARY = "draw and write: prompts in, images and text out"

_FORMATS = ("plain", "geneval", "dpg", "wise", "lmms")
_EPILOG = """\
examples:
  starflow2 sample --model DIR --out OUT "a handwritten three" --samples 4 --guidance 2
  starflow2 sample --model DIR --out OUT --prompts stories.jsonl --free --max-images 4
  starflow2 sample --model DIR --out OUT --prompts evaluation_metadata.jsonl --format geneval

a JSONL line: {"id": "a", "prompt": "a handwritten three"},
  {"prompt": ["a copy of", {"image": "three.png"}]}, or
  {"messages": [{"role": "user", "content": ["count from", {"image": "three.png"}]}, ...]}
image files are relative to the JSONL file

formats (--prompts is the benchmark's own file or folder; images come into OUT/images):
  geneval   evaluation_metadata.jsonl -> 00000/samples/0000.png, 00000/metadata.jsonl; 4 samples
  dpg       folder of .txt or JSON    -> STEM.png, a 2 x 2 sheet; 4 samples, or 1
  wise      JSON or folder of them    -> 1.png to 1000.png; 1 sample
  lmms      JSONL of doc_id, prompt   -> TASK_0.png and TASK.json, a log for --model from_log
Each is checked at the end: what a scorer would drop in silence is listed.

results:
  run.json        model, weights' checksum, settings, seed, sha256 of the prompts
  samples.jsonl   for each sample: id, sample, seed, reason, parts
  images/ grids/  PNG files

exit codes: 0 done; 2 bad input, or a folder that a scorer would not read; 130 interrupted: the same
  command with --resume goes on
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_model(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the results")
    parser.add_argument("text", metavar="TEXT", nargs="*", help="a prompt")
    parser.add_argument("--prompts", metavar="FILE", help="text file, JSONL, or a benchmark's file")
    parser.add_argument("--format", choices=_FORMATS, default="plain", help="(plain)")
    parser.add_argument("--task", default="WISE", help="of --format lmms (WISE)")
    parser.add_argument(
        "--samples", metavar="N", type=positive, help="of each prompt (1, or as the format has)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--free", action="store_true", help="the model chooses what to write and when to draw"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="(0)")
    parser.add_argument("--guidance", metavar="W", type=float, default=0.0, help="of images (0)")
    parser.add_argument("--image-temperature", metavar="T", type=float, default=1.0, help="(1)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="of text (0)")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="of text (1)")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=64, help="of text, in a reply (64)"
    )
    parser.add_argument("--max-images", metavar="N", type=positive, default=1, help="(1)")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="ends a reply")
    parser.add_argument("--rows", metavar="N", type=positive, default=16, help="at a time (16)")
    parser.add_argument(
        "--twins", metavar="N", type=positive, help="guided drawings at a time (as many as rows)"
    )
    parser.add_argument(
        "--context", metavar="N", type=positive, help="most positions; default: what is needed"
    )
    parser.epilog = _EPILOG


def run(args: argparse.Namespace) -> None:
    """Samples.

    Raises:
        UserError: bad model, prompts or folder; or a finished folder that its scorer would misread.
    """
    if bool(args.text) == bool(args.prompts):
        raise UserError("give prompts as TEXT, or a file with --prompts")
    if args.format != "plain" and (args.free or args.text):
        raise UserError(f"--format {args.format} takes --prompts, and draws at once: no --free")

    from starflow2_jax import sample
    from starflow2_jax.evaluation import formats
    from starflow2_jax.metrics import Progress
    from starflow2_jax.model import Sampling
    from starflow2_jax.sampling.engine import EngineConfig
    from starflow2_jax.service import Service

    makers = {
        "geneval": formats.GenEval,
        "dpg": formats.Dpg,
        "wise": formats.Wise,
        "lmms": lambda **changes: formats.LmmsEval(task=args.task, **changes),
    }
    sampling = Sampling(
        guidance=args.guidance,
        image_temperature=args.image_temperature,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens if args.free else 0,
        max_images=args.max_images if args.free else 1,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    sampling.check()
    model = load_model(args)
    path = pathlib.Path(args.prompts) if args.prompts else None
    layout, items = None, None
    if args.format != "plain":
        layout = makers[args.format](**({"samples": args.samples} if args.samples else {}))
        prompts, items = sample.layout_prompts(layout, path)
    else:
        prompts = sample.from_texts(args.text) if path is None else sample.from_file(path, model)
    samples = layout.samples if layout else args.samples or 1
    draw, out = not args.free, pathlib.Path(args.out)
    config = EngineConfig(
        rows=args.rows,
        twins=args.twins or 0,
        context=args.context or sample.needed(model, prompts, sampling, draw),
        images=sampling.max_images,
    )
    total = len(prompts) * samples
    progress = Progress("sample", total, unit="samples")
    service = Service(model, config)
    job = sample.Job(
        service,
        out,
        sampling,
        samples=samples,
        draw=draw,
        layout=layout,
        on_progress=lambda done: progress.update(done, {}),
    )
    # A command that cannot be run leaves nothing: the corrected one finds no other run's folder.
    job.check(prompts)
    about = sample.describe(model, sampling, service.engine.config, samples, draw, prompts, path)
    sample.claim(out, {"format": args.format, **about}, args.resume)
    drawn = job.run(prompts, items)
    print(f"wrote {drawn} samples, {total} in all, to {out}")
    if layout is not None:
        problems = layout.check(out / sample.IMAGES, list(items.values()))
        for problem in problems:
            print(f"check: {problem}")
        # A part of a benchmark is read well enough.
        if len(problems) > (layout.whole not in (0, len(items))):
            raise UserError(f"{out / sample.IMAGES}: {len(problems)} problems, see above")
