"""`starflow2 evaluate analysis`: its numbers are the model's own."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from starflow2_jax.bundle import save_bundle
from starflow2_jax.cli.main import main
from starflow2_jax.data import digits
from starflow2_jax.data.images import write_folder
from starflow2_jax.data.pipeline import single_batch, to_rows
from starflow2_jax.data.sequences import Turn, encode_turns
from starflow2_jax.evaluation import analysis
from starflow2_jax.evaluation.dataset import open_dataset
from starflow2_jax.model import Model, load
from starflow2_jax.models.patches import noisy_latents
from starflow2_jax.models.pretzel import Kind, Parts
from starflow2_jax.nn import attention, partition

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), dtype=np.uint8)
DIMS = 16


@pytest.fixture(scope="module")
def model():
    return Model(tiny.bundle(IMAGES, seed=3))


@pytest.fixture(scope="module")
def seen(model):
    """Two drawings, the second one's caption longer, and what a look at them shows."""
    captions = ["a three", "a handwritten three"]
    documents = [
        encode_turns([Turn("user", (c,)), Turn("assistant", (i,))], model.tokenizer, tiny.SHAPE)
        for c, i in zip(captions, IMAGES, strict=False)
    ]
    batch = single_batch(documents)
    return batch, analysis.look(model.pretzel, model.bundle.codec, batch)


def test_the_weights_are_those_that_attention_mixes_with():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 2, 3, 8), (2, 5, 2, 8)))
    segments = jnp.asarray([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]])
    spec = attention.AttentionSpec(segments=segments)
    each = jnp.broadcast_to(jnp.eye(5)[:, None], (2, 5, 2, 5))  # values that name their position
    mixed = attention.attend(q, k, each, spec)
    tiny.close(attention.weights(q, k, spec).transpose(0, 3, 1, 2, 4), mixed, 1e-6)


def test_the_parts_of_a_likelihood_add_up(model, seen):
    batch, found = seen
    x = noisy_latents(model.bundle.codec, batch["images"], 0, batch["image_seeds"])
    expected = model.pretzel.log_prob(to_rows(batch), x).image_log_prob[:, 0]
    tiny.close(found.log_dets.sum(-1) + found.prior, expected, 1e-5)


def test_skips_are_what_the_streams_hold(model, seen):
    batch, found = seen
    x = noisy_latents(model.bundle.codec, batch["images"], 0, batch["image_seeds"])
    rows = to_rows(batch)
    streams = [
        model.pretzel.log_prob(rows, x, parts).streams for parts in (Parts(), Parts(skips=False))
    ]
    # The skip is what the deep block's input has more.
    latent = np.asarray(rows.kinds) == Kind.LATENT
    there = np.asarray(streams[1].h)[latent]
    added = np.asarray(streams[0].h)[latent] - there
    norms = [np.linalg.norm(a, axis=-1) for a in (there, added)]
    visual = np.asarray(found.visual)[latent]
    tiny.close(visual[:, 0], norms[1] / (norms[0] + norms[1]), 1e-5)
    tiny.close(visual[:, 1], (there * added).sum(-1) / norms[0] / norms[1], 1e-5)
    assert 0.05 < visual[:, 0].mean() < 0.95


def test_positions_look_back_in_their_row(seen):
    batch, found = seen
    weights = np.asarray(found.attention)
    assert weights.shape[:2] == (2, 2)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert np.abs(np.triu(weights, 1)).max() == 0
    real = np.asarray(to_rows(batch).segments) > 0
    assert not real.all()
    padding = real[:, :, None] & ~real[:, None, :]
    assert np.abs(weights[:, padding]).max() == 0


def test_findings_do_not_depend_on_the_batch(model, tmp_path):
    write_folder(tmp_path / "data", IMAGES, np.arange(6) % 2, ("one", "two"))
    dataset = open_dataset([tmp_path / "data"], tiny.SHAPE)
    one, other = (analysis.analyse(model, dataset, count=5, rows=rows) for rows in (2, 5))
    tiny.close(np.concatenate(one.visual), np.concatenate(other.visual), 1e-5)
    tiny.close(np.stack(one.attention), np.stack(other.attention), 1e-5)
    np.testing.assert_allclose(np.stack(one.attention).sum(-1), 1, rtol=1e-5)
    words, weights = one.example
    assert "".join(words).count("one") == 1 and weights.shape == (2, 4, len(words))
    summary = one.summary()
    assert sum(s["mean"] for s in summary["log_det_share"].values()) == pytest.approx(1)


def test_a_model_on_several_devices_is_looked_at_where_it_lies(model, tmp_path, monkeypatch):
    save_bundle(tmp_path / "model", model.bundle)
    write_folder(tmp_path / "data", IMAGES, np.arange(6) % 2, ("one", "two"))
    dataset = open_dataset([tmp_path / "data"], tiny.SHAPE)
    spread = load(tmp_path / "model", devices=2)
    for name, act in (
        ("look", lambda: analysis.analyse(spread, dataset, count=2, rows=2)),
        ("generate", lambda: analysis.walk(spread, [digits.caption(1)], steps=2)),
    ):
        shards = []

        def seen(*args, shards=shards, **options):
            shards.append(partition.axis_extent("batch"))
            raise KeyboardInterrupt  # what is computed is another test's

        monkeypatch.setattr(analysis, name, seen)
        with pytest.raises(KeyboardInterrupt):
            act()
        assert shards == [2]


def test_a_walk_goes_from_one_noise_to_another(model):
    captions = [digits.caption(1), digits.caption(2)]
    walked = analysis.walk(model, captions, steps=3, guidance=1.0, seed=1)
    assert walked.shape == (2, 3, 4, 4, 1) and walked.dtype == np.uint8
    # Its ends alone are the same drawings; another caption and another noise give others.
    ends = analysis.walk(model, captions, steps=2, guidance=1.0, seed=1)
    assert np.abs(walked[:, ::2].astype(int) - ends).max() <= 1
    assert (walked[0] != walked[1]).any() and (walked[:, 0] != walked[:, -1]).any()


def test_the_command_writes_numbers_and_plots(model, tmp_path):
    save_bundle(tmp_path / "model", dataclasses.replace(model.bundle))
    write_folder(tmp_path / "data", IMAGES, np.arange(6) % 2, ("one", "two"))
    command = ["evaluate", "analysis", "--model", tmp_path / "model", "--data", tmp_path / "data"]
    sizes = ["--count", 4, "--rows", 2, "--walks", 2, "--steps", 3]
    assert main([str(word) for word in [*command, *sizes]]) == 0
    out = tmp_path / "model" / "analysis"
    summary = json.loads((out / "analysis.json").read_text())
    assert summary["drawings"] == 4 and 0 < summary["visual_contribution"]["mean"] < 1
    names = ("skips", "log_dets", "attention", "words", "walks")
    assert all((out / f"{name}.png").stat().st_size > 2000 for name in names)
