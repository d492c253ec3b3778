"""The emoji archive: composited, named, split by code point; conversations; bad input."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from starflow2_jax.cli.main import main
from starflow2_jax.data import emoji, emoji_archive
from starflow2_jax.data.decoding import decode
from starflow2_jax.data.emoji import Conversations, EmojiSet
from starflow2_jax.data.emoji_archive import group_of, read_manifest, split_of, write_emoji
from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.data.sources import FolderSource
from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Kind

TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")


def png(mode="RGBA", size=(64, 64), colour=None, **options):
    file = io.BytesIO()
    default = {"RGBA": (200, 0, 0, 128), "LA": (40, 255), "P": 3, "1": 1, "I;16": 900}
    image = Image.new(mode, size, default[mode] if colour is None else colour)
    image.save(file, "PNG", **options)
    return file.getvalue()


def entry(code, name, category="Smileys & Emotion", toned=False):
    one = {
        "name": name,
        "unified": code,
        "image": f"{code.lower()}.png",
        "category": category,
        "has_img_google": True,
    }
    if toned:
        one["skin_variations"] = {
            tone: {"unified": f"{code}-{tone}", "image": f"{code}-{tone}.png".lower()}
            for tone in TONES
        }
    return one


def write_archive(path, entries, change=None, name="emoji-datasource-google"):
    files = {one["image"]: png() for one in entries}
    for one in entries:
        for variant in one.get("skin_variations", {}).values():
            files[variant["image"]] = png(colour=(90, 60, 30, 255))
    files = {f"package/img/google/64/{file}": data for file, data in files.items()}
    files["package/emoji.json"] = json.dumps(entries).encode()
    files["package/package.json"] = json.dumps({"name": name}).encode()
    if change is not None:
        change(files)
    with tarfile.open(path, "w:gz") as archive:
        for file, data in files.items():
            info = tarfile.TarInfo(file)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


ENTRIES = [
    entry("1F600", "GRINNING FACE"),
    entry("1F44B", "WAVING HAND SIGN", "People & Body", toned=True),
    entry("1F1E9-1F1EA", "Germany Flag", "Flags"),
]


@pytest.fixture
def folder(tmp_path):
    write_emoji(write_archive(tmp_path / "e.tgz", ENTRIES), tmp_path / "emoji")
    return tmp_path / "emoji"


def test_pictures_lie_on_white_and_keep_their_names(folder):
    found = read_manifest(folder)
    assert len(found) == 8
    assert found[0].caption == "grinning face" and found[0].category == "Smileys & Emotion"
    assert found[2].caption == "waving hand sign, light skin tone"
    assert {one.base for one in found[1:7]} == {"1F44B"}
    pixels = emoji_archive.load_pictures(folder, found)
    assert pixels.shape == (8, 64, 64, 3) and pixels.dtype == np.uint8
    # Half red over white, by the rule of alpha compositing.
    expected = np.round(np.array([200, 0, 0]) * 128 / 255 + 255 * (1 - 128 / 255))
    assert np.abs(pixels[0].reshape(-1, 3) - expected).max() <= 1
    assert "Apache-2.0" in json.loads((folder / "emoji.json").read_text())["licence"]


def test_forms_of_one_emoji_share_a_split():
    assert group_of("1F44B-1F3FB") == group_of("1F44B")
    runner = group_of("1F3C3")
    assert group_of("1F3C3-1F3FF-200D-2640-FE0F") == runner
    assert group_of("1F3C3-200D-2642-FE0F-200D-27A1-FE0F") == runner
    assert group_of("1F468-200D-1F692") == group_of("1F469-1F3FD-200D-1F692") == group_of("1F692")
    assert group_of("1F1E9-1F1EA") != group_of("1F1EA-1F1E9")  # two countries
    assert group_of("1F469") == group_of("1F9D1-1F3FB") == "adult"
    splits = [split_of(f"{code:X}") for code in range(0x1F300, 0x1F300 + 1000)]
    shares = {name: splits.count(name) / 1000 for name in emoji_archive.SPLITS}
    assert abs(shares["tune"] - 0.05) < 0.03 and abs(shares["test"] - 0.10) < 0.03


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    archive = write_archive(tmp_path / "e.tgz", ENTRIES)
    assert main(["data", "emoji", "--archive", str(archive), "--out", str(tmp_path / "out")]) == 0
    assert "Apache-2.0" in capsys.readouterr().out
    assert len(list((tmp_path / "out").rglob("*.png"))) == 8


GRINNING = "package/img/google/64/1f600.png"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png("1"), "mode 1"),
        (png("I;16"), "mode I;16"),
        (png(size=(32, 64)), "32x64"),
        (png()[:-30], "not a whole PNG"),
        (b"GIF", "not a whole PNG"),
        (
            png(save_all=True, append_images=[Image.new("RGBA", (64, 64), (0, 9, 0, 255))]),
            "animated",
        ),
    ],
)
def test_bad_pictures_are_named(tmp_path, data, words):
    archive = write_archive(tmp_path / "e.tgz", ENTRIES, lambda f: f.update({GRINNING: data}))
    with pytest.raises(UserError, match=words) as caught:
        write_emoji(archive, tmp_path / "out")
    assert "1f600.png" in str(caught.value)
    assert not (tmp_path / "out" / "emoji.json").exists()


def test_other_archives_are_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no such file"):
        write_emoji(tmp_path / "none.tgz", out)
    (tmp_path / "text.tgz").write_text("text")
    with pytest.raises(UserError, match="is not the archive"):
        write_emoji(tmp_path / "text.tgz", out)
    other = write_archive(tmp_path / "a.tgz", ENTRIES, name="emoji-datasource-apple")
    with pytest.raises(UserError, match="is not the archive"):
        write_emoji(other, out)
    lacking = write_archive(tmp_path / "b.tgz", ENTRIES, lambda f: f.pop(GRINNING))
    with pytest.raises(UserError, match="missing"):
        write_emoji(lacking, out)
    whole = write_archive(tmp_path / "c.tgz", ENTRIES).read_bytes()
    (tmp_path / "d.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        write_emoji(tmp_path / "d.tgz", out)
    with pytest.raises(UserError, match="run it first"):
        read_manifest(out)


def test_conversations_draw_tell_and_edit(folder):
    found = read_manifest(folder)
    pixels = emoji_archive.load_pictures(folder, found)
    pixels = pixels + np.arange(8, dtype=np.uint8)[:, None, None, None]  # tell them apart
    made = Conversations(
        EmojiSet(found, pixels), emoji.tokenizer_of(found), ImageShape(64, 64, 3, 4)
    )
    rng = np.random.default_rng(0)
    ask, answer = made.turns("category", rng, in_words=False)
    shown = next(i for i in range(8) if (pixels[i] == ask.parts[0]).all())
    assert answer.parts == (found[shown].category.lower(),)
    for _ in range(10):
        ask, answer = made.turns("tone", rng, in_words=False)
        before, after = (
            next(i for i in range(8) if (pixels[i] == image).all())
            for image in (ask.parts[1], answer.parts[0])
        )
        assert ask.parts[0] == f"make the skin tone {found[after].tones[0]}"
        assert found[before].base == found[after].base and before != after
    forms = {name: change(pixels) for name, change in emoji.COLOURS.items()}
    others = {name: form for name, form in forms.items() if name != emoji.NATURAL}
    coloured = Conversations(EmojiSet(found, pixels, others), made.tokenizer, made.shape)
    shown = set()
    for _ in range(20):
        ask, answer = coloured.turns("restore", rng, in_words=False)
        assert ask.parts[0] == "restore the colours"
        [index] = [i for i in range(8) if (pixels[i] == answer.parts[0]).all()]
        shown |= {name for name in others if (others[name][index] == ask.parts[1]).all()}
    assert shown == {"grey", "swapped"}
    document = coloured.document("restore", rng, in_words=True)
    assert (document.tokens == made.tokenizer.special.image_pad).any()
    document = made.document("draw", rng, in_words=False)
    assert (document.kinds == Kind.LATENT).sum() == 16 and len(document.images) == 1
    words = made.document("draw", rng, in_words=True)
    assert not (words.kinds == Kind.LATENT).any()
    assert (words.tokens == made.tokenizer.special.image_pad).any()


def test_recoloured_pictures_are_a_source(folder):
    plain = FolderSource(folder / "train")
    source = emoji.RecolouredSource(plain)
    shape = ImageShape(64, 64, 3, 4)
    assert len(source) == 3 * len(plain)
    assert len({source.name(i) for i in range(len(source))}) == len(source)
    for i in range(len(source)):
        word, file = source[i].text("file").split("/")
        pixels = decode(plain[i % len(plain)].image("image"), shape)
        assert file == plain[i % len(plain)].text("file")
        np.testing.assert_array_equal(
            decode(source[i].image("image"), shape), emoji.COLOURS[word](pixels)
        )
    grey = emoji.COLOURS["grey"](np.array([[[255, 0, 0], [10, 20, 30]]], np.uint8))
    assert grey.tolist() == [[[76, 76, 76], [18, 18, 18]]]


def test_documents_depend_on_seed_and_index_alone(folder):
    found = read_manifest(folder)
    pixels = emoji_archive.load_pictures(folder, found)
    made = Conversations(
        EmojiSet(found, pixels), emoji.tokenizer_of(found), ImageShape(64, 64, 3, 4)
    )
    mixture = {"draw": 1.0, "category": 1.0, "tone": 1.0, "nothing": 0.5}
    first, again, other = (made.stream(mixture, False, seed).dataset for seed in (3, 3, 4))
    assert all(np.array_equal(first[i][key], again[i][key]) for i in (0, 7) for key in first[i])
    assert any(len(first[i]["tokens"]) != len(other[i]["tokens"]) for i in range(20))
