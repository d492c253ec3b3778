"""Training of the FAE: its losses, its discriminator, its stages."""

import dataclasses
import functools
import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from test_fae import VIT, config

from starflow2_jax.cli.config import load_config
from starflow2_jax.convert.lpips import entries, load_lpips
from starflow2_jax.convert.table import by_path, to_tensors
from starflow2_jax.data.images import open_folder, write_folder
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation import reconstruction
from starflow2_jax.evaluation.reconstruction import measure_reconstruction
from starflow2_jax.fae_bundle import load_fae, read_fae, save_fae
from starflow2_jax.models.dinov2 import DinoV2
from starflow2_jax.models.discriminator import Discriminator, DiscriminatorConfig
from starflow2_jax.models.fae import FeatureFAE, Moments
from starflow2_jax.models.lpips import LPIPS
from starflow2_jax.training import loop
from starflow2_jax.training.fae import FAETask, stages_of
from starflow2_jax.training.fae_losses import (
    FAETraining,
    FeatureLoss,
    PixelLoss,
    PixelWeights,
    hinge,
    lecam,
)
from starflow2_jax.training.fae_step import adversarial
from starflow2_jax.training.step import StepConfig

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
SIZE = 20
CRITIC = DiscriminatorConfig(width=8, multipliers=(1, 2), side=3, groups=4)


def batch(count=2, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8),
        "image_seeds": np.arange(count, dtype=np.uint32),
    }


@functools.cache
def training_model():
    def make():
        rngs = nnx.Rngs(0)
        return FAETraining(
            FeatureFAE(config(), VIT, rngs=rngs), Discriminator(CRITIC, rngs=rngs), None
        )

    model = tiny.randomised(make)
    for statistics in (model.model.fae.features, model.model.fae.latents):
        statistics.std[...] = jnp.abs(statistics.std[...]) + 0.5
    return model


def test_hinge_and_lecam():
    real, made = jnp.asarray([2.0, 0.5, -1.0]), jnp.asarray([-2.0, 0.0, 3.0])
    assert float(hinge(real, made)) == pytest.approx(0.5 * (2.5 / 3 + 5 / 3))
    found = lecam(real, made, jnp.asarray([0.5, -0.5]))
    assert float(found) == pytest.approx((2.5**2 + 1) / 3 + (2.5**2 + 0.5**2) / 3)


def test_moments():
    values = np.random.default_rng(0).normal(3.0, 2.0, (50, 7, 2))
    variance = np.random.default_rng(1).random((50, 7, 2))
    moments = Moments()
    for part in np.split(np.arange(50), [3, 30]):
        moments.add(values[part], variance[part])
    tiny.close(moments.mean, values.mean((0, 1)), 1e-12)
    exact = values.var((0, 1)) + variance.mean((0, 1))
    tiny.close(moments.squares / moments.count, exact, 1e-12)


@pytest.mark.parity
def test_discriminator_is_the_familys():
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    critic = tiny.randomised(lambda: Discriminator(CRITIC, rngs=nnx.Rngs(0)))
    pixels = np.random.default_rng(1).random((2, 24, 24, 3)).astype(np.float32)
    at = {k: torch.from_numpy(np.array(v)) for k, v in by_path(nnx.state(critic)).items()}

    def conv(x, name):
        kernel = at[f"{name}.kernel"].permute(3, 2, 0, 1)
        return f.conv2d(x, kernel, at[f"{name}.bias"], padding="same")

    act = lambda x: f.leaky_relu(x, 0.1)
    x = act(conv(torch.from_numpy(pixels).permute(0, 3, 1, 2), "first"))
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    for i in range(2):
        x = conv(x, f"stages.{i}")
        blur = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
        x = f.conv2d(x, blur, stride=2, padding=1, groups=x.shape[1])
        x = act(f.group_norm(x, 4, at[f"norms.{i}.scale"], at[f"norms.{i}.bias"]))
    x = f.adaptive_max_pool2d(x, 3)
    x = conv(act(conv(x, "middle")), "last")
    tiny.close(tiny.jit(lambda m, p: m(p))(critic, pixels), x.permute(0, 2, 3, 1).numpy(), 1e-5)


@pytest.mark.parity
@pytest.mark.slow
def test_lpips_and_its_files(tmp_path):
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    # Kernels that keep the signal's size through thirteen layers.
    model = tiny.randomised(lambda: LPIPS(rngs=nnx.Rngs(0)))
    for part in model.parts:
        for conv in part:
            fan_in = np.prod(conv.kernel.shape[:3])
            conv.kernel[...] = conv.kernel[...] / 0.15 * np.sqrt(2.0 / fan_in)
    for weight in model.weights:
        weight[...] = jnp.abs(weight[...])
    tensors = dict(to_tensors(list(entries()), by_path(nnx.state(model))))
    tensors = {n: torch.from_numpy(np.array(v)) for n, v in tensors.items()}
    linear = {n: v for n, v in tensors.items() if n.startswith("lin")}
    vgg = {n: v for n, v in tensors.items() if n not in linear}
    assert vgg["features.28.weight"].shape == (512, 512, 3, 3) and len(linear) == 5
    torch.save({**vgg, "classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg16.pth")
    torch.save(linear, tmp_path / "vgg.pth")
    loaded = load_lpips([tmp_path / "vgg16.pth", tmp_path / "vgg.pth"])
    a, b = np.random.default_rng(0).random((2, 2, 16, 16, 3)).astype(np.float32)

    def ends(x):
        x = torch.from_numpy(x).permute(0, 3, 1, 2) * 2 - 1
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = (x - shift[:, None, None]) / scale[:, None, None]
        taken = []
        for place in range(0, 31):
            if f"features.{place}.weight" in vgg:
                weight, bias = (vgg[f"features.{place}.{n}"] for n in ("weight", "bias"))
                x = f.relu(f.conv2d(x, weight, bias, padding=1))
            if place in (4, 9, 16, 23):
                x = f.max_pool2d(x, 2)
            if place in (3, 8, 15, 22, 29):
                taken.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return taken

    distance = sum(
        f.conv2d((x - y).square(), linear[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
        for i, (x, y) in enumerate(zip(ends(a), ends(b), strict=True))
    )
    found = jax.jit(lambda m, a, b: m(a, b))(loaded, a, b)
    assert distance.min() > 0.1
    tiny.close(found, distance.numpy(), 1e-5)
    with pytest.raises(UserError, match="missing: lin0.model.1.weight"):
        load_lpips([tmp_path / "vgg16.pth"])
    with pytest.raises(UserError, match="there is no file"):
        load_lpips([tmp_path / "nothing.pth"])


def split(model):
    return nnx.split(
        model, lambda path, _: path[0] == "discriminator" or "pixel_decoder" in path, ...
    )


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
def test_one_gradient_serves_decoder_and_discriminator(adaptive):
    model = training_model()
    weights = PixelWeights(perceptual=0.0, adversarial=0.3, adaptive=adaptive, lecam=0.2)
    loss = PixelLoss("decoded", 0.0, weights, training=True, tokens=16)
    graphdef, trained, rest = split(model)
    own = batch()

    def run(state):
        return loss(nnx.merge(graphdef, state, rest), None, own, jnp.uint32(3), jnp.float32(0))

    gradients, metrics = tiny.jit(jax.grad(run, has_aux=True))(trained)

    # Each of the two alone, with the other as it is.
    def pixels_of(model):
        features = loss._features(model.model, own, jnp.uint32(3))
        hidden = model.model.fae.pixel_decoder.hidden(features)
        return model.model.fae.pixel_decoder.to_pixels(hidden), hidden

    target = own["images"] / np.float32(255)

    def decoder_loss(state, weight):
        model = nnx.merge(graphdef, state, rest)
        pixels, _ = pixels_of(model)
        return jnp.square(pixels - target).mean() - weight * model.discriminator(pixels).mean()

    def critic_loss(state):
        model = nnx.merge(graphdef, state, rest)
        real, made = model.discriminator(target), model.discriminator(pixels_of(model)[0])
        averages = jax.lax.stop_gradient(model.discriminator.averages[...])
        return hinge(real, made) + 0.2 * lecam(real, made, averages)

    def at_head(state, term):
        model = nnx.merge(graphdef, state, rest)
        hidden = pixels_of(model)[1]

        def of(kernel):
            head = nnx.merge(*nnx.split(model.model.fae.pixel_decoder.head))
            head.kernel = nnx.Param(kernel)
            return term(model, model.model.fae.pixel_decoder.to_pixels(hidden, head))

        return jnp.linalg.norm(jax.grad(of)(model.model.fae.pixel_decoder.head.kernel[...]))

    weight = jnp.float32(0.3)
    if adaptive:
        terms = (
            lambda m, p: jnp.square(p - target).mean(),
            lambda m, p: -m.discriminator(p).mean(),
        )
        others, fool = (tiny.jit(at_head, static_argnums=1)(trained, term) for term in terms)
        weight = weight * others / (fool + 1e-4)
    tiny.close(metrics["adversarial_weight"], weight, 1e-5)
    of_decoder = tiny.jit(jax.grad(decoder_loss))(trained, weight)
    tiny.close_trees(
        nnx.to_pure_dict(gradients)["model"], nnx.to_pure_dict(of_decoder)["model"], 1e-4
    )
    of_critic = nnx.to_pure_dict(tiny.jit(jax.grad(critic_loss))(trained))["discriminator"]
    found = nnx.to_pure_dict(gradients)["discriminator"]
    means = [metrics["logit_real"], metrics["logit_made"]]
    averages = np.array(model.discriminator.averages[...])
    tiny.close(found.pop("averages"), averages - np.array(means), 1e-5)
    of_critic.pop("averages")
    tiny.close_trees(found, of_critic, 1e-4)


def test_optimizer_of_two():
    base = StepConfig(steps=10, learning_rate=1e-2, warmup=2, clip=0.5)
    whole = adversarial(base, discriminator_rate=3.0, average_decay=0.9).optimizer()
    rng = np.random.default_rng(0)
    numbers = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {
        "model": {"w": numbers(3, 2)},
        "discriminator": {"w": numbers(4), "averages": numbers(2)},
    }
    state = whole.init(params)
    alone = {"model": base, "discriminator": dataclasses.replace(base, learning_rate=3e-2)}
    parts = {name: {"w": params[name]["w"]} for name in alone}
    states = {name: c.optimizer().init(parts[name]) for name, c in alone.items()}
    averages = params["discriminator"]["averages"]
    for _ in range(3):
        gradients = jax.tree.map(lambda p: numbers(*p.shape), params)
        updates, state = whole.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for name, c in alone.items():
            own = {"w": gradients[name]["w"]}
            step, states[name] = c.optimizer().update(own, states[name], parts[name])
            parts[name] = optax.apply_updates(parts[name], step)
            tiny.close(params[name]["w"], parts[name]["w"], 1e-6)
        averages = averages - 0.1 * gradients["discriminator"]["averages"]
        tiny.close(params["discriminator"]["averages"], averages, 1e-6)


@pytest.mark.slow
def test_losses_are_their_formulas():
    model, own = training_model(), batch()
    fae = model.model.fae

    def of(loss):
        return tiny.jit(loss)(model, None, own, jnp.uint32(3), jnp.float32(0))[1]

    features = tiny.jit(lambda m, i: m.features_of(i, jnp.float32))(model.model, own["images"])
    posterior = tiny.jit(lambda f, x: f.encode(x))(fae, features)
    decode = tiny.jit(lambda f, z: (f.feature_decoder(z), f.decode(z)))
    normed = fae.features.normalise(features)
    found = of(FeatureLoss(1e-3, training=False, tokens=16))
    error = np.square(decode(fae, posterior.mean)[0] - normed).mean()
    tiny.close(found["loss_features"], error, 1e-5)
    tiny.close(found["kl"], posterior.kl().mean(), 1e-5)
    tiny.close(found["loss"], error + 1e-3 * posterior.kl().mean(), 1e-5)
    sampled = of(FeatureLoss(1e-3, training=True, tokens=16))
    assert abs(sampled["loss_features"] - error) > 1e-3
    ratio = np.sqrt(np.exp(posterior.logvar).mean((0, 1))) / np.std(posterior.mean, (0, 1))
    tiny.close(found["deviation_ratio"], ratio.mean(), 1e-4)
    # On pixels: held out there is no noise; L1 and L2.
    target = own["images"] / 255.0
    pixels = np.asarray(tiny.jit(lambda f, x: f.pixel_decoder(x))(fae, normed))
    for kind, expected in (("l2", np.square), ("l1", np.abs)):
        held_out = of(PixelLoss("features", 0.4, PixelWeights(kind), False, 16))
        tiny.close(held_out["loss_pixels"], expected(pixels - target).mean(), 1e-5)
        assert "loss_adversarial" not in held_out and "loss_perceptual" not in held_out
    clipped = np.square(np.clip(pixels, 0, 1) - target).mean((1, 2, 3))
    tiny.close(held_out["psnr"], (-10 * np.log10(clipped)).mean(), 1e-5)
    decoded = of(PixelLoss("decoded", 0.0, PixelWeights(), False, 16))
    other = np.square(decode(fae, posterior.mean)[1] - target).mean()
    tiny.close(decoded["loss_pixels"], other, 1e-5)
    noisy = of(PixelLoss("noisy", 0.3, PixelWeights(), False, 16))
    assert noisy["loss_pixels"] != decoded["loss_pixels"]
    # Parts of a batch add up to the whole.
    loss = PixelLoss("features", 0.4, PixelWeights(adversarial=0.0), True, 16)
    counts = loss.counts(own)
    parts = [
        tiny.jit(loss)(
            model, None, {k: v[i : i + 1] for k, v in own.items()}, jnp.uint32(3), 0.0, counts
        )[0]
        for i in range(2)
    ]
    tiny.close(sum(parts), of(loss)["loss"], 1e-5)


def run_config(*names):
    stage = {
        "batch": {"rows": 8},
        "optimizer": {"steps": 2, "learning_rate": 1e-3, "warmup": 1, "ema": 0.5},
    }
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "mesh": {"data": 4, "fsdp": 2, "tensor": 1, "sequence": 1},
            "log_every": 1,
            "log_seconds": 10.0,
            "stages": {name: stage for name in names},
            "checkpoint": {"every": 1, "keep_last": 1},
            "evaluation": {"every": 2, "batches": 1, "samples": 0},
        }
    )


def task_of(config_, workdir, vit):
    train, held_out = (open_folder(workdir.parent / "images", SIZE, 3) for _ in range(2))
    groups = {
        "fine_tune": {"weights": {"adversarial": 0.1}},
        "pixels": {"weights": {"adversarial": 0.0}},
        "noisy": {"weights": {"adversarial": 0.1, "adaptive": True}, "noise": 0.25},
    }
    return FAETask(
        config_,
        config(),
        stages_of(groups, 16),
        vit,
        train,
        held_out,
        workdir,
        lambda model, folder, name: None,
        discriminator=CRITIC,
    )


@pytest.mark.slow
def test_a_run_that_goes_on_with_another_stage(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3), np.uint8)
    write_folder(tmp_path / "images", images, [0] * 9, ["all"])
    vit = tiny.randomised(lambda: DinoV2(VIT, rngs=nnx.Rngs(0)))
    workdir = tmp_path / "run"
    workdir.mkdir()

    def run(*names, vit=vit):
        make_task = lambda config_, folder: task_of(config_, folder, vit)
        loop.run(run_config(*names), types.SimpleNamespace(make_task=make_task), workdir)
        return load_fae(workdir)

    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, arrays(a), arrays(b))
    arrays = lambda module: nnx.to_pure_dict(nnx.state(module))
    first = run("features")
    assert "perceptual" not in capsys.readouterr().err
    shutil.rmtree(workdir / "model")
    other = tiny.randomised(lambda: DinoV2(VIT, rngs=nnx.Rngs(0)), seed=1)
    with pytest.raises(UserError, match="was trained on other frozen weights"):
        run("features", "noisy", vit=other)
    capsys.readouterr()
    model = run("features", "noisy")
    said = capsys.readouterr().err
    assert said.count("no perceptual network is given: noisy train without") == 1
    assert read_fae(workdir / "model")[1]["tuned_to_noise"] == 0.25
    # The encoder and the statistics go on as the first stage's average left them; the rest moved.
    same(model.fae.encoder, first.fae.encoder)
    same(model.fae.features, first.fae.features)
    same(model.fae.latents, first.fae.latents)
    same(model.vit, vit)
    for part in ("feature_decoder", "pixel_decoder"):
        moved = zip(
            *(jax.tree.leaves(arrays(getattr(m.fae, part))) for m in (model, first)), strict=True
        )
        # At first, what starts at zero holds back the gradient of what lies before it.
        assert np.mean([(a != b).any() for a, b in moved]) > 0.5
    # The statistics are those of all images.
    features, posterior = tiny.jit(
        lambda m, i: (m.features_of(i, jnp.float32), m.encode(i, jnp.float32))
    )(model, images)
    tiny.close(model.fae.features.mean[...], np.mean(features, (0, 1)), 1e-5)
    tiny.close(model.fae.features.std[...], np.std(features, (0, 1)), 1e-5)
    mean, variance = np.asarray(posterior.mean), np.exp(np.asarray(posterior.logvar))
    tiny.close(model.fae.latents.mean[...], mean.mean((0, 1)), 1e-5)
    deviation = np.sqrt(mean.var((0, 1)) + variance.mean((0, 1)))
    tiny.close(model.fae.latents.std[...], deviation, 1e-5)
    measured = measure_reconstruction(model, images, rows=4, distance=lambda a, b: float(len(a)))
    assert measured["rfid"] == 9.0 and -1 < measured["ssim"] < 1 and measured["psnr"] > 0
    assert measured["numbers_per_pixel_value"] == 16 * 4 / (SIZE * SIZE * 3)
    ratio = np.sqrt(variance.mean((0, 1))) / mean.std((0, 1))
    tiny.close(measured["deviation_ratio"], ratio.mean(), 1e-4)


def test_the_report_has_rfid_where_there_are_weights(tmp_path, monkeypatch, capsys):
    settings, module = load_config(CONFIGS / "fae_dinov2.py", [("smoke", "True")])
    model = FeatureFAE(module._model(settings, 32), module._vit(settings).config, rngs=nnx.Rngs(0))
    for statistics in (model.fae.features, model.fae.latents):
        statistics.std[...] = jnp.ones_like(statistics.std[...])
    save_fae(tmp_path / "model", model)
    monkeypatch.setattr(module, "plot_losses", lambda *_: None)
    module.report(settings, tmp_path)
    assert "rfid" not in json.loads((tmp_path / "report.json").read_text())
    assert "No rFID: config.inception names no file" in capsys.readouterr().out
    settings.inception = str(tmp_path / "weights.pth")
    for start in (module.report, module.make_task):
        with pytest.raises(UserError, match="there is no file .*weights.pth"):
            start(settings, tmp_path)
    # The network itself is tested elsewhere: here the features are three means.
    features = lambda network, images: images.mean((1, 2)) * network
    monkeypatch.setattr(reconstruction, "load_inception", lambda path: 2.0)
    monkeypatch.setattr(reconstruction, "inception_features", features)
    module.report(settings, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["rfid"] > 1 and "rfid: " in capsys.readouterr().out
    same = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    distance = reconstruction.inception_distance("weights.pth")
    assert distance(same, same) == pytest.approx(0, abs=1e-6)
    assert distance(same, same // 2) > 1


def test_a_vit_of_another_width(tmp_path):
    write_folder(tmp_path / "images", batch(4)["images"], [0] * 4, ["all"])
    wide = dataclasses.replace(VIT, width=64)
    vit = nnx.eval_shape(lambda: DinoV2(wide, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="ViT has width 64, the FAE takes features of width 32"):
        task_of(run_config("features"), tmp_path / "run", vit)
    with pytest.raises(UserError, match="config.fae_stages.pixels"):
        stages_of({"pixels": {"nose": 0.4}}, 16)
    with pytest.raises(UserError, match="config.fae_stages.fine_tune.*lpips"):
        stages_of({"fine_tune": {"weights": {"lpips": 1.0}}}, 16)
    with pytest.raises(UserError, match="has 'pixel'; the stages are features, pixels"):
        stages_of({"pixel": {"noise": 0.4}}, 16)
