"""Summaries of what the public scorers of generation benchmarks wrote.

GenEval (github.com/djghosh13/geneval): `results.jsonl` of `evaluate_images.py`. WISE
(PKU-YuanGroup/WISE): the `--result_scores` of `gpt_eval.py` or `vllm_eval.py`.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.formats import json_lines
from starflow2_jax.evaluation.job import mean

GENEVAL_TAGS = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
"""Prompts of each task."""


@dataclasses.dataclass(frozen=True)
class WiseEdition:
    """One edition of WISE: what its judge gives, and how that is averaged.

    Attributes:
        parts: the judge's scores and their weights in a prompt's score.
        highest: of each part.
        categories: first and last prompt_id of each, and its weight in the overall score.
    """

    parts: Mapping[str, float]
    highest: int
    categories: Mapping[str, tuple[int, int, float]]


WISE_EDITIONS = {
    # Of the paper, judged by GPT-4o (`gpt_eval.py`); the repository keeps it in WISE_legacy.
    "original": WiseEdition(
        {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1},
        2,
        {
            "culture": (1, 400, 0.4),
            "time": (401, 567, 0.167),
            "space": (568, 700, 0.133),
            "biology": (701, 800, 0.1),
            "physics": (801, 900, 0.1),
            "chemistry": (901, 1000, 0.1),
        },
    ),
    # WISE_Verified: some other prompts, and another judge, who says yes or no (`vllm_eval.py`).
    # Weights, the ids of each file (to 400, 640, 1000) and the order of categories are those of its
    # repository's README (at d6bfe42). The borders inside a file are inferred: the shares in the
    # README's table are of 120 prompts. The overall score does not depend on them.
    "verified": WiseEdition(
        {"score": 1.0},
        1,
        {
            "culture": (1, 400, 0.4),
            "time": (401, 520, 0.12),
            "space": (521, 640, 0.12),
            "biology": (641, 760, 0.12),
            "physics": (761, 880, 0.12),
            "chemistry": (881, 1000, 0.12),
        },
    ),
}


def geneval_summary(path: pathlib.Path) -> dict[str, Any]:
    """GenEval's scores: the overall one is the mean of the tasks' means.

    Args:
        path: of `results.jsonl`: a line for each image, with `tag`, `correct` and `metadata`.

    Returns:
        `overall`; `tasks`, the share of correct images of each; `images`, `prompts` and the share
        of each that is right; `notes`, what makes this another number than the published one.

    Raises:
        UserError: unreadable, no results, or a line of another form.
    """
    tasks: dict[str, list[float]] = collections.defaultdict(list)
    prompts: dict[str, list[bool]] = collections.defaultdict(list)
    of_task: dict[str, set[str]] = collections.defaultdict(set)
    for where, row in json_lines(path):
        match row:
            case {"tag": str(tag), "correct": bool(correct), "metadata": metadata}:
                key = metadata if isinstance(metadata, str) else json.dumps(metadata)
                tasks[tag].append(float(correct))
                prompts[key].append(correct)
                of_task[tag].add(key)
            case _:
                raise UserError(f"{where}: expected an object with tag, correct and metadata")
    if not tasks:
        raise UserError(f"{path}: no results")
    notes = [f"unknown task {tag}" for tag in tasks if tag not in GENEVAL_TAGS]
    notes += [
        f"task {tag} has {len(of_task[tag])} of {count} prompts"
        for tag, count in GENEVAL_TAGS.items()
        if len(of_task[tag]) != count
    ]
    shares = {tag: mean(right) for tag, right in tasks.items()}
    return {
        "overall": mean(shares.values()),
        "tasks": shares,
        "images": sum(map(len, tasks.values())),
        "correct_images": mean(value for right in tasks.values() for value in right),
        "prompts": len(prompts),
        "correct_prompts": mean(float(any(right)) for right in prompts.values()),
        "notes": notes,
    }


def _wise_edition(row: Any) -> str:
    return "verified" if isinstance(row, dict) and "score" in row else "original"


def wise_summary(paths: Sequence[pathlib.Path]) -> dict[str, Any]:
    """WISE's scores, of the edition whose judge wrote the files.

    original: WiScore = (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2, each 0 to 2.
    verified: WiScore is 0 or 1.

    Args:
        paths: of JSONL files of one edition: a line for each prompt, with `prompt_id` and
            `consistency`, `realism` and `aesthetic_quality`, or `score`.

    Returns:
        `edition`; `overall`, by the published weights of the categories (absent while one has no
        score); `equal_mean` of the categories, which some reports give; `categories`; `prompts`;
        `notes`.

    Raises:
        UserError: unreadable, no results, a line of another form or edition, a prompt twice.
    """
    scores: dict[int, float] = {}
    name = None
    for path in paths:
        for where, row in json_lines(path):
            name = name or _wise_edition(row)
            edition = WISE_EDITIONS[name]
            if _wise_edition(row) != name:
                raise UserError(f"{where}: of another edition of WISE than the lines before it")
            try:
                number = int(row["prompt_id"])
                parts = {part: float(row[part]) for part in edition.parts}
            except (KeyError, TypeError, ValueError) as error:
                names = ", ".join(edition.parts)
                raise UserError(f"{where}: expected prompt_id, {names} ({error!r})") from error
            if not all(0 <= value <= edition.highest for value in parts.values()):
                # The published average would count the 999 of an answer that could not be read.
                raise UserError(
                    f"{where}: a score is not in 0 to {edition.highest}: {parts}; where the judge "
                    "failed, have it judge that prompt again"
                )
            if number in scores:
                raise UserError(f"{where}: prompt_id {number} is there twice")
            if not 1 <= number <= 1000:
                raise UserError(f"{where}: prompt_id {number} is not in 1 to 1000")
            weighted = sum(edition.parts[part] * value for part, value in parts.items())
            scores[number] = weighted / edition.highest
    if name is None:
        raise UserError(f"{', '.join(map(str, paths))}: no results")
    categories, weights, notes = {}, {}, []
    for category, (first, last, weight) in WISE_EDITIONS[name].categories.items():
        found = [scores[n] for n in range(first, last + 1) if n in scores]
        weights[category] = weight
        if found:
            categories[category] = mean(found)
        if len(found) != last - first + 1:
            notes.append(f"{category} has {len(found)} of {last - first + 1} prompts")
    summary: dict[str, Any] = {"edition": name}
    if len(categories) == len(weights):
        summary["overall"] = sum(weights[part] * value for part, value in categories.items())
    return summary | {
        "equal_mean": mean(categories.values()),
        "categories": categories,
        "prompts": len(scores),
        "notes": notes,
    }
