"""Summaries of what the public scorers of generation benchmarks wrote.

GenEval (github.com/djghosh13/geneval): `results.jsonl` of `evaluate_images.py`. WISE
(PKU-YuanGroup/WISE): the `*_scores_results.jsonl` of `gpt_eval.py`.
"""

import collections
import json
import pathlib
from collections.abc import Sequence
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

# First and last prompt_id, and the weight in the overall score: the categories' shares.
WISE_CATEGORIES = {
    "culture": (1, 400, 0.4),
    "time": (401, 567, 0.167),
    "space": (568, 700, 0.133),
    "biology": (701, 800, 0.1),
    "physics": (801, 900, 0.1),
    "chemistry": (901, 1000, 0.1),
}
_WISE_WEIGHTS = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
_WISE_HIGHEST = 2


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


def wise_summary(paths: Sequence[pathlib.Path]) -> dict[str, Any]:
    """WISE's scores: WiScore = (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2.

    Args:
        paths: of JSONL files: a line for each prompt, with `prompt_id`, `consistency`, `realism`
            and `aesthetic_quality`, each 0 to 2.

    Returns:
        `overall`, by the published weights of the categories (absent while one has no score);
        `equal_mean` of the categories, which some reports give; `categories`; `prompts`; `notes`.

    Raises:
        UserError: unreadable, no results, a line of another form, a prompt twice.
    """
    scores: dict[int, float] = {}
    for path in paths:
        for where, row in json_lines(path):
            try:
                number = int(row["prompt_id"])
                parts = {name: float(row[name]) for name in _WISE_WEIGHTS}
            except (KeyError, TypeError, ValueError) as error:
                names = ", ".join(_WISE_WEIGHTS)
                raise UserError(f"{where}: expected prompt_id, {names} ({error!r})") from error
            if not all(0 <= value <= _WISE_HIGHEST for value in parts.values()):
                raise UserError(f"{where}: a score is not in 0 to {_WISE_HIGHEST}: {parts}")
            if number in scores:
                raise UserError(f"{where}: prompt_id {number} is there twice")
            if not 1 <= number <= 1000:
                raise UserError(f"{where}: prompt_id {number} is not in 1 to 1000")
            weighted = sum(_WISE_WEIGHTS[name] * value for name, value in parts.items())
            scores[number] = weighted / _WISE_HIGHEST
    if not scores:
        raise UserError(f"{', '.join(map(str, paths))}: no results")
    categories, notes = {}, []
    for name, (first, last, _) in WISE_CATEGORIES.items():
        found = [scores[n] for n in range(first, last + 1) if n in scores]
        if found:
            categories[name] = mean(found)
        if len(found) != last - first + 1:
            notes.append(f"{name} has {len(found)} of {last - first + 1} prompts")
    summary: dict[str, Any] = {}
    if len(categories) == len(WISE_CATEGORIES):
        weights = {name: weight for name, (_, _, weight) in WISE_CATEGORIES.items()}
        summary["overall"] = sum(weights[name] * value for name, value in categories.items())
    return summary | {
        "equal_mean": mean(categories.values()),
        "categories": categories,
        "prompts": len(scores),
        "notes": notes,
    }
