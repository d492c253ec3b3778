"""What all training on single images shares: its batches, and what the means of a loss are over.

Letters: B images, H, W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from starflow2_jax.data.images import Augment
from starflow2_jax.data.pipeline import HostBatch
from starflow2_jax.training.step import StepConfig

Metrics = dict[str, jax.Array]


class Images(Protocol):
    """Images of one size, as `data.images.ImageFolder` has them."""

    def __len__(self) -> int:
        """How many."""

    def training_batches(
        self,
        rows: int,
        seed: int,
        augment: Augment | None = None,
        part: slice | None = None,
        place: Callable[[HostBatch], Any] | None = None,
    ) -> grain.IterDataset:
        """An endless stream of batches of `images` uint8 [B, H, W, channels], `image_seeds` [B]."""

    def batch(self, indices: Sequence[int]) -> HostBatch:
        """These, as they are."""


def image_counts(batch: HostBatch, tokens: int) -> Metrics:
    """Images of a batch, and their tokens, of which each has so many."""
    images = len(batch["images"])
    return {"images": jnp.int32(images), "tokens": jnp.int32(images * tokens)}


def share(metrics: Metrics, batch: HostBatch, counts: Metrics | None) -> Metrics:
    """Means over a batch, as what they add to those over the images that `counts` has."""
    if counts is None:
        return metrics
    part = len(batch["images"]) / counts["images"]
    return {name: part * value for name, value in metrics.items()}


class WholeStage:
    """The parts of `task.Stage` that are the same wherever a run is one stage of all parameters."""

    @property
    def trainable(self) -> nnx.filterlib.Filter:
        """Everything."""
        return nnx.Param

    def steps(self, config: StepConfig) -> StepConfig:
        """As given."""
        return config


class ImagesTask:
    """The parts of `task.Task` that are the same wherever a batch is a number of images.

    Attributes:
        config: of the run; `stages.NAME.batch.rows` is B.
        train, held_out: the images.
        augment: of the training images, or None.
    """

    config: ml_collections.ConfigDict
    train: Images
    held_out: Images
    augment: Augment | None

    @property
    def constants(self) -> None:
        """None."""

    def given(self, mesh: Mesh) -> Mapping[str, nnx.State]:
        """Nothing."""
        del mesh
        return {}

    def frozen(self, model: nnx.Module) -> nnx.State | None:
        """Nothing."""
        del model
        return None

    def batches(
        self,
        stage: str,
        held_out: bool,
        seed: int,
        rows: slice | None = None,
        place: Callable[[HostBatch], Any] | None = None,
    ) -> grain.IterDataset:
        """Batches of images; held-out ones are as they are."""
        images, augment = (self.held_out, None) if held_out else (self.train, self.augment)
        whole = self.config.stages[stage].batch.rows
        return images.training_batches(whole, seed, augment, rows, place)
