"""A run's model on its way from stage to stage, and the check of what none of them may change."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from starflow2_jax.errors import UserError
from starflow2_jax.parallel import rules
from starflow2_jax.training.checkpoint import checksum
from starflow2_jax.training.task import Stage, Task


def handed_on(stage: Stage) -> str:
    """The entry of a stage's last state that the next stage starts from."""
    return "ema" if stage.averaged else "trainable"


@dataclasses.dataclass
class Succession:
    """The model of the next stage. Training and export take the stages through it alike.

    Attributes:
        task: what is trained.
        mesh: that the model lies on.
        model: of the next stage; None while a stage runs: what it trains is then in its state
            alone.
        frozen_checksum: of what no stage but the first may change; "" before it is known, and
            where there is nothing of the kind.
    """

    task: Task
    mesh: Mesh
    model: nnx.Module | None
    frozen_checksum: str = ""

    @classmethod
    def begin(cls, task: Task, seed: int, mesh: Mesh) -> "Succession":
        """The model before the first stage, sharded over the mesh.

        Args:
            task: what is trained.
            seed: of the fresh parameters.
            mesh: see `mesh.make_mesh`.
        """
        model = rules.born_sharded(lambda: task.make_model(seed), mesh, task.given(mesh))
        return cls(task, mesh, model)

    def start(self, stage: Stage) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
        """Prepares the model for a stage and takes it apart; it is the caller's until `go_on`.

        Returns:
            The graph, the parameters that the stage trains, and all others.
        """
        self.model = self.task.prepare(stage.name, self.model, self.mesh)
        graphdef, trainable, frozen = nnx.split(self.model, stage.trainable, ...)
        if not self.frozen_checksum:  # what is frozen may have come with `prepare`
            self.frozen_checksum = self._checksum(trainable)
        self.model = None
        return graphdef, trainable, frozen

    def check(self, metadata: Mapping[str, Any], where: str | os.PathLike[str]) -> None:
        """Checks that a checkpoint was trained on the frozen weights that are there.

        Args:
            metadata: of the checkpoint.
            where: it is, for the message.

        Raises:
            UserError: it was trained on others.
        """
        recorded = metadata["frozen_checksum"]
        if recorded and recorded != self.frozen_checksum:
            raise UserError(
                f"{where} was trained on other frozen weights (checksum "
                f"{recorded[:12]}, now {self.frozen_checksum[:12]}); restore them, or use "
                "another workdir"
            )

    def go_on(self, graphdef: nnx.GraphDef, trained: nnx.State, frozen: nnx.State) -> None:
        """Puts the model of the next stage together, of what a stage hands on and the rest."""
        self.model = nnx.merge(graphdef, trained, frozen)

    def frozen_record(self) -> dict[str, str]:
        """For a model's metadata: checksums before and after; empty where nothing is frozen."""
        before = self.frozen_checksum or self._checksum()
        if not before:
            return {}
        return {"frozen_checksum_before": before, "frozen_checksum_after": self._checksum()}

    def _checksum(self, trained: nnx.State | None = None) -> str:
        """Of what no stage but the first may change; "" where that is nothing, or is trained."""
        frozen = self.task.frozen(self.model)
        if frozen is None:
            return ""
        now = {id(leaf) for leaf in jax.tree.leaves(trained)}
        return "" if any(id(leaf) in now for leaf in jax.tree.leaves(frozen)) else checksum(frozen)
