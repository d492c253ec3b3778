"""The Python interface: a saved model loads, writes, draws, streams and scores."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from starflow2_jax import Sampling, Turn, load
from starflow2_jax.bundle import save_bundle
from starflow2_jax.data import digits, pipeline
from starflow2_jax.data.sequences import encode_turns
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.likelihood import CaptionScores, score_captions
from starflow2_jax.model import Model
from starflow2_jax.models.patches import noisy_latents

SHAPE = tiny.SHAPE


def _leaves(model):
    return jax.tree.leaves(nnx.state(model.pretzel))


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    return Model(tiny.bundle(IMAGES, seed=0, trained_with=5))


def test_a_saved_model_is_the_same_model(model, tmp_path):
    save_bundle(tmp_path / "model", model.bundle)
    again = load(tmp_path)
    assert again.pretzel.config == model.pretzel.config
    assert again.bundle.metadata["trained_with"] == 5 and again.bundle.image == SHAPE
    prompts = [[Turn("user", ("a handwritten three", IMAGES[0]))]]
    sampling = Sampling(temperature=1.0, max_new_tokens=6, seed=1)
    ours, theirs = model.generate(prompts, sampling)[0], again.generate(prompts, sampling)[0]
    assert ours.text == theirs.text
    for a, b in zip(ours.images, theirs.images, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="no model.json"):
        load(tmp_path / "elsewhere")


@pytest.mark.distributed
def test_a_model_on_several_devices_is_the_same_model(model, tmp_path):
    save_bundle(tmp_path, model.bundle)
    spread = load(tmp_path, devices=4)
    held = collections.Counter()
    for leaf in _leaves(spread):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    whole = sum(leaf.nbytes for leaf in _leaves(spread))
    assert len(held) == 4 and max(held.values()) < 0.5 * whole
    turns = [Turn("user", (IMAGES[0], digits.QUESTION)), Turn("assistant", ("three", IMAGES[1]))]
    for ours, theirs in zip(spread.log_prob([turns] * 4), model.log_prob([turns] * 4), strict=True):
        np.testing.assert_allclose(ours.images, theirs.images, rtol=1e-5)
        np.testing.assert_allclose(ours.text, theirs.text, rtol=1e-4)
    prompts = [[Turn("user", (digits.caption(d),))] for d in range(4)]
    sampling = Sampling(guidance=1.0, max_images=1, max_new_tokens=4)
    ours, theirs = (m.generate(prompts, sampling, draw=True) for m in (spread, model))
    for a, b in zip(ours, theirs, strict=True):
        assert a.text == b.text
        for one, other in zip(a.images, b.images, strict=True):
            assert np.abs(one.astype(int) - other).max() <= 1
    half = load(tmp_path, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in _leaves(half)} == {"bfloat16"}
    with pytest.raises(UserError, match=r"on 99 devices: this process has"):
        load(tmp_path, devices=99)


def test_a_conversation_on_several_devices(model, tmp_path):
    save_bundle(tmp_path, model.bundle)
    said = []
    for one in (load(tmp_path, devices=4), model):
        chat = one.chat(Sampling(max_images=1, max_new_tokens=4), context=64)
        said.append([*chat.say(digits.caption(3), draw=True), *chat.say("and?", max_images=0)])
    assert [type(part) for part in said[0]] == [type(part) for part in said[1]]
    for a, b in zip(*said, strict=True):
        if isinstance(a, str):
            assert a == b
        else:
            assert np.abs(a.astype(int) - b).max() <= 1


def test_drawing_starts_at_once_and_has_the_image_shape(model):
    prompts = [[Turn("user", (digits.caption(d),))] for d in range(5)]
    replies = model.generate(prompts, Sampling(guidance=1.0, max_images=1), draw=True, rows=2)
    assert [len(reply.images) for reply in replies] == [1] * 5
    assert replies[0].images[0].shape == (4, 4, 1) and replies[0].images[0].dtype == np.uint8
    assert all(reply.reason == "images" for reply in replies)


def test_a_prompt_samples_alike_alone_and_in_company(model):
    prompts = [[Turn("user", (digits.caption(d),))] for d in range(3)]
    sampling = Sampling(temperature=1.0, max_new_tokens=5, max_images=0, seed=[7, 8, 9])
    together = model.generate(prompts, sampling)
    alone = model.generate(prompts[1:2], dataclasses.replace(sampling, seed=[8]))
    assert together[1].text == alone[0].text


def test_a_stream_is_the_reply_piece_by_piece(model):
    prompt = [Turn("user", ("count up from three",))]
    sampling = Sampling(temperature=1.0, max_new_tokens=8, max_images=2, seed=[3])
    whole = model.generate([prompt], sampling)[0]
    pieces = list(model.stream(prompt, sampling))
    written = "".join(piece for piece in pieces if isinstance(piece, str))
    assert written.replace(" ", "") == whole.text.replace(" ", "")
    images = [piece for piece in pieces if isinstance(piece, np.ndarray)]
    for a, b in zip(images, whole.images, strict=True):
        np.testing.assert_array_equal(a, b)


def test_log_prob_is_the_models(model):
    turns = [
        Turn("user", (IMAGES[0], "which digit is this?")),
        Turn("assistant", ("three", IMAGES[1])),
    ]
    short = [Turn("user", ("a handwritten two",)), Turn("assistant", ("two",))]
    scores = model.log_prob([turns, short, turns], seeds=[0, 1, 0], rows=2)
    assert [s.images.shape for s in scores] == [(2,), (0,), (2,)]
    np.testing.assert_array_equal(scores[0].images, scores[2].images)
    document = encode_turns(turns, model.tokenizer, SHAPE)
    batch = pipeline.single_batch([document])
    seeds = np.random.SeedSequence(0).generate_state(2)
    x = noisy_latents(model.bundle.codec, IMAGES[:2], 0, seeds)
    expected = model.pretzel.log_prob(pipeline.to_rows(batch), x[None])
    np.testing.assert_allclose(scores[0].images, expected.image_log_prob[0], rtol=1e-5)
    text = np.asarray(expected.text_log_prob[0])[document.text_loss]
    np.testing.assert_allclose(scores[0].text, text, rtol=1e-5)


def test_of_nothing_there_is_nothing(model):
    assert model.generate([]) == [] == model.log_prob([])


def test_bad_prompts_are_the_users_to_mend(model):
    with pytest.raises(UserError, match="end with a user's turn"):
        model.generate([[Turn("assistant", ("three",))]])
    with pytest.raises(UserError, match="special token"):
        model.generate([[Turn("user", ("<|image_pad|>",))]])
    with pytest.raises(UserError, match=r"prompt 0: .*'\\udc80' at character 2"):
        model.generate([[Turn("user", ("a \udc80",))]])
    with pytest.raises(UserError, match="shape"):
        model.generate([[Turn("user", (np.zeros((2, 2, 1), np.uint8),))]])
    with pytest.raises(UserError, match="context holds 4"):
        model.generate([[Turn("user", ("a handwritten three",))]], context=4)


def test_bad_prompts_are_named_by_their_own_number(model):
    good, bad = ([Turn("user", (text,))] for text in ("a handwritten three", "a <|im_end|>"))
    long = [Turn("user", ("a handwritten three " * 20,))]
    sampling = Sampling(max_new_tokens=1, max_images=0)
    for name, options in (("prompt 3", {}), ("here:4", {"names": ["", "", "", "here:4"]})):
        with pytest.raises(UserError, match=f"^{name}: the text holds"):
            model.generate([good] * 3 + [bad], sampling, rows=2, **options)
        with pytest.raises(UserError, match=f"^{name} has .* the context holds 32"):
            model.generate([good] * 3 + [long], sampling, rows=2, context=32, **options)
    with pytest.raises(UserError, match="^conversation 1: the text holds"):
        model.log_prob([good, bad])


def test_captions_are_scored_with_the_same_noise(model):
    scores = score_captions(model, IMAGES, ["a handwritten two", "a handwritten two"])
    assert scores.captioned.shape == (3, 2) and scores.empty.shape == (3,)
    np.testing.assert_array_equal(scores.captioned[:, 0], scores.captioned[:, 1])
    np.testing.assert_allclose(scores.mixture(), scores.captioned[:, 0], rtol=1e-12)
    table = CaptionScores(np.log(np.array([[1.0, 3.0]])), np.zeros(1))
    np.testing.assert_allclose(table.mixture(), np.log(2.0))
    assert table.posterior_argmax() == [1]
