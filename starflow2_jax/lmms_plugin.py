"""What lmms-eval asks an installed package for: the entry point of the group `lmms_eval.models`.

lmms-eval --model starflow2_jax --model_args pretrained=runs/digits --tasks mme --batch_size 16
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> "ModelManifest":
    """Names the model and its class, which is not imported before it is wanted."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="starflow2_jax",
        chat_class_path="starflow2_jax.lmms_model.LmmsModel",
        aliases=("starflow2",),
    )
