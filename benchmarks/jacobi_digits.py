"""Jacobi against sequential drawing, on a trained model of digits, at several thresholds.

    python benchmarks/jacobi_digits.py --model runs/digits --json FILE

The ten captions are drawn with the same noise by both: the deep block under the VLM, then the
shallow flow. For each threshold: passes, time over that of sequential drawing (medians of pairs run
in turn), what changed in latents and pixels, and log p of the images, given their captions.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax import Turn, load
from starflow2_jax.data import digits
from starflow2_jax.data.pipeline import single_batch, to_rows
from starflow2_jax.data.sequences import Document, encode_turns, unconditional_prompt
from starflow2_jax.model import Model
from starflow2_jax.sampling import display, jacobi, step
from starflow2_jax.sampling.prompts import Row, padded
from starflow2_jax.sampling.state import RowSettings, SampleState, row_settings

THRESHOLDS = (0.0, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
# What the digits report chooses.
GUIDANCE, TEMPERATURE = 1.0, 1.3


class Case:
    """Prefilled rows of one kind of sampling, and what sequential drawing makes of them."""

    def __init__(self, model: Model, rows: int, guidance: float, temperature: float) -> None:
        self.model, self.pretzel = model, model.pretzel
        flow = self.pretzel.config.flow
        captions = [digits.caption(i % 10) for i in range(rows)]
        self.settings: RowSettings = row_settings(
            rows, seed=7, guidance=guidance, image_temperature=temperature
        )
        empty = np.zeros((0, flow.tokens, flow.channels), np.float32)
        prompts = [model.encode([Turn("user", (c,))], draw=True) for c in captions]
        prompt = padded([Row(d.tokens, d.kinds, d.positions, empty) for d in prompts])
        unconditional = None
        if guidance:
            unconditional = jnp.asarray(
                unconditional_prompt(model.tokenizer, model.bundle.image).tokens
            )
        slots = prompt.tokens.shape[1] + flow.tokens + 1
        self.state = step.prefill(
            self.pretzel, prompt, self.settings, slots=slots, images=1, unconditional=unconditional
        )
        blank = np.zeros(
            (model.bundle.image.height, model.bundle.image.width, model.bundle.image.channels),
            np.uint8,
        )
        self.whole: list[Document] = [
            encode_turns(
                [Turn("user", (c,)), Turn("assistant", (blank,))],
                model.tokenizer,
                model.bundle.image,
            )
            for c in captions
        ]

    def fresh(self) -> SampleState:
        """A copy of the state: drawing takes it away."""
        return jax.block_until_ready(jax.tree.map(jnp.copy, self.state))

    def log_prob(self, x: jax.Array) -> np.ndarray:
        """log p(x | caption) of images x [B, N, C], nats."""
        rows = to_rows(single_batch(self.whole))
        return np.asarray(_log_prob(self.pretzel, rows, x[:, None]), np.float64)


@jax.jit
def _log_prob(model: Any, rows: Any, x: jax.Array) -> jax.Array:
    return model.log_prob(rows, x).image_log_prob[:, 0]


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and its seconds."""
    began = time.perf_counter()
    found = jax.block_until_ready(run())
    return found, time.perf_counter() - began


def pairs(
    sequential: Callable[[Any], Any],
    others: dict[float, Callable[[Any], Any]],
    prepare: Callable[[], Any],
    repeats: int,
) -> tuple[float, dict[float, float]]:
    """Median seconds of `sequential`; median ratio of each other one, run just after it."""
    seconds: list[float] = []
    ratios: dict[float, list[float]] = {key: [] for key in others}
    for key, other in others.items():
        timed(lambda other=other: other(prepare()))  # compiles
        for repeat in range(repeats + 1):
            given = prepare()
            plain = timed(lambda given=given: sequential(given))[1]
            given = prepare()
            ratio = timed(lambda given=given, other=other: other(given))[1] / plain
            if repeat:  # the first sequential run of all compiles
                seconds.append(plain)
                ratios[key].append(ratio)
    return statistics.median(seconds), {k: statistics.median(v) for k, v in ratios.items()}


def configuration(threshold: float) -> jacobi.JacobiConfig:
    """A whole image at a time; exact at threshold 0."""
    return jacobi.JacobiConfig(chunk=4096, threshold=threshold, max_passes=None, measure="largest")


def deep(case: Case, name: str, repeats: int) -> list[dict[str, Any]]:
    """Rows on the deep block under the VLM."""
    model, settings = case.pretzel, case.settings
    tokens = model.config.flow.tokens
    draw = jax.jit(jacobi.draw)

    def by_jacobi(threshold: float) -> Callable[[SampleState], SampleState]:
        config = configuration(threshold)
        return lambda state: jacobi.advance(model, state, settings, 1, config)

    sequential = lambda state: step.advance(model, state, settings, tokens)
    exact = sequential(case.fresh()).u[:, 0]
    x = display.to_x(model, exact)
    pixels = np.asarray(case.model.bundle.codec.to_uint8(x), np.int32)
    own = case.log_prob(x)
    others = {threshold: by_jacobi(threshold) for threshold in THRESHOLDS}
    seconds, ratios = pairs(sequential, others, case.fresh, repeats)
    rows = [
        {"name": f"{name} sequential seconds", "value": seconds, "unit": "s"},
        {"name": f"{name} sequential log p", "value": float(own.mean()), "unit": "nats"},
    ]
    for threshold in THRESHOLDS:
        u = by_jacobi(threshold)(case.fresh()).u[:, 0]
        _, passes = draw(model, case.state, settings, config=configuration(threshold))
        x = display.to_x(model, u)
        levels = np.asarray(case.model.bundle.codec.to_uint8(x), np.int32)
        change = np.abs(np.asarray(u - exact))
        rows.append(
            {
                "name": f"{name} threshold {threshold:g}",
                "value": ratios[threshold] * seconds,
                "unit": "s",
                "peer": seconds,
                "ratio": ratios[threshold],
                "evaluations": int(passes[0]) + 1,
                "sequential_evaluations": tokens,
                "u_largest": float(change.max()),
                "u_mean": float(change.mean()),
                "pixel_largest": int(np.abs(levels - pixels).max()),
                "pixel_mean": float(np.abs(levels - pixels).mean()),
                "log_p_change": float((case.log_prob(x) - own).mean()),
            }
        )
    return rows


def shallow(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Rows on the shallow flow's inverse."""
    model, settings = case.pretzel, case.settings
    tokens = model.config.flow.tokens
    u = step.advance(model, case.fresh(), settings, tokens).u[:, 0]
    exact = display.to_x(model, u)
    pixels = np.asarray(case.model.bundle.codec.to_uint8(exact), np.int32)
    own = case.log_prob(exact)

    def by_jacobi(threshold: float) -> Callable[[jax.Array], Any]:
        return lambda u: jacobi.to_x(model, u, configuration(threshold))

    others = {threshold: by_jacobi(threshold) for threshold in THRESHOLDS}
    seconds, ratios = pairs(lambda u: display.to_x(model, u), others, lambda: u, repeats)
    rows = [{"name": "shallow sequential seconds", "value": seconds, "unit": "s"}]
    for threshold in THRESHOLDS:
        x, passes = by_jacobi(threshold)(u)
        levels = np.asarray(case.model.bundle.codec.to_uint8(x), np.int32)
        change = np.abs(np.asarray(x - exact))
        rows.append(
            {
                "name": f"shallow threshold {threshold:g}",
                "value": ratios[threshold] * seconds,
                "unit": "s",
                "peer": seconds,
                "ratio": ratios[threshold],
                "evaluations": sum(int(p[0]) for p in passes),
                "sequential_evaluations": tokens * len(passes),
                "x_largest": float(change.max()),
                "x_mean": float(change.mean()),
                "pixel_largest": int(np.abs(levels - pixels).max()),
                "pixel_mean": float(np.abs(levels - pixels).mean()),
                "log_p_change": float((case.log_prob(x) - own).mean()),
            }
        )
    return rows


def main() -> None:
    """Measures, prints a table, writes the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="DIR", required=True, help="a finished digits run")
    parser.add_argument("--json", metavar="FILE", help="writes the rows")
    parser.add_argument("--rows", type=int, default=40, help="images drawn together")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of each timing")
    args = parser.parse_args()
    model = load(args.model)
    guided = Case(model, args.rows, guidance=GUIDANCE, temperature=TEMPERATURE)
    plain = Case(model, args.rows, guidance=0.0, temperature=1.0)
    rows = []
    measured = (
        lambda: deep(guided, "guided", args.repeats),
        lambda: deep(plain, "plain", args.repeats),
        lambda: shallow(guided, args.repeats),
    )
    for measure in measured:
        found = measure()
        rows += found
        for row in found:
            row = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
