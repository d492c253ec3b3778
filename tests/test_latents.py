"""Cached latents: what they hold, resuming, refusing, and bad images; through the command."""

import json
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from starflow2_jax import fae_cache
from starflow2_jax.cli.main import main
from starflow2_jax.data import latents
from starflow2_jax.data.decoding import decode, decode_still
from starflow2_jax.data.latents import CacheShape, LatentSource
from starflow2_jax.data.mixture import Entry, MixtureData
from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.data.sources import FolderSource
from starflow2_jax.data.sources.array_record import parse_example, serialised_example
from starflow2_jax.data.tasks import Draw
from starflow2_jax.data.tokenizer import train_tokenizer
from starflow2_jax.errors import UserError
from starflow2_jax.fae_bundle import load_fae, read_fae, save_fae
from starflow2_jax.models.fae import (
    EncoderConfig,
    FAEConfig,
    FeatureDecoderConfig,
    FeatureFAE,
    PixelDecoderConfig,
)
from starflow2_jax.models.fae_codec import FAECodec
from starflow2_jax.models.patches import noisy_latents

COUNT, SIDE, PATCH = 22, 2, 4
SIZE = SIDE * PATCH


def make_fae(seed):
    config = FAEConfig(
        features=PATCH * PATCH * 3,
        channels=3,
        side=SIDE,
        encoder=EncoderConfig(heads=2, head_dim=8),
        feature_decoder=FeatureDecoderConfig(1, 2, 16, final_norm="none"),
        pixel_decoder=PixelDecoderConfig(1, 16, 2, 16, patch=PATCH),
    )
    return FeatureFAE(config, None, rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def faes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fae")
    for seed in (0, 1):
        save_fae(folder / str(seed), make_fae(seed))
    return folder


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(COUNT):
        values = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{i:03d}.png")
    return folder


def cache(faes, pictures, out, **options):
    options = {"keep": ("file",), "shard": 8, "batch": 4, "threads": 2} | options
    return fae_cache.cache_latents(faes / "0", FolderSource(pictures), out, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_records_hold_the_posterior(faes, pictures, tmp_path):
    rates = cache(faes, pictures, tmp_path / "cache")
    assert rates.images == COUNT
    names = sorted(path.name for path in (tmp_path / "cache").glob("*.array_record"))
    assert names == [f"latents-0000{i}-of-00003.array_record" for i in range(3)]
    model = load_fae(faes / "0")
    source = LatentSource(tmp_path / "cache", read_fae(faes / "0")[1]["checksum"])
    assert len(source) == COUNT
    for index in (0, 9, COUNT - 1):  # the last is of a batch that was filled up
        assert source[index].text("file") == f"{index:03d}.png"
        image = np.asarray(Image.open(pictures / f"{index:03d}.png"))
        posterior = model.encode(jnp.asarray(image)[None], jnp.dtype("float32"))
        wanted = np.concatenate([posterior.mean[0], posterior.logvar[0]], -1)
        found = source.moments(index).astype(np.float32)
        assert found.shape == (SIDE**2, 6)
        np.testing.assert_allclose(found, wanted, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kills", [(5, 13), (8, 8), (1, 21)])
def test_interrupted_twice_gives_the_same_bytes(faes, pictures, tmp_path, monkeypatch, kills):
    cache(faes, pictures, tmp_path / "whole")
    decode_still = fae_cache.decode_still

    class Killed(BaseException):
        """As a signal would: no handler of errors sees it."""

    for last in kills:
        read = []

        def until(data, shape, read=read, last=last):
            read.append(0)
            if len(read) > last:
                raise Killed
            return decode_still(data, shape)

        monkeypatch.setattr(fae_cache, "decode_still", until)
        with pytest.raises(Killed):
            cache(faes, pictures, tmp_path / "cut", threads=1)
        with pytest.raises(UserError, match="not complete"):
            LatentSource(tmp_path / "cut", read_fae(faes / "0")[1]["checksum"])
    monkeypatch.setattr(fae_cache, "decode_still", decode_still)
    cache(faes, pictures, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert cache(faes, pictures, tmp_path / "cut").images == 0


@pytest.mark.slow
def test_a_killed_process_leaves_a_cache_that_goes_on(faes, pictures, tmp_path):
    cache(faes, pictures, tmp_path / "whole", shard=4)
    command = [sys.executable, "-m", "starflow2_jax", "data", "latents"]
    command += ["--fae", str(faes / "0"), "--data", str(pictures), "--keep", "file"]
    command += ["--shard", "4", "--batch", "4", "--out", str(tmp_path / "cut")]
    first = tmp_path / "cut" / "latents-00000-of-00006.array_record"
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2400):
            if first.exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert first.exists()
    assert main(command[3:]) == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_another_cache_is_refused(faes, pictures, tmp_path):
    out = tmp_path / "cache"
    cache(faes, pictures, out)
    before = contents(out)
    with pytest.raises(UserError, match="latents of another FAE"):
        fae_cache.cache_latents(faes / "1", FolderSource(pictures), out, shard=8, batch=4)
    with pytest.raises(UserError, match="of another FAE"):
        LatentSource(out, read_fae(faes / "1")[1]["checksum"])
    for differing, options in (
        (r"shard \(8 there, 16 now\)", {"shard": 16}),
        (r"dtype \(float32 there, bfloat16 now\)", {"dtype": "bfloat16"}),
        (r"image \(image there, file now\)", {"image": "file"}),
    ):
        with pytest.raises(UserError, match=f"differing: {differing};"):
            cache(faes, pictures, out, **options)
    (pictures / "022.png").write_bytes((pictures / "021.png").read_bytes())
    with pytest.raises(UserError, match="records"):
        cache(faes, pictures, out)
    assert contents(out) == before


def animation(path):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def sixteen_bits(path):
    Image.new("I;16", (SIZE, SIZE), 900).save(path)


def cut_off(path):
    data = path.read_bytes()
    path.write_bytes(data[:40])


def too_large(path):
    Image.new("1", (20_000, 20_000)).save(path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (animation, "animated"),
        (sixteen_bits, "mode I;16"),
        (cut_off, "cannot be read"),
        (too_large, "decompression bomb"),
    ],
)
def test_bad_images_are_named(faes, pictures, tmp_path, capsys, damage, words):
    damage(pictures / "010.png")
    command = ["data", "latents", "--fae", str(faes / "0"), "--data", str(pictures)]
    command += ["--shard", "8", "--batch", "4", "--out", str(tmp_path / "cache")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "010.png" in error and words in error and error.count("\n") == 1


def test_broken_records_are_left_out_and_named(faes, pictures, tmp_path, capsys, monkeypatch):
    for name in ("001.png", "010.png", "012.png"):
        cut_off(pictures / name)
    with pytest.raises(UserError, match=r"012.png cannot be read.* after 2 that were left out"):
        cache(faes, pictures, tmp_path / "cut", skip_broken=2)
    named = latents.read_skipped(tmp_path / "cut")
    assert list(named) == ["latents-00000-of-00003.array_record"]
    # It goes on, and ends with what comes out in one go.
    command = ["data", "latents", "--fae", str(faes / "0"), "--data", str(pictures), "--keep"]
    command += ["file", "--shard", "8", "--batch", "4", "--skip-broken", "3", "--out"]
    for out in ("cut", "whole"):
        assert main([*command, str(tmp_path / out)]) == 0
        said = capsys.readouterr().out
        assert f"{COUNT - 3} images" in said and "3 records were left out" in said
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    skipped = latents.read_skipped(tmp_path / "whole")
    assert [len(names) for names in skipped.values()] == [1, 2]
    assert "001.png cannot be read" in next(iter(skipped.values()))[0]
    source = LatentSource(tmp_path / "whole", read_fae(faes / "0")[1]["checksum"])
    left = [f"{i:03d}.png" for i in range(COUNT) if i not in (1, 10, 12)]
    assert [source[i].text("file") for i in range(len(source))] == left


def test_a_picture_of_a_phone(faes, pictures, tmp_path):
    # A JPEG with a second picture behind it, as phones write them: the first one counts.
    first, second = (Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue"))
    (pictures / "010.png").unlink()
    first.save(pictures / "010.jpg", "MPO", save_all=True, append_images=[second])
    assert Image.open(pictures / "010.jpg").n_frames == 2
    assert cache(faes, pictures, tmp_path / "cache").images == COUNT
    shape = ImageShape(SIZE, SIZE, 3, SIDE)
    pixels = decode_still((pictures / "010.jpg").read_bytes(), shape)
    assert np.abs(pixels - np.array([255.0, 0, 0])).max() < 4


def test_a_manifest_that_names_no_dtype(faes, pictures, tmp_path):
    cache(faes, pictures, tmp_path / "cache")
    path = tmp_path / "cache" / "manifest.json"
    record = json.loads(path.read_text())
    del record["cache"]["dtype"], record["cache"]["image"]
    path.write_text(json.dumps(record))
    assert len(LatentSource(tmp_path / "cache", read_fae(faes / "0")[1]["checksum"])) == COUNT
    assert cache(faes, pictures, tmp_path / "cache").images == 0


def write_llava(folder, pictures, images):
    """A JSONL file of these values of `image`, with blank lines; "": a line without one."""
    lines = []
    for image in images:
        shown = {"image": image} if image else {}
        lines.append(json.dumps({**shown, "conversations": [{"from": "human", "value": "?"}]}))
    path = folder / "llava.jsonl"
    path.write_text("\n\n" + "\n \n".join(lines) + "\n\n")
    for file in pictures.iterdir():
        file.rename(folder / file.name)
    return path


def test_lines_of_llava(faes, pictures, tmp_path, capsys):
    folder = tmp_path / "read-only"
    folder.mkdir()
    data = write_llava(folder, pictures, ["000.png", ["001.png"], "", ["002.png", "003.png"]])
    command = ["data", "latents", "--fae", str(faes / "0"), "--data", str(data)]
    command += ["--keep", "conversations", "--shard", "4", "--batch", "4"]
    command += ["--index", str(tmp_path / "index"), "--out", str(tmp_path / "cache")]
    for most, words in (
        ("0", "llava.jsonl line 7 cannot be read: no field 'image'"),
        ("1", "line 9 cannot be read: field 'image' holds no image but a list of 2"),
    ):
        assert main([*command, "--skip-broken", most]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert main([*command, "--skip-broken", "2"]) == 0
    assert "2 images, 2 of them now" in capsys.readouterr().out
    # Beside the data nothing is written.
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert (tmp_path / "index").is_dir()


@pytest.mark.parametrize("option", ["--threads", "--shard", "--batch"])
def test_numbers_are_positive(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["data", "latents", "--fae", "f", "--data", "d", "--out", "o", option, "0"])
    assert stopped.value.code == 2
    assert f"argument {option}: '0' is no positive number" in capsys.readouterr().err


def test_the_command_says_what_is_missing(faes, pictures, tmp_path, capsys):
    (faes / "bare").mkdir(exist_ok=True)
    for what, fae, data in (
        ("model.json", faes / "bare", pictures),
        ("no folder", faes / "0", tmp_path / "none"),
    ):
        command = ["data", "latents", "--fae", str(fae), "--data", str(data)]
        assert main([*command, "--out", str(tmp_path / "cache")]) == 2
        assert what in capsys.readouterr().err


def test_examples_come_back():
    fields = {"a": b"", "moments": bytes(range(256)) * 3, "ü": b"text"}
    assert parse_example(serialised_example(fields)) == {**fields, "a": b""}


def test_training_reads_a_cache_and_samples_it(faes, pictures, tmp_path):
    """The mixture takes cached latents as it takes files; each reading draws anew."""
    cache(faes, pictures, tmp_path / "cache")
    record = read_fae(faes / "0")[1]
    source = LatentSource(tmp_path / "cache", record["checksum"])
    shape = ImageShape(SIZE, SIZE, 3, SIDE, moments=6)
    codec = FAECodec(load_fae(faes / "0"), (SIZE, SIZE, 3), noise_std=0.0)
    data = MixtureData(
        tokenizer=train_tokenizer(["a picture 0123456789.png"], vocab_size=300),
        image=shape,
        codec=codec,
        entries={"cached": Entry(source, Draw(image="moments", caption="file"))},
        mixtures={"text_to_image": {"cached": 1.0}},
        text_drop=0.0,
    )
    document = next(iter(data.documents("text_to_image", False, 0).dataset.to_iter_dataset()))
    number = int(str(document["record"]).rsplit(" ", 1)[1]) + 8 * int(
        str(document["record"]).split("latents-")[1][:5]
    )
    moments = source.moments(number)
    assert np.array_equal(document["images"][0], moments)
    x = noisy_latents(codec, document["images"], 0, document["image_seeds"])
    again = noisy_latents(codec, document["images"], 1, document["image_seeds"])
    mean, logvar = np.split(moments.astype(np.float32), 2, -1)
    deviations = (np.stack([x[0], again[0]]) - mean) / np.exp(0.5 * logvar)
    assert np.abs(deviations).max() < 6 and np.abs(deviations[0] - deviations[1]).max() > 0.1
    with pytest.raises(ValueError, match="reshape|multiple"):
        decode(document["images"].tobytes()[:-2], shape)


def test_names_tell_caches_apart(pictures):
    one = latents.names_checksum(FolderSource(pictures))
    (pictures / "000.png").rename(pictures / "0.png")
    assert latents.names_checksum(FolderSource(pictures)) != one
    shape = CacheShape("f", 4, 6, 8, 17, one, shard=8, batch=4)
    assert shape.shards == 3 and shape.file(2) == "latents-00002-of-00003.array_record"
