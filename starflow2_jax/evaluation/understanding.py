"""Questions about pictures, and captions: exact match and ANLS over a JSONL file.

One object a line: {"image": FILE or [FILE, ...], "question": TEXT, "answer": TEXT or "answers":
[TEXT, ...]}; `<image>` in the question stands where a picture is shown, by default before it.
Without a question the picture is to be described. `id` and `doc_id` are optional.

DIR/examples.jsonl  for each record its reply and scores
DIR/summary.json    means with standard errors
DIR/TASK.json       with a task's name: a log that `lmms-eval --model from_log` scores
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from starflow2_jax.data.sequences import Turn
from starflow2_jax.data.sources import ConversationSource
from starflow2_jax.data.sources.record import Record, RecordError
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.formats import write_log
from starflow2_jax.evaluation.job import EXAMPLES, Job, Row, mean, run_job, standard_error
from starflow2_jax.evaluation.responder import Responder, Said

_PLACE = "<image>"
_ANLS_THRESHOLD = 0.5


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is asked, and how; it decides the results.

    Attributes:
        data: JSONL files.
        images: folder that the paths of pictures start from; default: each file's own.
        question: of records without one.
        suffix: is put behind every question, on a line of its own.
        max_new_tokens: of a reply.
        rows: records of a batch.
    """

    data: tuple[str, ...]
    images: str | None = None
    question: str = "describe this image"
    suffix: str = ""
    max_new_tokens: int = 32
    rows: int = 16


def normalised(text: str) -> str:
    """In lower case, single blanks, without punctuation at either end."""
    return " ".join(text.lower().split()).strip(string.punctuation + " ")


def exact_match(reply: str, answers: Sequence[str]) -> float:
    """1 if the normalised reply is one of the normalised answers, else 0."""
    return float(normalised(reply) in map(normalised, answers))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: letters to insert, delete or replace."""
    row = np.arange(len(b) + 1)
    letters = np.array(list(b))
    for i, letter in enumerate(a, 1):
        # Deletions and replacements first; insertions are a running minimum.
        kept = np.minimum(row[1:] + 1, row[:-1] + (letters != letter)) if b else row[1:]
        row = np.concatenate([[i], kept])
        row = np.minimum.accumulate(row - np.arange(len(row))) + np.arange(len(row))
    return int(row[-1])


def anls(reply: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity (arXiv 1905.13648) of one reply.

    1 - edits / the longer length for the nearest answer, in lower case; 0 from half of it on.
    """
    said = " ".join(reply.lower().split())
    best = 0.0
    for answer in answers:
        wanted = " ".join(answer.lower().split())
        longest = max(len(said), len(wanted))
        far = edit_distance(said, wanted) / longest if longest else 0.0
        best = max(best, 1.0 - far if far < _ANLS_THRESHOLD else 0.0)
    return best


@dataclasses.dataclass(frozen=True)
class Question:
    """One record.

    Attributes:
        id: its own, where it has one, or its number.
        number: `doc_id`, where it has one, or its number.
        said: texts and encoded pictures, in order.
        answers: that are right.
    """

    id: str | int
    number: int
    said: tuple[Said, ...]
    answers: tuple[str, ...]


def _question(record: Record, index: int, setting: Setting) -> Question:
    """Reads a record.

    Raises:
        RecordError: a field is missing or of another kind.
    """

    def optional(key: str, kind: type, default: Any) -> Any:
        value = record.value(key) if key in record else default
        if not isinstance(value, kind):
            raise RecordError(f"field {key!r} is {value!r}")
        return value

    shown = record.value("image") if "image" in record else []
    pictures = [record.encoded(v, "image") for v in (shown if isinstance(shown, list) else [shown])]
    question = optional("question", str, setting.question)
    if _PLACE not in question:
        question = _PLACE * len(pictures) + question
    pieces = question.split(_PLACE)
    if len(pieces) - 1 != len(pictures):
        raise RecordError(f"{len(pictures)} pictures, but {len(pieces) - 1} places {_PLACE}")
    if setting.suffix:
        pieces[-1] = f"{pieces[-1]}\n{setting.suffix}"
    said: list[Said] = [pieces[0].strip()]
    for picture, piece in zip(pictures, pieces[1:], strict=True):
        said += [picture, piece.strip()]
    answers = record.value("answers" if "answers" in record else "answer")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise RecordError(f"the answers are {answers!r}, expected a text or a list of texts")
    identity, number = optional("id", str | int, index), optional("doc_id", int, index)
    return Question(identity, number, tuple(one for one in said if one), tuple(answers))


class _Exam:
    """The questions of some files, asked in batches."""

    def __init__(self, source: ConversationSource, responder: Responder, setting: Setting) -> None:
        self._source, self._responder, self._setting = source, responder, setting

    def question(self, index: int) -> Question:
        """Reads a record; UserError: it is damaged, or lacks a field; names it."""
        try:
            return _question(self._source[index], index, self._setting)
        # Whatever the readers of other people's files raise on damaged ones.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self._source.name(index)}: {reason}") from error

    def digest(self, task: str | None) -> str:
        """What the records say: SHA-256, in hexadecimal, of all that is asked and expected.

        Of texts and encoded pictures, wherever the files lie. Everything is read once.

        Args:
            task: whose documents the records are, each one once; None: of none.

        Raises:
            UserError: as `question`; a document that is there twice.
        """
        found = hashlib.sha256()
        places: dict[int, int] = {}
        for index in range(len(self._source)):
            q = self.question(index)
            first = places.setdefault(q.number, index)
            if task is not None and first != index:
                raise UserError(
                    f"{self._source.name(index)}: doc_id {q.number} is there twice, first in "
                    f"{self._source.name(first)}; a log has one reply to each document of {task}"
                )
            said = [
                one if isinstance(one, str) else {"image": hashlib.sha256(one).hexdigest()}
                for one in q.said
            ]
            found.update(json.dumps([q.id, q.number, said, q.answers]).encode() + b"\n")
        return found.hexdigest()

    def score(self, records: range) -> list[Row]:
        """Asks some questions."""
        questions = [self.question(index) for index in records]
        names = [self._source.name(index) for index in records]
        asked: list[list[Turn]] = [
            [self._responder.turn("user", q.said, name)]
            for name, q in zip(names, questions, strict=True)
        ]
        setting = self._setting
        replies = self._responder.answers(
            asked, max_new_tokens=setting.max_new_tokens, rows=setting.rows, names=names
        )
        return [
            {
                "id": q.id,
                "doc_id": q.number,
                "question": " ".join(one for one in q.said if isinstance(one, str)),
                "answers": list(q.answers),
                "reply": reply,
                "exact_match": exact_match(reply, q.answers),
                "anls": anls(reply, q.answers),
            }
            for q, reply in zip(questions, replies, strict=True)
        ]

    def summarise(self, rows: list[Row]) -> Row:
        """Means and their standard errors."""
        summary: Row = {"questions": len(rows)}
        for name in ("exact_match", "anls"):
            values = [row[name] for row in rows]
            summary[name] = mean(values)
            summary[f"{name}_standard_error"] = standard_error(values)
        return summary


def run(
    responder: Responder,
    setting: Setting,
    out: pathlib.Path,
    *,
    task: str | None = None,
    index: str | os.PathLike[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Row:
    """Runs the job, or what is left of it; see `evaluation.job`.

    Args:
        responder: who answers.
        setting: see `Setting`.
        out: folder of the results.
        task: of lmms-eval, for whose documents (`doc_id`) a log is written.
        index: folder for the index of the files; default: beside them.
        on_progress: see `run_job`.

    Returns:
        The summary.

    Raises:
        UserError: bad data, results of another job, or a task's document that is there twice.
    """
    source = ConversationSource(list(setting.data), images=setting.images, index=index)
    if not len(source):
        raise UserError(f"data {', '.join(setting.data)} has no records")
    exam = _Exam(source, responder, setting)
    about: dict[str, Any] = dataclasses.asdict(setting)
    rows = about.pop("rows")
    about |= {"path": responder.path, "weights_checksum": responder.checksum()}
    if responder.devices > 1:
        about["devices"] = responder.devices
    # A file may have changed under the same name.
    about["records_sha256"] = exam.digest(task)
    job = Job(out, len(source), min(rows, len(source)), about)
    summary = run_job(job, exam.score, exam.summarise, on_progress)
    if task is not None:
        text = (out / EXAMPLES).read_text(encoding="utf-8")
        found = [json.loads(line) for line in text.split("\n") if line]
        write_log(out, task, {row["doc_id"]: row["reply"] for row in found})
    return summary
