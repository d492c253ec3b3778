"""One optimiser step for a decoder and its discriminator, inside `training.step.train_step`."""

import dataclasses
from typing import Any

import jax
import optax

from starflow2_jax.training.step import StepConfig


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


@dataclasses.dataclass(frozen=True)
class AdversarialStepConfig(StepConfig):
    """Hyperparameters of a stage that trains a discriminator beside its decoder.

    AdamW treats every parameter by itself, so that one of it is two: what the two do not share is
    the rate, and the norm at which gradients are clipped.

    Attributes:
        discriminator_rate: the discriminator's learning rate as a multiple of the decoder's.
        average_decay: of the running means of the discriminator's logits, each step.
    """

    discriminator_rate: float = 1.0
    average_decay: float = 0.999

    def optimizer(self) -> optax.GradientTransformation:
        """That of `StepConfig`, clipped for each of the two by itself.

        The gradient of the logits' running means is their distance from the batch's: they go
        1 - average_decay of it.
        """
        whole = dataclasses.replace(self, clip=0.0)
        adamw = StepConfig.optimizer(whole)

        def part(path: tuple) -> str:
            names = _names(path)
            if names[0] != "discriminator":
                return "decoder"
            return "averages" if "averages" in names else "discriminator"

        def clipped(gradients: Any) -> Any:
            if not self.clip:
                return gradients
            flat = jax.tree_util.tree_leaves_with_path(gradients)
            norms = {
                name: optax.tree.norm([leaf for path, leaf in flat if part(path) == name])
                for name in ("decoder", "discriminator")
            }

            def scale(path: tuple, gradient: jax.Array) -> jax.Array:
                if part(path) == "averages":
                    return gradient
                norm = norms[part(path)]
                return gradient * (self.clip / jax.numpy.maximum(norm, self.clip))

            return jax.tree_util.tree_map_with_path(scale, gradients)

        def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            updates, state = adamw.update(clipped(gradients), state, params)

            def final(path: tuple, update: jax.Array, gradient: jax.Array) -> jax.Array:
                if part(path) == "averages":
                    return -(1.0 - self.average_decay) * gradient
                rate = self.discriminator_rate if part(path) == "discriminator" else 1.0
                return rate * update

            return jax.tree_util.tree_map_with_path(final, updates, gradients), state

        return optax.GradientTransformation(adamw.init, update)


def adversarial(
    config: StepConfig, discriminator_rate: float, average_decay: float
) -> AdversarialStepConfig:
    """A stage's hyperparameters with those of its discriminator."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return AdversarialStepConfig(
        **fields, discriminator_rate=discriminator_rate, average_decay=average_decay
    )
