"""What likelihoods say of images and texts together: matching, retrieval, classification.

An image is scored under a caption and under the empty prompt, with the same noise. Their
difference, log p(image | text) - log p(image), says how well they go together: the pointwise mutual
information, in nats, of the latents; the mean of draws. It is no bound on that of the image: its
terms are bounds on either side. For one image the likeliest of several captions is that of the
largest log p(image | text), Bayes' rule with captions that are equally likely; for one caption the
best image is that of the largest difference. Letters: n images, K captions, S draws.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from starflow2_jax.data.sequences import Turn
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.conversation_likelihood import log_mean, noise_seeds, of_draws
from starflow2_jax.evaluation.dataset import Dataset, drawing
from starflow2_jax.evaluation.job import Row, mean, standard_error
from starflow2_jax.model import Model

Mode = Literal["matching", "retrieval", "classes"]

RECALL_AT = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class CaptionTable:
    """Scores drawings of a dataset under captions, see `job.run_job`.

    Attributes:
        model: a trained one.
        dataset: of drawings: a caption, an image.
        captions: K, that every image is scored under; none: only under its own (matching).
        draws: S.
        seed: see `ConversationLikelihood`.
        classes: the captions are classes, and each image's own caption is one of them.
    """

    model: Model
    dataset: Dataset
    captions: tuple[str, ...]
    draws: int
    seed: int
    classes: bool = False

    def score(self, records: range) -> list[Row]:
        """A row for each record.

        Raises:
            UserError: a record is damaged or no drawing, or its caption is none of the classes.
        """
        examples = [self.dataset[index] for index in records]
        pairs = [drawing(example) for example in examples]
        known = set(self.captions)
        for example, (caption, _) in zip(examples, pairs, strict=True):
            if self.classes and caption not in known:
                raise UserError(
                    f"record {example.id}: its caption {caption!r} is none of the "
                    f"{len(self.captions)} classes"
                )
        own_prompts: list[tuple[str, ...]] = [(own,) for own, _ in pairs]
        prompts = [[(c,)] * len(pairs) for c in self.captions] or [own_prompts]
        images = [image for _, image in pairs]
        table = self._table([*prompts, [()] * len(pairs)], images, records)
        rows = []
        for place, (index, example) in enumerate(zip(records, examples, strict=True)):
            own = pairs[place][0]
            row = {"index": index, "id": example.id, "caption": own}
            rows.append(row | self._row(own, table[:, :-1, place], table[:, -1, place]))
        return rows

    def _table(
        self,
        prompts: Sequence[Sequence[tuple[str, ...]]],
        images: Sequence[np.ndarray],
        records: range,
    ) -> np.ndarray:
        """log p of the images under each of some prompts, [S, prompts, n].

        A prompt at a time: a conversation that is being scored has a copy of its image.
        """
        drawing = lambda prompt, image: [Turn("user", prompt), Turn("assistant", (image,))]
        names = [self.dataset.source.name(index) for index in records]
        each = {prompt: name for some in prompts for prompt, name in zip(some, names, strict=True)}
        if self.captions:
            each |= {(caption,): f"caption {caption!r}" for caption in self.captions}
        longest = max(self.model.length(drawing(p, images[0]), name) for p, name in each.items())
        columns = []
        for mine in prompts:
            found = self.model.score_draws(
                [drawing(prompt, image) for prompt, image in zip(mine, images, strict=True)],
                seeds=noise_seeds(self.seed, records),
                draws=self.draws,
                rows=len(records),
                positions=longest,
                names=names,
            )
            columns.append(np.stack([scores.images[:, 0] for scores in found], axis=1))
        return np.stack(columns, axis=1)

    def _row(self, own: str, captioned: np.ndarray, empty: np.ndarray) -> Row:
        """Of one image: [S, K] and [S]."""
        names = self.captions or (own,)
        under = captioned[:, names.index(own)]
        pixels = self.model.bundle.codec.of_pixels
        row = {
            **of_draws("nats", under, pixels),
            **of_draws("nats_no_caption", empty, pixels),
            **of_draws("match", under - empty, False),
        }
        if not self.captions:
            return row
        by_caption = [mean(column) for column in captioned.T.tolist()]
        if not pixels:
            # A density of other latents at each draw: Bayes' rule for each, then the mean of what
            # it says. (The mean of the densities would be that of the luckiest draw.)
            captioned = np.stack([_normalised(draw) for draw in captioned])
        # Of pixels each draw gives an unbiased p(image | caption): Bayes' rule takes their mean.
        posterior = _normalised(np.array([log_mean(column) for column in captioned.T]))
        return row | {
            "nats_by_caption": by_caption,
            "predicted": names[int(posterior.argmax())],
            "log_posterior": float(posterior[names.index(own)]),
            "rank": 1 + int((posterior > posterior[names.index(own)]).sum()),
        }

    def summarise(self, rows: list[Row]) -> Row:
        """Means with standard errors, recalls or accuracies, whatever the order of the rows."""
        match = [row["match"] for row in rows]
        summary: dict[str, Any] = {
            "match": mean(match),
            "match_standard_error": standard_error(match),
            "match_positive": mean(float(m > 0) for m in match),
        }
        codec = self.model.bundle.codec
        for name in ("nats", "nats_no_caption"):
            nats = mean(row[name] for row in rows)
            summary[name] = nats
            bits = float(codec.bits_per_dim(np.float64(nats)))
            summary[name.replace("nats", "bits_per_dim")] = bits
        if not self.captions:
            return summary
        ranks = [row["rank"] for row in rows]
        if self.classes:
            right = [float(row["predicted"] == row["caption"]) for row in rows]
            return summary | {
                "classes": len(self.captions),
                "accuracy": mean(right),
                "accuracy_standard_error": standard_error(right),
                "accuracy_top_5": mean(float(rank <= 5) for rank in ranks),
                "log_posterior": mean(row["log_posterior"] for row in rows),
            }
        return summary | {
            "captions": len(self.captions),
            "text_retrieval": recalls(ranks),
            "image_retrieval": recalls(self._image_ranks(rows)),
        }

    def _image_ranks(self, rows: list[Row]) -> list[int]:
        """For each caption, the place of the best of its own images."""
        table = np.array([row["nats_by_caption"] for row in rows])
        match = table - np.array([row["nats_no_caption"] for row in rows])[:, None]  # [n, K]
        own = [row["caption"] for row in rows]
        ranks = []
        for place, caption in enumerate(self.captions):
            mine = np.array([c == caption for c in own])
            ranks.append(1 + int((match[~mine, place] > match[mine, place].max()).sum()))
        return ranks


def _normalised(logs: np.ndarray) -> np.ndarray:
    """Logs [K] of numbers that are made to sum to 1."""
    return logs - (log_mean(logs) + math.log(len(logs)))


def recalls(ranks: Sequence[int]) -> Row:
    """Recall at 1, 5 and 10, and the median of ranks that start at 1."""
    found = {f"recall_at_{k}": mean(float(rank <= k) for rank in ranks) for k in RECALL_AT}
    return found | {"median_rank": float(np.median(ranks))}


def own_captions(dataset: Dataset) -> tuple[str, ...]:
    """The captions of a dataset of drawings, each once, in the order of their first records.

    Raises:
        UserError: a record is no drawing, or damaged.
    """
    return tuple(dict.fromkeys(drawing(dataset[i])[0] for i in range(len(dataset))))
