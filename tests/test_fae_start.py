"""Starts of small FAEs and ViTs against the linear algebra that they come from."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from starflow2_jax.errors import UserError
from starflow2_jax.models.dinov2 import DinoV2Config
from starflow2_jax.models.fae import (
    EncoderConfig,
    FAEConfig,
    FeatureDecoderConfig,
    FeatureFAE,
    Moments,
    PixelDecoderConfig,
)
from starflow2_jax.nn import grid
from starflow2_jax.training.fae_start import start_linear
from starflow2_jax.training.masked_vit import MaskedViT, start_from_components

CONFIG = FAEConfig(
    features=48,
    channels=6,
    side=2,
    encoder=EncoderConfig(heads=2, head_dim=8),
    feature_decoder=FeatureDecoderConfig(2, 2, 16, positions="learned", final_norm="none"),
    pixel_decoder=PixelDecoderConfig(2, 64, 2, 16, patch=4),
)


@pytest.fixture(scope="module")
def images():
    """Of few directions and a little noise, [n, 8, 8, 3]."""
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(200, 4, 4)) @ rng.normal(size=(4, 48)) * 30.0 + 128.0
    smooth = grid.from_patches(jnp.asarray(smooth), 2, 2, 4) + rng.normal(size=(200, 8, 8, 3))
    return np.clip(np.round(np.asarray(smooth)), 0, 255).astype(np.uint8)


def started(config, images):
    model = FeatureFAE(config, None, rngs=nnx.Rngs(0))
    features = np.asarray(model.features_of(jnp.asarray(images), jnp.dtype("float32")))
    moments = Moments()
    moments.add(features)
    moments.into(model.fae.features)
    start_linear(model.fae, [(features[:77], images[:77]), (features[77:], images[77:])], seed=1)
    return model.fae, features


def test_linear_start_is_the_pca_of_normalised_features(images):
    fae, features = started(CONFIG, images)
    normed = np.asarray(fae.features.normalise(features), np.float64)
    flat = normed.reshape(-1, 48)
    axes = np.linalg.svd(flat, full_matrices=False)[2][: CONFIG.channels]
    posterior = fae.encode(jnp.asarray(features))
    expected = normed @ axes.T @ axes
    made = np.asarray(fae.feature_decoder(posterior.mean))
    assert np.abs(made - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.asarray(posterior.mean).std((0, 1)) == pytest.approx(np.ones(6), rel=1e-3)
    assert np.asarray(posterior.logvar) == pytest.approx(-6.0, abs=1e-4)


def test_linear_start_of_the_pixel_decoder_is_near_the_regression(images):
    fae, features = started(CONFIG, images)
    pixels = np.asarray(fae.decode_pixels(jnp.asarray(features)))
    error = np.square(pixels - images / 255.0).mean()
    # Bare patches hold the pixels themselves: what is left is the last norm's doing.
    assert error < 0.02 * np.var(images / 255.0)


@pytest.mark.parametrize(
    "change",
    [
        dict(encoder=EncoderConfig(heads=1, head_dim=8)),
        dict(encoder=EncoderConfig(heads=2, head_dim=8, activation="gelu")),
        dict(pixel_decoder=PixelDecoderConfig(2, 48, 2, 16, patch=4)),
        dict(feature_decoder=FeatureDecoderConfig(2, 2, 16)),
    ],
)
def test_no_room_for_a_linear_start(images, change):
    with pytest.raises(UserError, match="linear start"):
        started(dataclasses.replace(CONFIG, **change), images)


def test_vit_starts_from_the_components_of_patches(images):
    config = DinoV2Config(
        layers=1,
        width=16,
        heads=2,
        mlp_width=16,
        patch=4,
        table_side=2,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        layer_scale=1e-6,
    )
    model = MaskedViT(config, rngs=nnx.Rngs(0))
    start_from_components(model, images, seed=2)
    pixels = model.vit.normalise(jnp.asarray(images, jnp.float32) / 255.0)
    wanted = np.asarray(grid.to_patches(pixels, 4))
    told = np.asarray(model(pixels, jnp.zeros((len(images), 4), bool)))
    flat = wanted.reshape(-1, 48) - wanted.mean((0, 1))
    # The images have four directions, the embedding ten: the noise and the norm are left.
    assert np.square(told - wanted).mean() < 0.05 * np.square(flat).mean()
    embedded = np.asarray(model.vit.patch_embedding(jnp.asarray(wanted)))
    assert np.square(embedded).mean() == pytest.approx(1.0, rel=1e-3)
    with pytest.raises(ValueError, match="no room"):
        narrow = dataclasses.replace(config, width=4)
        start_from_components(MaskedViT(narrow, rngs=nnx.Rngs(0)), images, seed=2)
