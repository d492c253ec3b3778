"""Conversations over the engine, in Python, as a job and in the terminal."""

import dataclasses
import hashlib
import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tiny

from starflow2_jax import Sampling, Turn, sample
from starflow2_jax.bundle import save_bundle
from starflow2_jax.cli.main import main
from starflow2_jax.conversation import as_text, shows_images
from starflow2_jax.data import digits
from starflow2_jax.errors import UserError
from starflow2_jax.model import Model
from starflow2_jax.parallel.mesh import serving_mesh
from starflow2_jax.sampling import display
from starflow2_jax.sampling.engine import EngineConfig
from starflow2_jax.sampling.prompts import padded
from starflow2_jax.service import Chat, Service

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    return Model(tiny.bundle(IMAGES, seed=0, trained_with=5))


@pytest.fixture(scope="module")
def service(model):
    sizes = EngineConfig(rows=4, twins=2, context=128, images=2, chunk=16)
    return Service(model, sizes)


def finished(service, numbers):
    """The parts and reason of each request."""
    parts, reasons = {n: [] for n in numbers}, {}
    while service.busy:
        for answer in service.poll():
            if answer.part is None:
                reasons[answer.number] = answer.reason
            else:
                parts[answer.number].append(answer.part)
    return [(parts[n], reasons[n]) for n in numbers]


def test_replies_are_those_of_the_batch(model, service):
    turns = [[Turn("user", (digits.caption(d), IMAGES[d]))] for d in range(3)]
    options = {"temperature": 1.0, "max_new_tokens": 8, "max_images": 2, "guidance": 1.0}
    found = finished(service, [service.ask(t, Sampling(seed=9 + d, **options)) for d, t in
                               enumerate(turns)])  # fmt: skip
    batch = model.generate(turns, Sampling(seed=[9, 10, 11], **options))
    for (parts, reason), reply in zip(found, batch, strict=True):
        assert reason == reply.reason
        text = "".join(p for p in parts if isinstance(p, str))
        assert text.replace(" ", "") == reply.text.replace(" ", "")
        images = [p for p in parts if isinstance(p, np.ndarray)]
        assert len(images) == len(reply.images)
        for a, b in zip(images, reply.images, strict=True):
            # u is equal to rounding, which may cross the border of a grey level.
            assert np.abs(a.astype(int) - b).max() <= 1


def test_an_answer_about_a_drawing_costs_its_question(model, service):
    """Nothing is encoded or read again, and the logits are those of the image encoded anew."""
    chat = Chat(service, Sampling(seed=3, guidance=1.0, max_images=1, max_new_tokens=6))
    [image] = chat.say("a handwritten three", draw=True)
    assert chat.reason == "images" and chat.turns[-1].parts == (image,)
    encoded, fed, cached = service.encoded, service.engine.fed, len(chat.row)
    parts = list(chat.say("which digit is this?", max_images=0))
    assert all(isinstance(p, str) for p in parts)
    question = [Turn("user", (digits.caption(3),)), Turn("assistant", (image,)),
                Turn("user", ("which digit is this?",))]  # fmt: skip
    whole = service.row(question)
    assert service.encoded == encoded
    assert service.engine.fed - fed == len(whole) - cached
    # The caches hold what the same conversation is read as, and so do those of a client that
    # hands the pixels back.
    before = np.asarray(whole.tokens)
    np.testing.assert_array_equal(chat.row.tokens[: len(before)], before)
    reused = service.engine.reused
    finished(service, [service.ask(question, Sampling(max_images=0), keep=True)])
    assert service.engine.reused - reused == len(whole) - 1
    # Encoded anew from x the latents are the same to rounding, and so are the logits.
    u = jnp.asarray(whole.u)
    again = np.asarray(display.to_u(model.pretzel, display.to_x(model.pretzel, u)))
    logits = [_logits(model, whole), _logits(model, _with(whole, again))]
    tiny.close(again, whole.u, 1e-5)
    tiny.close(logits[1], logits[0], 1e-5)
    # From 8-bit pixels they are not: that is the grey levels' and the dequantisation's error.
    rough = model.latents(image[None], [0])
    assert np.abs(rough - whole.u).max() > 1e-3


def test_latents_that_are_not_finite_are_not_remembered(model):
    service = Service(model, EngineConfig(rows=1, context=64, images=1, chunk=16))
    turns = [Turn("user", ("a handwritten three",))]
    for heat, remembered in ((3e38, 0), (1.0, 1)):
        sampling = Sampling(image_temperature=heat, max_images=1)
        [(parts, _)] = finished(service, [service.ask(turns, sampling, draw=True)])
        assert parts[0].shape == IMAGES[0].shape and len(service._latents) == remembered


def test_an_image_that_is_drawn_again_is_remembered_anew(model, monkeypatch):
    monkeypatch.setattr("starflow2_jax.service.REMEMBERED", 2)
    service = Service(model, EngineConfig(rows=1, context=64, images=1, chunk=16))
    u = np.ones((3, *model.latents(IMAGES[:1], [0]).shape[1:]), np.float32)
    u *= np.array([1, 2, 3])[:, None, None]
    for n in (0, 1, 0, 2):
        service._remember(IMAGES[n], u[n])
    np.testing.assert_array_equal(service.latents(IMAGES[[0, 2]]), u[[0, 2]])
    assert service.encoded == 0
    service.latents(IMAGES[[1]])
    assert service.encoded == 1


def test_images_of_a_conversation_that_is_too_long_are_not_encoded(service):
    encoded = service.encoded
    with pytest.raises(UserError, match="the context holds 128"):
        service.ask([Turn("user", (*IMAGES,) * 10)])
    assert service.encoded == encoded


def test_a_conversation_without_a_reply_depends_on_nothing_that_was_asked(model):
    """Not on caches that start like it, nor on drawings whose pixels it shows."""
    sizes = EngineConfig(rows=2, context=128, images=2, chunk=64)
    used, sampling = Service(model, sizes), Sampling(seed=1, max_images=1)
    u = []

    def drawn(service, *parts):
        number = service.ask([Turn("user", parts)], sampling, draw=True, keep=True)
        [image] = [a for _ in iter(lambda: service.busy, False) for a in service.poll()
                   if a.number == number and a.u is not None]  # fmt: skip
        u.append(image.u)
        return image.part

    other = drawn(used, *IMAGES, "which digit is this?")
    drawn(used, *IMAGES, other, "count up from three")
    drawn(Service(model, sizes), *IMAGES, other, "count up from three")
    np.testing.assert_array_equal(u[1], u[2])
    assert used.engine.reused == 0 and used.encoded == 7


def _with(row, u):
    return type(row)(row.tokens, row.kinds, row.positions, u)


def _logits(model, row):
    from starflow2_jax.models.pretzel import spread_images
    from starflow2_jax.nn.attention import AttentionSpec

    p = padded([row])
    u = spread_images(p.u, p.image_start, p.tokens.shape[1])
    streams = model.pretzel.run(p.tokens, p.kinds, p.positions, u, AttentionSpec())
    return model.pretzel.logits(streams.y[:, -1], streams.g[:, -1])


def test_a_conversation_goes_on_where_it_was_left(model, service):
    chat = Chat(service, Sampling(temperature=1.0, max_new_tokens=5, max_images=1))
    for _ in chat.say("count up from three", IMAGES[0]):
        break  # nobody reads on
    assert [t.role for t in chat.turns] == ["user", "assistant"] and not service.busy
    with pytest.raises(UserError, match="special token"):
        list(chat.say("<|image_pad|>"))
    with pytest.raises(UserError, match="turn 3: image of shape"):
        list(chat.say(np.zeros((2, 2, 1), np.uint8)))
    assert len(chat.turns) == 2
    fed, cached = service.engine.fed, len(chat.row)
    list(chat.say("and this?", IMAGES[1]))
    assert len(chat.turns) == 4 and len(chat.row) > cached
    # A reply that nobody read to its end may lie short of its last position in the caches.
    assert service.engine.fed - fed <= len(chat.row) - cached + 2
    with pytest.raises(UserError, match="end with a user's turn"):
        service.ask(chat.turns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("model")
    save_bundle(path, model.bundle)
    return path


def run(*args):
    return main([str(a) for a in args])


def tree(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.mark.slow
def test_sample_writes_a_folder_and_goes_on_with_it(folder, tmp_path, capsys):
    PIL.Image.fromarray(IMAGES[0][..., 0]).save(tmp_path / "a.png")
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a handwritten three"},
        {"id": "look", "prompt": ["which digit is this?", {"image": "a.png"}]},
        {"messages": [
            {"role": "user", "content": "count up from three"},
            {"role": "assistant", "content": [{"image": "a.png"}]},
            {"role": "user", "content": "and the next?"},
        ]},
    ]  # fmt: skip
    prompts.write_text("\n".join(map(json.dumps, lines)))
    options = ["--model", folder, "--prompts", prompts, "--samples", 2, "--guidance", 1.5,
               "--rows", 3]  # fmt: skip
    out = tmp_path / "out"
    assert run("sample", "--out", out, *options) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["prompts"]["sha256"] == hashlib.sha256(prompts.read_bytes()).hexdigest()
    assert len(record["weights_sha256"]) == 64 and record["sampling"]["guidance"] == 1.5
    assert record["model"]["trained_with"] == 5
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {(s["id"], s["sample"]) for s in samples} == {
        (i, k) for i in ("00000", "look", "00002") for k in range(2)
    }
    files = [p["image"] for s in samples for p in s["parts"] if "image" in p]
    assert files and all(PIL.Image.open(out / f).size == (4, 4) for f in files)
    assert (out / "grids").is_dir()
    # Not twice into one folder, nor another run's; an interrupted one is the same in the end.
    assert run("sample", "--out", out, *options) == 2
    assert "--resume goes on" in capsys.readouterr().err
    assert run("sample", "--out", out, *options, "--seed", 1, "--resume") == 2
    assert "differs in sampling.seed" in capsys.readouterr().err
    before = tree(out)
    kept = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    lost = json.loads(kept[-1])["id"]
    (out / "samples.jsonl").write_text("".join(kept[:-1]) + kept[-1][:20])
    assert run("sample", "--out", out, *options, "--resume") == 0
    assert "wrote 2 samples, 6 in all" in capsys.readouterr().out
    after = tree(out)
    again = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    assert again[:-2] == kept[:-2] and {json.loads(x)["id"] for x in again[-2:]} == {lost}
    assert sorted(again) == sorted(kept)
    assert {k: v for k, v in after.items() if k != "samples.jsonl"} == {
        k: v for k, v in before.items() if k != "samples.jsonl"
    }


def test_samples_of_other_line_breaks_of_unicode_are_kept(model, tmp_path):
    """Only a newline ends a line, of prompts and of samples; what has none at its end is torn."""
    breaks = "\u2028\u2029\x85"
    prompts = [tmp_path / "p.jsonl", tmp_path / "p.txt"]
    prompts[0].write_text(f'\n{{"prompt": "one{breaks}two"}}\n\n{{"prompt": "b"}}\n', "utf-8")
    prompts[1].write_text(f"\none{breaks}two\n\nb\n", "utf-8")
    for path in prompts:
        found = sample.from_file(path, model)
        assert [p.turns[0].parts for p in found] == [(f"one{breaks}two",), ("b",)]
        assert [p.name for p in found] == [f"{path}:2", f"{path}:4"]
    lines = [json.dumps({"id": i, "parts": breaks}, ensure_ascii=False) for i in "abc"]
    file = tmp_path / "samples.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    assert sample._finished(file, 1, lambda _: True) == {"a", "b"}
    assert file.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in lines[:2])


def test_a_sample_torn_within_a_character_is_drawn_again(tmp_path):
    lines = [json.dumps({"id": i, "parts": "\u2028"}, ensure_ascii=False) + "\n" for i in "ab"]
    whole = [line.encode() for line in lines]
    file = tmp_path / "samples.jsonl"
    file.write_bytes(whole[0] + whole[1][: whole[1].index(b"\xe2") + 1])
    assert sample._finished(file, 1, lambda _: True) == {"a"}
    assert file.read_bytes() == whole[0]


def test_a_command_that_cannot_be_run_claims_no_folder(folder, tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a handwritten three\n\na <|im_end|> three\n")
    long = tmp_path / "long.txt"
    long.write_text("three\n" + "a handwritten three " * 9)
    small = ["--context", 24, "--prompts", long]
    for options, message in (
        (["a three", "--guidance", -1], "guidance is -1.0"),
        (["a three", "--seed", -1], "seed is -1"),
        (["a three", "--free", "--max-new-tokens", 9999999999], "max_new_tokens is 9999999999"),
        (["--prompts", prompts], f"{prompts}:3: the text holds the special token"),
        (small, f"{long}:2: "),
    ):
        out = tmp_path / "out"
        assert run("sample", "--model", folder, "--out", out, "--rows", 1, *options) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not out.exists()


def test_an_id_is_of_characters(model, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"id": "a\ud800", "prompt": "b"}))
    with pytest.raises(UserError, match="p.jsonl:1: id .* cannot name a file"):
        sample.from_file(prompts, model)


def test_a_run_is_of_the_codec_too(model):
    bundle = model.bundle
    codec = dataclasses.replace(bundle.codec, divisors=bundle.codec.divisors * 2)
    other = Model(dataclasses.replace(bundle, codec=codec))
    about = [
        sample.describe(m, Sampling(), EngineConfig(), 1, True, [], None) for m in (model, other)
    ]
    assert about[0]["weights_sha256"] == bundle.checksum() != about[1]["weights_sha256"]


def test_a_run_is_of_its_devices(model):
    """Another number of them rounds in another way: a run does not go on with it."""
    apart = Model(model.bundle, serving_mesh(2))
    about = [
        sample.describe(m, Sampling(), EngineConfig(), 1, True, [], None) for m in (model, apart)
    ]
    assert about[1] == about[0] | {"devices": 2}


@pytest.mark.slow
def test_sample_for_a_benchmark(folder, tmp_path, capsys):
    prompts = tmp_path / "evaluation_metadata.jsonl"
    records = [{"tag": "colors", "include": [], "prompt": digits.caption(d)} for d in range(2)]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in records))
    out = tmp_path / "out"
    options = ["sample", "--model", folder, "--prompts", prompts, "--format", "geneval", "--rows",
               4]  # fmt: skip
    assert run(*options, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "check: 2 prompts, the benchmark has 553" in printed
    assert PIL.Image.open(out / "images/00001/samples/0003.png").size == (4, 4)
    (out / "images/00001/samples/0003.png").unlink()
    assert run(*options, "--out", out, "--resume") == 0
    assert "wrote 4 samples, 8 in all" in capsys.readouterr().out
    assert len((out / "samples.jsonl").read_text().splitlines()) == 8
    assert run(*options, "--out", out, "--free") == 2
    assert run("sample", "--model", folder, "--out", out) == 2
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": {"image": "none.png"}}\n')
    capsys.readouterr()
    assert run("sample", "--model", folder, "--out", tmp_path / "o", "--prompts", bad) == 2
    assert "bad.jsonl:2: " in capsys.readouterr().err


@pytest.mark.slow
def test_chat_in_the_terminal(folder, tmp_path, capsys, monkeypatch):
    PIL.Image.fromarray(IMAGES[0][..., 0]).save(tmp_path / "a.png")
    lines = ["/draw a handwritten three", "", "/image none.png", "what?",
             f"/image {tmp_path / 'a.png'}", "which digit is this?"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    to = tmp_path / "drawn"
    options = ["--max-images", 1, "--max-new-tokens", 4, "--context", 128, "--images-to", to]
    assert run("chat", "--model", folder, *options) == 0
    printed = capsys.readouterr().out
    assert f"[{to / '0001.png'}]" in printed and "[none.png: no such image]" in printed
    assert PIL.Image.open(to / "0001.png").size == (4, 4)
    assert run("chat", "--model", folder, "--batch", "x") == 2
    assert "starflow2 sample" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seed", "-1"], "seed is -1"),
        (["--max-new-tokens", "9999999999"], "max_new_tokens is 9999999999"),
        (["--temperature", "inf"], "temperature is inf"),
        (["--image-temperature", "1e39"], "image_temperature is 1e+39"),
    ],
)
def test_chat_refuses_numbers_before_it_reads_a_model(tmp_path, capsys, options, message):
    (tmp_path / "model.json").write_text('{"model": {"flow": 0, "special": 0}}')
    assert run("chat", "--model", tmp_path, "--prompt", "a", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_chat_refuses_no_rows(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("chat", "--model", tmp_path, "--batch", "x", "--rows", 0)
    assert "--rows: '0' is no positive number" in capsys.readouterr().err


def test_pictures_as_text():
    image = np.zeros((3, 2, 3), np.uint8)
    image[0, 0] = (255, 0, 1)
    lines = as_text(image).split("\n")
    assert len(lines) == 2 and all(line.count("▀") == 2 for line in lines)
    assert lines[0].startswith("\x1b[38;2;255;0;1m\x1b[48;2;0;0;0m▀")
    assert as_text(np.zeros((100, 100, 1), np.uint8), 10).count("▀") == 50
    assert not shows_images(io.StringIO(), {"COLORTERM": "truecolor"})
