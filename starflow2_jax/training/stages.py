"""The Pretzel's training stages: what each computes, what it trains, and on which losses.

STARFlow2, section on training: the VLM never changes after stage 0, which exists only for small
models that have no pretrained VLM.
"""

import dataclasses

from flax import nnx

from starflow2_jax.models.pretzel import Parts
from starflow2_jax.training.objective import ObjectiveConfig, PretzelLoss
from starflow2_jax.training.step import StepConfig

FLOW = ("shallow", "deep")
COUPLINGS = ("adapter", "skip_vlm", "skip_flow")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        trains: top-level parts of `Pretzel` that get gradients.
        parts: couplings that are computed.
        image, text: whether L_image and L_text are in the loss.
        averaged: whether the next stage starts from the average of the parameters.
    """

    name: str
    trains: tuple[str, ...]
    parts: Parts
    image: bool
    text: bool
    averaged: bool = False

    @property
    def trainable(self) -> nnx.filterlib.Filter:
        """Filter of the trained parameters."""
        return nnx.Any(*(_first(part) for part in self.trains))

    @property
    def draws(self) -> bool:
        """Whether it changes what the model draws."""
        return self.image

    def steps(self, config: StepConfig) -> StepConfig:
        """As given."""
        return config

    def loss(self, config: StepConfig, training: bool) -> PretzelLoss:
        """The losses that this stage has; without the regulariser where none is trained."""
        weights = ObjectiveConfig(
            image=float(self.image),
            text=config.text_weight if self.text else 0.0,
            latent_norm=config.latent_norm if self.image and training else 0.0,
            z_loss=config.z_loss if training else 0.0,
        )
        return PretzelLoss(dataclasses.replace(self.parts, text=self.text), weights)


def _first(part: str) -> nnx.filterlib.Predicate:
    return lambda path, value: path[0] == part


PRETRAIN_LM = Stage("pretrain_lm", ("vlm",), Parts(False, False, False), image=False, text=True)
TEXT_TO_IMAGE = Stage("text_to_image", FLOW, Parts(False, False, True), image=True, text=False)
IMAGE_TO_TEXT = Stage("image_to_text", ("adapter",), Parts(True, False, False), False, True)
JOINT = Stage("joint", (*FLOW, *COUPLINGS), Parts(), image=True, text=True)
STAGES = (PRETRAIN_LM, TEXT_TO_IMAGE, IMAGE_TO_TEXT, JOINT)
