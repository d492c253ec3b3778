"""Pretraining of a small DINOv2-shaped ViT by masked reconstruction, where there are no weights.

Of each picture some patches are replaced by the mask token, and a linear head on the final tokens
tells the pixels of all patches. Those that are seen count too: an FAE's features must keep what
they show, and so they start from the patches' principal components. Letters: B images, H, W pixels,
N patches, D width, P numbers of a patch.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from starflow2_jax.data.images import Augment
from starflow2_jax.data.pipeline import HostBatch
from starflow2_jax.fae_bundle import save_vit
from starflow2_jax.models.dinov2 import DinoV2, DinoV2Config
from starflow2_jax.nn import grid, layers, partition
from starflow2_jax.training.fae_start import put
from starflow2_jax.training.images import Images, ImagesTask, WholeStage, image_counts, share
from starflow2_jax.training.step import StepConfig

# Root mean square of what all patches share at the start; that of patch and of position is 1.
_SHARED = 4.0


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


def start_from_components(model: MaskedViT, images: np.ndarray, seed: int) -> None:
    """Lets the patch embedding and the head start where almost nothing of a patch is lost.

    The embedding starts as a rotation of the patches' largest principal components, D - N - 2 of
    them where a patch has as many, with deviation 1 in the mean over channels; the rotation gives
    every channel about the same share of it, so that errors of normalised features are errors of
    pixels. Of the other directions N are the positions', and one all patches share, by which the
    final LayerNorm is nearly linear. The head starts as the inverse.

    Args:
        model: has a LayerNorm at the end, and a table of positions as large as the images.
        images: uint8 [n, H, W, channels].
        seed: of the rotation.

    Raises:
        ValueError: the ViT is too narrow.
    """
    vit, rng = model.vit, np.random.default_rng(seed)
    config = vit.config
    places, width = config.table_side**2, config.width
    pixels = vit.normalise(jnp.asarray(images, jnp.float32) / 255.0)
    patches = np.asarray(grid.to_patches(pixels, config.patch))
    patches = patches.reshape(-1, patches.shape[-1])
    kept = min(width - places - 2, patches.shape[-1])
    if kept < 1:
        raise ValueError(f"a ViT of width {width} has no room beside {places} positions")
    mean = patches.mean(0)
    covariance = (patches - mean).T @ (patches - mean) / len(patches)
    axes = np.linalg.qr(rng.normal(size=(len(mean), kept)).astype(np.float32))[0]
    for _ in range(8):  # orthogonal iteration: the subspace is wanted, not the components
        axes = np.linalg.qr(covariance @ axes)[0]
    size = np.sqrt(max(np.trace(axes.T @ covariance @ axes) / width, 1e-12))
    # The first direction is what the LayerNorm takes off: nothing is put there.
    turn = np.concatenate([np.ones((width, 1)), rng.normal(size=(width, width - 1))], 1)
    turn = np.linalg.qr(turn)[0][:, 1:].T
    content, shared, positions, _ = np.split(turn, [kept, kept + 1, kept + 1 + places])  # rows
    whole = axes @ content  # [P, D]
    table = np.sqrt(width) * (_SHARED * shared + np.concatenate([0 * shared, positions]))
    gain = np.sqrt(1.0 + 1.0 + _SHARED**2)
    for variable, value in (
        (vit.patch_embedding.kernel, whole / size),
        (vit.patch_embedding.bias, -mean @ whole / size),
        (vit.positions, table),
        (vit.decoder.final_norm.scale, np.full(width, gain)),
        (model.head.kernel, size * whole.T),
        (model.head.bias, mean),
    ):
        put(variable, value)


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
        return image_counts(batch, self.patches)

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
            hidden = jax.random.uniform(of_share, maxval=self.most_masked)
            return jax.random.uniform(of_patches, wanted.shape[1:2]) < hidden

        masked = jax.vmap(draw)(jnp.asarray(batch["image_seeds"]))  # [B, N]
        told = model(pixels.astype(self.dtype), masked)
        errors = jnp.square(told.astype(jnp.float32) - wanted).mean(-1)
        # Sums over all patches, so that parts of a batch add up to the whole.
        of_masked, of_seen = (errors * masked).mean(), (errors * ~masked).mean()
        loss = of_masked + self.seen * of_seen
        metrics = {"loss": loss, "loss_masked": of_masked, "loss_seen": of_seen}
        metrics = share(metrics, batch, counts)
        return metrics["loss"], metrics


@dataclasses.dataclass(frozen=True)
class MaskedStage(WholeStage):
    """The one stage."""

    masked_loss: MaskedLoss
    name: str = "vit"
    draws: bool = False
    averaged: bool = True

    def loss(self, config: StepConfig, training: bool) -> MaskedLoss:
        """The same on held-out images."""
        del config, training
        return self.masked_loss


@dataclasses.dataclass(frozen=True)
class MaskedViTTask(ImagesTask):
    """See `training.task.Task`.

    Attributes:
        config: of the run; `stages.vit.batch.rows` is B.
        model_config: the ViT's shape.
        train, held_out: the images.
        masked_loss: see `MaskedLoss`.
        augment: of the training images, or None.
        start_images: of the training images, for `start_from_components`; 0: a random start.
    """

    config: ml_collections.ConfigDict
    model_config: DinoV2Config
    train: Images
    held_out: Images
    masked_loss: MaskedLoss
    augment: Augment | None = None
    start_images: int = 0

    @property
    def stages(self) -> tuple[MaskedStage, ...]:
        """One."""
        return (MaskedStage(self.masked_loss),)

    def make_model(self, seed: int) -> MaskedViT:
        """A fresh model."""
        return MaskedViT(self.model_config, rngs=nnx.Rngs(seed))

    def prepare(self, stage: str, model: MaskedViT, mesh: Mesh) -> MaskedViT:
        """With the start that does not come from a seed alone."""
        del stage, mesh
        if self.start_images:
            count = min(len(self.train), self.start_images)
            chosen = np.linspace(0, len(self.train) - 1, count).round().astype(int)
            start_from_components(model, self.train.batch(chosen)["images"], self.config.seed)
        return model

    def flops(self, stage: str) -> float:
        """Of the layers in a step: forwards, and twice that backwards."""
        c, patches = self.model_config, self.masked_loss.patches
        matrices = 4 * c.width**2 + (3 if c.mlp == "swiglu" else 2) * c.width * c.mlp_width
        each = 2.0 * patches * c.layers * (matrices + 2 * patches * c.width)
        return 3.0 * each * self.config.stages[stage].batch.rows

    def draw(self, model: MaskedViT, folder: pathlib.Path, name: str) -> None:
        """Draws nothing."""

    def save(self, folder: pathlib.Path, model: MaskedViT, metadata: Mapping[str, Any]) -> None:
        """The ViT alone, see `fae_bundle.save_vit`."""
        save_vit(folder, model.vit, metadata)
