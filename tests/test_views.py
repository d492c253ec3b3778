"""Pictures for the vision tower: sizes, patch order, windows, positions, packing, errors."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tiny
from flax import nnx

from starflow2_jax.data.sequences import ImageShape, Turn, Writer, encode_turns
from starflow2_jax.data.tokenizer import QWEN_TURNS, Tokenizer, train_tokenizer
from starflow2_jax.data.views import (
    Limits,
    View,
    ViewShape,
    load_limits,
    pack_views,
    places_of,
    read_picture,
    smart_resize,
    view,
    view_shape,
)
from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Kind
from starflow2_jax.models.qwen2_5_vision import grid_layout
from starflow2_jax.models.qwen2_5_vl import Qwen25VL, qwen2_5_vl_tiny
from starflow2_jax.nn.attention import AttentionSpec, attend

CONFIG = qwen2_5_vl_tiny(vocab_size=280)
TOWER = CONFIG.vision
SMALL = Limits(min_pixels=28 * 28)
IMAGE = ImageShape(2, 2, 1, 2)
TOKENIZER = train_tokenizer(["a few words"], 280)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def blank(rows, columns):
    """A view of rows x columns patches that shows nothing."""
    patches = np.zeros((rows * columns, TOWER.patch_numbers), np.float32)
    return View(patches, rows, columns, (rows // 2, columns // 2))


# Numbers of the published processor and model, for limits of 3136 and 12,845,056 pixels.


@pytest.mark.parametrize(
    ("size", "resized", "tokens"),
    [
        ((256, 256), (252, 252), 81),
        ((224, 224), (224, 224), 64),
        ((384, 384), (392, 392), 196),
        ((512, 512), (504, 504), 324),
        ((480, 640), (476, 644), 391),
        ((1080, 1920), (1092, 1932), 2691),
        ((20, 20), (56, 56), 4),
    ],
)
def test_golden_sizes(size, resized, tokens):
    assert smart_resize(*size, 28, Limits()) == resized
    one = view(picture(*size), TOWER)
    assert (one.rows * 14, one.columns * 14) == resized
    assert one.tokens[0] * one.tokens[1] == tokens
    assert one.patches.shape == (4 * tokens, 588)
    assert one.patches.dtype == np.float32


def test_large_pictures_shrink_to_the_limit():
    height, width = smart_resize(8000, 6000, 28, Limits())
    assert height % 28 == width % 28 == 0
    assert height * width <= 12_845_056 < (height + 28) * (width + 28)
    assert abs(height / width - 8000 / 6000) < 0.02


@pytest.mark.parametrize(
    ("grid", "order", "ends"),
    [
        ((8, 8), [range(16)], [64]),
        (
            (16, 16),
            [range(0, 4), range(8, 12), range(16, 20), range(24, 28), range(4, 8)],
            [64, 128, 192, 256],
        ),
        (
            (10, 12),
            [
                [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18, 19, 20, 21],
                [4, 5, 10, 11, 16, 17, 22, 23],
                [24, 25, 26, 27],
                [28, 29],
            ],
            [64, 96, 112, 120],
        ),
        ((18, 18), [], [64, 128, 144, 208, 272, 288, 304, 320, 324]),
    ],
)
def test_golden_windows(grid, order, ends):
    layout = grid_layout(TOWER, *grid)
    tokens = layout.tokens[layout.tokens >= 0]
    expected = [token for group in order for token in group]
    assert tokens[: len(expected)].tolist() == expected
    assert sorted(tokens) == list(range(grid[0] * grid[1] // 4))
    windows = layout.patches.reshape(-1, 64)
    assert np.cumsum((windows >= 0).sum(1)).tolist() == ends


def test_golden_patch_ids():
    layout = grid_layout(TOWER, 4, 4)
    exists = layout.patches >= 0
    assert layout.patches[exists].tolist() == list(range(16))
    ids = [tuple(pair) for pair in layout.coordinates[exists].tolist()]
    assert ids[:9] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 0)]


@pytest.mark.parametrize(
    ("parts", "time", "row", "column", "delta"),
    [
        (
            [3, (4, 6), 3],
            [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 7, 8, 9, 10],
            [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7, 8, 9, 10],
            [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10],
            -3,
        ),
        (
            [1, (4, 4), 1, (2, 4), 1],
            [0, 1, 2, 2, 2, 2, 4, 5, 6, 7, 7, 9, 10],
            [0, 1, 2, 2, 3, 3, 4, 5, 6, 7, 7, 9, 10],
            [0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 8, 9, 10],
            -2,
        ),
    ],
)
def test_golden_positions(parts, time, row, column, delta):
    writer = Writer(TOKENIZER, IMAGE)
    for part in parts:
        if isinstance(part, int):
            writer.text([9] * part, loss=False)
        else:
            writer.view(blank(*part))
    document = writer.document()
    np.testing.assert_array_equal(document.positions.T, [time, row, column])
    assert document.positions.max() + 1 - len(document.tokens) == delta
    assert not document.text_loss.any()


@pytest.mark.parity
@pytest.mark.parametrize("size", [(480, 640), (20, 20), (333, 41), (57, 900), (28, 28)], ids=str)
def test_patches_are_those_of_the_published_processor(size):
    transformers = pytest.importorskip("transformers")
    limits = {"shortest_edge": Limits().min_pixels, "longest_edge": Limits().max_pixels}
    processor = transformers.Qwen2VLImageProcessorPil(size=limits)
    theirs = processor(images=[PIL.Image.fromarray(picture(*size))], return_tensors="np")
    one = view(picture(*size), TOWER)
    assert theirs["image_grid_thw"].tolist() == [[1, one.rows, one.columns]]
    frames = theirs["pixel_values"].reshape(len(one.patches), 3, 2, -1)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])
    np.testing.assert_array_equal(one.patches, frames[:, :, 0].reshape(one.patches.shape))


def test_limits_of_a_folder(tmp_path):
    assert load_limits(tmp_path) == Limits()
    published = tmp_path / "preprocessor_config.json"
    published.write_text('{"min_pixels": 3136, "max_pixels": 200704, "patch_size": 14}')
    assert load_limits(tmp_path) == Limits(3136, 200704)
    published.write_text('{"size": {"shortest_edge": 784, "longest_edge": 7840}}')
    assert load_limits(tmp_path) == Limits(784, 7840)
    (tmp_path / "processor_config.json").write_text(
        '{"image_processor": {"size": {"shortest_edge": 1, "longest_edge": 2}}}'
    )
    assert load_limits(tmp_path) == Limits(1, 2)
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(UserError, match="processor_config.json"):
        load_limits(tmp_path)


# Windows of attention.


def test_windows_are_segments():
    attended = tiny.jit(attend)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 24, 2, 3, 4)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 24, 2, 4)), jnp.float32) for _ in range(2))
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, 24))), jnp.int32)
    cut = segments * 4 + jnp.arange(24) // 6
    for causal in (False, True):
        whole = AttentionSpec(causal=causal, segments=segments)
        inside = dataclasses.replace(whole, window=6)
        expected = attended(q, k, v, dataclasses.replace(whole, segments=cut))
        tiny.close(attended(q, k, v, inside), expected, 1e-6)
        for flag, same in ((True, attended(q, k, v, whole)), (False, expected)):
            chosen = attended(q, k, v, dataclasses.replace(inside, whole=jnp.asarray(flag)))
            tiny.close(chosen, same, 1e-6)
    for bad in ({"window": 7}, {"window": 6, "lengths": jnp.array([3, 3])}):
        with pytest.raises(ValueError, match="windows"):
            attend(q, k, v, AttentionSpec(**bad))


# Packing, and one program for a bucket of sizes.


def model():
    return tiny.randomised(lambda: Qwen25VL(CONFIG, rngs=nnx.Rngs(0)))


def kinds_of(rows):
    counts = [sum(v.tokens[0] * v.tokens[1] for v in views) for views in rows]
    kinds = np.zeros((len(rows), 40), np.int32)
    for row, count in enumerate(counts):
        kinds[row, :count] = Kind.VIT
    return kinds


def views_of(sizes, seed=0):
    return [view(picture(h, w, seed + i), TOWER, SMALL) for i, (h, w) in enumerate(sizes)]


ROWS = [views_of([(140, 168), (28, 28)]), [], views_of([(56, 84), (84, 252), (28, 56)], 5)]


def test_a_bucket_of_sizes_is_traced_once():
    traces = []

    @tiny.jit
    def see(model, views):
        traces.append(views.patches.shape)
        return model.see(views, jnp.float32)

    ours = model()
    seen = []
    for sizes in ([(140, 168)], [(112, 224)], [(84, 196)], [(224, 112)], [(252, 84)]):
        rows = [views_of(sizes), views_of([(28, 28)])]
        seen.append(np.asarray(see(ours, pack_views(rows, kinds_of(rows), TOWER))))
    four = (2, 1, 4 * 64, 588)
    assert [places_of(views_of([s])[0], TOWER) for s in ((140, 168), (252, 84))] == [256, 192]
    assert traces == [four, (2, 1, 2 * 64, 588), (2, 1, 3 * 64, 588)]
    assert np.abs(seen[0][0, :30]).min() > 0


@pytest.fixture(scope="module")
def seen():
    """What a tiny model sees in `ROWS`, in the packing of a shape."""
    ours = model()
    see = tiny.jit(lambda model, views: model.see(views, jnp.float32))

    def run(shape=None, rows=ROWS):
        return np.asarray(see(ours, pack_views(rows, kinds_of(rows), TOWER, shape)))

    return run


def test_packing_changes_nothing(seen):
    default = view_shape(ROWS, TOWER)
    assert default == ViewShape(2, 256)
    first = seen()
    assert np.abs(first).max() > 1
    np.testing.assert_array_equal(first[1], 0)  # a row that looks at nothing
    np.testing.assert_array_equal(first[kinds_of(ROWS) == 0], 0)
    for shape in (ViewShape(3, 256), ViewShape(1, 384)):
        tiny.close(seen(shape), first, 1e-5, shape)


def test_a_picture_sees_no_other(seen):
    before = seen()
    changed = [ROWS[0][:1] + views_of([(28, 28)], 77), [], ROWS[2]]
    after = seen(rows=changed)
    different = (before != after).any(-1)
    count = ROWS[0][0].tokens[0] * ROWS[0][0].tokens[1]
    assert different[0, count] and different.sum() == 1


def test_views_that_do_not_fit():
    with pytest.raises(ValueError, match="row 0 do not fit"):
        pack_views(ROWS, kinds_of(ROWS), TOWER, ViewShape(1, 256))
    with pytest.raises(ValueError, match="row 1 has 0 VIT positions"):
        pack_views([[], ROWS[0]], kinds_of([[], []]), TOWER)


# Rows with views.


def test_a_conversation_with_views():
    latents = np.zeros((2, 2, 1), np.uint8)
    both = (ROWS[0][0], latents)
    turns = [Turn("user", ("a", *both, "few")), Turn("assistant", ("words", latents))]
    document = encode_turns(turns, TOKENIZER, IMAGE)
    special = TOKENIZER.special
    starts = np.flatnonzero(document.tokens == special.vision_start)
    assert [document.kinds[s + 1] for s in starts] == [Kind.VIT, Kind.LATENT, Kind.LATENT]
    assert (document.tokens[document.kinds == Kind.VIT] == special.image_pad).all()
    assert (document.kinds == Kind.VIT).sum() == 30
    assert (document.tokens == special.vision_end).sum() == 3
    # What is shown is never trained; what is drawn is chosen by its start token.
    assert document.text_loss[starts].tolist() == [False, False, True]
    assert len(document.images) == 2
    assert document.views == (ROWS[0][0],)


def test_the_published_chat_template():
    plain = Tokenizer(TOKENIZER.backend, QWEN_TURNS)
    turns = [Turn("user", ("a", blank(2, 2), "few")), Turn("assistant", ("words",))]
    document = encode_turns(turns, plain, IMAGE)
    text = TOKENIZER.backend.decode(document.tokens.tolist(), skip_special_tokens=False)
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\na<|vision_start|><|image_pad|><|vision_end|>few<|im_end|>\n"
        "<|im_start|>assistant\nwords<|im_end|>"
    )
    assert text.replace(" ", "") == expected.replace(" ", "")
    answered = encode_turns([*turns, Turn("user", ("a",))], plain, IMAGE, reply=True)
    text = TOKENIZER.backend.decode(answered.tokens.tolist(), skip_special_tokens=False)
    more = "\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert text.replace(" ", "") == (expected + more).replace(" ", "")


# Errors name the file or record.


def test_unreadable_pictures(tmp_path):
    words = tmp_path / "words.png"
    words.write_text("not a picture")
    half = tmp_path / "half.png"
    PIL.Image.fromarray(picture(64, 64)).save(half)
    half.write_bytes(half.read_bytes()[:5000])
    for path, message in (
        (words, "words.png: cannot be read as an image"),
        (half, "half.png: cannot be read as an image"),
        (tmp_path / "none.png", "none.png: no such image"),
        (tmp_path, "cannot be read as an image"),
    ):
        with pytest.raises(UserError, match=message) as refusal:
            read_picture(path)
        assert "\n" not in str(refusal.value)


def test_pictures_are_read_upright_and_in_colour(tmp_path):
    path = pathlib.Path(tmp_path / "turned.png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    PIL.Image.fromarray(picture(30, 50)[..., 0]).save(path, exif=exif)
    read = read_picture(path)
    assert (read.height, read.width, read.mode) == (50, 30, "RGB")


def test_pictures_that_cannot_be_looked_at():
    with pytest.raises(UserError, match="strip.png: 2001 x 10 pixels: one side is more than 200"):
        view(picture(10, 2001), TOWER, where="strip.png")
    assert view(picture(10, 2000), TOWER).columns == 58
    for bad in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)):
        with pytest.raises(UserError, match=r"record 3: array of shape .* expected uint8"):
            view(bad, TOWER, where="record 3")


def test_a_view_that_overflows_the_context():
    turns = [Turn("user", ("a few", ROWS[0][0]))]
    needed = len(encode_turns(turns, TOKENIZER, IMAGE).tokens)
    assert needed > 32
    encode_turns(turns, TOKENIZER, IMAGE, context=needed)
    message = f"record 7: {needed} positions, but the context holds {needed - 1}"
    with pytest.raises(UserError, match=message):
        encode_turns(turns, TOKENIZER, IMAGE, context=needed - 1, where="record 7")


def test_an_assistant_shows_no_views():
    with pytest.raises(UserError, match="record 7: turn 1 is the assistant's"):
        encode_turns([Turn("assistant", (ROWS[0][0],))], TOKENIZER, IMAGE, where="record 7")


def test_grids_that_are_no_tokens():
    for grid in ((3, 4), (4, 5), (0, 2)):
        with pytest.raises(ValueError, match="patches are not tokens"):
            grid_layout(TOWER, *grid)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "3 heads"),
        ({"window": 100}, "windows of 100"),
        ({"full_layers": (4,)}, "full_layers"),
    ],
)
def test_towers_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TOWER, **changes)
