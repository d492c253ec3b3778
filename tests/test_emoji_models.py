"""The measures of the emoji reports against plain formulae; the masked loss of the small ViT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from starflow2_jax.data.emoji import varied
from starflow2_jax.evaluation.distances import kernel_distance
from starflow2_jax.evaluation.emoji_fae import principal_components, quality
from starflow2_jax.models.dinov2 import DinoV2Config
from starflow2_jax.nn import grid
from starflow2_jax.training.masked_vit import MaskedLoss, MaskedViT


def test_quality_of_known_errors():
    originals = np.full((2, 4, 4, 3), 255, np.uint8)
    originals[0, :2] = 51  # 0.2
    made = originals / 255.0
    made[0, 0] += 0.1  # a quarter of all pixels, half of those that are shown
    made[1] -= 0.01
    found = quality(made, originals)
    first, second = -10 * np.log10(0.01 / 4), -10 * np.log10(1e-4)
    assert found.whole == pytest.approx((first + second) / 2)
    assert found.shown == pytest.approx(-10 * np.log10(0.01 / 2))  # the second shows nothing


def test_principal_components_against_the_covariance():
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (2, 30, 2, 2, 3)).astype(np.uint8)
    flat = train.reshape(30, -1) / 255.0
    values, axes = np.linalg.eigh(np.cov(flat, rowvar=False))
    kept = axes[:, np.argsort(-values)[:5]]
    wanted = (test.reshape(30, -1) / 255.0 - flat.mean(0)) @ kept @ kept.T + flat.mean(0)
    found = principal_components(train, test, 5)
    np.testing.assert_allclose(found.reshape(30, -1), wanted, atol=1e-5)
    np.testing.assert_allclose(principal_components(train, train, 12), train / 255.0, atol=1e-5)


def test_kernel_distance_is_unbiased_and_grows():
    rng = np.random.default_rng(0)
    sets = rng.normal(size=(200, 2, 20, 8))
    same = [kernel_distance(a, b, subsets=1)[0] for a, b in sets]
    apart = [kernel_distance(a, b + 1.0, subsets=1)[0] for a, b in sets]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert np.mean(apart) > 5 * np.std(same)


def test_varied_pictures_keep_size_and_background():
    rng = np.random.default_rng(0)
    image = np.full((64, 64, 3), 255, np.uint8)
    image[20:40, 20:30] = (10, 60, 200)
    seen = [varied(image, rng) for _ in range(300)]
    assert all(one.shape == image.shape and one.dtype == np.uint8 for one in seen)
    # Nothing is lost: the same number of coloured pixels, of the same three levels.
    assert {int((one < 255).any(-1).sum()) for one in seen} == {200}
    assert {tuple(sorted(one.reshape(-1, 3).min(0))) for one in seen} == {(10, 60, 200)}
    assert len({one.tobytes() for one in seen}) > 20


@pytest.fixture(scope="module")
def masked():
    config = DinoV2Config(
        layers=1,
        width=16,
        heads=2,
        mlp_width=32,
        patch=4,
        table_side=2,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    model = MaskedViT(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    batch = {
        "images": rng.integers(0, 256, (6, 8, 8, 3)).astype(np.uint8),
        "image_seeds": np.arange(6, dtype=np.uint32),
    }
    return model, batch


def test_masked_patches_are_not_seen(masked):
    model, batch = masked
    pixels = jnp.asarray(batch["images"][:1], jnp.float32) / 127.5 - 1.0
    hidden = jnp.array([[True, False, False, True]])
    told = model(pixels, hidden)
    assert told.shape == (1, 4, 48)
    patches = grid.to_patches(pixels, 4)
    changed = patches.at[:, 0].add(1.0)
    other = model(grid.from_patches(changed, 2, 2, 4), hidden)
    assert np.array_equal(told, other)
    seen = model(grid.from_patches(patches.at[:, 1].add(1.0), 2, 2, 4), hidden)
    assert np.abs(seen - told).max() > 1e-3


@pytest.mark.parametrize("most", [0.0, 0.5, 1.0])
def test_masked_loss_adds_up_over_parts(masked, most):
    model, batch = masked
    loss = MaskedLoss(4, most_masked=most, seen=0.5)
    run = jax.jit(lambda model, batch, counts: loss(model, None, batch, 3, 0.0, counts))
    whole, metrics = run(model, batch, None)
    assert float(whole) == pytest.approx(
        float(metrics["loss_masked"]) + 0.5 * float(metrics["loss_seen"]), rel=1e-6
    )
    assert (float(metrics["loss_masked"]) == 0.0) == (most == 0.0)
    counts = loss.counts(batch)
    assert (int(counts["images"]), int(counts["tokens"])) == (6, 24)
    parts = [
        {name: array[rows] for name, array in batch.items()} for rows in np.split(np.arange(6), 3)
    ]
    total = sum(float(run(model, part, counts)[0]) for part in parts)
    assert total == pytest.approx(float(whole), rel=1e-5)
