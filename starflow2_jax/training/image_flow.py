"""Training of TarFlow: an image flow on the pixels of a folder of images, with or without classes.

TarFlow (arXiv 2412.06329). Letters: B images, H, W pixels.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from starflow2_jax.data.images import NO_CLASS, Augment, ImageFolder
from starflow2_jax.data.pipeline import HostBatch
from starflow2_jax.errors import UserError
from starflow2_jax.flow_bundle import save_image_flow
from starflow2_jax.models.af_block import Given
from starflow2_jax.models.patches import dequantised, image_noise
from starflow2_jax.models.starflow import ImageFlow, TarFlowConfig
from starflow2_jax.nn import partition
from starflow2_jax.training.flops import image_flow_flops
from starflow2_jax.training.images import ImagesTask, WholeStage, image_counts, share
from starflow2_jax.training.step import StepConfig


@dataclasses.dataclass(frozen=True)
class ImageFlowLoss:
    """The family's loss, nats per dim, on dequantised and noised pixels; see `step.Loss`.

    Attributes:
        label_drop: how often an image's class is withheld.
        latent_norm: weight of `Passed.latent_norm`.
        patches: of an image.
    """

    label_drop: float
    latent_norm: float
    patches: int = 1

    def counts(self, batch: HostBatch) -> dict[str, jax.Array]:
        """Images, and their patches."""
        return image_counts(batch, self.patches)

    def __call__(
        self,
        model: ImageFlow,
        constants: None,
        batch: HostBatch,
        seed: jax.Array,
        noise_std: jax.Array,
        counts: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `training.step.Loss`."""
        images, seeds = jnp.asarray(batch["images"]), jnp.asarray(batch["image_seeds"])
        uniform, normal = image_noise(seed, seeds, images.shape[1:])
        x = dequantised(images, uniform) + noise_std * normal
        x = partition.constrain(x, ("batch", None, None, None))
        labels = jnp.asarray(batch["labels"])
        if self.label_drop:
            base = jax.random.fold_in(jax.random.key(seed), 1)
            keys = jax.vmap(lambda image_seed: jax.random.fold_in(base, image_seed))(seeds)
            chance = jax.vmap(jax.random.uniform)(keys)
            labels = jnp.where(chance < self.label_drop, NO_CLASS, labels)
        passed = model.forward(x, Given(labels=labels))
        loss, metrics = passed.loss, {"loss_image": passed.loss}
        if self.latent_norm:
            metrics["latent_norm"] = passed.latent_norm
            loss = loss + self.latent_norm * passed.latent_norm
        metrics = share({"loss": loss, **metrics}, batch, counts)
        return metrics["loss"], metrics


@dataclasses.dataclass(frozen=True)
class ImageFlowStage(WholeStage):
    """The one stage of an image flow."""

    label_drop: float
    patches: int = 1
    name: str = "train"
    draws: bool = True
    averaged: bool = False

    def loss(self, config: StepConfig, training: bool) -> ImageFlowLoss:
        """Held-out images keep their classes."""
        if not training:
            return ImageFlowLoss(label_drop=0.0, latent_norm=0.0, patches=self.patches)
        return ImageFlowLoss(self.label_drop, config.latent_norm, self.patches)


@dataclasses.dataclass(frozen=True)
class ImageFlowTask(ImagesTask):
    """See `training.task.Task`.

    Attributes:
        config: of the run; `stages.train.batch.rows` is B.
        model_config: the model's shape.
        train, held_out: the images.
        draw_samples: writes samples: (model, folder, name).
        augment: of the training images, or None.
        label_drop: how often an image's class is withheld in training.
    """

    config: ml_collections.ConfigDict
    model_config: TarFlowConfig
    train: ImageFolder
    held_out: ImageFolder
    draw_samples: Callable[[ImageFlow, pathlib.Path, str], None]
    augment: Augment | None = None
    label_drop: float = 0.0

    def __post_init__(self) -> None:
        model = self.model_config
        if model.scale == "none":
            raise UserError("a volume-preserving flow can be converted and sampled, not trained")
        if model.classes and model.classes != len(self.train.classes):
            raise UserError(
                f"{self.train.root} has {len(self.train.classes)} classes, the model has "
                f"{model.classes}"
            )

    @property
    def stages(self) -> tuple[ImageFlowStage, ...]:
        """One."""
        label_drop = self.label_drop if self.model_config.classes else 0.0
        return (ImageFlowStage(label_drop, self.model_config.side**2),)

    def make_model(self, seed: int) -> ImageFlow:
        """A fresh model."""
        return ImageFlow(self.model_config, rngs=nnx.Rngs(seed))

    def prepare(self, stage: str, model: ImageFlow, mesh: Mesh) -> ImageFlow:
        """As it is."""
        return model

    def flops(self, stage: str) -> float:
        """See `image_flow_flops`."""
        rows = self.config.stages[stage].batch.rows
        return sum(image_flow_flops(self.model_config, rows).values())

    def draw(self, model: ImageFlow, folder: pathlib.Path, name: str) -> None:
        """Samples of the config's choice."""
        self.draw_samples(model, folder, name)

    def save(self, folder: pathlib.Path, model: ImageFlow, metadata: Mapping[str, Any]) -> None:
        """See `flow_bundle`; the names of the classes go with it."""
        classes = list(self.train.classes) if self.model_config.classes else []
        left_out = sorted(self.train.unreadable.files)
        save_image_flow(
            folder, model, {**metadata, "classes": classes, "unreadable_images": left_out}
        )
