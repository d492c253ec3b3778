"""What a trained model does inside, measured on drawings of a dataset.

- Skips: how much the VLM adds to the flow's view of a latent, and the flow to the VLM's of a token:
  |s| / (|o| + |s|) of what a skip adds, s, to what is there, o; and the cosine between the two
  (0.472 and near 0 are the paper's for the visual skip over 50 prompts; it gives no formula).
- Log-determinants: each block's share in log p of an image.
- Attention of an image's positions in the deep block: to words, to the image before, to itself.
- Latent walks: the noise of two drawings of one caption, and of what lies between them.

Letters: B rows, T positions, I = 1 image per row, N tokens per image, C latent channels, L layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.pipeline import BatchShape, HostBatch, single_batch, to_rows
from starflow2_jax.data.sequences import Document, Turn, encode_turns, unconditional_prompt
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.dataset import Dataset, drawing
from starflow2_jax.evaluation.job import mean, standard_error
from starflow2_jax.model import Model
from starflow2_jax.models.codec import Codec
from starflow2_jax.models.patches import noisy_latents
from starflow2_jax.models.pretzel import Kind, Pretzel, spread_images
from starflow2_jax.nn.attention import AttentionSpec
from starflow2_jax.nn.layers import at_least_float32
from starflow2_jax.sampling.generate import generate
from starflow2_jax.sampling.jacobi import JacobiConfig
from starflow2_jax.sampling.prompts import Image, Row
from starflow2_jax.sampling.state import row_settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Look:
    """What one pass over drawings shows.

    Attributes:
        visual: [B, T, 2], contribution and alignment of the skip from the VLM, at latents.
        textual: [B, T, 2], of the skip to the language model, at the positions that predict text.
        log_dets: [B, blocks], nats: the deep block's, then the shallow ones' in order.
        prior: [B], nats: log N(z; 0, 1) of an image.
        attention: [L, B, T, T], of the deep block, mean over heads.
    """

    visual: jax.Array
    textual: jax.Array
    log_dets: jax.Array
    prior: jax.Array
    attention: jax.Array


def _skip(there: jax.Array, added: jax.Array) -> jax.Array:
    """[..., D] twice -> contribution and alignment [..., 2]; 0 where nothing is added."""
    there, added = (a.astype(at_least_float32(a.dtype)) for a in (there, added))
    a, b = jnp.linalg.norm(there, axis=-1), jnp.linalg.norm(added, axis=-1)
    tiny = jnp.finfo(a.dtype).tiny
    contribution = b / jnp.maximum(a + b, tiny)
    return jnp.stack([contribution, (there * added).sum(-1) / jnp.maximum(a * b, tiny)], -1)


@jax.jit
def look(model: Pretzel, codec: Codec, batch: HostBatch) -> Look:
    """One pass over rows of one document with one image each."""
    rows = to_rows(batch)
    x = noisy_latents(codec, batch["images"], 0, batch["image_seeds"])
    found = model.log_prob(rows, x)
    streams = found.streams
    u = spread_images(found.shallow_outputs[-1], rows.image_start, rows.tokens.shape[1])
    latent = (rows.kinds == Kind.LATENT)[..., None]
    there = jnp.where(latent, model.deep.proj_u(u.astype(streams.y.dtype)), 0.0)
    angles = model.deep.angles(rows.positions, at_least_float32(streams.h.dtype))
    spec = AttentionSpec(causal=True, segments=rows.segments)
    total = lambda a: a.sum(tuple(range(1, a.ndim)))
    inside = latent.astype(found.z.dtype)
    prior = -0.5 * (jnp.square(found.z) + jnp.log(2 * jnp.pi)) * inside
    log_dets = [total(d) for d in (found.deep_log_det, *found.shallow_log_dets)]
    return Look(
        visual=_skip(there, model.skip_vlm(streams.y)),
        textual=_skip(streams.y, model.skip_flow(streams.g)),
        log_dets=jnp.stack(log_dets, -1),
        prior=total(prior),
        attention=model.deep.decoder.attention_weights(streams.h, angles, spec),
    )


@dataclasses.dataclass
class Findings:
    """Of all drawings that were looked at.

    Attributes:
        visual, textual: lists of [positions, 2], one for each drawing.
        log_dets: list of [blocks], nats per dim; `prior` beside it.
        attention: list of [L, 3]: of an image's positions, the share that goes to words (all text
            before the image), to the image, to its own position.
        example: tokens of the first drawing's text, and the attention of its image to them [L, N,
            words].
    """

    visual: list[np.ndarray] = dataclasses.field(default_factory=list)
    textual: list[np.ndarray] = dataclasses.field(default_factory=list)
    log_dets: list[np.ndarray] = dataclasses.field(default_factory=list)
    prior: list[float] = dataclasses.field(default_factory=list)
    attention: list[np.ndarray] = dataclasses.field(default_factory=list)
    example: tuple[list[str], np.ndarray] | None = None

    def summary(self) -> dict[str, Any]:
        """Means over drawings with standard errors."""

        def of(values: Sequence[float]) -> dict[str, float]:
            values = [float(v) for v in values]
            return {"mean": mean(values), "standard_error": standard_error(values)}

        found: dict[str, Any] = {"drawings": len(self.visual)}
        for name in ("visual", "textual"):
            skips = [skip.mean(0) for skip in getattr(self, name) if len(skip)]
            for place, what in enumerate(("contribution", "alignment")):
                found[f"{name}_{what}"] = of([skip[place] for skip in skips])
        blocks = np.stack(self.log_dets)
        names = ["deep", *(f"shallow_{n}" for n in range(blocks.shape[1] - 1))]
        found["log_det_nats_per_dim"] = {n: of(blocks[:, i]) for i, n in enumerate(names)}
        shares = np.abs(blocks) / np.abs(blocks).sum(1, keepdims=True)
        found["log_det_share"] = {n: of(shares[:, i]) for i, n in enumerate(names)}
        found["prior_nats_per_dim"] = of(self.prior)
        layers = np.stack(self.attention).mean(0)
        kinds = ("words", "image", "itself")
        found["attention"] = {n: layers[:, i].tolist() for i, n in enumerate(kinds)}
        return found


def _drawings(dataset: Dataset, count: int) -> list[tuple[str, np.ndarray]]:
    """Captions and images, spread evenly over the dataset."""
    if not len(dataset):
        raise UserError("the data has no records")
    numbers = np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int))
    return [drawing(dataset[int(number)]) for number in numbers]


def analyse(model: Model, dataset: Dataset, *, count: int = 50, rows: int = 16) -> Findings:
    """Looks at drawings of a dataset.

    Args:
        model: a trained one.
        dataset: of drawings: a caption, an image.
        count: of the drawings, spread evenly over the dataset.
        rows: of a compiled batch.

    Raises:
        UserError: no records, or one that is no drawing.
    """
    pairs, bundle = _drawings(dataset, count), model.bundle
    turns = [[Turn("user", (c,)), Turn("assistant", (image,))] for c, image in pairs]
    documents = [encode_turns(t, model.tokenizer, bundle.image) for t in turns]
    shape = BatchShape(rows, max(len(document.tokens) for document in documents), 1)
    found = Findings()
    for start in range(0, len(documents), rows):
        some = documents[start : start + rows]
        batch = single_batch([*some, *some[-1:] * (rows - len(some))], shape)
        batch["image_seeds"][:, 0] = start + np.arange(rows)
        with model.placed():
            seen = jax.tree.map(np.asarray, look(model.pretzel, bundle.codec, batch))
        for b, document in enumerate(some):
            _note(found, model, document, jax.tree.map(lambda a, b=b: a[b], _rows_first(seen)))
    return found


def _rows_first(seen: Look) -> Look:
    return dataclasses.replace(seen, attention=seen.attention.swapaxes(0, 1))


def _note(found: Findings, model: Model, document: Document, seen: Look) -> None:
    """Adds one drawing; `seen` is of its row."""
    latent = np.flatnonzero(document.kinds == Kind.LATENT)
    predicts = np.flatnonzero(document.text_loss) - 1
    dims = len(latent) * model.pretzel.config.flow.channels
    found.visual.append(seen.visual[latent])
    found.textual.append(seen.textual[predicts])
    found.log_dets.append(seen.log_dets / dims)
    found.prior.append(float(seen.prior) / dims)
    ours = seen.attention[:, latent]  # [L, N, T]
    itself = ours[:, np.arange(len(latent)), latent].mean(1)
    image = ours[..., latent].sum(-1).mean(1) - itself
    words = ours[..., : latent[0]]
    found.attention.append(np.stack([words.sum(-1).mean(1), image, itself], -1))
    if found.example is None:
        tokens = document.tokens[: latent[0]]
        show = model.tokenizer.backend.decode
        names = [show([int(token)], skip_special_tokens=False) for token in tokens]
        found.example = names, words


def walk(
    model: Model,
    captions: Sequence[str],
    *,
    steps: int = 8,
    guidance: float = 0.0,
    seed: int = 0,
    jacobi: JacobiConfig | None = None,
) -> np.ndarray:
    """Drawings of each caption while the noise turns from one draw into another.

    The noise is cos(a) z_0 + sin(a) z_1, a from 0 to pi / 2: standard normal all the way.

    Args:
        model: a trained one.
        captions: K.
        steps: drawings of a caption.
        guidance: w, see `Sampling`.
        seed: of z_0 and z_1, which all captions share.
        jacobi: draw by Jacobi iteration; None: latent after latent.

    Returns:
        uint8 [K, steps, H, W, channels].
    """
    flow = model.pretzel.config.flow
    ends = np.random.default_rng(seed).normal(size=(2, flow.tokens, flow.channels))
    angles = np.linspace(0.0, np.pi / 2, steps)
    noise = np.stack([np.cos(a) * ends[0] + np.sin(a) * ends[1] for a in angles])
    rows = [
        Row(d.tokens, d.kinds, d.positions, np.zeros((0, *ends.shape[1:]), np.float32))
        for d in (model.encode([Turn("user", (c,))], draw=True) for c in captions)
        for _ in range(steps)
    ]
    settings = row_settings(
        len(rows),
        guidance=guidance,
        max_new_tokens=0,
        max_images=1,
        noise=jnp.asarray(np.tile(noise, (len(captions), 1, 1))[:, None], jnp.float32),
    )
    empty = None
    if guidance:
        empty = unconditional_prompt(model.tokenizer, model.bundle.image).tokens
    with model.placed():
        outputs = generate(model.pretzel, rows, settings, unconditional=empty, jacobi=jacobi)
    u = np.stack([next(p.u for p in out.pieces if isinstance(p, Image)) for out in outputs])
    pixels = model.pixels(u, jacobi)
    return pixels.reshape(len(captions), steps, *pixels.shape[1:])
