"""From turns to rows: tokens, kinds, positions, losses, packing; and pixels to latents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from starflow2_jax.data import digits, pipeline
from starflow2_jax.data.sequences import (
    ImageShape,
    Turn,
    Words,
    encode_turns,
    unconditional_prompt,
)
from starflow2_jax.data.tokenizer import load_tokenizer
from starflow2_jax.errors import UserError
from starflow2_jax.models.patches import fit_patch_codec
from starflow2_jax.models.pretzel import Kind

SHAPE = ImageShape(4, 4, 1, 2)
IMAGE = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)


@pytest.fixture(scope="module")
def tokenizer():
    return digits.tokenizer()


@pytest.fixture(scope="module")
def story(tokenizer):
    turns = [
        Turn("user", (IMAGE, "which digit is this?")),
        Turn("assistant", ("three", IMAGE)),
    ]
    return encode_turns(turns, tokenizer, SHAPE)


def test_every_word_of_the_tasks_is_one_token(tokenizer):
    assert all(len(tokenizer.encode(word)) == 1 for word in digits.NUMBERS)
    assert tokenizer.decode(tokenizer.encode("a handwritten three")).strip() == (
        "a handwritten three"
    )


def test_a_saved_tokenizer_loads_again(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.special == tokenizer.special and again.turns == tokenizer.turns
    assert again.encode(digits.QUESTION) == tokenizer.encode(digits.QUESTION)
    with pytest.raises(UserError, match="tokenizer.json"):
        load_tokenizer(tmp_path / "nowhere")


def test_only_short_texts_stay_in_memory():
    tokenizer = digits.tokenizer()
    short = tokenizer.encode("a handwritten three")
    held = tokenizer._cached.cache_info().currsize
    assert held and tokenizer.encode("a handwritten three " * 100)[: len(short)] == short
    assert tokenizer._cached.cache_info().currsize == held


def test_kinds_and_positions_of_a_document(story, tokenizer):
    special = tokenizer.special
    starts = np.flatnonzero(story.tokens == special.vision_start)
    assert len(starts) == 2 and len(story.images) == 2
    for start in starts:
        places = slice(start + 1, start + 5)
        assert (story.kinds[places] == Kind.LATENT).all()
        assert (story.tokens[places] == special.image_pad).all()
        assert story.tokens[start + 5] == special.vision_end
        p = story.positions[start, 0] + 1
        grid = [[p, p, p], [p, p, p + 1], [p, p + 1, p], [p, p + 1, p + 1]]
        np.testing.assert_array_equal(story.positions[places], grid)
        np.testing.assert_array_equal(story.positions[start + 5], [p + 2] * 3)
    text = story.kinds == Kind.TEXT
    assert (story.positions[text] == story.positions[text][:, :1]).all()


def test_loss_falls_on_what_the_assistant_chooses(story, tokenizer):
    special = tokenizer.special
    trained = list(story.tokens[story.text_loss])
    assert trained == [*tokenizer.encode("three"), special.vision_start, special.end]


def test_the_unconditional_row_is_one_empty_user_turn(tokenizer):
    document = unconditional_prompt(tokenizer, SHAPE)
    turns = tokenizer.turns
    opening = turns.user_open + turns.user_close + turns.assistant_open
    expected = [*tokenizer.encode_template(opening), tokenizer.special.vision_start]
    assert list(document.tokens) == expected


def test_words_stand_where_the_image_would(tokenizer):
    ids = np.array([7, 8, 9, 10])
    document = encode_turns([Turn("assistant", (Words(ids, True),))], tokenizer, SHAPE)
    image = encode_turns([Turn("assistant", (IMAGE,))], tokenizer, SHAPE)
    np.testing.assert_array_equal(document.positions, image.positions)
    places = image.kinds == Kind.LATENT
    np.testing.assert_array_equal(document.tokens[places], ids)
    assert (document.kinds == Kind.TEXT).all() and document.text_loss[places].all()


@pytest.mark.parametrize(
    "part, message",
    [
        ("a <|vision_start|> here", r"<\|vision_start\|> at character 2"),
        (np.zeros((5, 4, 1), np.uint8), r"prompt: image of shape \(5, 4, 1\).*\(4, 4, 1\)"),
        (np.zeros((4, 4, 1), np.float32), "float32.*uint8"),
        ("a handwritten three " * 9, "positions, but the context holds 16"),
    ],
)
def test_bad_prompts(tokenizer, part, message):
    with pytest.raises(UserError, match=message):
        encode_turns([Turn("user", (part,))], tokenizer, SHAPE, context=16)


def test_packed_rows_hold_whole_documents(tokenizer):
    shape = ImageShape(28, 28, 1, 4)
    split = digits.load_splits()["tune"]
    maker = digits.Conversations(split, tokenizer, shape, len(split.labels), 1.0)
    mixture = dict(draw=1.0, read=1.0, next=1.0, story=1.0)
    batches = pipeline.packed_batches(
        maker.stream(mixture, False, 0), pipeline.BatchShape(4, 96, 4)
    )
    iterator = iter(batches)
    batch = next(iterator)
    rows = pipeline.to_rows(batch)
    for row in range(4):
        kinds, start = batch["kinds"][row], batch["image_start"][row]
        found = start[start >= 0]
        latent = np.zeros(96, bool)
        for s in found:
            assert batch["tokens"][row, s - 1] == tokenizer.special.vision_start
            assert batch["segments"][row, s - 1] == batch["segments"][row, s + 15]
            latent[s : s + 16] = True
        np.testing.assert_array_equal(latent, kinds == Kind.LATENT)
        borders = np.flatnonzero(np.diff(batch["segments"][row], prepend=0))
        first = [b for b in borders if batch["segments"][row, b]]
        assert (batch["positions"][row, first] == 0).all()
        assert not batch["text_loss"][row, first].any()
    assert rows.positions.shape == (3, 4, 96)
    state = iterator.get_state()
    after = next(iterator)
    again = iter(batches)
    again.set_state(state)
    for name, value in next(again).items():
        np.testing.assert_array_equal(value, after[name])


@pytest.mark.parametrize("patch, tokens, smooth", [(4, 16, 0), (4, 16, 2), (7, 49, 49)])
def test_patch_codec_is_an_exact_change_of_variables(x64, patch, tokens, smooth):
    images = digits.load_splits()["tune"].images
    fitted = fit_patch_codec(images, patch, 0, smooth)
    wide = {n: jnp.asarray(getattr(fitted, n), jnp.float64) for n in ("basis", "waves", "divisors")}
    codec = dataclasses.replace(fitted, **wide)
    uniform = np.random.default_rng(1).random(images.shape)
    x = codec.encode(jnp.asarray(images), uniform)
    assert x.shape == (len(images), tokens, 784 // tokens)
    np.testing.assert_array_equal(codec.to_uint8(x), images)
    # With levels for pixels, the constant of bits_per_dim is minus log2 |det| per dim.
    levels = jnp.zeros((1, 28, 28, 1))
    jacobian = jax.jacfwd(lambda levels: codec.encode(levels, 0.0).ravel())(levels)
    log_det = np.linalg.slogdet(np.asarray(jacobian).reshape(784, 784))[1]
    bits = codec.bits_per_dim(jnp.zeros(()))
    np.testing.assert_allclose(bits, -log_det / 784 / np.log(2), atol=1e-6)


def test_a_band_holds_one_coefficient_of_every_patch():
    images = digits.load_splits()["tune"].images[:2].copy()
    codec = fit_patch_codec(images, 4, 0)
    before = np.asarray(codec.encode(jnp.asarray(images[:1]), 0.5))
    images[0, 8:12, 20:24] = 255 - images[0, 8:12, 20:24]  # the patch in row 2, column 5 of 7
    after = np.asarray(codec.encode(jnp.asarray(images[:1]), 0.5))
    assert np.unique(np.argwhere(before != after)[:, 2]).tolist() == [2 * 7 + 5]
    spread = np.square(codec.divisors).mean(1)
    assert np.all(np.diff(spread) < 0)  # coarse to fine


def test_waves_of_a_smooth_map_are_few():
    """A level picture is one wave of the coarsest map; the fine maps stay where they are."""
    images = digits.load_splits()["tune"].images
    codec = fit_patch_codec(images, 4, 0, smooth=1)
    plain = fit_patch_codec(images, 4, 0)
    level = jnp.full((1, 28, 28, 1), 100, jnp.uint8)
    coarse = np.asarray(codec.encode(level, 0.5) * codec.divisors)[0, 0]
    map_of_it = np.asarray(plain.encode(level, 0.5) * plain.divisors)[0, 0].reshape(7, 7)
    np.testing.assert_allclose(coarse, scipy.fft.dctn(map_of_it, norm="ortho").ravel(), atol=1e-5)
    np.testing.assert_allclose(np.asarray(codec.waves)[1:], np.asarray(plain.waves)[1:])


def test_patches_that_do_not_fill_the_image():
    with pytest.raises(ValueError, match="do not fill"):
        fit_patch_codec(np.zeros((1, 28, 28, 1), np.uint8), 5, 0)


def test_inverted_images_are_negative_latents():
    images = digits.load_splits()["tune"].images[:4]
    codec = fit_patch_codec(images, 4, 0)
    x = codec.encode(jnp.asarray(images), 0.5)
    y = codec.encode(jnp.asarray(255 - images), 0.5)
    np.testing.assert_allclose(np.asarray(x), -np.asarray(y), atol=1e-4)


def test_a_document_longer_than_a_row_is_named(tokenizer):
    shape = ImageShape(28, 28, 1, 4)
    split = digits.load_splits()["tune"]
    maker = digits.Conversations(split, tokenizer, shape, len(split.labels), 1.0)
    stream = maker.stream({"story": 1.0}, False, 0)
    for batch, message in (
        (pipeline.BatchShape(2, 48, 4), "64 positions.*holds 48"),
        (pipeline.BatchShape(2, 64, 2), "3 images.*holds 2"),
    ):
        with pytest.raises(UserError, match=message):
            next(iter(pipeline.packed_batches(stream, batch)))
