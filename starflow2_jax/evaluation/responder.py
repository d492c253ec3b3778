"""Answers about pictures, by a STARFlow2 model or a converted VLM, whichever a folder holds.

A picture goes into the prompt as what the vision tower sees of it (VIT), or as the latents that the
model itself draws with (LATENT).
"""

import io
import os
import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import PIL.Image

from starflow2_jax.bundle import is_bundle
from starflow2_jax.data.decoding import decode
from starflow2_jax.data.sequences import Part, Turn
from starflow2_jax.data.views import Limits, upright, view
from starflow2_jax.errors import UserError
from starflow2_jax.model import Model, Sampling, load
from starflow2_jax.sampling.text import check_stop, until
from starflow2_jax.vlm import Assistant, Writing

Path = Literal["vit", "latent"]

Said = str | bytes | PIL.Image.Image
"""A text, an encoded picture (PNG, JPEG, WebP), or an opened one."""


class Responder:
    """A model that answers in words."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        path: Path | None = None,
        limits: Limits = Limits(),
        *,
        dtype: str | None = None,
        devices: int = 1,
    ) -> None:
        """Loads a model.

        Args:
            folder: a STARFlow2 model or run, or a converted VLM.
            path: how it sees; default: through the vision tower if it has one.
            limits: of the pictures' size for the tower; a converted VLM has its own.
            dtype: of the parameters; default: as stored.
            devices: see `model.load`; a converted VLM lies on one.

        Raises:
            UserError: it is neither, or damaged, or cannot see in that way.
        """
        place = pathlib.Path(folder)
        self._model: Model | None = None
        self._assistant: Assistant | None = None
        if is_bundle(place):
            self._model = load(place, dtype=dtype, devices=devices)
        elif devices != 1:
            raise UserError(f"{place} is a converted VLM, which lies on one device, not {devices}")
        else:
            self._assistant = Assistant.load(place, dtype)
        if self._model is not None:
            self._tower, self._limits = self._model.pretzel.config.vlm.vision, limits
        else:
            self._tower, self._limits = self._assistant.model.config.vision, self._assistant.limits
        self.path: Path = path or ("latent" if self._tower is None else "vit")
        """How it sees."""
        if self.path == "vit" and self._tower is None:
            raise UserError(f"{place} has no vision tower; it sees latents")
        if self.path == "latent" and self._model is None:
            raise UserError(f"{place} is a VLM that has no latents; it sees through its tower")

    @property
    def devices(self) -> int:
        """See `Model.devices`."""
        return 1 if self._model is None else self._model.devices

    def checksum(self) -> str:
        """Of all that answers depend on."""
        if self._model is None:
            return str(self._assistant.record["checksum"])
        return self._model.bundle.checksum()

    def _part(self, said: Said, where: str) -> Part:
        if isinstance(said, str):
            return said
        try:
            if self.path == "latent":
                data = said if isinstance(said, bytes) else _encoded(said)
                return decode(data, self._model.bundle.image)
            opened = PIL.Image.open(io.BytesIO(said)) if isinstance(said, bytes) else said
            picture = upright(opened).convert("RGB")
        except Exception as error:  # Pillow's readers raise anything on damaged files
            reason = " ".join(str(error).split())
            raise UserError(f"{where}: the picture cannot be read ({reason})") from error
        return view(picture, self._tower, self._limits, where)

    def turn(self, role: Literal["user", "assistant"], said: Sequence[Said], where: str) -> Turn:
        """A turn of texts and pictures.

        Raises:
            UserError: a picture that cannot be read; `where` names it.
        """
        return Turn(role, tuple(self._part(one, where) for one in said if one))

    def answers(
        self,
        conversations: Sequence[Sequence[Turn]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        stop: tuple[str, ...] = (),
        rows: int = 16,
        names: Sequence[str] | None = None,
    ) -> list[str]:
        """The texts of the replies; nothing is drawn.

        Args:
            conversations: each ends with a user's turn.
            max_new_tokens: of a reply.
            temperature, top_p, seed: see `Sampling`.
            numbers: of the conversations among all that are asked, so that conversation n is
                sampled alike in whatever batches they come, and one that is asked twice has two
                replies; default 0, 1, ...
            stop: strings that end a reply and are no part of it.
            rows: of a compiled batch.
            names: what to call each conversation in an error; default: prompt and its number.

        Raises:
            UserError: special tokens in a text, or more than the context holds; an empty stop
                string.
        """
        check_stop(stop)
        numbers = range(len(conversations)) if numbers is None else numbers
        names = names or [f"prompt {n}" for n in numbers]
        if self._model is not None:
            sampling = Sampling(
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                max_images=0,
                seed=[np.random.SeedSequence([seed, n]).generate_state(1)[0] for n in numbers],
                stop=stop,
            )
            replies = self._model.generate(conversations, sampling, rows=rows, names=names)
            texts = [reply.text for reply in replies]
        else:
            texts = []
            for start in range(0, len(conversations), rows):
                here = slice(start, start + rows)
                writing = Writing(
                    temperature, top_p, max_new_tokens, [seed + n for n in numbers[here]]
                )
                some = self._assistant.answers(conversations[here], writing, names[here])
                texts += [answer.text for answer in some]
        return [until(text, stop).strip() for text in texts]


def _encoded(picture: PIL.Image.Image) -> bytes:
    """As PNG, upright; what PNG cannot hold (CMYK, say) in RGB."""
    file = io.BytesIO()
    picture = upright(picture)
    held = picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA")
    (picture if held else picture.convert("RGB")).save(file, "PNG")
    return file.getvalue()
