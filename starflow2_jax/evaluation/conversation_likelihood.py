"""Exact likelihoods of conversations: every image and every text of a dataset, as a job.

All log-probabilities are in nats. An image k's are of its latents x, of which S draws are made.

Pixels as latents: x is k and noise in its grey levels, so an integral of the density of x over them
is the 8-bit image's probability. Bits per dim are of that image, an upper bound. Each draw gives an
unbiased estimate of the probability, so the log of the draws' mean is a bound that more draws
tighten (importance weighting, arXiv 1509.00519); the mean of the logs is the plain one.

An FAE's latents: x is drawn from q(x | k), the encoder's posterior, normalised, with the codec's
noise. log p(x) and its bits per dim are of noisy latents, and say nothing of pixels: an FAE has no
probability p(k | x) of an image given its latents, which alone could make a bound of them. What can
be said is the rate, E[log q(x | k) - log p(x)] = KL(q || p) over draws of q: the nats that x costs
beyond its noise, which bits-back coding gets back (arXiv 1901.04866). It is reported as a mean of
draws and has no importance-weighted form: the mean over draws of p(x) / q(x | k) is 1 for every
normalised p, so more draws would bring the log of that mean to 0 and tell nothing of the model.

A text's probability given images as they are read is a mean over the draws with either codec, so
the log of the draws' mean is its importance-weighted bound. Letters: S draws, I images.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from starflow2_jax.evaluation.dataset import Dataset
from starflow2_jax.evaluation.job import Row, mean, spread, standard_error
from starflow2_jax.model import DrawScores, Model


def log_mean(values: np.ndarray) -> float:
    """log of the mean of exp, of draws [S]."""
    top = float(values.max())
    return top + math.log(mean(np.exp(values - top).tolist()))


def of_draws(name: str, values: np.ndarray, bound: bool) -> Row:
    """Mean of what draws [S] give, and spread over them; and the draws themselves.

    With `bound` the log of the mean of exp, too, where each exp is an unbiased estimate.
    """
    return {
        name: mean(values.tolist()),
        f"{name}_spread": spread(values.tolist()),
        **({f"{name}_bound": log_mean(values)} if bound else {}),
        f"{name}_by_draw": values.tolist(),
    }


@dataclasses.dataclass(frozen=True)
class ConversationLikelihood:
    """Scores records of a dataset, see `job.run_job`.

    Attributes:
        model: a trained one.
        dataset: the conversations.
        draws: S.
        seed: of the draws; record i has noise of its own, seeded by both.
    """

    model: Model
    dataset: Dataset
    draws: int
    seed: int

    def score(self, records: range) -> list[Row]:
        """A row for each record.

        Raises:
            UserError: a record is damaged, or no conversation that the model can read.
        """
        examples = [self.dataset[index] for index in records]
        seeds = noise_seeds(self.seed, records)
        turns = [example.turns for example in examples]
        names = [self.dataset.source.name(index) for index in records]
        options = {"seeds": seeds, "draws": self.draws, "rows": len(records), "names": names}
        found = self.model.score_draws(turns, **options)
        rows = []
        for index, example, scores in zip(records, examples, found, strict=True):
            roles = [t.role for t in example.turns for p in t.parts if isinstance(p, np.ndarray)]
            rows.append({"index": index, "id": example.id, **self._row(scores, roles)})
        return rows

    def _row(self, scores: DrawScores, roles: list[str]) -> Row:
        codec = self.model.bundle.codec
        bits = lambda nats: float(codec.bits_per_dim(np.float64(nats)))
        images = []
        for place, role in enumerate(roles):
            values = scores.images[:, place]
            each = [bits(v) for v in values]
            row = {
                "role": role,
                **of_draws("nats", values, codec.of_pixels),
                "bits_per_dim": bits(mean(values.tolist())),
                "bits_per_dim_spread": spread(each),
            }
            if codec.of_pixels:
                row["bits_per_dim_bound"] = bits(log_mean(values))
            else:
                row |= of_draws("rate_nats", scores.posterior[:, place] - values, False)
            images.append(row)
        text = np.array([math.fsum(draw) for draw in scores.text])
        tokens = scores.text.shape[1]
        drawn = [place for place, role in enumerate(roles) if role == "assistant"]
        joint = np.array(
            [
                math.fsum([*image[drawn], *words])
                for image, words in zip(scores.images, scores.text, strict=True)
            ]
        )
        return {
            "images": images,
            "text_tokens": tokens,
            **of_draws("text_nats", text, True),
            "perplexity": math.exp(-mean(text.tolist()) / tokens) if tokens else None,
            **of_draws("joint_nats", joint, codec.of_pixels),
        }

    def summarise(self, rows: list[Row]) -> Row:
        """Means over images and records with standard errors, whatever the order of the rows."""
        images = [image for row in rows for image in row["images"]]
        tokens = sum(row["text_tokens"] for row in rows)
        joint = [row["joint_nats"] for row in rows]
        summary: dict[str, Any] = {"images": len(images), "text_tokens": tokens}
        for role in ("assistant", "user"):
            of_role = [image for image in images if image["role"] == role]
            if of_role:
                summary[f"{role}_images"] = self._images(of_role)
        if tokens:
            nats = math.fsum(row["text_nats"] for row in rows)
            by_draw = _by_draw([row["text_nats_by_draw"] for row in rows])
            summary |= {
                "text_nats_per_token": nats / tokens,
                "text_nats_per_token_spread": spread([d * len(rows) / tokens for d in by_draw]),
                "perplexity": math.exp(-nats / tokens),
            }
        summary |= {"joint_nats": mean(joint), "joint_nats_standard_error": standard_error(joint)}
        if self.model.bundle.codec.of_pixels:
            summary["joint_nats_bound"] = mean(row["joint_nats_bound"] for row in rows)
        return summary

    def _images(self, images: list[Row]) -> Row:
        codec = self.model.bundle.codec
        bits = [image["bits_per_dim"] for image in images]
        by_draw = [
            float(codec.bits_per_dim(np.float64(nats)))
            for nats in _by_draw([image["nats_by_draw"] for image in images])
        ]
        summary: Row = {
            "images": len(images),
            "nats": mean(image["nats"] for image in images),
            "bits_per_dim": mean(bits),
            "bits_per_dim_standard_error": standard_error(bits),
            "bits_per_dim_by_draw": by_draw,
            "bits_per_dim_spread": spread(by_draw),
        }
        if codec.of_pixels:
            bounds = [image["bits_per_dim_bound"] for image in images]
            return summary | {"bits_per_dim_bound": mean(bounds)}
        rates = [image["rate_nats"] for image in images]
        return summary | {
            "rate_nats": mean(rates),
            "rate_nats_standard_error": standard_error(rates),
        }


def _by_draw(rows: list[list[float]]) -> list[float]:
    """Mean over rows of each draw."""
    return [mean(draw) for draw in zip(*rows, strict=True)]


def noise_seeds(seed: int, records: range) -> list[int]:
    """Seeds of the records' noise: with seed 0 their numbers, as `Model.log_prob` has it."""
    if not seed:
        return list(records)
    return [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in records]
