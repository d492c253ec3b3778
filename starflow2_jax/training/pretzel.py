"""Training of STARFlow2: the Pretzel on packed rows of conversations, in the paper's stages."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import grain
import jax
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from starflow2_jax.bundle import Bundle, save_bundle
from starflow2_jax.data.pipeline import BatchShape, HostBatch, packed_batches
from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.data.tokenizer import Tokenizer
from starflow2_jax.errors import UserError
from starflow2_jax.models.codec import Codec
from starflow2_jax.models.fae_codec import FAECodec
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.pretzel import Pretzel, PretzelConfig
from starflow2_jax.models.qwen2_5_vl import LanguageModelConfig
from starflow2_jax.training.flops import pretzel_flops
from starflow2_jax.training.stages import PRETRAIN_LM, STAGES, Stage
from starflow2_jax.vlm_bundle import load_vlm, read_description


class Data(Protocol):
    """Conversations, and what they are made of."""

    tokenizer: Tokenizer
    image: ImageShape
    codec: Codec

    def documents(self, stage: str, held_out: bool, seed: int) -> grain.IterDataset:
        """An endless stream of packable documents (see `data.pipeline.features`) for a stage."""


def small_config(config: ml_collections.ConfigDict, data: Data, channels: int) -> PretzelConfig:
    """The shape of a small model that is trained from nothing, language model and all, on CPU.

    Args:
        config: of the run, with the groups `language_model` (width, layers, head_dim, mlp_width)
            and `flow` (width, head_dim, deep_layers, shallow_layers).
        data: tells vocabulary and raster.
        channels: C.
    """
    lm, flow = config.language_model, config.flow
    heads = lm.width // lm.head_dim
    return PretzelConfig(
        vlm=LanguageModelConfig(
            vocab_size=data.tokenizer.vocab_size,
            width=lm.width,
            layers=lm.layers,
            heads=heads,
            kv_heads=max(1, heads // 2),
            head_dim=lm.head_dim,
            mlp_width=lm.mlp_width,
            tied=True,
            remat="full",
        ),
        flow=FlowConfig(
            channels=channels,
            side=data.image.side,
            width=flow.width,
            head_dim=flow.head_dim,
            deep_layers=flow.deep_layers,
            shallow_layers=tuple(flow.shallow_layers),
            shallow_orders=("keep", "flip"),
            # Recomputing is cheaper than the memory traffic of keeping, on CPU.
            remat="full",
        ),
        special=data.tokenizer.special,
        dtype="float32",
    )


@dataclasses.dataclass(frozen=True)
class PretzelTask:
    """See `training.task.Task`.

    Attributes:
        config: of the run; its `stages` have a group `batch`, see `BatchShape`.
        data: the conversations.
        model_config: the model's shape.
        draw_samples: writes samples of fixed prompts: (bundle, folder, name).
        vlm: directory of a converted VLM (`vlm_bundle`), of the shape that `model_config` says;
            None: the VLM begins fresh, and stage `pretrain_lm` trains it.
        load_codec: gives the codec of drawings and of the exported model, where `data.codec` is
            only what training needs of it; None: it is the same one.
    """

    config: ml_collections.ConfigDict
    data: Data
    model_config: PretzelConfig
    draw_samples: Callable[[Bundle, pathlib.Path, str], None]
    vlm: pathlib.Path | None = None
    load_codec: Callable[[], Codec] | None = None

    def __post_init__(self) -> None:
        if self.vlm is None:
            return
        found, _ = read_description(self.vlm)
        ours = dataclasses.replace(self.model_config.vlm, remat=found.remat)
        if found != ours:
            raise UserError(f"{self.vlm} holds a VLM of shape {found}, but the config has {ours}")
        if PRETRAIN_LM.name in self.config.stages:
            raise UserError(
                f"stage {PRETRAIN_LM.name} would train the VLM of {self.vlm}, which never changes: "
                "leave the stage or the VLM out"
            )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The paper's."""
        return STAGES

    @property
    def constants(self) -> Codec:
        """The codec, as far as training needs it."""
        return self.data.codec

    def make_model(self, seed: int) -> Pretzel:
        """Both streams, fresh."""
        return Pretzel(self.model_config, rngs=nnx.Rngs(seed))

    def prepare(self, stage: str, model: Pretzel, mesh: Mesh) -> Pretzel:
        """As it is."""
        return model

    def given(self, mesh: Mesh) -> Mapping[str, nnx.State]:
        """The converted VLM, in the types that it is stored in."""
        if self.vlm is None:
            return {}
        return {"vlm": nnx.state(load_vlm(self.vlm, mesh=mesh).model)}

    def batches(
        self,
        stage: str,
        held_out: bool,
        seed: int,
        rows: slice | None = None,
        place: Callable[[HostBatch], Any] | None = None,
    ) -> grain.IterDataset:
        """Packed rows."""
        documents = self.data.documents(stage, held_out, seed)
        return packed_batches(documents, self._shape(stage), rows, place)

    def flops(self, stage: str) -> float:
        """See `pretzel_flops`."""
        [found] = [one for one in STAGES if one.name == stage]
        return sum(pretzel_flops(self.model_config, found, self._shape(stage)).values())

    def _shape(self, stage: str) -> BatchShape:
        return BatchShape(**self.config.stages[stage].batch)

    def frozen(self, model: Pretzel) -> nnx.State:
        """The VLM."""
        return nnx.state(model.vlm)

    def draw(self, model: Pretzel, folder: pathlib.Path, name: str) -> None:
        """Drawings of fixed prompts."""
        # The codec goes where the model is: both make the pictures.
        mesh = jax.tree.leaves(nnx.state(model))[0].sharding.mesh
        codec = self.data.codec if self.load_codec is None else self.load_codec()
        if isinstance(codec, FAECodec):
            codec = codec.decoder()
        codec = jax.device_put(codec, jax.NamedSharding(mesh, jax.P()))
        bundle = Bundle(model, codec, self.data.tokenizer, self.data.image, {})
        self.draw_samples(bundle, folder, name)

    def save(self, folder: pathlib.Path, model: Pretzel, metadata: Mapping[str, Any]) -> None:
        """See `bundle`."""
        codec = self.data.codec if self.load_codec is None else self.load_codec()
        save_bundle(folder, Bundle(model, codec, self.data.tokenizer, self.data.image, metadata))
