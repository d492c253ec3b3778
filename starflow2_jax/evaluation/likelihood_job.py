"""Likelihoods of a dataset under a STARFlow2 model: the ways of scoring of the command."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal

from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.conversation_likelihood import ConversationLikelihood
from starflow2_jax.evaluation.dataset import Dataset, FolderSource, open_dataset
from starflow2_jax.evaluation.job import SUMMARY, Job, Row, run_job
from starflow2_jax.evaluation.matching import CaptionTable, own_captions
from starflow2_jax.model import Model

__all__ = ["SUMMARY", "Score", "Setting", "run"]

Score = Literal["likelihood", "matching", "retrieval", "classes"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is scored, and how; it decides the results.

    Attributes:
        score: `likelihood` of conversations; of drawings `matching`, `retrieval` or `classes`.
        data, task, fields, images, template: see `open_dataset`.
        draws: of the images' noise.
        seed: of the draws.
        rows: records of a batch.
        captions: file of the classes, one a line; of a folder, its classes by default.
    """

    score: Score
    data: tuple[str, ...]
    draws: int = 4
    seed: int = 0
    rows: int = 64
    task: str | None = None
    fields: tuple[tuple[str, str], ...] = ()
    images: str | None = None
    template: str = "{}"
    captions: str | None = None


def run(
    model: Model,
    setting: Setting,
    out: pathlib.Path,
    *,
    index: str | os.PathLike[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Row:
    """Runs the job, or what is left of it; see `evaluation.job`.

    Args:
        model: a trained one.
        setting: see `Setting`.
        out: folder of the results.
        index: see `open_dataset`.
        on_progress: see `run_job`.

    Returns:
        The summary.

    Raises:
        UserError: bad data or settings, or results of another job.
    """
    dataset = open_dataset(
        setting.data,
        model.bundle.image,
        task=setting.task,
        fields=dict(setting.fields),
        images=setting.images,
        index=index,
        template=setting.template,
    )
    if not len(dataset):
        raise UserError(f"data {', '.join(setting.data)} has no records")
    captions = _captions(setting, dataset)
    scorer: ConversationLikelihood | CaptionTable
    if setting.score == "likelihood":
        scorer = ConversationLikelihood(model, dataset, setting.draws, setting.seed)
    else:
        classes = setting.score == "classes"
        scorer = CaptionTable(model, dataset, captions, setting.draws, setting.seed, classes)
    about: dict[str, Any] = dataclasses.asdict(setting)
    rows = about.pop("rows")
    about["weights_checksum"] = model.bundle.checksum()
    # A file may have changed under the same name.
    about["records_sha256"] = dataset.digest()
    if model.devices > 1:
        about["devices"] = model.devices
    if captions:
        about["captions_sha256"] = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    job = Job(out, len(dataset), min(rows, len(dataset)), about)
    return run_job(job, scorer.score, scorer.summarise, on_progress)


def _captions(setting: Setting, dataset: Dataset) -> tuple[str, ...]:
    """What every image is scored under.

    Raises:
        UserError: no classes, or a file of them that cannot be read or is not asked for.
    """
    if setting.captions is not None and setting.score != "classes":
        raise UserError("--captions are classes, for --score classes")
    if setting.score == "retrieval":
        return own_captions(dataset)
    if setting.score != "classes":
        return ()
    if setting.captions is not None:
        try:
            text = pathlib.Path(setting.captions).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the captions {setting.captions}: {error}") from error
        # Not splitlines: a text may hold other line breaks of Unicode's.
        lines = [line.strip() for line in text.split("\n")]
        captions = tuple(dict.fromkeys(line for line in lines if line))
    elif isinstance(dataset.source, FolderSource):
        source = dataset.source
        captions = tuple(source.caption(label) for label in range(len(source.folder.classes)))
    else:
        raise UserError("--score classes needs --captions FILE: one class a line")
    if len(captions) < 2:
        raise UserError(f"{len(captions)} classes; a choice needs at least two")
    return captions
