"""`starflow2 evaluate likelihood` on conversations: exact, resumable, the same on any processes."""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
import source_files
import tiny
from PIL import Image

from starflow2_jax import Turn, load
from starflow2_jax.bundle import save_bundle
from starflow2_jax.cli.main import main
from starflow2_jax.data import digits
from starflow2_jax.data.images import write_folder
from starflow2_jax.data.pipeline import single_batch, to_rows
from starflow2_jax.data.sequences import encode_turns
from starflow2_jax.evaluation.dataset import drawing, open_dataset
from starflow2_jax.evaluation.job import Job, run_job
from starflow2_jax.evaluation.matching import CaptionTable, recalls
from starflow2_jax.model import _image_seeds
from starflow2_jax.models.patches import noisy_latents
from starflow2_jax.training.objective import image_loss

ROOT = pathlib.Path(__file__).parent.parent
SHAPE = tiny.SHAPE
COUNT = 7


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (COUNT, 4, 4, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images):
    """A model directory and the data: `model`, `drawings.jsonl`, `stories.jsonl`."""
    folder = tmp_path_factory.mktemp("likelihood")
    save_bundle(folder / "model", tiny.bundle(images, seed=3))
    (folder / "images").mkdir()
    drawings, stories = [], []
    for i, image in enumerate(images):
        name = f"images/{i}.png"
        Image.fromarray(image[..., 0]).save(folder / name)
        said = [("human", digits.caption(i % 3)), ("gpt", "<image>")]
        drawings.append({"id": f"d{i}", "image": name, "conversations": _said(said)})
        said = [("human", "<image>\nwhich digit is this?"), ("gpt", "it is one, then <image>")]
        stories.append({"image": [name, "images/0.png"], "conversations": _said(said)})
    for name, records in (("drawings", drawings), ("stories", stories)):
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def _said(turns):
    return [{"from": who, "value": text} for who, text in turns]


@pytest.fixture(scope="module")
def model(folder):
    return load(folder / "model")


def arguments(folder, out, data="drawings", *more):
    command = ["evaluate", "likelihood", "--model", folder / "model", "--out", out, "--data"]
    return [str(word) for word in [*command, folder / f"{data}.jsonl", "--rows", 3, *more]]


def results(out):
    lines = (out / "examples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((out / "summary.json").read_text())


def test_every_number_of_a_conversation(folder, model, images, tmp_path, capsys):
    assert main(arguments(folder, tmp_path / "out", "stories", "--draws", "3")) == 0
    assert "perplexity" in capsys.readouterr().out
    rows, summary = results(tmp_path / "out")
    turns = lambda i: [
        Turn("user", (images[i], "which digit is this?")),
        Turn("assistant", ("it is one, then", images[0])),
    ]
    expected = model.log_prob([turns(i) for i in range(COUNT)], draws=3, rows=3)
    assert [row["index"] for row in rows] == [row["id"] for row in rows] == [*range(COUNT)]
    for row, scores in zip(rows, expected, strict=True):
        shown, drawn = row["images"]
        assert (shown["role"], drawn["role"]) == ("user", "assistant")
        for image, nats, bits in zip(
            row["images"], scores.images, scores.bits_per_dim, strict=True
        ):
            assert image["nats"] == pytest.approx(nats, rel=1e-5)
            assert image["bits_per_dim"] == pytest.approx(bits, rel=1e-5)
            draws = np.array(image["nats_by_draw"])
            bound = np.logaddexp.reduce(draws) - np.log(3)
            assert image["nats_bound"] == pytest.approx(bound, rel=1e-9)
            assert image["nats_spread"] == pytest.approx(draws.std(ddof=1), rel=1e-6) != 0
            assert image["bits_per_dim_bound"] < image["bits_per_dim"]
        assert row["text_tokens"] == len(scores.text)
        assert row["text_nats"] == pytest.approx(scores.text.sum(), rel=1e-5)
        assert math.log(row["perplexity"]) == pytest.approx(-scores.text.mean(), rel=1e-5)
        assert row["joint_nats"] == pytest.approx(drawn["nats"] + row["text_nats"], rel=1e-9)
    assert summary["images"] == 2 * COUNT
    tokens = sum(len(s.text) for s in expected)
    nats = sum(s.text.sum() for s in expected)
    assert math.log(summary["perplexity"]) == pytest.approx(-nats / tokens, rel=1e-5)
    drawn = summary["assistant_images"]
    bits = np.array([s.bits_per_dim[1] for s in expected])
    assert drawn["bits_per_dim"] == pytest.approx(bits.mean(), rel=1e-5)
    assert np.mean(drawn["bits_per_dim_by_draw"]) == pytest.approx(bits.mean(), rel=1e-5)


def test_bits_per_dim_are_those_of_the_training_objective(folder, model, tmp_path):
    main(arguments(folder, tmp_path / "out", "drawings", "--draws", "1"))
    _, summary = results(tmp_path / "out")
    dataset = open_dataset([folder / "drawings.jsonl"], SHAPE)
    documents = [encode_turns(dataset[i].turns, model.tokenizer, SHAPE) for i in range(COUNT)]
    batch = single_batch(documents)
    batch["image_seeds"] = np.stack([_image_seeds(i, 1) for i in range(COUNT)])
    rows = to_rows(batch)
    x = noisy_latents(model.bundle.codec, batch["images"], 0, batch["image_seeds"])
    held_out = tiny.jit(lambda model, rows, x: image_loss(rows, model.log_prob(rows, x)))
    loss = float(held_out(model.pretzel, rows, x))  # what training calls held_out_loss_image
    dims = math.prod(model.bundle.codec.shape)
    nats = -(loss + 0.5 * math.log(2 * math.pi)) * dims
    bits = float(model.bundle.codec.bits_per_dim(jnp.float32(nats)))
    assert summary["assistant_images"]["bits_per_dim"] == pytest.approx(bits, rel=1e-5)


def test_scoring_captions(folder, model, images, tmp_path):
    captions = [digits.caption(i) for i in range(3)]
    (tmp_path / "classes.txt").write_text("\n".join(captions) + "\n")
    outs = {}
    for score in ("matching", "retrieval", "classes"):
        more = ["--score", score, "--draws", "2"]
        if score == "classes":
            more += ["--captions", tmp_path / "classes.txt"]
        assert main(arguments(folder, tmp_path / score, "drawings", *more)) == 0
        outs[score] = results(tmp_path / score)

    def nats(parts):
        turns = [[Turn("user", parts), Turn("assistant", (image,))] for image in images]
        return np.array([s.images[:, 0] for s in model.score_draws(turns, draws=2, rows=3)])

    table = np.stack([nats((caption,)) for caption in captions], 2)  # [n, S, K]
    empty = nats(())
    own = np.arange(COUNT) % 3
    match = (table - empty[..., None]).mean(1)  # [n, K]
    of_own = match[np.arange(COUNT), own]
    for rows, summary in outs.values():
        np.testing.assert_allclose([row["match"] for row in rows], of_own, rtol=1e-4, atol=1e-5)
        assert summary["match"] == pytest.approx(of_own.mean(), rel=1e-4)
        assert summary["match_positive"] == np.mean(of_own > 0)
        # A difference of bounds is none.
        bounds = [name for name in rows[0] if name.endswith("_bound")]
        assert bounds == ["nats_bound", "nats_no_caption_bound"]
    rows, summary = outs["classes"]
    posterior = np.logaddexp.reduce(table, axis=1)
    right = posterior.argmax(1) == own
    assert [row["predicted"] for row in rows] == [captions[k] for k in posterior.argmax(1)]
    assert summary["accuracy"] == right.mean() and summary["accuracy_top_5"] == 1.0
    log_posterior = posterior - np.logaddexp.reduce(posterior, axis=1, keepdims=True)
    expected = log_posterior[np.arange(COUNT), own]
    np.testing.assert_allclose([row["log_posterior"] for row in rows], expected, rtol=1e-4)
    _, summary = outs["retrieval"]
    assert summary["text_retrieval"]["recall_at_1"] == right.mean()
    first = [own[match[:, k].argmax()] == k for k in range(3)]
    assert summary["image_retrieval"]["recall_at_1"] == pytest.approx(np.mean(first))
    assert summary["image_retrieval"]["recall_at_10"] == 1.0


def test_captions_are_scored_a_batch_at_a_time(folder, model):
    """Whatever their number; and the numbers are those of all of them at once, to the bit."""

    class Counted:
        def __init__(self):
            self.calls = []
            self.bundle, self.length = model.bundle, model.length

        def score_draws(self, turns, **options):
            self.calls.append(len(turns))
            return model.score_draws(turns, **options)

    captions = (*(digits.caption(i) for i in range(3)), "a", "a handwritten " * 8 + "three")
    dataset, records = open_dataset([folder / "drawings.jsonl"], SHAPE), range(2, 5)
    counted = Counted()
    rows = CaptionTable(counted, dataset, captions, 2, 0).score(records)
    assert counted.calls == [len(records)] * (len(captions) + 1)
    images = [drawing(dataset[i])[1] for i in records]
    turns = [
        [Turn("user", prompt), Turn("assistant", (image,))]
        for prompt in [*((c,) for c in captions), ()]
        for image in images
    ]
    whole = model.score_draws(turns, seeds=[*records] * 6, draws=2, rows=len(records))
    table = np.stack([one.images[:, 0] for one in whole]).reshape(6, len(records), 2)
    for place, row in enumerate(rows):
        assert row["nats_by_caption"] == table[:-1, place].mean(1).tolist()
        assert row["nats_no_caption_by_draw"] == table[-1, place].tolist()


def test_recalls():
    found = recalls([1, 2, 6, 30])
    assert [found[f"recall_at_{k}"] for k in (1, 5, 10)] == [0.25, 0.5, 0.75]
    assert found["median_rank"] == 4.0


def test_a_folder_of_classes(model, images, tmp_path):
    write_folder(tmp_path / "f", images[:4], np.array([0, 1, 1, 0]), ("big_cat", "dog"))
    dataset = open_dataset([tmp_path / "f"], SHAPE, template="a photo of a {}")
    assert [drawing(dataset[i])[0] for i in range(4)] == [
        *["a photo of a big cat"] * 2,
        *["a photo of a dog"] * 2,
    ]
    np.testing.assert_array_equal(drawing(dataset[1])[1], images[3])
    assert dataset[0].id == "big_cat/000000.png"
    braces = open_dataset([tmp_path / "f"], SHAPE, template="{a} {}")
    assert drawing(braces[2])[0] == "{a} dog"


def _process(arguments, **environment):
    variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "starflow2_jax", *arguments],
        env=os.environ | variables | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _kill_after_parts(arguments, parts, count):
    """Kills the command as soon as it has written `count` more chunks."""
    before = len([*parts.glob("*.jsonl")]) if parts.exists() else 0
    process = _process(arguments)
    while process.poll() is None:
        if parts.exists() and len([*parts.glob("*.jsonl")]) >= before + count:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.communicate()
    return process.returncode


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_twice_and_resumed_is_one_go_on_one_and_two_processes(folder, tmp_path):
    more = ["stories", "--draws", "2", "--rows", "1"]
    ran = _process(arguments(folder, tmp_path / "whole", *more))
    assert ran.wait() == 0, ran.stdout.read()
    killed = arguments(folder, tmp_path / "killed", *more)
    for count in (1, 2):
        assert _kill_after_parts(killed, tmp_path / "killed" / "parts", count) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "summary.json").exists()
    last = _process(killed)
    assert last.wait() == 0, last.stdout.read()
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "local.py", "-n", "2", "--"]
        + arguments(folder, tmp_path / "two", *more),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("examples.jsonl", "summary.json", "job.json"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == whole
        assert (tmp_path / "two" / name).read_bytes() == whole
    assert not (tmp_path / "killed" / "parts").exists()


def test_totals_do_not_depend_on_order_and_work_is_not_done_twice(tmp_path):
    values = [1e16, 1.0, -1e16, 3.5, 1e-9]
    scored = []

    def score(records):
        scored.extend(records)
        return [{"index": i, "value": values[i]} for i in records]

    def summarise(rows):
        return {"total": math.fsum(row["value"] for row in rows)}

    job = Job(tmp_path / "a", len(values), 2, {"seed": 0})
    first = run_job(job, score, summarise)
    assert first["total"] == 4.5 + 1e-9 and scored == [*range(5)]
    assert run_job(job, score, summarise) == first and scored == [*range(5)]
    values.reverse()
    again = run_job(Job(tmp_path / "b", len(values), 3, {"seed": 0}), score, summarise)
    assert again["total"] == first["total"]


def test_other_data_under_the_same_name_is_another_job(folder, tmp_path, capsys):
    shutil.copytree(folder / "images", tmp_path / "images")
    lines = (folder / "drawings.jsonl").read_text().splitlines(keepends=True)
    data, picture = tmp_path / "d.jsonl", tmp_path / "images" / "0.png"
    data.write_text("".join(lines[:2]))
    command = arguments(folder, tmp_path / "out", "drawings", "--draws", "1", "--data", data)
    command = [str(word) for word in command]
    assert main(command) == 0
    before = results(tmp_path / "out")

    def refused():
        capsys.readouterr()
        assert main(command) == 2
        return "another job: records_sha256" in capsys.readouterr().err

    data.write_text("".join(lines[2:4]))
    assert refused()
    # A job that is half done, too.
    (tmp_path / "out" / "summary.json").rename(tmp_path / "kept.json")
    assert refused()
    (tmp_path / "kept.json").rename(tmp_path / "out" / "summary.json")
    data.write_text("".join(lines[:2]))
    shown = picture.read_bytes()
    shutil.copy(tmp_path / "images" / "3.png", picture)
    assert refused()
    picture.write_bytes(shown)
    assert main(command) == 0 and results(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["tar", "jsonl", "folder"])
def test_a_digest_is_of_what_the_records_say(kind, tmp_path):
    def made(name, change=None):
        place = tmp_path / name
        if kind == "folder":
            pictures = np.full((3, 4, 4, 1), 7, np.uint8)
            pictures[1] += change is not None
            write_folder(place, pictures, np.array([0, 1, 0]), ("a", "b"))
            return open_dataset([place], SHAPE).digest()
        place.mkdir()
        if kind == "tar":
            source_files.write_tar(place / "0.tar", range(3), change)
            options = {"fields": {"image": "png"}}
        else:
            records = []
            for number in range(3):
                fields = {"png": source_files.png(number), "txt": b"a"}
                if change is not None:
                    change(number, fields)
                (place / f"{number}.png").write_bytes(fields["png"])
                records.append({"jpg": f"{number}.png", "txt": fields["txt"].decode()})
            lines = [json.dumps(record) + "\n" for record in records]
            (place / "0.jsonl").write_text("".join(lines))
            options = {"task": "draw"}
        (path,) = place.glob(f"*.{kind}")
        return open_dataset([path], SHAPE, **options).digest()

    def other_picture(number, fields):
        if number == 1:
            fields["png"] = fields["png"][:-1] + b"!"  # of one size

    def other_text(number, fields):
        if number == 1:
            fields["txt"] = fields["txt"][:-1] + b"!"

    first = made("first")
    assert made("elsewhere") == first != made("changed", other_picture)
    if kind != "folder":
        assert made("reworded", other_text) != first


@pytest.mark.parametrize(
    "change, message",
    [
        (["--draws", "5"], "holds the results of another job: draws (4 there, 5 now)"),
        (["--data", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--data", "data.txt"], "expected a folder of images, or files of one of the kinds"),
        (["--field", "picture=x"], "task conversation has no field 'picture'"),
        (["--score", "classes"], "needs --captions FILE"),
        (["--captions", "c.txt"], "--captions are classes, for --score classes"),
        (["--no-bayes"], "--no-bayes is for image flows"),
        (["--score", "matching", "--data", "{}/stories.jsonl"], "is not one caption of the user's"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path_factory, capsys, change, message):
    out = folder / "out"
    if not out.exists():
        assert main(arguments(folder, out)) == 0
    capsys.readouterr()
    if "--draws" not in change:
        out = tmp_path_factory.mktemp("bad")
    words = [word.format(folder) for word in change]
    assert main(arguments(folder, out, "drawings", *words)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_damaged_record_stops_the_job_with_its_name(folder, tmp_path, capsys):
    lines = (folder / "drawings.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace("images/4.png", "images/none.png")
    (folder / "spoilt.jsonl").write_text("\n".join(lines))
    assert main(arguments(folder, tmp_path / "out", "spoilt")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "spoilt.jsonl line 5" in line and "images/none.png" in line


def test_a_text_that_cannot_be_read_is_named_by_its_line(folder, tmp_path, capsys):
    lines = (folder / "drawings.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace("a handwritten", "a <|im_end|>")
    (folder / "special.jsonl").write_text("\n".join(lines))
    for score in ("likelihood", "matching"):
        assert main(arguments(folder, tmp_path / score, "special", "--score", score)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "special.jsonl line 5: the text holds the special token" in line
