"""Prefill and decode of a small Qwen2.5-VL language model against `transformers` on torch's CPU.

    python benchmarks/vlm_speed.py --json FILE

The same random weights, float32, greedy, two threads each. Theirs is `generate` as it comes: cache,
sdpa. The two of a pair are measured one right after the other, in alternating order, so that a busy
machine slows both alike; a ratio is the median over the pairs, above 1 where ours is faster.
Prefill: from the call until the logits of the first new token. Decode: the 64 tokens after it.
"""

import argparse
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from starflow2_jax.convert import starflow2, table
from starflow2_jax.models.qwen2_5_vl import LanguageModelConfig, Qwen25VL
from starflow2_jax.nn.decoder import empty_cache
from starflow2_jax.sampling import write

THREADS, PAIRS, TOKENS = 2, 5, 64
PROMPTS, BATCHES = (64, 512), (1, 8)
CONFIG = LanguageModelConfig(
    vocab_size=32000,
    width=768,
    layers=12,
    heads=12,
    kv_heads=2,
    head_dim=64,
    mlp_width=2048,
    tied=True,
)


def their_model() -> transformers.Qwen2_5_VLForConditionalGeneration:
    """Random weights; the tower only has to exist."""
    text = {
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.width,
        "intermediate_size": CONFIG.mlp_width,
        "num_hidden_layers": CONFIG.layers,
        "num_attention_heads": CONFIG.heads,
        "num_key_value_heads": CONFIG.kv_heads,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": CONFIG.rope_theta,
            "mrope_section": [8, 12, 12],
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": CONFIG.width,
        "fullatt_block_indexes": [0],
    }
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=True
        )
    ).eval()
    assert model.config.text_config._attn_implementation == "sdpa"
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return model


def our_model(theirs: transformers.Qwen2_5_VLForConditionalGeneration) -> Qwen25VL:
    """Their weights."""
    state = theirs.state_dict()
    entries = list(starflow2.qwen("", "", CONFIG))
    names = [name for entry in entries for group in entry.names for name in group]
    tensors = {
        name: state[name.replace("model.", "model.language_model.", 1)].numpy() for name in names
    }
    model = table.from_tensors(lambda: Qwen25VL(CONFIG, rngs=nnx.Rngs(0)), entries, tensors)
    return write.for_decoding(model)


class Clock(transformers.LogitsProcessor):
    """Notes when the logits of each token are there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Changes nothing."""
        self.times.append(time.perf_counter())
        return scores


@torch.no_grad()
def run_theirs(model: Any, ids: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Seconds of the prefill and of TOKENS steps after it, and the tokens."""
    clock, tokens = Clock(), torch.from_numpy(ids)
    begin = time.perf_counter()
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=TOKENS + 1,
        logits_processor=transformers.LogitsProcessorList([clock]),
    )
    assert len(clock.times) == TOKENS + 1
    new = out[:, ids.shape[1] :].numpy()[:, :TOKENS]
    return clock.times[0] - begin, clock.times[-1] - clock.times[0], new


_logits = jax.jit(lambda model, y: model.logits(y))


def run_ours(model: Qwen25VL, ids: np.ndarray) -> tuple[float, float, np.ndarray]:
    """The same."""
    rows, length = ids.shape
    begin = time.perf_counter()
    cache = empty_cache(CONFIG.decoder(), rows, 0, jnp.float32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (3, rows, length))
    lengths = np.full(rows, length, np.int32)
    cache, y = write.read(
        model, cache, ids.astype(np.int32), positions, lengths, slots=length + TOKENS
    )
    jax.block_until_ready(_logits(model, y))
    read = time.perf_counter()
    state = write.WriteState(
        cache=cache,
        position=jnp.full((rows,), length, jnp.int32),
        y=y,
        tokens=jnp.zeros((rows, TOKENS), jnp.int32),
        written=jnp.zeros((rows,), jnp.int32),
        done=jnp.zeros((rows,), bool),
    )
    settings = write.write_settings(rows, (), max_new_tokens=TOKENS)
    jax.block_until_ready((state, settings))
    start = time.perf_counter()
    state = jax.block_until_ready(write.advance(model, state, settings, jnp.int32(TOKENS)))
    return read - begin, time.perf_counter() - start, np.asarray(state.tokens)


def measure(ours: Callable, theirs: Callable, rows: int, length: int) -> list[dict[str, Any]]:
    """The rows of one batch size and prompt length."""
    rng = np.random.default_rng(rows * length)
    ids = rng.integers(0, CONFIG.vocab_size, (rows, length))
    agreed = (ours(ids)[2] == theirs(ids)[2]).mean()  # both compile or warm up here
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for pair in range(PAIRS):
        order = [("ours", ours), ("theirs", theirs)]
        for name, run in order if pair % 2 == 0 else order[::-1]:
            time.sleep(0.3)  # torch's threads spin for a while
            times[name].append(run(ids)[:2])
    out = []
    for part, what, tokens in ((0, "prefill", length), (1, "decode", TOKENS)):
        a, b = ([t[part] for t in times[name]] for name in ("ours", "theirs"))
        out.append(
            {
                "name": f"{what}, prompt {length}, batch {rows}",
                "value": rows * tokens / statistics.median(a),
                "unit": "tokens/s",
                "peer": rows * tokens / statistics.median(b),
                "ratio": statistics.median(y / x for x, y in zip(a, b, strict=True)),
            }
        )
    out.append(
        {
            "name": f"greedy tokens that agree, prompt {length}, batch {rows}",
            "value": float(agreed),
            "unit": "fraction",
        }
    )
    return out


def main() -> None:
    """Measures, prints the rows, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="writes the rows")
    args = parser.parse_args()
    # Before the backend counts the processors.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(THREADS)
    theirs = their_model()
    ours = our_model(theirs)
    rows = []
    for batch in BATCHES:
        for length in PROMPTS:
            rows += measure(
                lambda ids: run_ours(ours, ids),
                lambda ids: run_theirs(theirs, ids),
                batch,
                length,
            )
            for row in rows[-3:]:
                print(json.dumps(row), flush=True)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
