"""Pretraining of a small DINOv2-shaped ViT by masked reconstruction, where there are no weights.

Of each picture some patches are replaced by the mask token, and a linear head on the final tokens
tells the pixels of all patches. Those that are seen count too: an FAE's features must keep what
they show. Letters: B images, H, W pixels, N patches, D width, P numbers of a patch.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from starflow2_jax.data.images import Augment, ImageFolder
from starflow2_jax.data.pipeline import HostBatch
from starflow2_jax.fae_bundle import save_vit
from starflow2_jax.models.dinov2 import DinoV2, DinoV2Config
from starflow2_jax.nn import grid, layers, partition
from starflow2_jax.training.step import StepConfig


class MaskedViT(nnx.Module):
    """A ViT and the head that is thrown away."""

    def __init__(self, config: DinoV2Config, *, rngs: nnx.Rngs) -> None:
        self.vit = DinoV2(config, rngs=rngs)
        self.head = layers.Linear(
            config.width, config.channels * config.patch**2, rngs=rngs, logical=("embed", None)
        )

    def __call__(self, pixels: jax.Array, masked: jax.Array) -> jax.Array:
        """Normalised pixels [B, H, W, channels] and bool [B, N] -> patches [B, N, P]."""
        return self.head(self.vit(pixels, masked).patches)


@dataclasses.dataclass(frozen=True)
class MaskedLoss:
    """Mean squared error of normalised pixels, masked patches and seen ones; see `step.Loss`.

    Attributes:
        patches: N.
        most_masked: the share of masked patches is uniform from 0 to this, image by image.
        seen: weight of the patches that are seen; that of the masked ones is 1.
        dtype: of the computation.
    """

    patches: int
    most_masked: float = 0.5
    seen: float = 1.0
    dtype: str = "float32"

    def counts(self, batch: HostBatch) -> dict[str, jax.Array]:
        """Images, and their patches."""
        images = len(batch["images"])
        return {"images": jnp.int32(images), "tokens": jnp.int32(images * self.patches)}

    def __call__(
        self,
        model: MaskedViT,
        constants: None,
        batch: HostBatch,
        seed: jax.Array,
        noise_std: jax.Array,
        counts: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `training.step.Loss`."""
        del constants, noise_std
        images = partition.constrain(jnp.asarray(batch["images"]), ("batch", None, None, None))
        pixels = model.vit.normalise(images.astype(jnp.float32) / 255.0)
        wanted = grid.to_patches(pixels, model.vit.config.patch)
        base = jax.random.key(seed)

        def draw(image_seed: jax.Array) -> jax.Array:
            of_share, of_patches = jax.random.split(jax.random.fold_in(base, image_seed))
            share = jax.random.uniform(of_share, maxval=self.most_masked)
            return jax.random.uniform(of_patches, wanted.shape[1:2]) < share

        masked = jax.vmap(draw)(jnp.asarray(batch["image_seeds"]))  # [B, N]
        told = model(pixels.astype(self.dtype), masked)
        errors = jnp.square(told.astype(jnp.float32) - wanted).mean(-1)
        # Sums over all patches, so that parts of a batch add up to the whole.
        of_masked, of_seen = (errors * masked).mean(), (errors * ~masked).mean()
        loss = of_masked + self.seen * of_seen
        metrics = {"loss": loss, "loss_masked": of_masked, "loss_seen": of_seen}
        if counts is not None:
            share = len(images) / counts["images"]
            metrics = {name: share * value for name, value in metrics.items()}
        return metrics["loss"], metrics


@dataclasses.dataclass(frozen=True)
class MaskedStage:
    """The one stage."""

    masked_loss: MaskedLoss
    name: str = "vit"
    draws: bool = False
    averaged: bool = True

    @property
    def trainable(self) -> nnx.filterlib.Filter:
        """Everything."""
        return nnx.Param

    def steps(self, config: StepConfig) -> StepConfig:
        """As given."""
        return config

    def loss(self, config: StepConfig, training: bool) -> MaskedLoss:
        """The same on held-out images."""
        del config, training
        return self.masked_loss


@dataclasses.dataclass(frozen=True)
class MaskedViTTask:
    """See `training.task.Task`.

    Attributes:
        config: of the run; `stages.vit.batch.rows` is B.
        model_config: the ViT's shape.
        train, held_out: the images.
        masked_loss: see `MaskedLoss`.
        augment: of the training images, or None.
    """

    config: ml_collections.ConfigDict
    model_config: DinoV2Config
    train: ImageFolder
    held_out: ImageFolder
    masked_loss: MaskedLoss
    augment: Augment | None = None

    @property
    def stages(self) -> tuple[MaskedStage, ...]:
        """One."""
        return (MaskedStage(self.masked_loss),)

    @property
    def constants(self) -> None:
        """None."""

    def make_model(self, seed: int) -> MaskedViT:
        """A fresh model."""
        return MaskedViT(self.model_config, rngs=nnx.Rngs(seed))

    def prepare(self, stage: str, model: MaskedViT, mesh: Mesh) -> MaskedViT:
        """As it is."""
        del stage, mesh
        return model

    def given(self, mesh: Mesh) -> Mapping[str, nnx.State]:
        """Nothing."""
        return {}

    def batches(
        self,
        stage: str,
        held_out: bool,
        seed: int,
        rows: slice | None = None,
        place: Callable[[HostBatch], Any] | None = None,
    ) -> grain.IterDataset:
        """Batches of images."""
        images, augment = (self.held_out, None) if held_out else (self.train, self.augment)
        whole = self.config.stages[stage].batch.rows
        return images.training_batches(whole, seed, augment, rows, place)

    def flops(self, stage: str) -> float:
        """Of the layers in a step: forwards, and twice that backwards."""
        c, patches = self.model_config, self.masked_loss.patches
        matrices = 4 * c.width**2 + (3 if c.mlp == "swiglu" else 2) * c.width * c.mlp_width
        each = 2.0 * patches * c.layers * (matrices + 2 * patches * c.width)
        return 3.0 * each * self.config.stages[stage].batch.rows

    def frozen(self, model: MaskedViT) -> None:
        """Nothing."""

    def draw(self, model: MaskedViT, folder: pathlib.Path, name: str) -> None:
        """Draws nothing."""

    def save(self, folder: pathlib.Path, model: MaskedViT, metadata: Mapping[str, Any]) -> None:
        """The ViT alone, see `fae_bundle.save_vit`."""
        save_vit(folder, model.vit, metadata)
