"""What a run trains, as far as the loop must know: one implementation for each kind of model."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import grain
from flax import nnx
from jax.sharding import Mesh

from starflow2_jax.data.pipeline import HostBatch
from starflow2_jax.training.step import Loss, StepConfig


class Stage(Protocol):
    """One stage of a run."""

    @property
    def name(self) -> str:
        """Of its group in the config, of its folder, and of its rows of metrics."""

    @property
    def trainable(self) -> nnx.filterlib.Filter:
        """Filter of the trained parameters."""

    @property
    def draws(self) -> bool:
        """Whether it changes what the model draws."""

    @property
    def averaged(self) -> bool:
        """Whether the next stage starts from the average of the parameters."""

    def steps(self, config: StepConfig) -> StepConfig:
        """The hyperparameters of its steps, of those that the config gives for all stages."""

    def loss(self, config: StepConfig, training: bool) -> Loss:
        """What the stage minimises; or, not `training`, what is measured on held-out data."""


class Task(Protocol):
    """A model, its stages, and their data."""

    @property
    def stages(self) -> Sequence[Stage]:
        """All there are, in order; a run has those that its config names."""

    @property
    def constants(self) -> Any:
        """Arrays that the losses need and that are no parameters, as one pytree."""

    def make_model(self, seed: int) -> nnx.Module:
        """A fresh model; traced, so that it can be born sharded."""

    def prepare(self, stage: str, model: Any, mesh: Mesh) -> Any:
        """The model with what a stage needs of files or data, before it starts or goes on."""

    def given(self, mesh: Mesh) -> Mapping[str, nnx.State]:
        """Pretrained parameters, sharded, by the part of the model that they are; often none."""

    def batches(
        self,
        stage: str,
        held_out: bool,
        seed: int,
        rows: slice | None = None,
        place: Callable[[HostBatch], Any] | None = None,
    ) -> grain.IterDataset:
        """An endless stream of a stage's batches.

        Args:
            stage: its name.
            held_out: of data that no stage trains on.
            seed: of their order.
            rows: those of each batch that this process is to have; default all.
            place: applied to each batch in the thread that reads ahead.
        """

    def flops(self, stage: str) -> float:
        """What a step of a stage has to compute, see `training.flops`."""

    def frozen(self, model: Any) -> nnx.State | None:
        """What no stage but the first may change; None: there is nothing of the kind."""

    def draw(self, model: Any, folder: pathlib.Path, name: str) -> None:
        """Writes fixed samples into a folder, while the model trains."""

    def save(self, folder: pathlib.Path, model: Any, metadata: Mapping[str, Any]) -> None:
        """Writes the model's directory."""
