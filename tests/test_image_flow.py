"""TarFlow on folders of images: its loss, its likelihoods, the command that writes them."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from starflow2_jax.cli.main import main
from starflow2_jax.data.images import NO_CLASS, open_folder, write_folder
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.image_likelihood import score_images, summarise
from starflow2_jax.flow_bundle import save_image_flow
from starflow2_jax.models.af_block import Given
from starflow2_jax.models.patches import dequantised, image_noise
from starflow2_jax.models.starflow import ImageFlow, StarFlowConfig, TarFlowConfig, bits_per_dim
from starflow2_jax.training.image_flow import ImageFlowLoss, ImageFlowTask
from starflow2_jax.training.step import StepConfig

CONFIG = TarFlowConfig(1, 8, 4, 32, 2, 1, classes=3, head_dim=16)
CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def model():
    model = tiny.randomised(lambda: ImageFlow(CONFIG, rngs=nnx.Rngs(0)))
    for block in model.blocks:  # two exponentials of anything larger are no longer numbers
        block.head.proj.kernel[...] *= 0.1
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (7, 8, 8, 1), dtype=np.uint8)
    where = tmp_path_factory.mktemp("data") / "images"
    write_folder(where, values, [0, 0, 1, 1, 1, 2, 2], CLASSES)
    return where


def test_the_loss_is_the_familys_on_noised_pixels(model, folder):
    batch = open_folder(folder, 8, 1).batch(range(4))
    loss = tiny.jit(ImageFlowLoss(0.0, 0.1))
    found, metrics = loss(model, None, batch, jnp.uint32(5), jnp.float32(0.2))
    uniform, normal = image_noise(5, batch["image_seeds"], (8, 8, 1))
    x = dequantised(batch["images"], uniform) + 0.2 * normal
    passed = tiny.jit(lambda m, x: m.forward(x, Given(labels=batch["labels"])))(model, x)
    tiny.close(metrics["loss_image"], passed.loss, 1e-5)
    tiny.close(found, passed.loss + 0.1 * passed.latent_norm, 1e-5)


def test_dropped_labels_are_no_class(model, folder):
    batch = open_folder(folder, 8, 1).batch(range(4))
    run = lambda drop, labels: tiny.jit(ImageFlowLoss(drop, 0.0))(
        model, None, batch | {"labels": labels}, jnp.uint32(5), jnp.float32(0.0)
    )[0]
    none = np.full(4, NO_CLASS, np.int32)
    tiny.close(run(1.0, batch["labels"]), run(0.0, none), 1e-6)
    assert abs(float(run(0.0, batch["labels"]) - run(0.0, none))) > 1e-4


def test_scores_are_the_models_with_one_noise_for_all_classes(model, folder):
    data = open_folder(folder, 8, 1)
    scores = score_images(model, data, draws=2, seed=4, rows=3)
    assert scores.by_class.shape == (2, 7, 3) and scores.plain.shape == (2, 7)
    draw_seed = np.random.SeedSequence(4).generate_state(2)[1]
    batch = data.batch(range(7))
    uniform, _ = image_noise(draw_seed, batch["image_seeds"], (8, 8, 1))
    bits = bits_per_dim(model, batch["images"], uniform, Given(labels=batch["labels"]))
    tiny.close(scores.bits(scores.own)[1], bits, 1e-5)
    assert np.abs(scores.own[0] - scores.own[1]).min() > 0
    summary = summarise(scores)
    assert summary["bits_per_dim"] == pytest.approx(scores.bits(scores.own).mean())
    assert summary["bits_per_dim_spread"] == pytest.approx(
        np.std(summary["bits_per_dim_by_draw"], ddof=1)
    )
    assert summary["bayes_accuracy"] == np.mean(
        scores.by_class.mean(0).argmax(1) == batch["labels"]
    )
    mixture = np.logaddexp.reduce(scores.by_class, axis=-1) - np.log(3)
    np.testing.assert_allclose(scores.mixture, mixture, rtol=1e-9)
    own = score_images(model, data, draws=2, seed=4, rows=3, classes=False)
    np.testing.assert_allclose(own.own, scores.own, rtol=1e-6)
    assert "bayes_accuracy" not in summarise(own, classes=False)


@pytest.fixture
def saved(model, tmp_path):
    save_image_flow(tmp_path / "run" / "model", model, {"classes": CLASSES})
    return tmp_path / "run"


def test_the_command_writes_every_image_and_a_summary(saved, folder, capsys):
    arguments = ["evaluate", "likelihood", "--model", str(saved), "--data", str(folder)]
    assert main([*arguments, "--draws", "2"]) == 0
    assert "bits_per_dim" in capsys.readouterr().out
    out = saved / "model" / "likelihood"
    rows = [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    assert [row["class"] for row in rows] == ["a", "a", "b", "b", "b", "c", "c"]
    for row in rows:
        assert row["bits_per_dim"] == pytest.approx(-row["nats"] / (64 * math.log(2)) + 7)
        assert row["predicted"] == CLASSES[int(np.argmax(row["nats_by_class"]))]
        assert row["nats_spread"] > 0
    assert summary["bits_per_dim"] == pytest.approx(np.mean([r["bits_per_dim"] for r in rows]))
    assert summary["classes"] == list(CLASSES) and summary["draws"] == 2


def test_bad_input_is_one_line(saved, folder, tmp_path, capsys):
    def fails(*arguments):
        assert main(["evaluate", "likelihood", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "no model.json" in fails("--model", tmp_path / "none", "--data", folder)
    assert "there is no folder" in fails("--model", saved, "--data", tmp_path / "none")
    for option in ("--score matching", "--captions words", "--field image=png", "--template a{}"):
        message = f"{option.split()[0]} is for STARFlow2 models"
        assert message in fails("--model", saved, "--data", folder, *option.split())
    other = tmp_path / "other"
    write_folder(other, np.zeros((1, 8, 8, 1), np.uint8), [0], ["dog"])
    assert "dog is of no class" in fails("--model", saved, "--data", other)
    spoilt = tmp_path / "spoilt" / "a"
    spoilt.mkdir(parents=True)
    (spoilt / "0.png").write_text("no image")
    assert "a/0.png is not a readable" in fails("--model", saved, "--data", tmp_path / "spoilt")
    latents = tmp_path / "latents"
    shape = StarFlowConfig(2, 2, 32, 32, (1,), head_dim=16)
    save_image_flow(latents, tiny.randomised(lambda: ImageFlow(shape, rngs=nnx.Rngs(0))))
    assert "model of latents" in fails("--model", latents, "--data", folder)


def test_what_cannot_be_trained_is_refused(folder):
    data = open_folder(folder, 8, 1)
    make = lambda **changes: ImageFlowTask(
        None, TarFlowConfig(1, 8, 4, 32, 2, 1, head_dim=16, **changes), data, data, None
    )
    with pytest.raises(UserError, match="volume-preserving"):
        make(scale="none")
    with pytest.raises(UserError, match="3 classes, the model has 4"):
        make(classes=4)
    [stage] = make(classes=3).stages
    counts = stage.loss(StepConfig(1, 1.0, 0), training=True).counts(data.batch(range(2)))
    assert counts == {"images": 2, "tokens": 8}
    assert jax.tree.leaves(make(classes=3).constants) == []
