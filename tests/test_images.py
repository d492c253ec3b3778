"""Folders of images: classes, sizes, what cannot be read, and batches that repeat themselves."""

import json

import numpy as np
import pytest
from PIL import Image

from starflow2_jax.data import digits, images
from starflow2_jax.errors import UserError
from starflow2_jax.training.checkpoint import Checkpoints


def picture(rng, height, width, channels=3):
    values = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values if channels == 3 else values[..., 0]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("cat", 3), ("ape", 2)):
        (tmp_path / "data" / name / "more").mkdir(parents=True)
        for i in range(count):
            where = "more/" if i == 1 else ""
            Image.fromarray(picture(rng, 8, 8)).save(tmp_path / "data" / name / f"{where}{i}.png")
    (tmp_path / "data" / ".hidden").mkdir()
    (tmp_path / "data" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "data"


def test_classes_are_the_sub_folders(folder):
    found = images.open_folder(folder, 8, 3)
    assert found.classes == ("ape", "cat")
    assert found.files == (
        "ape/0.png",
        "ape/more/1.png",
        "cat/0.png",
        "cat/2.png",
        "cat/more/1.png",
    )
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    known = images.open_folder(folder, 8, 3, ["bee", "cat", "ape"])
    assert known.labels.tolist() == [2, 2, 1, 1, 1]
    flat = images.open_folder(folder / "ape" / "more", 8, 3, ["ape", "cat"])
    assert flat.labels.tolist() == [images.NO_CLASS] and flat.classes == ("ape", "cat")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "loose.png").write_bytes((f / "cat/0.png").read_bytes()), "loose.png"),
        (lambda f: (f / "dog").mkdir(), "dog holds no image files"),
        (lambda f: [p.unlink() for p in f.rglob("*.png")], "holds no image files"),
        (lambda f: f.rename(f.with_name("elsewhere")), "there is no folder"),
    ],
)
def test_folders_that_say_nothing_clear(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        images.open_folder(folder, 8, 3)


def test_a_class_that_the_model_does_not_know(folder):
    with pytest.raises(UserError, match="cat is of no class of the model; it has ape, bee"):
        images.open_folder(folder, 8, 3, ["ape", "bee"])


def test_other_sizes_are_cropped_in_the_middle_and_resized(tmp_path):
    rng = np.random.default_rng(1)
    exact = picture(rng, 8, 8)
    Image.fromarray(exact).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png", 8, 3), exact)
    wide = np.zeros((4, 10, 3), np.uint8)
    wide[:, 3:7] = 200
    Image.fromarray(wide).save(tmp_path / "b.png")
    found = images.read_image(tmp_path / "b.png", 4, 3)
    np.testing.assert_array_equal(found, np.full((4, 4, 3), 200))
    # Odd margins: half a pixel on each side.
    tall = np.repeat(np.arange(0, 250, 50, dtype=np.uint8)[:, None], 4, 1)
    Image.fromarray(tall).save(tmp_path / "c.png")
    rows = images.read_image(tmp_path / "c.png", 4, 1)[:, 0, 0]
    np.testing.assert_array_equal(rows, [25, 75, 125, 175])
    smooth = np.add.outer(np.arange(24), np.arange(48)).astype(np.uint8) * 3
    Image.fromarray(smooth).save(tmp_path / "d.png")
    ours = images.read_image(tmp_path / "d.png", 8, 1)[..., 0].astype(int)
    resized = Image.fromarray(smooth).resize((16, 8), Image.Resampling.BILINEAR)
    assert np.abs(ours - np.asarray(resized, int)[:, 4:12]).max() <= 1
    assert images.read_image(tmp_path / "d.png", 8, 3).shape == (8, 8, 3)


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    rng = np.random.default_rng(2)
    Image.fromarray(picture(rng, 64, 64)).save(tmp_path / "torn.png")
    content = (tmp_path / "torn.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(content[: len(content) // 2])
    Image.fromarray(np.full((4, 4), 60000, np.uint16)).save(tmp_path / "deep.png")
    for name, message in (
        ("text", "not a readable"),
        ("torn", "not a readable"),
        ("deep", "8 bits"),
    ):
        with pytest.raises(UserError, match=f"{name}.png.*{message}"):
            images.read_image(tmp_path / f"{name}.png", 4, 3)


def batches(folder, count, **options):
    stream = iter(folder.training_batches(4, **options))
    return [next(stream) for _ in range(count)]


def test_batches_repeat_themselves_and_continue(folder):
    found = images.open_folder(folder, 8, 3)
    ours, again = (batches(found, 5, seed=3, augment=images.random_flip) for _ in range(2))
    other = batches(found, 1, seed=4, augment=images.random_flip)
    assert ours[0]["images"].shape == (4, 8, 8, 3) and ours[0]["images"].dtype == np.uint8
    assert ours[0]["labels"].dtype == np.int32 and ours[0]["image_seeds"].dtype == np.uint32
    for a, b in zip(ours, again, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert any(
        (a["image_seeds"] != b["image_seeds"]).all() for a, b in zip(ours, other, strict=True)
    )
    # 20 draws of 5 images: every epoch has each of them once.
    labels = np.concatenate([batch["labels"] for batch in ours]).reshape(4, 5)
    assert (np.sort(labels, 1) == [0, 0, 1, 1, 1]).all()
    stream = iter(found.training_batches(4, seed=3, augment=images.random_flip))
    next(stream)
    state = stream.get_state()
    fresh = iter(found.training_batches(4, seed=3, augment=images.random_flip))
    fresh.set_state(state)
    np.testing.assert_array_equal(next(fresh)["image_seeds"], ours[1]["image_seeds"])


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (2, 2)])
def test_batches_continue_whoever_has_the_rows(tmp_path, folder, before, after):
    # The position as of two processes on two meshes: each has a half of the rows, or all of them.
    found = images.open_folder(folder, 8, 3)
    options = {"seed": 3, "augment": images.random_flip}
    whole = batches(found, 6, **options)

    def parts(count):
        cuts = [slice(4 // count * i, 4 // count * (i + 1)) for i in range(count)]
        # Of as many processes: where there are fewer parts, each part is read twice.
        return [iter(found.training_batches(4, part=p, **options)) for p in cuts * (2 // count)]

    saved, resumed = parts(before), parts(after)
    with Checkpoints(tmp_path / "run") as checkpoints:
        for stream in saved:
            for _ in range(4):
                next(stream)
        checkpoints.save(4, {"a": np.zeros(1)}, saved[0])
        checkpoints.wait()
        data = tmp_path / "run" / "4" / "data"
        (data / "process_0-of-1.json").unlink()
        for index, stream in enumerate(saved):
            (data / f"process_{index}-of-2.json").write_text(json.dumps(stream.get_state()))
        for stream in resumed:
            checkpoints.restore(4, {"a": np.zeros(1)}, stream)
    for expected in whole[4:]:
        seeds = [next(stream)["image_seeds"] for stream in resumed][:after]
        np.testing.assert_array_equal(np.concatenate(seeds), expected["image_seeds"])


def test_positions_of_other_batches(folder):
    stream = iter(images.open_folder(folder, 8, 3).training_batches(4, seed=0))
    for state, message in (
        ({"rows": 8, "batches": 2}, "batches of 8 rows, but now they have 4"),
        ({"next_index": 8}, "older version"),
    ):
        with pytest.raises(UserError, match=message):
            stream.set_state(state)


def test_training_leaves_out_what_it_cannot_read(folder, capfd):
    (folder / "cat" / "0.png").write_text("no image")
    found = images.open_folder(folder, 8, 3)
    labels = np.concatenate([batch["labels"] for batch in batches(found, 6, seed=0)])
    assert found.unreadable.files == {"cat/0.png"}
    assert capfd.readouterr().err.count("left out") == 1
    assert (labels == 1).mean() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(UserError, match="cat/0.png"):
        found.batch(range(len(found)))
    for path in folder.rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(UserError, match="none of the images"):
        batches(images.open_folder(folder, 8, 3), 1, seed=0)


def test_digits_become_folders_once(tmp_path):
    folders = digits.write_folders(tmp_path)
    split = digits.load_splits()["test"]
    found = images.open_folder(folders["test"], 28, 1)
    assert found.classes == tuple(str(d) for d in range(10)) and len(found) == 250
    np.testing.assert_array_equal(found.labels, split.labels)
    np.testing.assert_array_equal(found.batch([0, 249])["images"], split.images[[0, 249]])
    before = (folders["test"] / "0").stat().st_mtime_ns
    digits.write_folders(tmp_path)
    assert (folders["test"] / "0").stat().st_mtime_ns == before
