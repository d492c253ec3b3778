"""What an engine is asked, and how large it is."""

import dataclasses

from starflow2_jax.sampling.generate import Stop
from starflow2_jax.sampling.prompts import Row
from starflow2_jax.sampling.state import RowSettings, row_settings


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes, all of them compiled once.

    Attributes:
        rows: requests that are served at a time.
        twins: images that are drawn with guidance at a time, each of which costs one row more;
            0: as many as rows. More rows than twins wait their turn before they draw.
        context: most positions of a request, its prompt included.
        images: most images of one reply.
        chunk: positions of a prompt that are read at a time, between the steps of the others.
        chunks: calls that read such a piece, or short prompts of several rows, in one of `poll`.
        steps: decode steps in one call of `poll`, fewer where others wait for rows that are done.
        groups: into so many groups rows and twins are shared out evenly, each with programs of its
            own that run beside those of the others; 0: as many as suit the device
            (`engine.groups_for`).
    """

    rows: int = 8
    twins: int = 0
    context: int = 512
    images: int = 4
    chunk: int = 64
    chunks: int = 4
    steps: int = 4
    groups: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One row to continue; fields as in `RowSettings`.

    Attributes:
        row: the prompt; see `prompts.extended`. Where it ends with `<|vision_start|>`, an image
            follows at once.
        stop: strings that end the reply.
        keep: the caches stay for a request that goes on from this one's row and reply, until the
            row is needed.
        reuse: this one goes on from where a request with `keep` ended, if it can. Its numbers then
            are those of another order of computation, equal to rounding.
    """

    row: Row
    seed: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    image_temperature: float = 1.0
    guidance: float = 0.0
    max_new_tokens: int = 64
    max_images: int = 1
    stop: Stop | None = None
    keep: bool = False
    reuse: bool = False

    def settings(self) -> RowSettings:
        """Of one row."""
        return row_settings(
            1,
            seed=[self.seed],
            temperature=self.temperature,
            top_p=self.top_p,
            image_temperature=self.image_temperature,
            guidance=self.guidance,
            max_new_tokens=self.max_new_tokens,
            max_images=self.max_images,
        )
