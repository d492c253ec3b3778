"""A trained model for Python: what the commands, too, are made of.

    from starflow2_jax import load
    model = load("runs/digits")
    [reply] = model.generate([[Turn("user", ("a handwritten three",))]], Sampling(guidance=2.0))
    drawing = [Turn("user", ("a handwritten three",)), Turn("assistant", (image,))]
    [score] = model.log_prob([drawing])

Letters: I images of a conversation, N tokens per image, C latent channels, T positions.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from starflow2_jax.bundle import Bundle, load_bundle
from starflow2_jax.data.pipeline import BatchShape, HostBatch, single_batch, to_rows
from starflow2_jax.data.sequences import Document, Turn, encode_turns, unconditional_prompt
from starflow2_jax.data.views import places_of
from starflow2_jax.errors import UserError
from starflow2_jax.models.codec import Codec
from starflow2_jax.models.fae_codec import FAECodec
from starflow2_jax.models.patches import noisy_latents
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.parallel import rules
from starflow2_jax.parallel.distributed import fetch
from starflow2_jax.parallel.mesh import serving_mesh
from starflow2_jax.sampling import display, generate
from starflow2_jax.sampling import jacobi as parallel
from starflow2_jax.sampling.engine import EngineConfig
from starflow2_jax.sampling.generate import Event, Output
from starflow2_jax.sampling.jacobi import JacobiConfig
from starflow2_jax.sampling.prompts import Image, Row
from starflow2_jax.sampling.state import (
    LIMITS,
    RowSettings,
    check_number,
    check_seed,
    row_settings,
)
from starflow2_jax.sampling.text import TextPieces, check_stop, until

if TYPE_CHECKING:
    from starflow2_jax.service import Chat

Conversation = Sequence[Turn]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample; every field may be one number or one per prompt.

    Attributes:
        guidance: w of classifier-free guidance of images; 0 is off.
        image_temperature: scales the noise of the deep block.
        temperature: of text; 0 takes the likeliest token.
        top_p: the likeliest tokens that hold this much probability.
        max_new_tokens: text tokens of the reply.
        max_images: images of the reply; it ends behind the last one.
        seed: of each prompt's random stream.
        stop: strings that end a reply, and are no part of its text.
    """

    guidance: float | Sequence[float] = 0.0
    image_temperature: float | Sequence[float] = 1.0
    temperature: float | Sequence[float] = 0.0
    top_p: float | Sequence[float] = 1.0
    max_new_tokens: int | Sequence[int] = 64
    max_images: int | Sequence[int] = 4
    seed: int | Sequence[int] = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises UserError for a number out of range, or a stop string that is none."""
        check_seed(self.seed)
        for name in LIMITS:
            value = getattr(self, name)
            check_number(name, value)
            row_settings(np.size(value), **{name: value})  # which says whether its type holds it
        check_stop(self.stop)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the model answered: text pieces and images (uint8 [H, W, channels]) in order."""

    parts: tuple[str | np.ndarray, ...]
    reason: str

    @property
    def text(self) -> str:
        """The text pieces, joined."""
        return " ".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[np.ndarray]:
        """The images."""
        return [part for part in self.parts if isinstance(part, np.ndarray)]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probabilities of one conversation, nats.

    Attributes:
        images: [I], log p(latents of image i | all before it).
        bits_per_dim: [I], of the 8-bit image given all before it: an upper bound from one
            dequantisation draw (or the mean of several). Of an FAE's latents: of these, as they
            are with one draw of their noise.
        text: log p of the assistant's text tokens, in order.
    """

    images: np.ndarray
    bits_per_dim: np.ndarray
    text: np.ndarray


@dataclasses.dataclass(frozen=True)
class DrawScores:
    """Log-probabilities of one conversation under each of S draws of the images' noise, nats.

    Attributes:
        images: float64 [S, I], log p(latents of image i | all before it).
        text: float64 [S, tokens], log p of the assistant's text tokens, in order.
        posterior: float64 [S, I], log q(latents of image i | image i): of an FAE's latents, the
            density that each draw comes from; None with pixels as latents.
    """

    images: np.ndarray
    text: np.ndarray
    posterior: np.ndarray | None = None


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    devices: int = 1,
) -> "Model":
    """Loads a model directory, or the work directory of a finished run.

    Args:
        folder: see above.
        dtype: of the parameters; default: as stored.
        devices: of this process, which share out weights and rows: none ever holds all weights.

    Raises:
        UserError: it is neither, or damaged; fewer devices.
    """
    mesh = serving_mesh(devices)
    return Model(load_bundle(pathlib.Path(folder), dtype, mesh), mesh)


class Model:
    """A model with its tokenizer and codec."""

    def __init__(self, bundle: Bundle, mesh: Mesh | None = None) -> None:
        """`mesh`: that the model lies on by `rules.SERVING`; None: on one device, or as it is."""
        self.bundle = bundle
        self.mesh = mesh
        self.pretzel = bundle.model
        self.tokenizer = bundle.tokenizer

    @property
    def devices(self) -> int:
        """How many share out the weights and rows; numbers are equal to rounding for another."""
        return 1 if self.mesh is None else self.mesh.size

    def placed(self) -> contextlib.AbstractContextManager:
        """What to run the model's functions in: its mesh, if it has one."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return rules.use(self.mesh, rules.SERVING)

    def encode(
        self,
        conversation: Conversation,
        *,
        draw: bool = False,
        context: int | None = None,
        where: str = "prompt",
    ) -> Document:
        """A conversation as a prompt: the reply's turn is open, and its image too with `draw`.

        Args:
            conversation: ends with a user's turn.
            draw: see above.
            context: most positions; default: any number.
            where: what to call it in an error.

        Raises:
            UserError: special tokens in a text, an image of another size, a prompt too long.
        """
        shape = self.bundle.image
        options = {"reply": True, "draw": draw, "context": context, "where": where}
        return encode_turns(conversation, self.tokenizer, shape, **options)

    def generate(
        self,
        prompts: Sequence[Conversation],
        sampling: Sampling = Sampling(),
        *,
        draw: bool = False,
        context: int | None = None,
        rows: int = 128,
        jacobi: JacobiConfig | None = None,
        names: Sequence[str] | None = None,
    ) -> list[Reply]:
        """Continues each conversation with the model's turn.

        Args:
            prompts: conversations that end with a user's turn.
            sampling: how.
            draw: the reply starts with an image, whatever the model would choose.
            context: most positions of a row; default: as many as its limits allow.
            rows: prompts of one compiled batch.
            jacobi: draw, and invert the shallow flow, by Jacobi iteration; None: token after token.
            names: what to call each conversation in an error; default: prompt 0, 1, ...

        Raises:
            UserError: special tokens in a text, an image of another size, a prompt too long.
        """
        outputs: list[Output] = []
        names = names or _numbered("prompt", prompts)
        for start in range(0, len(prompts), rows):
            # A short last batch is filled up with its last prompt: one shape is compiled.
            here = [min(i, len(prompts) - 1) for i in range(start, start + rows)]
            here = here if len(prompts) > rows else list(range(len(prompts)))
            called = [names[i] for i in here]
            encoded = self._rows([prompts[i] for i in here], draw, called)
            options = self._options(here, sampling, context) | {"names": called}
            with self.placed():
                outputs += generate.generate(self.pretzel, encoded, jacobi=jacobi, **options)
        outputs = outputs[: len(prompts)]
        drawn = [piece.u for out in outputs for piece in out.pieces if isinstance(piece, Image)]
        pixels = iter(self.pixels(np.stack(drawn), jacobi) if drawn else ())
        return [Reply(self._parts(out, pixels, sampling.stop), out.reason) for out in outputs]

    def _parts(
        self, out: Output, pixels: Iterator[np.ndarray], stop: Sequence[str]
    ) -> tuple[str | np.ndarray, ...]:
        """An output's pieces as text and images; a piece that is only an end token is nothing."""
        parts: list[str | np.ndarray] = []
        for piece in out.pieces:
            if isinstance(piece, Image):
                parts.append(next(pixels))
            elif text := until(self.tokenizer.decode(piece.tokens), stop).strip(" "):
                parts.append(text)
        return tuple(parts)

    def stream(
        self,
        prompt: Conversation,
        sampling: Sampling = Sampling(),
        *,
        draw: bool = False,
        context: int | None = None,
        jacobi: JacobiConfig | None = None,
    ) -> Iterator[str | np.ndarray]:
        """Yields the reply to one conversation as it comes: pieces of text, then images."""
        rows = self._rows([prompt], draw, ["the prompt"])
        options = self._options([0], sampling, context) | {"names": ["the prompt"]}
        text = TextPieces(self.tokenizer.decode, sampling.stop)
        events = generate.stream(self.pretzel, rows, jacobi=jacobi, **options)
        # The mesh is in context while an event is made, and never while the caller has it.
        for event in iter(lambda: self._next(events), None):
            if isinstance(event, generate.TextEvent):
                if more := text.more(event.tokens):
                    yield more
            else:
                if more := text.end():
                    yield more
                if isinstance(event, generate.ImageEvent):
                    yield self.pixels(event.u[None], jacobi)[0]

    def _next(self, events: Iterator[Event]) -> Event | None:
        with self.placed():
            return next(events, None)

    def chat(self, sampling: Sampling = Sampling(), *, context: int = 1024) -> "Chat":
        """A conversation that keeps its caches from turn to turn.

        Args:
            sampling: of every reply.
            context: most positions of the conversation.
        """
        from starflow2_jax.service import Chat, Service  # which is made of models

        most = int(np.max(sampling.max_images))
        images = max(1, most)
        config = EngineConfig(self.devices, context=context, images=images, chunk=32, steps=1)
        return Chat(Service(self, config), sampling)

    def length(self, conversation: Conversation, name: str = "the conversation") -> int:
        """Positions of a whole conversation; `name`: what to call it in an error.

        Raises:
            UserError: special tokens in a text, an image of another size.
        """
        return len(encode_turns(conversation, self.tokenizer, self.bundle.image, where=name).tokens)

    def log_prob(
        self,
        conversations: Sequence[Conversation],
        *,
        seeds: Sequence[int] | None = None,
        draws: int = 1,
        rows: int = 256,
    ) -> list[Scores]:
        """Exact log-probabilities of every image, and of the assistant's text.

        Args:
            conversations: whole ones.
            seeds: of each conversation's dequantisation noise; default 0, 1, ...
            draws: dequantisation draws to average over.
            rows: conversations of one compiled batch.

        Raises:
            UserError: special tokens in a text, an image of another size.
        """
        scores = []
        for one in self.score_draws(conversations, seeds=seeds, draws=draws, rows=rows):
            images, text = one.images.mean(0), one.text.mean(0)
            scores.append(Scores(images, np.asarray(self.bundle.codec.bits_per_dim(images)), text))
        return scores

    def score_draws(
        self,
        conversations: Sequence[Conversation],
        *,
        seeds: Sequence[int] | None = None,
        draws: int = 1,
        rows: int = 256,
        positions: int = 1,
        names: Sequence[str] | None = None,
    ) -> list[DrawScores]:
        """Like `log_prob`, with every draw apart.

        Args:
            conversations, seeds, draws, rows: see `log_prob`.
            positions: that a row has at least, see `length`: so calls of conversations that are not
                equally long run one program.
            names: what to call each conversation in an error; default: conversation 0, 1, ...

        Raises:
            UserError: see `log_prob`.
        """
        names = names or _numbered("conversation", conversations)
        documents = [
            encode_turns(turns, self.tokenizer, self.bundle.image, where=name)
            for turns, name in zip(conversations, names, strict=True)
        ]
        if not documents:
            return []
        seeds = range(len(documents)) if seeds is None else seeds
        longest = max(positions, *(len(d.tokens) for d in documents))
        most = max(1, max(len(d.images) for d in documents))
        tower = self.pretzel.config.vlm.vision
        shape = BatchShape(
            min(rows, len(documents)),
            generate.bucket(longest, 8),
            most,
            places=self._places(documents),
        )
        scores = []
        for start in range(0, len(documents), shape.rows):
            part = documents[start : start + shape.rows]
            batch = single_batch(part, shape, tower)
            for row, seed in enumerate(seeds[start : start + shape.rows]):
                batch["image_seeds"][row] = _image_seeds(seed, most)
            with self.placed():
                found = [
                    _score(self.pretzel, self.bundle.codec, batch, draw) for draw in range(draws)
                ]
            images, text, posterior = (
                None if draws_of[0] is None else np.stack(draws_of).astype(np.float64)
                for draws_of in zip(*found, strict=True)
            )
            for row, document in enumerate(part):
                loss, mine = np.flatnonzero(document.text_loss), slice(len(document.images))
                of_row = None if posterior is None else posterior[:, row, mine]
                scores.append(DrawScores(images[:, row, mine], text[:, row, loss], of_row))
        return scores

    def pixels(self, u: np.ndarray, jacobi: JacobiConfig | None = None) -> np.ndarray:
        """Latents of the deep stream [B, N, C] -> images uint8 [B, H, W, channels].

        The shallow flow is inverted token after token, or by Jacobi iteration.
        """
        count = len(u)
        padded = np.resize(u, (generate.bucket(count, 4), *u.shape[1:]))
        with self.placed():
            latents = jnp.asarray(padded)
            if jacobi is None:
                x = display.to_x(self.pretzel, latents)
            else:
                x, _ = parallel.to_x(self.pretzel, latents, jacobi)
            return fetch(self.bundle.codec.to_uint8(x))[:count]

    def draw_latents(
        self, prompts: Sequence[Conversation], sampling: Sampling, *, rows: int = 128
    ) -> np.ndarray:
        """Draws one image for each conversation: its latents x [B, N, C], not decoded.

        Raises:
            UserError: as `generate`.
        """
        drawn, names = [], _numbered("prompt", prompts)
        sampling = dataclasses.replace(sampling, max_images=1)
        for start in range(0, len(prompts), rows):
            here = [min(i, len(prompts) - 1) for i in range(start, start + rows)]
            here = here if len(prompts) > rows else list(range(len(prompts)))
            called = [names[i] for i in here]
            encoded = self._rows([prompts[i] for i in here], True, called)
            options = self._options(here, sampling, None) | {"names": called}
            with self.placed():
                outputs = generate.generate(self.pretzel, encoded, **options)
            drawn += [next(p.u for p in out.pieces if isinstance(p, Image)) for out in outputs]
        with self.placed():
            return fetch(display.to_x(self.pretzel, jnp.asarray(np.stack(drawn[: len(prompts)]))))

    def latents(self, images: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
        """Images uint8 [B, H, W, channels] as they are read, with noise by their seeds, to u.

        Returns:
            [B, N, C].
        """
        count = generate.bucket(len(images), 4)
        padded = np.resize(images, (count, *images.shape[1:]))
        numbers = np.resize(np.asarray(seeds, np.uint32), count)
        with self.placed():
            found = _latents(self.pretzel, self.bundle.codec, padded, numbers)
            return fetch(found)[: len(images)]

    def reading_seeds(self, images: int) -> np.ndarray:
        """Seeds uint32 [images] of the noise of a prompt's images, in order."""
        return _image_seeds(0, images)

    def text(self, tokens: Sequence[int]) -> str:
        """Token ids to text, without special tokens and outer blanks."""
        return self.tokenizer.decode(tokens).strip(" ")

    def _places(self, documents: Sequence[Document]) -> int:
        """The bucket of places that holds the views of any one document.

        Raises:
            UserError: views, and the model has no vision tower.
        """
        if not any(d.views for d in documents):
            return 0
        tower = self.pretzel.config.vlm.vision
        if tower is None:
            raise UserError("this model has no vision tower: give images, not views")
        most = max(sum(places_of(v, tower) for v in d.views) for d in documents)
        return generate.bucket(most // tower.window_places, 2) * tower.window_places

    def _rows(self, prompts: Sequence[Conversation], draw: bool, names: Sequence[str]) -> list[Row]:
        documents = []
        for turns, name in zip(prompts, names, strict=True):
            if not turns or turns[-1].role != "user":
                raise UserError(f"{name} must end with a user's turn")
            documents.append(self.encode(turns, draw=draw, where=name))
        self._places(documents)  # refuses views without a tower
        images = [image for d in documents for image in d.images]
        seeds = [_image_seeds(0, len(d.images)) for d in documents]
        u = self.latents(np.stack(images), np.concatenate(seeds)) if images else None
        rows, taken = [], 0
        flow = self.pretzel.config.flow
        for d in documents:
            mine = (
                u[taken : taken + len(d.images)]
                if len(d.images)
                else np.zeros((0, flow.tokens, flow.channels), np.float32)
            )
            taken += len(d.images)
            rows.append(Row(d.tokens, d.kinds, d.positions, mine, d.views))
        return rows

    def _options(
        self, prompts: Sequence[int], sampling: Sampling, context: int | None
    ) -> dict[str, Any]:
        """Arguments of `generate` for the prompts of these indices."""
        sampling.check()

        def pick(value: Any) -> Any:
            return value if np.ndim(value) == 0 else [value[i] for i in prompts]

        seed = pick(sampling.seed)
        if np.ndim(seed) == 0:  # one number: every prompt has its own stream all the same
            seed = [np.random.SeedSequence([seed, i]).generate_state(1)[0] for i in prompts]
        settings: RowSettings = row_settings(
            len(prompts),
            seed=seed,
            temperature=pick(sampling.temperature),
            top_p=pick(sampling.top_p),
            image_temperature=pick(sampling.image_temperature),
            guidance=pick(sampling.guidance),
            max_new_tokens=pick(sampling.max_new_tokens),
            max_images=pick(sampling.max_images),
        )
        unconditional = None
        if np.any(np.asarray(sampling.guidance) > 0):
            unconditional = unconditional_prompt(self.tokenizer, self.bundle.image).tokens
        stop = generate.Stop(sampling.stop, self.tokenizer.decode) if sampling.stop else None
        return {
            "settings": settings,
            "unconditional": unconditional,
            "stop": stop,
            "context": context,
        }


def _numbered(what: str, of: Sequence[Any]) -> list[str]:
    return [f"{what} {i}" for i in range(len(of))]


def _image_seeds(record: int, images: int) -> np.ndarray:
    """Seeds uint32 [images] of the images of a conversation."""
    return np.random.SeedSequence(record).generate_state(images)


@jax.jit
def _latents(model: Pretzel, codec: Codec, images: jax.Array, seeds: jax.Array) -> jax.Array:
    x = noisy_latents(codec, images, 0, seeds, reading=True)
    return model.shallow.forward(x, jnp.dtype(model.config.dtype))[0][-1]


@jax.jit
def _score(
    model: Pretzel, codec: Codec, batch: HostBatch, draw: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """log p of images [B, I] and of text tokens [B, T], log q of images [B, I] or None; nats."""
    images, seeds = batch["images"], batch["image_seeds"]
    if isinstance(codec, FAECodec):
        # Once, for the latents and for the density that they come from.
        flat = jnp.asarray(images).reshape(-1, *images.shape[2:])
        moments = codec.moments(flat)
        images = moments.reshape(*seeds.shape, *moments.shape[1:])
    x = noisy_latents(codec, images, draw, seeds)
    posterior = codec.log_posterior(x, images) if isinstance(codec, FAECodec) else None
    likelihood = model.log_prob(to_rows(batch), x)
    return likelihood.image_log_prob, likelihood.text_log_prob, posterior
