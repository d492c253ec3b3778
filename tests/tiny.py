"""Tiny models with every parameter random, and packed rows of text and images."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from starflow2_jax.bundle import Bundle
from starflow2_jax.data import digits, pipeline
from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.patches import fit_patch_codec
from starflow2_jax.models.pretzel import Kind, Pretzel, PretzelConfig, Rows, SpecialTokens
from starflow2_jax.models.qwen2_5_vl import LanguageModelConfig

# Tiny programs take far longer to compile than to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

VOCABULARY = 64
# The last ids, so that ordinary text is everything below FIRST_SPECIAL.
SPECIAL = SpecialTokens(vision_start=60, vision_end=61, image_pad=62, end=63)
FIRST_SPECIAL = 60


def vlm(**changes):
    shape = {
        "vocab_size": VOCABULARY,
        "width": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "mlp_width": 96,
        "tied": False,
    }
    return LanguageModelConfig(**shape | changes)


def flow(**changes):
    shape = {
        "channels": 3,
        "side": 2,
        "width": 32,
        "head_dim": 16,
        "deep_layers": 2,
        "shallow_layers": (2, 1),
        "shallow_orders": ("keep", "flip"),
    }
    return FlowConfig(**shape | changes)


def config(dtype="float32", **flow_changes):
    return PretzelConfig(vlm(), flow(**flow_changes), SPECIAL, dtype=dtype)


def randomised(make_model, seed=0, dtype=np.float32, zero=()):
    """A model of random parameters, none of them left at a zero or one initial value.

    Those under the paths of `zero` are 0. Drawn by NumPy: initialising eagerly compiles something
    for each shape.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(make_model))
    rng = np.random.default_rng(seed)
    flat = []
    for path, leaf in nnx.to_flat_state(abstract):
        name = ".".join(map(str, path))
        value = 0.15 * rng.normal(size=leaf.shape)
        if name.endswith(("norm.weight", "norm.scale")):
            value = 1.0 + value
        if zero and name.startswith(tuple(zero)):
            value = np.zeros(leaf.shape)
        flat.append((path, leaf.replace(jnp.asarray(value, dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def pretzel(cfg, seed=0, zero=()):
    wide = np.float64 if cfg.dtype == "float64" else np.float32
    return randomised(lambda: Pretzel(cfg, rngs=nnx.Rngs(0)), seed, wide, zero)


# Of the pictures of `bundle`: 2 x 2 patches of 2 x 2 grey pixels.
SHAPE = ImageShape(4, 4, 1, 2)


def bundle(images, seed=0, **metadata):
    """All of a model with the digits' tokenizer; its codec fits these pictures."""
    tokenizer = digits.tokenizer()
    cfg = PretzelConfig(
        vlm(vocab_size=tokenizer.vocab_size), flow(channels=4), tokenizer.special, dtype="float32"
    )
    codec = fit_patch_codec(images, 2, 0)
    return Bundle(pretzel(cfg, seed), codec, tokenizer, SHAPE, metadata)


@dataclasses.dataclass
class Document:
    """One document: arrays of one row, [T] (positions [3, T]), and its images [I, N, C]."""

    tokens: np.ndarray
    kinds: np.ndarray
    positions: np.ndarray
    text_loss: np.ndarray
    starts: list[int]
    x: np.ndarray

    def __len__(self):
        return len(self.tokens)


def document(cfg, parts, seed):
    """A document of these parts: a number of text tokens, or "image". Its first token is text."""
    rng = np.random.default_rng(seed)
    side, channels = cfg.flow.side, cfg.flow.channels
    tokens, kinds, positions, loss, starts = [], [], [], [], []
    at = 0

    def text(token, counts):
        nonlocal at
        tokens.append(token)
        kinds.append(Kind.TEXT)
        positions.append((at, at, at))
        loss.append(counts and len(tokens) > 1)
        at += 1

    for part in parts:
        if part != "image":
            for token in rng.integers(0, FIRST_SPECIAL, part):
                text(token, True)
            continue
        text(SPECIAL.vision_start, True)
        starts.append(len(tokens))
        for index in range(side * side):
            tokens.append(SPECIAL.image_pad)
            kinds.append(Kind.LATENT)
            positions.append((at, at + index // side, at + index % side))
            loss.append(False)
        at += side
        text(SPECIAL.vision_end, False)
    return Document(
        np.array(tokens),
        np.array(kinds),
        np.array(positions).T,
        np.array(loss),
        starts,
        rng.normal(size=(len(starts), side * side, channels)),
    )


def pack(cfg, rows, length=None, images=None, left=False, dtype=jnp.float32):
    """Rows of documents, each row padded to `length` (default: the longest), and x [B, I, N, C].

    Absent images hold a finite number that is not zero. Padding holds ids that mean nothing.
    """
    length = length or max(sum(map(len, row)) for row in rows)
    images = images or max(1, *(sum(len(d.starts) for d in row) for row in rows), 1)
    b, n, c = len(rows), cfg.flow.tokens, cfg.flow.channels
    tokens = np.full((b, length), 7, np.int32)
    kinds = np.zeros((b, length), np.int32)
    positions = np.zeros((3, b, length), np.int32)
    segments = np.zeros((b, length), np.int32)
    text_loss = np.zeros((b, length), bool)
    start = np.full((b, images), -1, np.int32)
    x = np.full((b, images, n, c), 0.5)
    for r, row in enumerate(rows):
        used = sum(map(len, row))
        assert used <= length, (used, length)
        at = length - used if left else 0
        image = 0
        for s, doc in enumerate(row):
            here = slice(at, at + len(doc))
            tokens[r, here], kinds[r, here] = doc.tokens, doc.kinds
            positions[:, r, here], segments[r, here] = doc.positions, s + 1
            text_loss[r, here] = doc.text_loss
            for k, first in enumerate(doc.starts):
                start[r, image], x[r, image] = at + first, doc.x[k]
                image += 1
            at += len(doc)
    as_jax = jnp.asarray
    return Rows(
        tokens=as_jax(tokens),
        kinds=as_jax(kinds),
        positions=as_jax(positions),
        segments=as_jax(segments),
        text_loss_mask=as_jax(text_loss),
        image_start=as_jax(start),
        image_loss_mask=as_jax(start >= 0),
    ), jnp.asarray(x, dtype)


def close(ours, theirs, tolerance, name=""):
    """max|a - b| <= tolerance max(1, max|b|)."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
    assert np.isfinite(ours).all(), name
    worst = np.abs(ours - theirs).max(initial=0.0)
    assert worst <= tolerance * max(1.0, np.abs(theirs).max(initial=0.0)), (name, worst)


def close_trees(ours, theirs, tolerance):
    flat, structure = jax.tree_util.tree_flatten_with_path(ours)
    others, other_structure = jax.tree_util.tree_flatten(theirs)
    assert structure == other_structure
    for (path, a), b in zip(flat, others, strict=True):
        close(a, b, tolerance, jax.tree_util.keystr(path))


def digits_case(rows):
    """A model of digits, their codec, and a batch of so many rows of drawings and readings."""
    tokenizer = digits.tokenizer()
    shape = ImageShape(28, 28, 1, 2)
    split = digits.load_splits()["tune"]
    codec = fit_patch_codec(split.images, 2, 0)
    maker = digits.Conversations(split, tokenizer, shape, len(split.labels), 1.0)
    model = PretzelConfig(
        vlm(vocab_size=tokenizer.vocab_size),
        flow(channels=196, shallow_layers=(1, 1)),
        tokenizer.special,
        dtype="float32",
    )
    documents = maker.stream({"draw": 1.0, "read": 1.0, "story": 1.0}, False, 0)
    batches = pipeline.packed_batches(documents, pipeline.BatchShape(rows, 64, 3))
    return pretzel(model), codec, next(iter(batches))
