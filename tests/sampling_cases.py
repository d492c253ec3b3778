"""What the tests of sampling share: models, prompts of every kind, and one shape for all."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import tiny

from starflow2_jax.sampling import step
from starflow2_jax.sampling.prompts import Image, Text, extended, padded
from starflow2_jax.sampling.state import row_settings

SPECIAL = dataclasses.replace(tiny.SPECIAL, video_pad=59)
CONFIG = dataclasses.replace(tiny.config("float64"), special=SPECIAL)
SIDE, N, C = CONFIG.flow.side, CONFIG.flow.tokens, CONFIG.flow.channels
START, END_OF_IMAGE, PAD, END = 60, 61, 62, 63
UNCONDITIONAL = (5, START)
SLOTS, IMAGES = 40, 2
TOLERANCE = 1e-10


@functools.cache
def random_model():
    """Random parameters; it starts an image often."""
    model = tiny.pretzel(CONFIG, seed=3)
    head = model.vlm.head[...]
    model.vlm.head[...] = head.at[START].multiply(6.0)
    return model


@functools.cache
def steered_model(*preferences):
    """After token t it wants each (t, (first, second, ...)) in turn, by falling logits."""
    mute = ("attention.out", "mlp.down")
    zero = [f"vlm.decoder.layers.{name}" for name in mute] + ["skip_flow", "adapter.out"]
    model = tiny.pretzel(CONFIG, seed=3, zero=tuple(zero))
    size = CONFIG.vlm.vocab_size
    head = np.zeros((size, size))
    for token, wanted in preferences:
        head[list(wanted), token] = 4.0 - np.arange(len(wanted))
    model.vlm.embedding[...] = jnp.eye(size)
    model.vlm.head[...] = jnp.asarray(head)
    model.vlm.decoder.final_norm.weight[...] = jnp.ones(size)
    return model


def image(seed):
    return Image(np.random.default_rng(seed).normal(size=(N, C)))


def row_of(*pieces):
    return extended(None, pieces, CONFIG)


def batch(rows, length=16, images=1):
    """The rows as a prompt of a size that does not depend on what they hold: one compilation."""
    prompt = padded(rows, length)
    b, present = prompt.image_start.shape
    more = ((0, 0), (0, images - present))
    u = jnp.zeros((b, 0, N, C)) if prompt.u is None else prompt.u
    return dataclasses.replace(
        prompt,
        image_start=jnp.pad(prompt.image_start, more, constant_values=-1),
        u=jnp.pad(u, (*more, (0, 0), (0, 0))),
    )


def prefilled(model, rows, settings, unconditional=None, length=16):
    if unconditional is not None:
        unconditional = jnp.asarray(unconditional)
    options = {"slots": SLOTS, "images": IMAGES, "unconditional": unconditional, "record": True}
    return step.prefill(model, batch(rows, length), settings, **options)


def sampled(model, rows, settings, unconditional=None, steps=10**6, **size):
    state = prefilled(model, rows, settings, unconditional, **size)
    return step.advance(model, state, settings, steps)


# Prompts of every kind: text, a drawing at once, an image to read, an image right at the end.
PROMPT_IMAGES = ([], [], [7], [8])
PROMPTS = (
    (Text((1, 2, 3)),),
    (Text((9, 8, 7, 6, START)),),
    (image(7), Text((4, 5))),
    (Text((11,)), image(8)),
)
SETTINGS = {
    "seed": [11, 5, 6, 4],
    "temperature": [1.0, 0.7, 0.0, 1.3],
    "top_p": [1.0, 0.9, 1.0, 0.5],
    "image_temperature": [1.0, 0.8, 1.0, 1.0],
    "max_new_tokens": [9, 5, 7, 3],
    "max_images": [2, 2, 1, 0],
}
WEIGHTS = [1.5, 2.0, 0.0, 1.0]


def mixed(rows, guidance):
    picked = {k: jnp.asarray(v)[jnp.asarray(rows)] for k, v in SETTINGS.items()}
    weights = jnp.asarray(WEIGHTS)[jnp.asarray(rows)] if guidance else 0.0
    return row_settings(len(rows), guidance=weights, **picked)
