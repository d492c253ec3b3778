"""`starflow2 evaluate understanding`, and lmms-eval's way to a model."""

import importlib
import importlib.util
import io
import json
import pathlib
import sys
import tomllib
import types

import hf_folder
import numpy as np
import pytest
import tiny
from PIL import Image

from starflow2_jax import Sampling, Turn, load
from starflow2_jax.bundle import save_bundle
from starflow2_jax.cli.main import main
from starflow2_jax.convert.qwen2_5_vl import import_folder
from starflow2_jax.data.decoding import decode
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.formats import LmmsEval
from starflow2_jax.evaluation.responder import Responder
from starflow2_jax.evaluation.understanding import (
    Setting,
    anls,
    edit_distance,
    exact_match,
    run,
)
from starflow2_jax.vlm import Assistant, Writing

ROOT = pathlib.Path(__file__).parent.parent
COUNT = 5


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (COUNT, 4, 4, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pictures):
    """`model`, `vlm`, `questions.jsonl` and its pictures."""
    folder = tmp_path_factory.mktemp("understanding")
    save_bundle(folder / "model", tiny.bundle(pictures, seed=3))
    import_folder(hf_folder.write(folder / "hf", hf_folder.hf_model()), folder / "vlm")
    lines = []
    for n, picture in enumerate(pictures):
        large = np.kron(picture[..., 0], np.ones((16, 16), np.uint8))
        Image.fromarray(large).save(folder / f"{n}.png")
        line = {"image": f"{n}.png", "question": "which digit is this?", "answers": ["three", "3"]}
        lines.append(line | {"doc_id": 10 + n})
    lines[1] |= {"id": "named", "question": "it is <image>, is it not?", "answer": "yes"}
    del lines[1]["answers"], lines[2]["question"]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def arguments(folder, out, *more, model="model"):
    command = ["evaluate", "understanding", "--model", folder / model, "--out", out, "--rows", 2]
    data = ["--data", folder / "questions.jsonl", "--max-new-tokens", 4]
    return [str(word) for word in [*command, *data, *more]]


def results(out):
    lines = (out / "examples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((out / "summary.json").read_text())


def test_scores_of_replies():
    assert exact_match(" Three. ", ["3", "three"]) == 1 and exact_match("threes", ["three"]) == 0
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = ("".join(rng.choice(list("ab "), rng.integers(0, 7))) for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                replaced = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
                table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, replaced)
        assert edit_distance(a, b) == table[-1, -1], (a, b)
    assert anls("Three", ["three"]) == 1
    assert anls("thre", ["nine", "three"]) == pytest.approx(0.8)
    assert anls("ab", ["ac"]) == 0  # at the threshold
    assert anls("abc", ["abd"]) == pytest.approx(2 / 3)


@pytest.mark.slow
def test_replies_are_the_models(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(folder, out, "--task", "digits")) == 0
    assert "exact_match" in capsys.readouterr().out
    rows, summary = results(out)
    model = load(folder / "model")
    shown = [decode((folder / f"{n}.png").read_bytes(), tiny.SHAPE) for n in range(COUNT)]
    asked = [[Turn("user", (picture, "which digit is this?"))] for picture in shown]
    asked[1] = [Turn("user", ("it is", shown[1], ", is it not?"))]
    asked[2] = [Turn("user", (shown[2], "describe this image"))]
    replies = model.generate(asked, Sampling(max_images=0, max_new_tokens=4), rows=2)
    assert [row["reply"] for row in rows] == [reply.text for reply in replies]
    assert [row["id"] for row in rows] == [0, "named", 2, 3, 4]
    assert rows[1]["answers"] == ["yes"] and summary["path"] == "latent"
    for name in ("exact_match", "anls"):
        assert summary[name] == pytest.approx(np.mean([row[name] for row in rows]))
    # The log is one that the harness's replay reads.
    log = json.loads((out / "digits.json").read_text())
    assert {e["doc_id"]: e["resps"][0][0] for e in log["logs"]} == {
        row["doc_id"]: row["reply"] for row in rows
    }
    items = [{"doc_id": row["doc_id"], "prompt": "-"} for row in rows]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    layout = LmmsEval(task="digits")
    problems = layout.check(out, layout.items(tmp_path / "items.jsonl"))
    assert all("not the JSON text of an image" in problem for problem in problems)


def test_an_interrupted_job_goes_on(folder, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main(arguments(folder, whole))
    answers, calls = Responder.answers, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise UserError("pulled the plug")
        return answers(self, *args, **kwargs)

    monkeypatch.setattr(Responder, "answers", failing)
    assert main(arguments(folder, broken)) == 2
    assert not (broken / "summary.json").exists()
    assert main(arguments(folder, broken)) == 0 and len(calls) == 4
    for name in ("examples.jsonl", "summary.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert main(arguments(folder, broken, "--suffix", "in one word")) == 2


class Silent:
    """Answers nothing, of no weights."""

    path = "latent"
    devices = 1

    def checksum(self):
        return "0"

    def turn(self, role, said, where):
        return Turn(role, ("?",))

    def answers(self, conversations, **_):
        return ["three"] * len(conversations)


def test_other_data_under_the_same_name_is_another_job(folder, tmp_path, monkeypatch):
    data, picture = tmp_path / "q.jsonl", tmp_path / "0.png"
    picture.write_bytes((folder / "0.png").read_bytes())
    line = {"image": "0.png", "question": "which digit is this?", "answer": "three"}

    def ask(line):
        data.write_text(json.dumps(line) + "\n")
        return run(Silent(), Setting((str(data),)), tmp_path / "out")["exact_match"]

    assert ask(line) == 1.0
    for change in ({"answer": "seven"}, {"question": "which one is this??"}, {"doc_id": 3}):
        with pytest.raises(UserError, match="another job: records_sha256"):
            ask(line | change)
    monkeypatch.setattr(Silent, "devices", 2)  # which round in another way
    with pytest.raises(UserError, match="another job: devices"):
        ask(line)
    monkeypatch.undo()
    assert ask(line) == 1.0
    picture.write_bytes((folder / "1.png").read_bytes())
    with pytest.raises(UserError, match="another job: records_sha256"):
        ask(line)


def test_a_document_of_a_task_is_asked_once(folder, tmp_path):
    data = tmp_path / "q.jsonl"
    # The second has no doc_id: it is known by its number.
    lines = [{"doc_id": 1, "question": "a", "answer": "a"}, {"question": "b", "answer": "b"}]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    setting = Setting((str(data),))
    with pytest.raises(UserError, match=r"q.jsonl line 2: doc_id 1 is there twice, first in .*1;"):
        run(Silent(), setting, tmp_path / "out", task="digits")
    assert not (tmp_path / "out").exists()
    assert run(Silent(), setting, tmp_path / "out")["questions"] == 2  # without a log: no matter


@pytest.mark.slow
def test_a_vlm_sees_through_its_tower(folder, tmp_path):
    out = tmp_path / "out"
    assert main(arguments(folder, out, "--suffix", "in one word", model="vlm")) == 0
    rows, summary = results(out)
    assert summary["path"] == "vit"
    assistant = Assistant.load(folder / "vlm")
    files = [folder / f"{n}.png" for n in (0, 2)]
    questions = ["which digit is this?\nin one word", "describe this image\nin one word"]
    asked = [[assistant.turn(q, [f])] for q, f in zip(questions, files, strict=True)]
    replies = assistant.answers(asked, Writing(max_new_tokens=4))
    assert [rows[n]["reply"] for n in (0, 2)] == [reply.text.strip() for reply in replies]


@pytest.mark.parametrize(
    "line, message",
    [
        ({"image": "0.png", "answer": 3}, "line 1: the answers are 3"),
        (
            {"image": "0.png", "question": "<image><image>", "answer": ""},
            "1 pictures, but 2 places",
        ),
        ({"image": "none.png", "answer": "a"}, "none.png: No such file"),
        ({"image": "bad.png", "answer": "a"}, "line 1: the picture cannot be read"),
        ({"question": "why?"}, "no field 'answer'"),
        (
            {"image": "0.png", "question": "why<|im_end|>?", "answer": "a"},
            "bad.jsonl line 1: the text holds the special token <|im_end|>",
        ),
    ],
)
def test_bad_records_stop_the_job_with_their_name(folder, tmp_path, line, message, capsys):
    (folder / "bad.png").write_bytes((folder / "0.png").read_bytes()[:40])
    data = tmp_path / "bad.jsonl"
    data.write_text(json.dumps(line) + "\n")
    command = arguments(folder, tmp_path / "out", "--images", folder)
    command[command.index(str(folder / "questions.jsonl"))] = str(data)
    assert main(command) == 2
    assert message in capsys.readouterr().err


def test_paths_that_a_model_has_not_are_refused(folder):
    with pytest.raises(UserError, match="has no vision tower"):
        Responder(folder / "model", "vit")
    with pytest.raises(UserError, match="has no latents"):
        Responder(folder / "vlm", "latent")


@pytest.mark.parametrize("name", ["model", "vlm"])
def test_an_empty_stop_string_is_told_of(folder, name):
    responder = Responder(folder / name)
    asked = [[responder.turn("user", ("which digit is this?",), "here")]]
    with pytest.raises(UserError, match="a stop string is empty"):
        responder.answers(asked, max_new_tokens=1, stop=("",))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "vlm"])
def test_sampled_replies_are_by_number_whatever_the_batch(folder, name):
    responder = Responder(folder / name)
    asked = [[responder.turn("user", ("which digit is this?",), "here")]] * 4

    def answers(conversations, rows, numbers=None):
        return responder.answers(
            conversations, max_new_tokens=8, temperature=1.0, numbers=numbers, rows=rows
        )

    replies = answers(asked, 1)
    assert len(set(replies)) == 4
    assert answers(asked[:2], 2, numbers=[1, 3]) == replies[1::2]


@pytest.fixture
def harness(monkeypatch):
    """The class for lmms-eval, over stubs of what it imports of the harness; and the stubs."""
    made = {
        name: types.ModuleType(name)
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.instance", "lmms_eval.api.model")
        + ("lmms_eval.protocol",)
    }

    class Base:
        def __init__(self):
            self.cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)
            self.task_dict = {}

    made["lmms_eval.api.instance"].Instance = types.SimpleNamespace
    made["lmms_eval.api.model"].lmms = Base
    made["lmms_eval.protocol"].ChatMessages = types.SimpleNamespace
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "starflow2_jax.lmms_model", raising=False)
    yield importlib.import_module("starflow2_jax.lmms_model")
    sys.modules.pop("starflow2_jax.lmms_model", None)


def _request(number, settings):
    """As the harness makes it, of the task `t`, whose documents are their numbers."""

    def messages(document):
        content = types.SimpleNamespace(type="text", text=f"question {document}")
        return [types.SimpleNamespace(role="user", content=[content])]

    return types.SimpleNamespace(args=("", messages, settings, number, "t", "test"))


def test_the_harness_has_its_replies(harness, folder, monkeypatch):
    calls = []

    class Recorder(Silent):
        def turn(self, role, said, where):
            return Turn(role, tuple(said))

        def answers(self, conversations, *, numbers, rows, **settings):
            assert len(conversations) == len(numbers) <= rows
            texts = [turns[0].parts[0] for turns in conversations]
            calls.append((tuple(numbers), settings))
            return [f"{text} with stream {n}" for text, n in zip(texts, numbers, strict=True)]

    monkeypatch.setattr(harness, "Responder", lambda *_, **__: Recorder())

    def replies(settings, batch_size):
        model = harness.LmmsModel("model", batch_size=batch_size)
        model.task_dict = {"t": {"test": range(len(settings))}}
        return model.generate_until([_request(n, s) for n, s in enumerate(settings)])

    # Tasks of two settings come in turns: every request has a stream of its own all the same.
    settings = [{"do_sample": True, "max_new_tokens": 8 + n % 2} for n in range(6)]
    for batch_size in (1, 2, 3):
        found = replies(settings, batch_size)
        assert found == [f"question {n} with stream {n}" for n in range(6)]
    calls.clear()
    cases = [
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": None}, 1.0),
        ({"do_sample": True, "temperature": 0}, 0.0),
        ({"do_sample": True, "temperature": 0.5}, 0.5),
        ({"do_sample": False, "temperature": 0.5}, 0.0),
        ({"temperature": 0.5, "until": ["\n"], "top_p": 0.9}, 0.5),
        ({}, 0.0),
    ]
    replies([settings for settings, _ in cases], 4)
    assert [settings["temperature"] for _, settings in calls] == [t for _, t in cases]
    assert calls[5][1]["stop"] == ("\n",) and calls[5][1]["top_p"] == 0.9
    with pytest.raises(UserError, match="seed is -1"):
        harness.LmmsModel("model", seed=-1)


def test_both_kinds_of_pictures_are_read(folder, pictures):
    """Encoded or opened: the same turn."""
    responder = Responder(folder / "model")
    file = io.BytesIO()
    Image.fromarray(pictures[0][..., 0]).save(file, "PNG")
    turns = [
        responder.turn("user", (picture, "", "a"), "here")
        for picture in (file.getvalue(), Image.open(file))
    ]
    for turn in turns:
        np.testing.assert_array_equal(turn.parts[0], pictures[0])
        assert turn.parts[1:] == ("a",)
    # An opened JPEG may have to be turned, and may be of a mode that PNG has not.
    data, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    large = np.kron(pictures[0][..., 0], np.ones((16, 16), np.uint8))
    Image.fromarray(large).convert("CMYK").save(data, "JPEG", exif=exif, quality=100)
    upright = io.BytesIO()
    Image.fromarray(np.rot90(large, -1)).save(upright, "PNG")
    wanted = decode(upright.getvalue(), tiny.SHAPE).astype(int)
    for picture in (data.getvalue(), Image.open(data)):
        [part] = responder.turn("user", (picture,), "here").parts
        np.testing.assert_allclose(part, wanted, atol=12)


def test_the_harness_is_told_of_the_model():
    """Without the harness: that the entry point and the class that it leads to are there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["starflow2_jax"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert importlib.util.find_spec("starflow2_jax.lmms_model") is not None
