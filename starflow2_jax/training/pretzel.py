"""Training of STARFlow2: the Pretzel on packed rows of conversations, in the paper's stages."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import grain
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from starflow2_jax.bundle import Bundle, save_bundle
from starflow2_jax.data.pipeline import BatchShape, HostBatch, packed_batches
from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.data.tokenizer import Tokenizer
from starflow2_jax.models.codec import Codec
from starflow2_jax.models.pretzel import Pretzel, PretzelConfig
from starflow2_jax.training.stages import STAGES, Stage


class Data(Protocol):
    """Conversations, and what they are made of."""

    tokenizer: Tokenizer
    image: ImageShape
    codec: Codec

    def documents(self, stage: str, held_out: bool, seed: int) -> grain.IterDataset:
        """An endless stream of packable documents (see `data.pipeline.features`) for a stage."""


@dataclasses.dataclass(frozen=True)
class PretzelTask:
    """See `training.task.Task`.

    Attributes:
        config: of the run; its `stages` have a group `batch`, see `BatchShape`.
        data: the conversations.
        model_config: the model's shape.
        draw_samples: writes samples of fixed prompts: (bundle, folder, name).
    """

    config: ml_collections.ConfigDict
    data: Data
    model_config: PretzelConfig
    draw_samples: Callable[[Bundle, pathlib.Path, str], None]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The paper's."""
        return STAGES

    @property
    def constants(self) -> Codec:
        """The codec."""
        return self.data.codec

    def make_model(self, seed: int) -> Pretzel:
        """Both streams, fresh."""
        return Pretzel(self.model_config, rngs=nnx.Rngs(seed))

    def prepare(self, stage: str, model: Pretzel, mesh: Mesh) -> Pretzel:
        """As it is."""
        return model

    def batches(self, stage: str, held_out: bool, seed: int) -> grain.IterDataset:
        """Packed rows."""
        shape = BatchShape(**self.config.stages[stage].batch)
        return packed_batches(self.data.documents(stage, held_out, seed), shape)

    def counts(self, batch: HostBatch) -> dict[str, int]:
        """Images, and tokens that are no padding."""
        images, tokens = (batch["image_start"] >= 0).sum(), (batch["segments"] > 0).sum()
        return {"images": int(images), "tokens": int(tokens)}

    def frozen(self, model: Pretzel) -> nnx.State:
        """The VLM."""
        return nnx.state(model.vlm)

    def draw(self, model: Pretzel, folder: pathlib.Path, name: str) -> None:
        """Drawings of fixed prompts."""
        self.draw_samples(self._bundle(model, {}), folder, name)

    def save(self, folder: pathlib.Path, model: Pretzel, metadata: Mapping[str, Any]) -> None:
        """See `bundle`."""
        save_bundle(folder, self._bundle(model, metadata))

    def _bundle(self, model: Pretzel, metadata: Mapping[str, Any]) -> Bundle:
        return Bundle(model, self.data.codec, self.data.tokenizer, self.data.image, metadata)
