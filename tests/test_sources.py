"""Every kind of source reads what was written, at random as in order, and says what is damaged."""

import io
import json
import pickle
import shutil
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image
from source_files import (
    MAKERS,
    SIDE,
    add,
    caption,
    colour,
    example,
    is_number,
    make_conversations,
    make_parquet,
    png,
    write_tar,
)

from starflow2_jax.data import decoding, views
from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.data.sources import (
    ArrayRecordSource,
    ConversationSource,
    ParquetSource,
    Record,
    RecordError,
    WebDatasetSource,
    array_record,
    index,
)
from starflow2_jax.data.tasks import Conversation, Draw, Edit, Read, Story
from starflow2_jax.errors import UserError

SHAPE = ImageShape(SIDE, SIDE, 3, 2)
COUNT = 25


def content(source, number):
    record = source[number]
    return record.name, record.text("txt"), record.image("png")


@pytest.mark.parametrize("kind", MAKERS)
def test_what_was_written_is_read(kind, tmp_path, monkeypatch):
    source = MAKERS[kind](tmp_path, COUNT)
    assert len(source) == COUNT
    in_order = [content(source, number) for number in range(COUNT)]
    for number, (name, text, image) in enumerate(in_order):
        assert (text, image) == (caption(number), png(number))
        assert name == source.name(number)
    names = [name for name, _, _ in in_order]
    assert len(set(names)) == COUNT and str(tmp_path) in names[0]
    # Another process has a copy; a later one finds the index.
    monkeypatch.setattr(np, "save", None)
    copies = [pickle.loads(pickle.dumps(source)), type(source)(source._files)]
    shuffled = np.random.default_rng(0).permutation(COUNT)
    for number in shuffled:
        assert all(content(copy, number) == in_order[number] for copy in copies)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_index_follows_the_files_and_may_lie_elsewhere(kind, tmp_path):
    (tmp_path / "data").mkdir()
    MAKERS[kind](tmp_path / "data", 6, index=tmp_path / "cache")
    assert not (tmp_path / "data" / index.FOLDER).exists()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").mkdir()
    source = MAKERS[kind](tmp_path / "data", 9, index=tmp_path / "cache")
    assert len(source) == 9 and source[8].text("txt") == caption(8)


@pytest.mark.parametrize("kind", MAKERS)
def test_an_order_is_each_record_once_an_epoch(kind, tmp_path):
    source = MAKERS[kind](tmp_path, COUNT)
    order = source.order(3, COUNT, 7)
    epochs = [[order[e * (COUNT - 3) + i] for i in range(COUNT - 3)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(3, COUNT)) and epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [source.order(3, COUNT, 7)[i] for i in range(5)] == epochs[0][:5]
    assert [source.order(3, COUNT, 8)[i] for i in range(9)] != epochs[0][:9]


def test_parquet_reads_few_row_groups_at_a_time(tmp_path, monkeypatch):
    source = make_parquet(tmp_path, 40, groups=2)
    import pyarrow.parquet

    read, groups = pyarrow.parquet.ParquetFile.read_row_group, []

    def counted(self, *args, **kwargs):
        groups.append(args[0])
        return read(self, *args, **kwargs)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", counted)
    order = source.order(0, 40, 0)
    for place in range(40):
        source[order[place]].text("txt")
    assert len(groups) == len(source._number) == 11


def test_missing_files_and_files_of_another_kind(tmp_path):
    with pytest.raises(UserError, match=r"no file .*\*\.tar"):
        WebDatasetSource(tmp_path / "*.tar")
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"[1, 2, 3]" * 100)
    with pytest.raises(UserError, match=r"wrong.*JSON array.*JSONL"):
        ConversationSource(wrong)
    with pytest.raises(UserError, match=r"wrong is not a Parquet file"):
        ParquetSource(wrong)
    with pytest.raises(UserError, match=r"wrong is not an ArrayRecord file"):
        ArrayRecordSource(wrong)
    make_parquet(tmp_path, 6)
    with pytest.raises(UserError, match="no column 'caption'; it has png, txt"):
        ParquetSource(tmp_path / "*.parquet", columns=["caption"])


@pytest.mark.parametrize("cut", [4, 8, 40, 200])
def test_a_damaged_parquet_footer(tmp_path, cut):
    make_parquet(tmp_path, 6)
    path = sorted(tmp_path.glob("*.parquet"))[0]
    data = bytearray(path.read_bytes())
    # Behind the footer stand its length and a magic number.
    data[-cut] ^= 0xFF
    data[-cut + 1] ^= 0xFF
    path.write_bytes(data)
    shutil.rmtree(tmp_path / index.FOLDER, ignore_errors=True)
    try:
        source = ParquetSource(tmp_path / "*.parquet")
    except UserError as error:
        assert "is not a Parquet file, or damaged" in str(error) and "\n" not in str(error)
    else:
        assert cut > 8 and len(source) == 6  # what was hit is a text that nobody reads


def readable(source):
    """Which records can be read in full, and why the others cannot."""
    good, bad = [], {}
    for number in range(len(source)):
        try:
            content(source, number)
            good.append(json.loads(source[number].value("json"))["key"])
        except RecordError as error:
            bad[source.name(number)] = str(error)
    return good, bad


@pytest.mark.parametrize("cut", ["in a member", "at a header", "before the end"])
def test_a_truncated_tar_gives_what_is_whole(tmp_path, cut):
    path = tmp_path / "0.tar"
    write_tar(path, range(6))
    whole = WebDatasetSource(path, index=tmp_path / "i")
    offset, size = whole._members[4, whole._names.index("png")]
    header = offset - 512
    end = {"in a member": offset + size // 2, "at a header": header + 100, "before the end": header}
    with path.open("r+b") as file:
        file.truncate(int(end[cut]))
    good, bad = readable(WebDatasetSource(path, index=tmp_path / "i"))
    assert good == [0, 1, 2, 3]
    assert any("cut off here, the rest is lost" in why for why in bad.values())
    assert all(str(path) in name for name in bad)
    if cut == "in a member":
        with pytest.raises(RecordError, match=f"'png' is cut off: {size // 2} of {size} bytes"):
            WebDatasetSource(path, index=tmp_path / "i")[4].image("png")


def test_a_broken_header_ends_the_shard_only(tmp_path):
    write_tar(tmp_path / "0.tar", range(6))
    write_tar(tmp_path / "1.tar", range(6, 9))
    whole = WebDatasetSource(tmp_path / "*.tar")
    header = int(whole._members[3, whole._names.index("png")][0]) - 512
    with (tmp_path / "0.tar").open("r+b") as file:
        file.seek(header)
        file.write(b"\xff" * 512)
    good, bad = readable(WebDatasetSource(tmp_path / "*.tar"))
    assert good == [0, 1, 2, 6, 7, 8]
    assert list(bad) == [f"{tmp_path / '0.tar'}:(damage)"]


def test_a_json_line_that_is_none(tmp_path):
    source = make_conversations(tmp_path, 9)
    lines = (tmp_path / "b.jsonl").read_text().split("\n")
    lines[1] = lines[1][:-5]
    lines[2] = "[]"
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n")
    source = ConversationSource(tmp_path / "*.jsonl")
    assert len(source) == 9
    for number, message in ((4, "not JSON"), (5, "not a JSON object but a list")):
        with pytest.raises(RecordError, match=message):
            source[number]
        assert source.name(number) == f"{tmp_path / 'b.jsonl'} line {number - 2}"
    assert source[6].text("txt") == caption(6)
    # Blank lines are no records, but count as lines.
    (tmp_path / "b.jsonl").write_text("\n" + "\n \f \r\n\n".join(lines) + "\n\n")
    source = ConversationSource(tmp_path / "*.jsonl")
    assert len(source) == 9 and source[6].text("txt") == caption(6)
    assert source.name(4) == f"{tmp_path / 'b.jsonl'} line 5"
    with pytest.raises(RecordError, match="not JSON"):
        source[4]
    (tmp_path / "images" / "6.png").unlink()
    with pytest.raises(RecordError, match=r"image .*6\.png: No such file"):
        source[6].image("image")


def test_examples_of_tensorflow():
    fields = {"b": b"\x00\xff", "f": [0.5, -2.0], "i": [-3, 2**40], "one": 7, "many": [b"a", b"b"]}
    assert array_record.parse_example(example(fields)) == fields
    for broken in (b"no protocol buffer", example(fields)[:-1]):
        with pytest.raises(RecordError, match=r"tf\.train\.Example"):
            array_record.parse_example(broken)


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def test_images_are_covered_and_cropped_in_the_middle():
    # Thirds of red, green and blue from left to right: a square in the middle is green.
    pixels = np.zeros((30, 90, 3), np.uint8)
    for third in range(3):
        pixels[:, 30 * third : 30 * third + 30, third] = 255
    for turned in (pixels, pixels.transpose(1, 0, 2)):
        out = decoding.decode(encoded(Image.fromarray(turned)), SHAPE)
        assert out.shape == (SIDE, SIDE, 3) and out.dtype == np.uint8
        assert (out[4:-4, 4:-4] == (0, 255, 0)).all()
    # Half of the width of a wide target: all of the height is cropped to a third.
    wide = decoding.decode(encoded(Image.fromarray(pixels)), ImageShape(8, 24, 3, 2))
    assert (wide[:, 2] == (255, 0, 0)).all() and (wide[:, -3] == (0, 0, 255)).all()


def test_aspect_is_kept():
    y, x = np.mgrid[:120, :200]
    disc = ((y - 60) ** 2 + (x - 100) ** 2 < 50**2).astype(np.uint8) * 255
    out = decoding.decode(encoded(Image.fromarray(disc)), ImageShape(48, 48, 1, 2))[..., 0] > 127
    height, width = (np.ptp(np.flatnonzero(out.any(axis))) + 1 for axis in (1, 0))
    assert height == width == 40


def test_orientation_transparency_and_large_jpegs():
    upright = np.zeros((20, 20, 3), np.uint8)
    upright[:10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying = Image.fromarray(np.rot90(upright))
    out = decoding.decode(encoded(lying, exif=exif), ImageShape(20, 20, 3, 2))
    np.testing.assert_array_equal(out, upright)
    with Image.open(io.BytesIO(encoded(lying, exif=exif))) as opened:
        once = views.upright(opened)
        assert views.upright(once) is once
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert (decoding.decode(encoded(clear), SHAPE) == 255).all()
    grey = decoding.decode(encoded(Image.new("RGB", (9, 9), (90, 90, 90))), ImageShape(8, 8, 1, 2))
    assert grey.shape == (8, 8, 1) and (grey == 90).all()
    y, x = np.mgrid[:1000, :1500]
    smooth = np.stack([x * 255 // 1499, y * 255 // 999, x * 0 + 128], -1).astype(np.uint8)
    large = Image.fromarray(smooth)
    jpeg = decoding.decode(encoded(large, format="JPEG", quality=95), SHAPE)
    exact = decoding.decode(encoded(large), SHAPE)
    assert np.abs(jpeg.astype(int) - exact.astype(int)).max() <= 4


def test_orientation_beside_a_damaged_tag():
    lying = np.zeros((20, 20, 3), np.uint8)
    lying[:10] = 255
    # The width is a text; then, to be turned by 90 degrees clockwise.
    entries = struct.pack(">HHLL", 0x100, 2, 21, 38) + struct.pack(">HHLHH", 0x112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entries + b"\0\0\0\0" + b"a" * 21
    shape = ImageShape(20, 20, 3, 2)
    out = decoding.decode(encoded(Image.fromarray(lying), exif=exif), shape)
    np.testing.assert_array_equal(out, np.rot90(lying, -1))
    damaged = encoded(Image.fromarray(lying), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(decoding.decode(damaged, shape), lying)


def test_broken_images_raise():
    good = encoded(Image.new("RGB", (64, 64), colour(3)), format="JPEG")
    for broken in (good[: len(good) // 2], b"", b"<html>not found</html>", png(1)[:50]):
        with pytest.raises((OSError, ValueError, SyntaxError)):
            decoding.decode(broken, SHAPE)


def decode(data):
    return decoding.decode(data, SHAPE)


RNG = np.random.default_rng(0)


def check(turns, *expected):
    """Compares turns with (role, parts); an integer stands for the image of that number."""
    assert [turn.role for turn in turns] == [role for role, _ in expected]
    for turn, (_, parts) in zip(turns, expected, strict=True):
        assert len(turn.parts) == len(parts)
        for part, wanted in zip(turn.parts, parts, strict=True):
            assert is_number(part, wanted) if isinstance(wanted, int) else part == wanted


def test_the_tasks_of_a_tar(tmp_path):
    def change(number, fields):
        fields["source.png"], fields["target.png"] = png(number), png(number + 1)
        fields["texts.json"] = json.dumps([None, " one ", "two", None]).encode()
        fields["images.json"] = json.dumps(["source.png", None, "png", "target.png"]).encode()

    write_tar(tmp_path / "0.tar", [5], change)
    record = WebDatasetSource(tmp_path / "0.tar")[0]
    check(Draw("png").turns(record, decode, RNG), ("user", [caption(5)]), ("assistant", [5]))
    check(
        Read("png", questions=("what?",)).turns(record, decode, RNG),
        ("user", [5, "what?"]),
        ("assistant", [caption(5)]),
    )
    check(
        Edit("source.png", "txt", "target.png").turns(record, decode, RNG),
        ("user", [5, caption(5)]),
        ("assistant", [6]),
    )
    check(
        Story("texts.json", "images.json").turns(record, decode, RNG),
        ("user", [5, "one"]),
        ("assistant", ["two", 5, 6]),
    )


def test_llava_conversations(tmp_path):
    record = make_conversations(tmp_path, 6)[4]
    turns = Conversation().turns(record, decode, RNG)
    check(turns, ("user", [4, "what is this?"]), ("assistant", [caption(4)]))
    edit = {
        "image": ["images/1.png", "images/2.png"],
        "conversations": [
            {"from": "human", "value": "make this <image> the next"},
            {"from": "gpt", "value": "here: <image>"},
        ],
    }
    record = Record("r", edit, lambda path: png(int(path[7])))
    turns = Conversation().turns(record, decode, RNG)
    check(turns, ("user", ["make this", 1, "the next"]), ("assistant", ["here:", 2]))


@pytest.mark.parametrize(
    "task, fields, message",
    [
        (Draw("png"), {"png": png(1), "txt": b"  "}, "'txt' is empty"),
        (Draw("png"), {"png": png(1), "txt": b"\xff\xfe"}, "'txt' is not UTF-8"),
        (Draw("png"), {"txt": b"a"}, "no field 'png'; it has txt"),
        (Draw("png"), {"txt": "a", "png": b""}, "'png' holds no image but nothing"),
        (Draw("png"), {"txt": 3, "png": png(1)}, "'txt' holds no text but a int"),
        (Story(), {"texts": ["a"], "images": []}, "'images' holds no list, or an empty one"),
        (Story(), {"texts": ["a"], "images": [None, None]}, "1 and 2 places"),
        (Story(), {"texts": [None], "images": [png(1)]}, "a story needs a text"),
        (Story(), {"texts": ["a"], "images": [None]}, "something that follows"),
        (Conversation(), {"conversations": "{"}, "'conversations' holds no list"),
        (Conversation(), {"conversations": [{"from": "human"}]}, "turn 0 is no object"),
        (
            Conversation(),
            {"conversations": [{"from": "cat", "value": "a"}]},
            "turn 0 is from 'cat'",
        ),
        (
            Conversation(),
            {"conversations": [{"from": "human", "value": "<image>"}]},
            r"more places <image> than images \(0\)",
        ),
        (
            Conversation(),
            {"image": png(1), "conversations": [{"from": "gpt", "value": "a"}]},
            "1 images, but 0 places",
        ),
        (Conversation(), {"conversations": [{"from": "human", "value": "a"}]}, "nobody answers"),
    ],
)
def test_records_that_do_not_fit_a_task(task, fields, message):
    with pytest.raises(RecordError, match=message):
        task.turns(Record("r", fields), decode, RNG)


def test_names_of_members(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("./x/a.b.JPG", "./x/a.txt", "./y.z/a.txt", f"./{'long' * 60}.txt"):
            add(tar, name, b"content")
    source = WebDatasetSource(tmp_path / "0.tar")
    keys = [source.name(i).split(":")[-1] for i in range(3)]
    assert keys == ["./x/a", "./y.z/a", f"./{'long' * 60}"]
    assert source[0].value("b.jpg") == source[2].value("txt") == b"content"
