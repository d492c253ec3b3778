"""The FAE: published sizes, switches, statistics."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from starflow2_jax.convert import table
from starflow2_jax.models import fae as models
from starflow2_jax.models.dinov2 import DinoV2Config, dinov2_giant
from starflow2_jax.models.fae import (
    FAE,
    EncoderConfig,
    FAEConfig,
    FeatureDecoderConfig,
    FeatureFAE,
    PixelDecoderConfig,
    Posterior,
)
from starflow2_jax.nn import partition

VIT = DinoV2Config(layers=1, width=32, heads=2, mlp_width=64, patch=4, table_side=4)


def config(**changes):
    shape = {
        "features": 32,
        "channels": 4,
        "side": 4,
        "encoder": EncoderConfig(heads=2, head_dim=24),
        "feature_decoder": FeatureDecoderConfig(layers=2, heads=2, mlp_width=48),
        "pixel_decoder": PixelDecoderConfig(layers=1, width=24, heads=2, mlp_width=40, patch=5),
    }
    return FAEConfig(**shape | changes)


def counts(config):
    """Parameters of encoder, feature decoder and pixel decoder."""
    shapes = table.shapes_in(
        nnx.state(nnx.eval_shape(lambda: FAE(config, rngs=nnx.Rngs(0))), nnx.Param)
    )
    parts = dict.fromkeys(("encoder", "feature_decoder", "pixel_decoder"), 0)
    for path, shape in shapes.items():
        parts[path.split(".")[0]] += math.prod(shape)
    return tuple(parts.values())


def published(**changes):
    """The published model with these changes of its parts."""
    made = models.fae_dinov2_giant()
    return dataclasses.replace(
        made,
        **{n: dataclasses.replace(getattr(made, n), **fields) for n, fields in changes.items()},
    )


def test_published_sizes():
    # The paper counts the tables of positions, fixed or not.
    learned = {"positions": "learned"}
    counted = published(encoder={"norm": "none"}, feature_decoder=learned, pixel_decoder=learned)
    assert counts(counted) == (38_166_592, 170_428_416, 305_360_896)
    fixed = published(encoder={"norm": "none"})
    tables = (0, 256 * 1536, 256 * 1024)
    assert counts(fixed) == tuple(np.subtract(counts(counted), tables))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder": {"norm": "layer", "qk_norm": True, "activation": "gelu"}},
        {"feature_decoder": {"final_norm": "none", "rope": False}},
        {"feature_decoder": {"qk_norm": True}},
        {"pixel_decoder": {"norm": "rms", "layer_scale": 1.0, "rope": True}},
    ],
    ids=str,
)
def test_switches_keep_the_published_sizes(changes):
    parts = np.add(counts(published(**changes)), (0, 256 * 1536, 256 * 1024))
    assert [f"{n / 1e6:.2f}" for n in parts] == ["38.17", "170.43", "305.36"]
    if changes.get("pixel_decoder"):
        assert parts[2] == 305_359_872


def test_shape_of_the_published_model():
    made = models.fae_dinov2_giant()
    assert made.image_size == 256 and made.tokens == 256

    def through(features):
        model = FAE(made, rngs=nnx.Rngs(0))
        posterior = model.encode(features)
        return posterior, model.decode_features(posterior.mean), model.decode(posterior.mean)

    posterior, features, pixels = jax.eval_shape(through, jnp.zeros((2, 256, 1536)))
    assert posterior.mean.shape == posterior.logvar.shape == (2, 256, 32)
    assert features.shape == (2, 256, 1536) and pixels.shape == (2, 256, 256, 3)


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def random_fae(made, dtype=np.float64):
    model = tiny.randomised(lambda: FAE(made, rngs=nnx.Rngs(0)), 0, dtype)
    for statistics in (model.features, model.latents):
        statistics.std[...] = jnp.abs(statistics.std[...]) + 0.5
    return model


@pytest.mark.parametrize(
    "encoder",
    [
        EncoderConfig(heads=2, head_dim=24, norm="none", activation="none"),
        EncoderConfig(heads=2, head_dim=24, norm="rms", activation="silu"),
        EncoderConfig(heads=2, head_dim=24, norm="layer", activation="gelu", qk_norm=True),
    ],
    ids=str,
)
def test_encoder_is_its_formula(encoder, x64):
    made = config(encoder=encoder)
    model = random_fae(made)
    x = np.array(numbers(2, 16, 32))
    found = tiny.jit(lambda model, x: model.encode(x))(model, x)
    at = lambda name: np.array(table.by_path(nnx.state(model.encoder))[name])
    linear = lambda a, name: a @ at(f"{name}.kernel") + at(f"{name}.bias")
    s = (x - np.array(model.features.mean[...])) / np.array(model.features.std[...])
    normed = s
    if encoder.norm == "rms":
        normed = s / np.sqrt((s**2).mean(-1, keepdims=True) + 1e-6) * at("norm.weight")
    elif encoder.norm == "layer":
        centred = s - s.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        normed = normed * at("norm.scale") + at("norm.bias")
    q, k, v = (linear(normed, n).reshape(2, 16, 2, 24) for n in "qkv")
    if encoder.qk_norm:
        rms = lambda a, n: a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6) * at(f"{n}.weight")
        q, k = rms(q, "q_norm"), rms(k, "k_norm")
    scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(24))
    mixed = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v)
    hidden = mixed.reshape(2, 16, 48) + linear(s, "skip")
    if encoder.activation == "silu":
        hidden = hidden / (1 + np.exp(-hidden))
    elif encoder.activation == "gelu":
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    mean, logvar = np.split(linear(hidden, "out"), 2, -1)
    tiny.close(found.mean, mean, 1e-10)
    tiny.close(found.logvar, logvar, 1e-10)


def test_posterior(x64):
    posterior = Posterior(numbers(3, 5, 2), numbers(3, 5, 2, seed=1))
    normal = numbers(3, 5, 2, seed=2)
    tiny.close(
        posterior.sample(normal), posterior.mean + jnp.exp(posterior.logvar / 2) * normal, 1e-12
    )
    torch = pytest.importorskip("torch")
    normals = torch.distributions.Normal
    ours = normals(*(torch.tensor(np.array(a)) for a in (posterior.mean, posterior.std)))
    theirs = torch.distributions.kl_divergence(ours, normals(0.0, 1.0))
    tiny.close(posterior.kl(), theirs.sum((1, 2)).numpy(), 1e-10)


def test_own_units_and_normalised_ones_agree(x64):
    model = random_fae(config())
    z = numbers(2, 16, 4)
    pixels, again = tiny.jit(
        lambda model, z: (model.decode(z), model.decode_pixels(model.decode_features(z)))
    )(model, z)
    tiny.close(pixels, again, 1e-10)
    tiny.close(model.latents.denormalise(model.latents.normalise(z)), z, 1e-10)
    assert pixels.shape == (2, 20, 20, 3)


def test_learned_positions_start_as_the_fixed_ones(x64):
    learned = FeatureDecoderConfig(layers=2, heads=2, mlp_width=48, positions="learned")
    fixed, moving = (FAE(config(**c), rngs=nnx.Rngs(0)) for c in ({}, {"feature_decoder": learned}))
    z = numbers(2, 16, 4).astype(jnp.float32)
    tiny.close(fixed.decode_features(z), moving.decode_features(z), 1e-5)


def test_rotary_positions_and_tables_tell_places_apart(x64):
    for changes in ({"rope": True}, {"rope": False}):
        made = config(
            feature_decoder=FeatureDecoderConfig(layers=2, heads=2, mlp_width=48, **changes)
        )
        same = jnp.broadcast_to(numbers(1, 1, 4), (1, 16, 4))
        decoded = tiny.jit(lambda model, z: model.decode_features(z))(random_fae(made), same)
        found = np.array(decoded)[0]
        assert np.unique(found[:, 0].round(9)).size == 16


@pytest.mark.parametrize("vit", [VIT, None], ids=["vit", "patches"])
def test_features_of_pictures(vit):
    made = config()
    if vit is None:
        pixels = dataclasses.replace(made.pixel_decoder, patch=4)
        made = config(features=48, pixel_decoder=pixels)
    model = tiny.randomised(lambda: FeatureFAE(made, vit, rngs=nnx.Rngs(0)))
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
    features_of = tiny.jit(lambda model, images: model.features_of(images, jnp.float32))
    features = features_of(model, images)
    assert features.shape == (2, 16, made.features)
    tiny.close(features, features_of(model, images / np.float32(255)), 1e-5)
    posterior = tiny.jit(lambda model, images: model.encode(images, jnp.float32))(model, images)
    assert posterior.mean.shape == (2, 16, 4)


def test_features_of_another_width():
    with pytest.raises(ValueError, match="ViT has 32 features, the FAE takes 36"):
        FeatureFAE(
            config(features=36, feature_decoder=FeatureDecoderConfig(1, 3, 48)),
            VIT,
            rngs=nnx.Rngs(0),
        )
    with pytest.raises(ValueError, match="patches have 75 features, the FAE takes 32"):
        FeatureFAE(config(), None, rngs=nnx.Rngs(0))


def test_json():
    import json

    made = published(encoder={"norm": "none"}, pixel_decoder={"layer_scale": 0.5})
    assert models.from_json(json.loads(json.dumps(dataclasses.asdict(made)))) == made


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_published_model_encodes_and_trains_on_accelerators(monkeypatch, platform):
    # Its encoder has heads of 256, twice as wide as TPU's kernel takes.
    monkeypatch.setattr(partition, "platform", lambda: platform)
    vit = dataclasses.replace(dinov2_giant(), layers=1)
    whole = nnx.eval_shape(lambda: FeatureFAE(models.fae_dinov2_giant(), vit, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(whole)

    def loss(state, images):
        model = nnx.merge(graphdef, state)
        posterior = model.encode(images, jnp.float32)
        return posterior.mean.sum() + model.fae.decode(posterior.mean).sum()

    images = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.uint8)
    gradient = jax.eval_shape(jax.grad(loss), state, images)
    assert gradient["fae"]["encoder"]["q"]["kernel"].get_value().shape == (1536, 24 * 256)
