"""Evaluate a trained model.

likelihood: exact log-probabilities, of conversations with images, or of a folder of images under an
image flow of pixels (TarFlow); image-text matching, retrieval and classification by them.
understanding: questions about pictures, exact match and ANLS.
analysis: what a model does inside, as plots.
generation: FID, KID and CLIP score of folders of images; GenEval's and WISE's scores.
"""

import argparse
import pathlib
from collections.abc import Callable

from starflow2_jax.errors import UserError

SUMMARY = "evaluate a trained model"

_LIKELIHOOD = """\
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
                   bits_per_dim of the 8-bit image (an upper bound); text_nats, perplexity;
                   joint_nats of the reply given the prompt
  summary.json     means with standard errors, and the spread over the draws; it comes last

An interrupted command continues where it stopped when it is given again. Several processes
(launch/) share the work; the results are the same to the byte.

exit codes: 0 done; 2 bad input
"""

_UNDERSTANDING = """\
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

_ANALYSIS = """\
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

_GENERATION = """\
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
                   the six tasks' means; wise: overall by the published weights. notes name what
                   is missing for a number that compares with published ones

exit codes: 0 done; 2 bad input
"""


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _field(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FIELD")
    return name, value


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR", required=True, help="model directory, or a finished run's workdir"
    )


def _paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="PATH", nargs="+", required=True, help="files, or a folder of images"
    )


def _records(parser: argparse._ActionsContainer) -> None:
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


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds one sub-command for each kind of evaluation."""
    kinds = parser.add_subparsers(
        metavar="WHAT", required=True, help="what to measure; each has a --help of its own"
    )
    for name, configure_kind, short, long, epilog in (
        (
            "likelihood",
            _configure_likelihood,
            "exact log p of images and text",
            "Exact log-probabilities of images and text, nats and bits per dim.",
            _LIKELIHOOD,
        ),
        (
            "understanding",
            _configure_understanding,
            "questions about pictures: exact match, ANLS",
            "Answers to questions about pictures, and captions.",
            _UNDERSTANDING,
        ),
        (
            "generation",
            _configure_generation,
            "FID, KID, CLIP score; GenEval's and WISE's scores",
            "Scores of drawn images.",
            _GENERATION,
        ),
        (
            "analysis",
            _configure_analysis,
            "skips, log-determinants, attention, latent walks, as plots",
            "What a STARFlow2 model does inside, measured on drawings.",
            _ANALYSIS,
        ),
    ):
        kind = kinds.add_parser(
            name,
            help=short,
            description=long,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        configure_kind(kind)


def _configure_understanding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR", required=True, help="STARFlow2 model or run, or a converted VLM"
    )
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
        "--max-new-tokens", type=_positive, default=32, metavar="N", help="of a reply (default 32)"
    )
    parser.add_argument(
        "--rows", type=_positive, default=16, metavar="N", help="records of a batch (default 16)"
    )
    parser.add_argument("--task", metavar="NAME", help="write a log for this task of lmms-eval")
    parser.add_argument(
        "--index", metavar="DIR", help="for the index of the files (default: beside them)"
    )
    parser.set_defaults(evaluate=_understanding)


def _configure_analysis(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _paths(parser)
    _records(parser)
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the results; default: analysis/ in the model's"
    )
    parser.add_argument(
        "--count", type=_positive, default=50, metavar="N", help="drawings (default 50)"
    )
    parser.add_argument(
        "--rows", type=_positive, default=16, metavar="N", help="drawings of a batch (default 16)"
    )
    parser.add_argument(
        "--walks", type=_positive, default=4, metavar="N", help="captions to walk on (default 4)"
    )
    parser.add_argument(
        "--steps", type=_positive, default=8, metavar="N", help="drawings of a walk (default 8)"
    )
    parser.add_argument("--guidance", type=float, default=0.0, metavar="W", help="of walks (0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")
    parser.set_defaults(evaluate=_analysis)


def _configure_generation(parser: argparse.ArgumentParser) -> None:
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
        "--rows", type=_positive, default=32, metavar="N", help="images of a batch (default 32)"
    )
    pictures.add_argument("--seed", type=int, default=0, metavar="N", help="of KID's subsets (0)")
    results = parser.add_argument_group("results of public scorers")
    results.add_argument("--geneval", metavar="FILE", help="results.jsonl of evaluate_images.py")
    results.add_argument("--wise", metavar="FILE", nargs="+", help="score files of gpt_eval.py")
    parser.set_defaults(evaluate=_generation)


def _configure_likelihood(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _paths(parser)
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the results; default: likelihood/ in the model's"
    )
    parser.add_argument(
        "--draws", type=_positive, default=4, metavar="N", help="of the images' noise (default 4)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    parser.add_argument(
        "--rows", type=_positive, default=64, metavar="N", help="records of a batch (default 64)"
    )
    conversations = parser.add_argument_group("STARFlow2 models")
    conversations.add_argument(
        "--score",
        choices=("likelihood", "matching", "retrieval", "classes"),
        default="likelihood",
        help="see below (default likelihood)",
    )
    _records(conversations)
    conversations.add_argument("--captions", metavar="FILE", help="classes, one a line")
    flows = parser.add_argument_group("image flows")
    flows.add_argument(
        "--no-bayes",
        action="store_true",
        help="score an image's own class and no class, not every class",
    )
    parser.set_defaults(evaluate=_likelihood)


def run(args: argparse.Namespace) -> None:
    """Evaluates; prints the summary.

    Raises:
        UserError: bad model, data or setting.
    """
    args.evaluate(args)


def _print_summary(summary: dict, path: pathlib.Path) -> None:
    def show(values: dict, prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                show(value, f"{prefix}{name}.")
            elif isinstance(value, float):
                print(f"{prefix}{name} {value:.5g}")

    show(summary, "")
    print(f"wrote {path}")


def _likelihood(args: argparse.Namespace) -> None:
    from starflow2_jax.flow_bundle import is_image_flow

    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}, expected at least 0")
    if is_image_flow(pathlib.Path(args.model)):
        _image_flow_likelihood(args)
    else:
        _conversation_likelihood(args)


def _image_flow_likelihood(args: argparse.Namespace) -> None:
    from starflow2_jax.data.images import open_folder
    from starflow2_jax.evaluation.image_likelihood import SUMMARY as SUMMARY_FILE
    from starflow2_jax.evaluation.image_likelihood import write_likelihoods
    from starflow2_jax.flow_bundle import load_image_flow, model_folder, read_description
    from starflow2_jax.models.starflow import TarFlowConfig
    from starflow2_jax.training.metrics import Progress

    folder = pathlib.Path(args.model)
    config, record = read_description(folder)
    if not isinstance(config, TarFlowConfig):
        raise UserError(f"{folder} is a model of latents; expected one of pixels, a TarFlow")
    if len(args.data) != 1:
        raise UserError(f"{len(args.data)} paths in --data; an image flow takes one folder")
    if args.score != "likelihood":
        raise UserError(f"--score {args.score} is for STARFlow2 models; {folder} is an image flow")
    # A converted model has classes, but no names for them.
    classes = tuple(record.get("classes") or (str(i) for i in range(config.classes)))
    data = open_folder(args.data[0], config.size, config.channels, classes or None)
    out = pathlib.Path(args.out) if args.out else model_folder(folder) / "likelihood"
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
    _print_summary(summary, out / SUMMARY_FILE)


def _conversation_likelihood(args: argparse.Namespace) -> None:
    import jax

    from starflow2_jax import load
    from starflow2_jax.evaluation import likelihood_job
    from starflow2_jax.flow_bundle import model_folder
    from starflow2_jax.parallel.distributed import join_job

    join_job()
    folder = pathlib.Path(args.model)
    model = load(folder)
    out = pathlib.Path(args.out) if args.out else model_folder(folder) / args.score
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
    on_progress = _progress_of(args.score)
    summary = likelihood_job.run(model, setting, out, index=args.index, on_progress=on_progress)
    if jax.process_index() == 0:
        _print_summary(summary, out / likelihood_job.SUMMARY)


def _understanding(args: argparse.Namespace) -> None:
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
    responder, out = Responder(args.model, args.path), pathlib.Path(args.out)
    summary = understanding.run(
        responder,
        setting,
        out,
        task=args.task,
        index=args.index,
        on_progress=_progress_of("understanding"),
    )
    if jax.process_index() == 0:
        _print_summary(summary, out / SUMMARY_FILE)


def _progress_of(name: str) -> Callable[[int, int], None]:
    """Shows the first process's records on the terminal, from the first that are done."""
    import jax

    from starflow2_jax.training.metrics import Progress

    progress: list[Progress] = []

    def on_progress(done: int, total: int) -> None:
        if not progress:
            enabled = jax.process_index() == 0
            progress.append(Progress(name, total, unit="records", enabled=enabled))
        progress[0].update(done, {})

    return on_progress


def _analysis(args: argparse.Namespace) -> None:
    from starflow2_jax import load
    from starflow2_jax.evaluation import analysis, analysis_plots
    from starflow2_jax.evaluation.dataset import drawing, open_dataset
    from starflow2_jax.flow_bundle import model_folder
    from starflow2_jax.provenance import write_json

    if args.guidance < 0 or args.seed < 0:
        raise UserError("--guidance and --seed are at least 0")
    folder = pathlib.Path(args.model)
    model = load(folder)
    dataset = open_dataset(
        args.data,
        model.bundle.image,
        task=args.task,
        fields=dict(args.field),
        images=args.images,
        index=args.index,
        template=args.template,
    )
    out = pathlib.Path(args.out) if args.out else model_folder(folder) / "analysis"
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
    _print_summary(summary, out)


def _generation(args: argparse.Namespace) -> None:
    from starflow2_jax.evaluation import benchmark_scores, generation
    from starflow2_jax.evaluation.job import SUMMARY as SUMMARY_FILE
    from starflow2_jax.provenance import write_json
    from starflow2_jax.training.metrics import Progress

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
    _print_summary(summary, out / SUMMARY_FILE)
