"""Directories of an FAE, and its latents in the flow's place for images."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.stats
import tiny
from flax import nnx
from test_fae import VIT, config

from starflow2_jax import fae_bundle
from starflow2_jax.bundle import Bundle, load_bundle, save_bundle
from starflow2_jax.convert import starflow2_folder
from starflow2_jax.data.sequences import ImageShape, Turn, encode_turns
from starflow2_jax.data.tokenizer import train_tokenizer
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.conversation_likelihood import ConversationLikelihood
from starflow2_jax.evaluation.dataset import Example
from starflow2_jax.evaluation.matching import CaptionTable
from starflow2_jax.model import Model, _image_seeds
from starflow2_jax.models.fae import FeatureFAE
from starflow2_jax.models.fae_codec import FAECodec
from starflow2_jax.models.latents import LatentCodec
from starflow2_jax.models.patches import noisy_latents
from starflow2_jax.models.pretzel import PretzelConfig
from starflow2_jax.training.checkpoint import checksum, load_tree

SIZE = 20  # 4 tokens of 5 pixels


def made(vit=VIT, seed=0):
    cfg = config()
    if vit is None:
        cfg = config(features=48, pixel_decoder=dataclasses.replace(cfg.pixel_decoder, patch=4))
    model = tiny.randomised(lambda: FeatureFAE(cfg, vit, rngs=nnx.Rngs(0)), seed)
    for statistics in (model.fae.features, model.fae.latents):
        statistics.std[...] = jnp.abs(statistics.std[...]) + 0.5
    return model


def pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def arrays(model):
    return nnx.to_pure_dict(nnx.state(model))


@pytest.mark.parametrize("vit", [VIT, None], ids=["vit", "patches"])
def test_round_trip(tmp_path, vit):
    model = made(vit)
    fae_bundle.save_fae(tmp_path, model, {"stage": "features"})
    again = fae_bundle.load_fae(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, arrays(again), arrays(model))
    assert again.config == model.config and again.vit_config == vit
    record = fae_bundle.read_fae(tmp_path)[1]
    assert record["stage"] == "features" and record["checksum"] == checksum(arrays(again))
    # Another model at the same place: its own checksum.
    fae_bundle.save_fae(tmp_path, made(vit, seed=1))
    assert fae_bundle.read_fae(tmp_path)[1]["checksum"] != record["checksum"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fae")
    fae_bundle.save_fae(folder, made())
    return folder


def damaged(stored, tmp_path, change):
    folder = tmp_path / "fae"
    shutil.copytree(stored, folder)
    change(folder)
    with pytest.raises(UserError) as error:
        fae_bundle.load_fae(folder)
    return str(error.value)


def test_missing_statistics(stored, tmp_path):
    message = damaged(stored, tmp_path, lambda f: (f / "statistics.json").unlink())
    assert "there is no statistics file" in message and "statistics.json" in message


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r["latents"]["std"].pop(), "latents.std has 3 channels, the FAE has 4"),
        (lambda r: r["latents"]["std"].__setitem__(0, 0.0), "latents.std has numbers"),
        (lambda r: r.pop("features"), "no statistics of an FAE"),
    ],
)
def test_damaged_statistics(stored, tmp_path, change, message):
    def damage(folder):
        path = folder / "statistics.json"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    assert message in damaged(stored, tmp_path, damage)


def test_vit_of_another_width(stored, tmp_path):
    def widen(folder):
        path = folder / "vit" / "model.json"
        record = json.loads(path.read_text())
        record["model"]["width"] = 64
        path.write_text(json.dumps(record))

    message = damaged(stored, tmp_path, widen)
    assert "the ViT has 64 features, the FAE takes 32" in message


def test_directories_of_other_models(stored, tmp_path):
    with pytest.raises(UserError, match="of family fae, expected dinov2"):
        fae_bundle.load_vit(stored)
    with pytest.raises(UserError, match="of family dinov2, expected fae"):
        fae_bundle.load_fae(stored / "vit")
    with pytest.raises(UserError, match="no model.json; expected the directory of an FAE"):
        fae_bundle.load_fae(tmp_path)


def test_codec():
    codec = FAECodec(made(), (SIZE, SIZE, 3), noise_std=0.3)
    model, images = codec.model, pictures(3)
    seeds = np.asarray([5, 6, 5], np.uint32)

    @functools.partial(tiny.jit, static_argnames="reading")
    def draw(codec, images, seeds, noise_std, reading=False):
        return codec.latents(images, 0, seeds, noise_std, reading)

    def latents(images, seeds, noise_std=0.0, **more):
        return np.asarray(draw(codec, images, seeds, noise_std, **more))

    x = latents(images, seeds)
    assert x.shape == (3, 16, 4) and x.dtype == np.float32
    posterior = tiny.jit(lambda m, i: m.encode(i, jnp.float32))(model, images)
    mean, logvar = np.asarray(posterior.mean), np.asarray(posterior.logvar)
    shift, scale = (np.asarray(v[...]) for v in (model.fae.latents.mean, model.fae.latents.std))
    normalised = (mean - shift) / scale
    read = latents(images, seeds, reading=True)
    noise = (read - normalised) / 0.3
    # Images of one seed have the same noise; others another; and it is a standard normal.
    tiny.close(noise[0], noise[2], 1e-4)
    assert np.abs(noise[0] - noise[1]).max() > 1
    assert 0.8 < noise.std() < 1.2
    sampled = (x - read) / (np.exp(logvar / 2) / scale)
    tiny.close(sampled[0], sampled[2], 1e-4)
    assert 0.8 < sampled.std() < 1.2
    assert np.abs(np.corrcoef(sampled.ravel(), noise.ravel())[0, 1]) < 0.3
    # More noise adds up by variance.
    more = latents(images, seeds, 0.4, reading=True)
    tiny.close(more - normalised, noise * 0.5, 1e-5)
    # Whatever batch it is in.
    tiny.close(latents(images[[1, 0, 0]], seeds[[1, 0, 0]])[0], x[1], 1e-5)
    # Cached moments give the same latents; in bfloat16, to its precision.
    moments = np.concatenate([mean, logvar], -1)
    tiny.close(latents(moments, seeds), x, 1e-5)
    rounded = latents(moments.astype(ml_dtypes.bfloat16), seeds)
    assert 0 < np.abs(rounded - x).max() < 0.05
    # With rows of images, as batches have them.
    rows = tiny.jit(lambda codec, m, s: noisy_latents(codec, m, 0, s))
    tiny.close(rows(codec, moments[:, None], seeds[:, None])[:, 0], x, 1e-5)
    pixels, levels, plain = tiny.jit(
        lambda codec, x: (
            codec.decode(x),
            codec.to_uint8(x),
            codec.model.fae.decode(codec.model.fae.latents.denormalise(x)),
        )
    )(codec, read)
    tiny.close(pixels, 2 * np.asarray(plain) - 1, 1e-5)
    expected = np.clip(np.round((np.asarray(pixels, np.float64) + 1) * 127.5), 0, 255)
    assert np.abs(expected - levels).max() <= 1 and levels.dtype == np.uint8
    # A standard normal's entropy is log2 sqrt(2 pi e) bits per dim.
    nats = -16 * 4 * 0.5 * np.log(2 * np.pi * np.e)
    tiny.close(codec.bits_per_dim(nats), 0.5 * np.log2(2 * np.pi * np.e), 1e-6)


def test_a_decoder_has_no_encoder():
    codec = FAECodec(made(), (SIZE, SIZE, 3), noise_std=0.3)
    decoder = codec.decoder()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 4)), jnp.float32)
    np.testing.assert_array_equal(decoder.decode(x), codec.decode(x))
    left = nnx.to_pure_dict(nnx.state(decoder.model))
    assert set(left) == {"fae"} and "encoder" not in left["fae"]
    whole = nnx.to_pure_dict(nnx.state(codec.model))
    assert "vit" in whole and "encoder" in whole["fae"]
    with pytest.raises(AttributeError):
        decoder.latents(jnp.zeros((1, SIZE, SIZE, 3), jnp.uint8), 0, jnp.zeros(1, jnp.uint32))


def test_codec_of_another_size():
    with pytest.raises(ValueError, match="the FAE decodes 20x20 pixels, not 24x24"):
        FAECodec(made(), (24, 24, 3))


TOKENIZER = train_tokenizer(["a small picture"], 280)
SHAPE = ImageShape(SIZE, SIZE, 3, side=4)


def bundle(image=SHAPE):
    vlm = tiny.vlm(vocab_size=TOKENIZER.vocab_size)
    cfg = PretzelConfig(vlm, tiny.flow(channels=4, side=4), TOKENIZER.special)
    codec = FAECodec(made(), (SIZE, SIZE, 3), noise_std=0.25)
    return Bundle(tiny.pretzel(cfg), codec, TOKENIZER, image, {"note": "kept"})


@pytest.mark.slow
def test_model_directory_with_an_fae(tmp_path):
    before = bundle(dataclasses.replace(SHAPE, moments=8))
    save_bundle(tmp_path, before)
    after = load_bundle(tmp_path)
    assert after.image == SHAPE and after.codec.noise_std == 0.25
    jax.tree.map(
        np.testing.assert_array_equal, arrays(after.codec.model), arrays(before.codec.model)
    )
    [image] = pictures(1)
    conversation = [Turn("user", ("a small picture",)), Turn("assistant", (image,))]
    first, second = (Model(b).log_prob([conversation], seeds=[3])[0] for b in (bundle(), after))
    np.testing.assert_array_equal(first.images, second.images)
    tiny.close(first.bits_per_dim, -first.images / (64 * np.log(2)), 1e-6)


def test_a_rate_is_the_divergence_of_the_posterior():
    rng = np.random.default_rng(0)
    shift, scale = rng.normal(size=3), rng.uniform(0.5, 2, 3)
    codec = LatentCodec(jnp.asarray(shift), jnp.asarray(scale), tokens=2, noise_std=0.3)
    mean, logvar = rng.normal(size=(1, 2, 3)), rng.normal(size=(1, 2, 3))
    moments = jnp.asarray(np.concatenate([mean, logvar], -1))
    centre, variance = (mean - shift) / scale, np.exp(logvar) / scale**2 + 0.09
    draws = 4000
    many = jax.jit(jax.vmap(lambda seed: codec.latents(moments, seed, np.zeros(1, np.uint32))))
    x = np.asarray(many(np.arange(draws)), np.float64)
    log_q = np.asarray(codec.log_posterior(jnp.asarray(x, jnp.float32), moments))
    normal = scipy.stats.norm(centre, np.sqrt(variance))
    np.testing.assert_allclose(log_q, normal.logpdf(x).sum((-2, -1)), rtol=1e-5)
    # Beside a standard normal p the divergence is known.
    log_p = scipy.stats.norm.logpdf(x).sum((-2, -1))
    known = 0.5 * (variance + centre**2 - 1 - np.log(variance)).sum()
    error = (log_q - log_p).std() / np.sqrt(draws)
    assert (log_q - log_p).mean() == pytest.approx(known, abs=5 * error) and error < 0.1
    # Why it has no importance-weighted form: that one is near 0 whatever p is.
    assert np.log(np.exp(log_p - log_q).mean()) > -0.2 * known


class Examples(list):
    """Records that lie in memory."""

    source = types.SimpleNamespace(name="record {}".format)


@pytest.mark.parametrize("captions", [(), ("a", "a small picture")])
def test_latents_have_a_rate_and_no_bound_on_pixels(captions):
    model = Model(bundle())
    codec, shown = model.bundle.codec, pictures(2)
    turns = lambda i: (Turn("user", ("a small picture",)), Turn("assistant", (shown[i],)))
    dataset = Examples(Example(i, turns(i)) for i in range(2))
    if captions:
        [row, _] = CaptionTable(model, dataset, captions, 2, 0, classes=True).score(range(2))
        conversations = [
            [Turn("user", (words,)), Turn("assistant", (shown[0],))] for words in captions
        ]
        found = model.score_draws(conversations, seeds=[0, 0], draws=2, rows=2)
        nats = np.stack([one.images[:, 0] for one in found], 1)  # [S, K]
        by_draw = nats - np.logaddexp.reduce(nats, 1, keepdims=True)
        other, own = np.logaddexp.reduce(by_draw) - np.log(2)
        assert row["log_posterior"] == pytest.approx(own, rel=1e-4)
        assert row["rank"] == 1 + int(other > own)
        # Not that of the draw of the largest density.
        lucky = np.logaddexp.reduce(nats)
        assert abs(lucky[1] - np.logaddexp.reduce(lucky) - own) > 0.5
        assert not [name for name in row if name.endswith("_bound")]
        return
    scorer = ConversationLikelihood(model, dataset, 2, 0)
    rows = scorer.score(range(2))
    for i, row in enumerate(rows):
        [image] = row["images"]
        seeds = _image_seeds(i, 1)
        moments = tiny.jit(lambda codec, image: codec.moments(image))(codec, shown[i : i + 1])
        for draw in range(2):
            x = codec.latents(moments, draw, seeds)
            log_q = float(codec.log_posterior(x, moments)[0])
            rate = log_q - image["nats_by_draw"][draw]
            assert image["rate_nats_by_draw"][draw] == pytest.approx(rate, rel=1e-4)
        assert image["rate_nats"] == pytest.approx(np.mean(image["rate_nats_by_draw"]))
        names = [name for name in (*row, *image) if name.endswith("_bound")]
        assert names == ["text_nats_bound"]
    summary = scorer.summarise(rows)
    drawn = summary["assistant_images"]
    assert drawn["rate_nats"] == np.mean([row["images"][0]["rate_nats"] for row in rows])
    assert not [name for name in (*summary, *drawn) if name.endswith("_bound")]


def test_a_model_with_an_fae_as_safetensors_and_back(tmp_path):
    model, tensors, back = (tmp_path / name for name in ("model", "tensors", "back"))
    save_bundle(model, bundle(dataclasses.replace(SHAPE, moments=8)))
    starflow2_folder.export_folder(model, tensors)
    starflow2_folder.import_folder(tensors, back)
    for name in ("weights", "fae/weights", "fae/vit/weights"):
        ours, theirs = (load_tree(folder / name)[0] for folder in (back, model))
        assert checksum(ours) == checksum(theirs)
    for name in ("model.json", "fae/model.json", "fae/statistics.json", "fae/vit/model.json"):
        assert (back / name).read_bytes() == (model / name).read_bytes()
    (model / "fae" / "statistics.json").unlink()
    with pytest.raises(UserError, match="has no fae/statistics.json; copy its whole directory"):
        starflow2_folder.export_folder(model, tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_a_newer_format_is_named_whatever_it_holds(tmp_path):
    (tmp_path / "model.json").write_text('{"format_version": 99, "model": {"of": "another age"}}')
    with pytest.raises(UserError, match="has format version 99, this package reads 2"):
        load_bundle(tmp_path)


def test_documents_of_cached_latents():
    shape = dataclasses.replace(SHAPE, moments=8)
    moments = np.random.default_rng(0).normal(size=(16, 8)).astype(ml_dtypes.bfloat16)
    turns = [Turn("user", ("a small picture",)), Turn("assistant", (moments,))]
    document = encode_turns(turns, TOKENIZER, shape)
    assert document.images.shape == (1, 16, 8) and document.images.dtype == moments.dtype
    np.testing.assert_array_equal(document.images[0], moments)
    pixels = [Turn("user", ("a small picture",)), Turn("assistant", (pictures(1)[0],))]
    with pytest.raises(UserError, match=r"expected \(16, 8\) \(tokens, moments\) bfloat16"):
        encode_turns(pixels, TOKENIZER, shape)
