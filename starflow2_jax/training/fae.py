"""Training of an FAE on images: its stages, its statistics, its directory.

Specification: arXiv 2512.07829. Letters: B images, N tokens, D features, C latent channels.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from starflow2_jax.data.images import Augment
from starflow2_jax.errors import UserError
from starflow2_jax.fae_bundle import load_statistics, save_fae, save_statistics
from starflow2_jax.models.dinov2 import DinoV2
from starflow2_jax.models.discriminator import Discriminator, DiscriminatorConfig
from starflow2_jax.models.fae import FAEConfig, FeatureFAE, Moments
from starflow2_jax.models.lpips import LPIPS
from starflow2_jax.nn.decoder import DecoderConfig
from starflow2_jax.nn.layers import check_compute_dtype
from starflow2_jax.parallel import rules
from starflow2_jax.parallel.distributed import fetch
from starflow2_jax.training.fae_losses import (
    FAETraining,
    FeatureLoss,
    PixelLoss,
    PixelWeights,
)
from starflow2_jax.training.fae_start import start_linear
from starflow2_jax.training.fae_step import adversarial
from starflow2_jax.training.images import Images, ImagesTask
from starflow2_jax.training.step import StepConfig

STATISTICS_FILE = "statistics.json"

Net = TypeVar("Net", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class FAEStage:
    """One stage.

    Attributes:
        trains: parts of the FAE.
        source: of the pixel decoder's input, see `PixelLoss`; None: the stage of features.
        noise: standard deviation of the noise in normalised units.
        noise_by: see `PixelLoss`.
        beta: weight of the KL.
        weights: of the terms of a loss on pixels.
        critic: whether there is a discriminator.
        discriminator_rate, average_decay: see `AdversarialStepConfig`.
        tokens: N.
        dtype: of the computation.
        averaged: the encoder never changes again, so it is the average that goes on.
    """

    name: str
    trains: tuple[str, ...]
    tokens: int
    source: Literal["features", "decoded", "noisy"] | None = None
    noise: float = 0.0
    noise_by: Literal["channel", "token"] = "channel"
    beta: float = 0.0
    weights: PixelWeights = PixelWeights()
    discriminator_rate: float = 1.0
    average_decay: float = 0.999
    dtype: str = "float32"
    draws: bool = True
    averaged: bool = True

    def __post_init__(self) -> None:
        check_compute_dtype(self.dtype)

    @property
    def adversarial(self) -> bool:
        """Whether it trains the discriminator."""
        return self.source is not None and self.weights.adversarial > 0

    @property
    def trainable(self) -> nnx.filterlib.Filter:
        """Filter of the trained parameters."""

        def trained(path: tuple, value: Any) -> bool:
            if path[0] == "discriminator":
                return self.adversarial
            return path[:2] == ("model", "fae") and path[2] in self.trains

        return trained

    def steps(self, config: StepConfig) -> StepConfig:
        """With those of the discriminator, where there is one."""
        if not self.adversarial:
            return config
        return adversarial(config, self.discriminator_rate, self.average_decay)

    def loss(self, config: StepConfig, training: bool) -> FeatureLoss | PixelLoss:
        """On held-out images without the adversarial part; of noise, only that of `noisy` stays."""
        if self.source is None:
            return FeatureLoss(self.beta, training, self.tokens, self.dtype)
        return PixelLoss(
            self.source,
            self.noise,
            self.weights,
            training,
            self.tokens,
            self.noise_by,
            self.dtype,
        )


# Name, what is trained, where the pixel decoder's input is from, its noise.
_STAGES: tuple[tuple[str, tuple[str, ...], Any, float], ...] = (
    ("features", ("encoder", "feature_decoder"), None, 0.0),
    ("pixels", ("pixel_decoder",), "features", 0.4),
    ("fine_tune", ("pixel_decoder",), "decoded", 0.0),
    ("noisy", ("feature_decoder", "pixel_decoder"), "noisy", 0.3),
)


def stages_of(groups: Mapping[str, Mapping[str, Any]], tokens: int) -> tuple[FAEStage, ...]:
    """The four stages, with what the config says of those that it has.

    Args:
        groups: by stage, what is to be other than `FAEStage` has it: `features` (beta), `pixels`
            (noise, noise_by, weights), `fine_tune` (weights), `noisy` (noise, weights).
        tokens: N.

    Raises:
        UserError: no such stage, or an entry that it does not have.
    """
    if unknown := set(groups) - {name for name, *_ in _STAGES}:
        names = ", ".join(name for name, *_ in _STAGES)
        raise UserError(f"config.fae_stages has {sorted(unknown)[0]!r}; the stages are {names}")
    made = []
    for name, trains, source, noise in _STAGES:
        fields = {"noise": noise, **groups.get(name, {})}
        if name == "features":
            fields.setdefault("beta", 1e-6)
        try:
            if "weights" in fields:
                fields["weights"] = PixelWeights(**fields["weights"])
            made.append(FAEStage(name, trains, tokens, source, **fields))
        except (ValueError, TypeError) as error:
            raise UserError(f"config.fae_stages.{name}: {error}") from error
    return tuple(made)


def _placed(net: Net, mesh: Mesh) -> Net:
    graphdef, state = nnx.split(net)
    return nnx.merge(graphdef, jax.device_put(state, rules.shardings(state, mesh)))


def _stack_flops(config: DecoderConfig, tokens: int) -> float:
    """Of a forward pass of a decoder over one image."""
    matrices = 4 * config.width * config.heads * config.head_dim
    matrices += (3 if config.mlp == "swiglu" else 2) * config.width * config.mlp_width
    attention = 2 * tokens * config.heads * config.head_dim
    return 2.0 * tokens * config.layers * (matrices + attention)


@dataclasses.dataclass(frozen=True)
class FAETask(ImagesTask):
    """See `training.task.Task`.

    Attributes:
        config: of the run; `stages.NAME.batch.rows` is B.
        model_config: the FAE's shape.
        stages: see `stages_of`.
        vit: makes the features; frozen; None: bare patches.
        train, held_out: the images, of the size that the FAE decodes.
        workdir: of the run: keeps the statistics.
        draw_samples: writes reconstructions: (model, folder, name).
        discriminator: its shape.
        perceptual: network of the perceptual loss; None: there is no such term.
        augment: of the training images, or None.
        statistics_images: of the training images, that the statistics are taken from.
        linear_start: whether training starts near a PCA, see `fae_start`.
    """

    config: ml_collections.ConfigDict
    model_config: FAEConfig
    stages: tuple[FAEStage, ...]
    vit: DinoV2 | None
    train: Images
    held_out: Images
    workdir: pathlib.Path
    draw_samples: Callable[[FeatureFAE, pathlib.Path, str], None]
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    perceptual: LPIPS | None = None
    augment: Augment | None = None
    statistics_images: int = 50_000
    linear_start: bool = False

    def __post_init__(self) -> None:
        if self.vit is not None and self.vit.config.width != self.model_config.features:
            raise UserError(
                f"the ViT has width {self.vit.config.width}, the FAE takes features of width "
                f"{self.model_config.features}"
            )
        ours = self.perceptual is None
        wanted = [s.name for s in self._running() if s.source and s.weights.perceptual]
        if ours and wanted:
            print(
                f"starflow2: note: no perceptual network is given: {', '.join(wanted)} train "
                "without the perceptual term",
                file=sys.stderr,
            )

    def _running(self) -> Iterator[FAEStage]:
        return (stage for stage in self.stages if stage.name in self.config.stages)

    def make_model(self, seed: int) -> FAETraining:
        """A fresh FAE and discriminator; what is frozen comes in `prepare`."""
        rngs = nnx.Rngs(seed)
        vit = None if self.vit is None else self.vit.config
        model = FeatureFAE(self.model_config, vit, rngs=rngs)
        critic = None
        if any(stage.adversarial for stage in self._running()):
            critic = Discriminator(self.discriminator, rngs=rngs)
        return FAETraining(model, critic, None)

    def prepare(self, stage: str, model: FAETraining, mesh: Mesh) -> FAETraining:
        """With the frozen networks and the statistics of features; and of latents, where needed."""
        if stage == next(self._running()).name:
            if self.vit is not None:
                model.model.vit = _placed(self.vit, mesh)
            if self.perceptual is not None:
                model.perceptual = nnx.data(_placed(self.perceptual, mesh))
            path = self.workdir / STATISTICS_FILE
            if path.is_file():
                load_statistics(path, model.model.fae)
            else:
                self._measure_features(model.model)
                save_statistics(path, model.model.fae)
            if self.linear_start:
                start_linear(model.model.fae, self._features(model.model), self.config.seed)
        if stage == "noisy":
            self._measure_latents(model.model)
        return model

    def _parts(self) -> Iterator[np.ndarray]:
        """Training images, evenly spread, in batches of one size but for the last."""
        count = min(len(self.train), self.statistics_images)
        rows = self.config.stages[next(self._running()).name].batch.rows
        indices = np.linspace(0, len(self.train) - 1, count).round().astype(int)
        for start in range(0, count, rows):
            yield self.train.batch(indices[start : start + rows])["images"]

    def _dtype(self) -> jnp.dtype:
        return jnp.dtype(next(self._running()).dtype)

    def _features(self, model: FeatureFAE) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features [b, N, D] and images of `_parts`."""
        features_of = jax.jit(lambda model, images: model.features_of(images, self._dtype()))
        for images in self._parts():
            yield fetch(features_of(model, images)), images

    def _measure_features(self, model: FeatureFAE) -> None:
        moments = Moments()
        for features, _ in self._features(model):
            moments.add(features)
        moments.into(model.fae.features)

    def _measure_latents(self, model: FeatureFAE) -> None:
        moments = Moments()
        encode = jax.jit(lambda model, images: model.encode(images, self._dtype()))
        for images in self._parts():
            posterior = fetch(encode(model, images))
            moments.add(posterior.mean, np.exp(posterior.logvar))
        moments.into(model.fae.latents)

    def flops(self, stage: str) -> float:
        """Of the transformers in a step; what is trained counts three times."""
        c = self.model_config
        [found] = [one for one in self.stages if one.name == stage]
        inner = c.encoder.heads * c.encoder.head_dim
        encoder = 2.0 * c.tokens * (4 * c.features * inner + 2 * c.tokens * inner)
        each = {
            "encoder": encoder,
            "feature_decoder": _stack_flops(c.features_stack(), c.tokens),
            "pixel_decoder": _stack_flops(c.pixels_stack(), c.tokens),
        }
        used = {
            None: ("encoder", "feature_decoder"),
            "features": ("pixel_decoder",),
        }.get(found.source, tuple(each))
        total = sum(each[part] * (3 if part in found.trains else 1) for part in used)
        if self.vit is not None:
            total += _stack_flops(self.vit.config.decoder(), c.tokens)
        return total * self.config.stages[stage].batch.rows

    def frozen(self, model: FAETraining) -> nnx.State | None:
        """The ViT."""
        return None if model.model.vit is None else nnx.state(model.model.vit)

    def draw(self, model: FAETraining, folder: pathlib.Path, name: str) -> None:
        """Reconstructions of the config's choice."""
        self.draw_samples(model.model, folder, name)

    def save(self, folder: pathlib.Path, model: FAETraining, metadata: Mapping[str, Any]) -> None:
        """See `fae_bundle`; the statistics of the latents are taken now."""
        self._measure_latents(model.model)
        noisy = [stage for stage in self._running() if stage.source == "noisy"]
        # An export names its stage, which `noisy` may still be to follow.
        tuned = [stage.noise for stage in noisy if metadata.get("stage", stage.name) == stage.name]
        about = {"tuned_to_noise": tuned[0] if tuned else 0.0}
        save_fae(folder, model.model, {**about, **metadata})
