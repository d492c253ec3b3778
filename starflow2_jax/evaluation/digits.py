"""The report on a model of handwritten digits: likelihoods, drawings, readings, edits, stories.

Everything is measured on digits that no training step has seen. Guidance and temperature are chosen
on the `tune` split and its seeds, reported on `test` and others.
"""

import dataclasses
import json
import pathlib
import resource
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from starflow2_jax.data import digits
from starflow2_jax.data.digits import NUMBERS, STORY_IMAGES, Digits
from starflow2_jax.data.sequences import Turn
from starflow2_jax.evaluation.likelihood import paired_difference, score_captions
from starflow2_jax.evaluation.pictures import draw_captions, grid, plot_losses
from starflow2_jax.metrics import read_metrics
from starflow2_jax.model import Model, Reply, Sampling
from starflow2_jax.provenance import write_json


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """How much is measured.

    Attributes:
        drawings: reported drawings, a multiple of ten.
        stories: reported stories of three.
        tuning: drawings for each candidate setting.
        candidates: (guidance, image temperature) to choose from for drawings and stories.
        edit_candidates: the same, for edits.
        least_diversity: a candidate below it is chosen only if all are.
        draws: dequantisation draws of each likelihood.
        seed: of all sampling.
    """

    drawings: int
    stories: int
    tuning: int
    candidates: tuple[tuple[float, float], ...]
    edit_candidates: tuple[tuple[float, float], ...]
    least_diversity: float
    draws: int
    seed: int


class Judge:
    """An independent classifier of digits: a support vector machine on the real training images."""

    def __init__(self, train: Digits) -> None:
        from sklearn.svm import SVC

        self._machine = SVC(C=5.0, gamma="scale").fit(self._flat(train.images), train.labels)

    @staticmethod
    def _flat(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float64) / 255.0

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Labels of images uint8 [n, 28, 28, 1]."""
        if not len(images):
            return np.zeros(0, int)
        return self._machine.predict(self._flat(np.stack(images)))


def gaussian_bits_per_dim(train: Digits, tune: Digits, test: Digits, seed: int) -> dict[str, float]:
    """Bits per dim of held-out digits under one full-covariance Gaussian a class.

    Each class's covariance is shrunk towards its own diagonal, by the share that gives the least
    median on `tune`. The pixels are dequantised as the model's are.

    Returns:
        `median` and `mean` bits per dim on `test`, and `shrinkage`.
    """
    rng = np.random.default_rng(seed)

    def pixels(split: Digits) -> np.ndarray:
        levels = split.images.reshape(len(split.images), -1)
        return 2.0 * (levels + rng.random(levels.shape)) / 256.0 - 1.0

    data, dims = pixels(train), train.images[0].size
    held = {"tune": (pixels(tune), tune.labels), "test": (pixels(test), test.labels)}
    # With D its diagonal a covariance is D^1/2 Q L Q' D^1/2 for a rotation Q, and shrunk by s with
    # (1 - s) L + s in the place of L: one decomposition a class serves every s.
    squares = {name: np.empty_like(x) for name, (x, _) in held.items()}
    spectra, scales = np.empty((2, 10, dims))
    for digit in range(10):
        mine = data[train.labels == digit]
        mean, scales[digit] = mine.mean(0), mine.std(0, ddof=1)
        spectra[digit], rotation = np.linalg.eigh(
            np.cov((mine - mean) / scales[digit], rowvar=False)
        )
        for name, (x, labels) in held.items():
            here = labels == digit
            squares[name][here] = ((x[here] - mean) / scales[digit] @ rotation) ** 2

    def bits(name: str, shrinkage: float) -> np.ndarray:
        labels = held[name][1]
        variances = (1.0 - shrinkage) * spectra + shrinkage  # [class, dims]
        log_dets = np.log(variances).sum(1) + 2.0 * np.log(scales).sum(1)
        distance = (squares[name] / variances[labels]).sum(1)
        nats = 0.5 * (distance + log_dets[labels] + dims * np.log(2 * np.pi))
        return nats / (dims * np.log(2.0)) + 7.0

    shares = np.geomspace(1e-3, 0.99, 12)
    best = float(min(shares, key=lambda share: np.median(bits("tune", share))))
    found = bits("test", best)
    return {"median": float(np.median(found)), "mean": float(found.mean()), "shrinkage": best}


def _captions() -> list[str]:
    return [digits.caption(digit) for digit in range(10)]


def _ask(*parts: str | np.ndarray) -> list[Turn]:
    return [Turn("user", parts)]


def _draw(model: Model, count: int, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """`count` drawings of the ten captions in turn, and their intended classes."""
    labels = np.arange(count) % 10
    replies = model.generate(
        [_ask(digits.caption(int(label))) for label in labels], sampling, draw=True
    )
    return np.stack([reply.images[0] for reply in replies]), labels


def _within_class_variance(images: np.ndarray, labels: np.ndarray) -> float:
    flat = images.reshape(len(images), -1).astype(np.float64)
    return float(np.mean([flat[labels == d].var(0).mean() for d in range(10)]))


def _nearest(images: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Euclidean distance of each image to the nearest of `train`."""
    a = images.reshape(len(images), -1).astype(np.float64)
    b = train.reshape(len(train), -1).astype(np.float64)
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2.0 * a @ b.T
    return np.sqrt(np.maximum(squares.min(1), 0.0))


def _first_image(reply: Reply) -> np.ndarray | None:
    """The reply's image, if it is one image and nothing else."""
    well_formed = len(reply.parts) == 1 and len(reply.images) == 1
    return reply.images[0] if well_formed else None


def _judged(judge: Judge, drawn: list[np.ndarray | None], wanted: np.ndarray) -> np.ndarray:
    """Whether each drawing is there and of its class."""
    there = np.array([image is not None for image in drawn])
    right = np.zeros(len(drawn), bool)
    labels = judge([image for image in drawn if image is not None])
    right[there] = labels == wanted[there]
    return right


def draw_fixed_prompts(model: Model, folder: pathlib.Path, name: str) -> None:
    """Draws each caption twice with fixed seeds, into `folder/NAME.png`."""
    captions = [digits.caption(i % 10) for i in range(20)]
    draw_captions(model, captions, Sampling(1.5, 0.9, seed=0), folder / f"{name}.png", columns=10)


def choose_sampling(
    model: Model, judge: Judge, real_variance: float, config: ReportConfig
) -> tuple[tuple[float, float], list[dict[str, float]]]:
    """The candidate whose drawings are judged best, among those that are diverse enough."""
    rows = []
    for guidance, temperature in config.candidates:
        drawn, labels = _draw(
            model,
            config.tuning,
            Sampling(guidance, temperature, max_images=1, seed=config.seed + 1),
        )
        rows.append(
            {
                "guidance": guidance,
                "image_temperature": temperature,
                "accuracy": float((judge(drawn) == labels).mean()),
                "diversity": _within_class_variance(drawn, labels) / real_variance,
            }
        )
    enough = [row for row in rows if row["diversity"] >= config.least_diversity] or rows
    best = max(enough, key=lambda row: row["accuracy"])
    return (best["guidance"], best["image_temperature"]), rows


def measure(model: Model, config: ReportConfig, folder: pathlib.Path) -> dict[str, Any]:
    """Everything the report holds of the model; writes the pictures into `folder`."""
    splits = digits.load_splits()
    train, tune, test = splits["train"], splits["tune"], splits["test"]
    judge = Judge(train)
    report: dict[str, Any] = {"held_out_images": len(test.labels)}
    report["classifier_accuracy"] = float((judge(test.images) == test.labels).mean())

    scores = score_captions(model, test.images, _captions(), draws=config.draws)
    own = scores.captioned[np.arange(len(test.labels)), test.labels]

    def bits(nats: np.ndarray) -> float:
        return float(np.mean(model.bundle.codec.bits_per_dim(nats)))

    gap, error = paired_difference(own, scores.empty)
    gaussian = gaussian_bits_per_dim(train, tune, test, config.seed)
    report |= {
        "bits_per_dim": bits(own),
        "bits_per_dim_no_caption": bits(scores.empty),
        "bits_per_dim_mixture": bits(scores.mixture()),
        "bits_per_dim_gaussian": gaussian["median"],
        "bits_per_dim_gaussian_mean": gaussian["mean"],
        "gaussian_shrinkage": gaussian["shrinkage"],
        "dequantisation_draws": config.draws,
        "caption_gap_nats": gap,
        "caption_gap_standard_error": error,
        "bayes_accuracy": float((scores.posterior_argmax() == test.labels).mean()),
    }

    replies = model.generate(
        [_ask(image, digits.QUESTION) for image in test.images], Sampling(max_new_tokens=16)
    )
    answers = [
        reply.parts == (NUMBERS[label],) for reply, label in zip(replies, test.labels, strict=True)
    ]
    report["reading_accuracy"] = float(np.mean(answers))

    real_variance = _within_class_variance(train.images, train.labels)
    chosen, tuning = choose_sampling(model, judge, real_variance, config)
    sampling = Sampling(*chosen, max_images=1, seed=config.seed + 2)
    report |= {"guidance": chosen[0], "image_temperature": chosen[1], "tuning": tuning}

    drawn, labels = _draw(model, config.drawings, sampling)
    plain, _ = _draw(model, config.drawings, Sampling(max_images=1, seed=config.seed + 3))
    held = np.concatenate([tune.images, test.images])
    threshold = np.quantile(_nearest(held, train.images), 0.01)
    report |= {
        "drawings": config.drawings,
        "drawing_accuracy": float((judge(drawn) == labels).mean()),
        "diversity": _within_class_variance(drawn, labels) / real_variance,
        "copy_rate": float((_nearest(drawn, train.images) < threshold).mean()),
        "drawing_accuracy_plain": float((judge(plain) == labels).mean()),
        "diversity_plain": _within_class_variance(plain, labels) / real_variance,
        "copy_rate_plain": float((_nearest(plain, train.images) < threshold).mean()),
    }
    columns = [drawn[labels == digit][:10] for digit in range(10)]
    deep = min(len(images) for images in columns)
    grid([images[row] for row in range(deep) for images in columns], 10).save(
        folder / "drawings.png"
    )

    report |= _measure_edits(model, judge, tune, test, config, folder)
    report |= _measure_stories(model, judge, config, sampling, folder)
    return report


@dataclasses.dataclass(frozen=True)
class _Edits:
    """Edits of a split's digits: what was shown, what was drawn, and whether that is right."""

    shown: np.ndarray
    drawn: list[np.ndarray | None]
    right: np.ndarray


def _next_digits(model: Model, judge: Judge, split: Digits, sampling: Sampling) -> _Edits:
    """Right where the drawing is of the class after the shown one's."""
    follows = split.labels < 9
    shown, wanted = split.images[follows], split.labels[follows] + 1
    replies = model.generate([_ask(image, digits.NEXT) for image in shown], sampling)
    drawn = [_first_image(reply) for reply in replies]
    return _Edits(shown, drawn, _judged(judge, drawn, wanted))


def _is_inverted(image: np.ndarray | None) -> bool:
    return image is not None and bool(image.mean() > 127.5)


def _inversions(model: Model, judge: Judge, split: Digits, sampling: Sampling) -> _Edits:
    """Right where the drawing is dark on light and, inverted back, of the shown one's class."""
    replies = model.generate([_ask(image, digits.INVERT) for image in split.images], sampling)
    drawn = [_first_image(reply) for reply in replies]
    restored = [255 - image if _is_inverted(image) else None for image in drawn]
    return _Edits(split.images, drawn, _judged(judge, restored, split.labels))


def _measure_edits(
    model: Model,
    judge: Judge,
    tune: Digits,
    test: Digits,
    config: ReportConfig,
    folder: pathlib.Path,
) -> dict[str, Any]:
    def edit(split: Digits, setting: tuple[float, float], seed: int) -> tuple[_Edits, _Edits]:
        sampling = Sampling(*setting, max_images=1, seed=seed)
        return (
            _next_digits(model, judge, split, sampling),
            _inversions(model, judge, split, sampling),
        )

    def accuracy(edits: tuple[_Edits, _Edits]) -> float:
        return float(np.concatenate([e.right for e in edits]).mean())

    tuning = [
        {
            "guidance": setting[0],
            "image_temperature": setting[1],
            "accuracy": accuracy(edit(tune, setting, config.seed + 1)),
        }
        for setting in config.edit_candidates
    ]
    best = max(tuning, key=lambda row: row["accuracy"])
    chosen = (best["guidance"], best["image_temperature"])
    following, inverted = edits = edit(test, chosen, config.seed + 2)
    rng = np.random.default_rng(0)
    pairs = []
    for edited in edits:
        for i in rng.permutation(len(edited.shown))[:20]:
            image, drawn = edited.shown[i], edited.drawn[i]
            pairs += [image, np.zeros_like(image) if drawn is None else drawn]
    grid(pairs, 10).save(folder / "edits.png")
    return {
        "editing_accuracy": accuracy(edits),
        "editing_next_accuracy": float(following.right.mean()),
        "editing_invert_accuracy": float(inverted.right.mean()),
        "editing_invert_sign": float(np.mean([_is_inverted(image) for image in inverted.drawn])),
        "edits": len(following.right) + len(inverted.right),
        "editing_guidance": chosen[0],
        "editing_image_temperature": chosen[1],
        "editing_tuning": tuning,
    }


def _measure_stories(
    model: Model, judge: Judge, config: ReportConfig, sampling: Sampling, folder: pathlib.Path
) -> dict[str, float]:
    starts = np.arange(config.stories) % (10 - STORY_IMAGES + 1)
    replies = model.generate(
        [_ask(digits.story_prompt(int(start))) for start in starts],
        dataclasses.replace(sampling, max_images=STORY_IMAGES + 1, max_new_tokens=16),
    )
    right, decided, words_right, shown = [], [], [], []
    for start, reply in zip(starts, replies, strict=True):
        kinds = [isinstance(part, str) for part in reply.parts]
        decided.append(kinds == [True, False] * STORY_IMAGES and reply.reason == "end")
        words = [part for part in reply.parts if isinstance(part, str)]
        words_right.append(words == [NUMBERS[start + i] for i in range(STORY_IMAGES)])
        drawn: list[np.ndarray | None] = [*reply.images[:STORY_IMAGES]]
        drawn += [None] * (STORY_IMAGES - len(drawn))
        right.append(_judged(judge, drawn, start + np.arange(STORY_IMAGES)))
        shown += [np.zeros((28, 28, 1), np.uint8) if image is None else image for image in drawn]
    grid(shown[:96], 12).save(folder / "stories.png")
    table = np.array(right)
    return {
        "stories": config.stories,
        "story_accuracy": float(table.mean()),
        "story_accuracy_by_place": [float(v) for v in table.mean(0)],
        "story_all_right": float(table.all(1).mean()),
        "story_words_right": float(np.mean(words_right)),
        "story_decision_accuracy": float(np.mean(decided)),
    }


def _training_record(workdir: pathlib.Path) -> dict[str, Any]:
    """What the training left in `metrics.jsonl`: seconds, rates, memory."""
    record: dict[str, Any] = {"stages": {}}
    for row in read_metrics(workdir / "metrics.jsonl"):
        if "stage_seconds" in row:
            record["stages"][row["stage"]] = {
                "seconds": row["stage_seconds"],
                "images_per_second": row["images_per_second"],
                "tokens_per_second": row["tokens_per_second"],
            }
            record["peak_memory_gb"] = row["peak_memory_gb"]
        record["seconds_training"] = row["seconds"]
    return record


_TABLE = (
    "bits_per_dim",
    "bits_per_dim_no_caption",
    "bits_per_dim_mixture",
    "bits_per_dim_gaussian",
    "bayes_accuracy",
    "reading_accuracy",
    "drawing_accuracy",
    "classifier_accuracy",
    "editing_accuracy",
    "editing_next_accuracy",
    "editing_invert_accuracy",
    "story_accuracy",
    "story_all_right",
    "story_decision_accuracy",
    "diversity",
    "copy_rate",
    "guidance",
    "image_temperature",
    "drawing_accuracy_plain",
    "diversity_plain",
    "seconds_total",
    "peak_memory_gb",
)


def write_report(model: Model, config: ReportConfig, workdir: pathlib.Path) -> dict[str, Any]:
    """Measures, and writes `report.json`, `report.md` and the pictures into the work directory."""
    began = time.monotonic()
    report = measure(model, config, workdir)
    training = _training_record(workdir)
    seconds = time.monotonic() - began
    report |= training
    report |= {
        "seconds_evaluation": seconds,
        "seconds_total": training.get("seconds_training", 0.0) + seconds,
        "peak_memory_gb": max(
            training.get("peak_memory_gb", 0.0),
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        ),
        "frozen_checksum_before": model.bundle.metadata["frozen_checksum_before"],
        "frozen_checksum_after": model.bundle.metadata["frozen_checksum_after"],
    }
    plot_losses(
        workdir,
        [("text_to_image", "loss_image"), ("joint", "loss_image"), ("joint", "loss_text")],
    )
    write_json(workdir / "report.json", report)
    lines = [f"| {name} | {report[name]:.4g} |" for name in _TABLE]
    table = "\n".join(["| measure | value |", "|---|---|", *lines])
    stages = "\n".join(
        f"| {name} | {s['seconds']:.0f} | {s['images_per_second']:.0f} | "
        f"{s['tokens_per_second']:.0f} |"
        for name, s in report["stages"].items()
    )
    (workdir / "report.md").write_text(
        "# Handwritten digits\n\n"
        f"{report['held_out_images']} held-out digits; {report['drawings']} drawings at guidance "
        f"{report['guidance']} and temperature {report['image_temperature']} (chosen on another "
        f"split; `_plain` is guidance 0, temperature 1); {report['stories']} stories of three; "
        f"{report['edits']} edits at guidance {report['editing_guidance']} and temperature "
        f"{report['editing_image_temperature']}, chosen likewise.\n\n"
        f"{table}\n\n"
        f"| stage | seconds | images/s | tokens/s |\n|---|---|---|---|\n{stages}\n\n"
        f"Frozen weights before and after: `{report['frozen_checksum_before'][:16]}`, "
        f"`{report['frozen_checksum_after'][:16]}`.\n\n"
        "![drawings](drawings.png)\n\n![stories](stories.png)\n\n![edits](edits.png)\n\n"
        "![losses](losses.png)\n\n"
        f"```json\n{json.dumps([report['tuning'], report['editing_tuning']], indent=1)}\n```\n",
        encoding="utf-8",
    )
    print(table)
    return report
