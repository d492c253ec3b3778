"""Layouts of benchmarks: what is written passes, and whatever a scorer would drop is named."""

import json
import re

import numpy as np
import PIL.Image
import pytest

from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.formats import Dpg, GenEval, LmmsEval, Wise, check_folder, tiled


def picture(seed, side=8, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (side, side, channels), dtype=np.uint8)


def geneval_prompts(path, count=3):
    records = [
        {"tag": "counting", "include": [{"class": "cup", "count": n}], "prompt": f"{n} cups"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def dpg_prompts(path):
    path.mkdir()
    for name in ("countbench27", "partiprompts3"):
        (path / f"{name}.txt").write_text(f"a picture of {name}\n")
    return path


def wise_prompts(path, count=3):
    path.write_text(
        json.dumps([{"Prompt": f"thing {n}", "prompt_id": n, "Hint": ""} for n in (3, 1, 2)])
    )
    return path


def lmms_prompts(path):
    path.write_text('{"doc_id": 0, "prompt": "a"}\n\n{"doc_id": 4, "prompt": "b"}\n')
    return path


def fill(layout, prompts, folder):
    """A finished folder, and whether each prompt was there before its images."""
    folder.mkdir()
    for n, item in enumerate(layout.items(prompts)):
        assert not layout.finished(folder, item)
        layout.write(folder, item, [picture(10 * n + k) for k in range(layout.samples)])
        assert layout.finished(folder, item)
    layout.close(folder, layout.items(prompts))
    return folder


def problems(layout, folder, prompts):
    return "\n".join(check_folder(layout, folder, prompts))


@pytest.fixture
def geneval(tmp_path):
    layout, prompts = GenEval(whole=3), geneval_prompts(tmp_path / "evaluation_metadata.jsonl")
    return layout, fill(layout, prompts, tmp_path / "out"), prompts


def test_geneval_is_what_its_scorer_reads(geneval):
    layout, folder, prompts = geneval
    assert not problems(layout, folder, prompts)
    # The reader's own rules, on everything that it lists.
    seen = 0
    for sub in folder.iterdir():
        if not sub.is_dir() or not sub.name.isdigit():
            continue
        with open(sub / "metadata.jsonl") as file:
            metadata = json.load(file)
        assert metadata["prompt"] == f"{int(sub.name)} cups"
        for file in (sub / "samples").iterdir():
            assert re.match(r"\d+\.png", file.name)
            seen += PIL.Image.open(file).mode == "RGB"
    assert seen == 12
    assert PIL.Image.open(folder / "00001" / "grid.png").size == (16, 16)


def test_geneval_problems_are_named(geneval):
    layout, folder, prompts = geneval
    (folder / "00000" / "samples" / "0002.png").unlink()
    file = folder / "00001" / "samples" / "0000.png"
    file.write_bytes(file.read_bytes()[:60])
    metadata = folder / "00001" / "metadata.jsonl"
    metadata.write_text(metadata.read_text() + "{}\n")
    (folder / "00002" / "metadata.jsonl").write_text("{}")
    (folder / "00002" / "samples" / "00009.png").write_bytes(b"")
    (folder / "00007").mkdir()
    found = problems(layout, folder, prompts)
    for expected in (
        "00000/samples/0002.png: missing",
        "00001/samples/0000.png: not a readable image",
        "00001/metadata.jsonl: not exactly one JSON object",
        "00002/metadata.jsonl: not the prompt file's line 3",
        "00002/samples/00009.png: scored too, but not expected",
        "00007: of no prompt, but scored",
    ):
        assert expected in found, expected
    assert len(found.splitlines()) == 6
    assert "the benchmark has 553" in problems(GenEval(), folder, prompts)


@pytest.mark.parametrize("samples", [1, 4])
def test_dpg(tmp_path, samples):
    layout, prompts = Dpg(samples=samples, whole=2), dpg_prompts(tmp_path / "prompts")
    folder = fill(layout, prompts, tmp_path / "out")
    assert not problems(layout, folder, prompts)
    sheet = np.asarray(PIL.Image.open(folder / "partiprompts3.png"))
    # The order in which the scorer cuts: top left, top right, bottom left, bottom right.
    for k in range(samples):
        y, x = 8 * (k // 2), 8 * (k % 2)
        np.testing.assert_array_equal(sheet[y : y + 8, x : x + 8], picture(10 + k))
    PIL.Image.fromarray(picture(0, 12)).save(folder / "countbench27.png")
    (folder / "dpg-bench_results.txt").write_text("0.5")
    (folder / "partiprompts3.png").rename(folder / "partiprompts3.x.png")
    found = problems(layout, folder, prompts)
    assert "partiprompts3.png: missing" in found
    assert "partiprompts3.x.png: of no prompt" in found
    assert "dpg-bench_results.txt: of no prompt" in found
    PIL.Image.fromarray(picture(0, 16)).save(folder / "partiprompts3.png")
    assert "images of several sizes [(12, 12), (16, 16)]" in problems(layout, folder, prompts)
    listed = tmp_path / "meta.json"
    listed.write_text(json.dumps([{"prompt": "a", "prompt_file_name": "a.b"}]))
    with pytest.raises(UserError, match="up to its first dot"):
        layout.items(listed)
    with pytest.raises(UserError, match="1 or 4 images"):
        Dpg(samples=2).items(prompts)


def test_wise(tmp_path):
    layout, prompts = Wise(whole=3), wise_prompts(tmp_path / "culture.json")
    assert [item.id for item in layout.items(prompts)] == ["1", "2", "3"]
    folder = fill(layout, prompts, tmp_path / "out")
    assert not problems(layout, folder, prompts)
    (folder / "2.png").rename(folder / "0002.png")
    found = problems(layout, folder, prompts)
    assert "2.png: missing" in found and "0002.png: of no prompt_id" in found
    many = tmp_path / "data"
    many.mkdir()
    wise_prompts(many / "a.json")
    wise_prompts(many / "b.json")
    with pytest.raises(UserError, match="id '1' is there twice"):
        layout.items(many)
    # All of the lists once more.
    (many / "b.json").rename(many / "merge.json")
    assert [item.id for item in layout.items(many)] == ["1", "2", "3"]
    for one in (Wise(samples=4), LmmsEval(samples=4)):
        with pytest.raises(UserError, match="one image of a prompt, not 4"):
            one.items(prompts)


def replayed(folder, task):
    """What the harness' log model takes from a folder: it passes over whatever it cannot use."""
    found = {}
    for file in folder.rglob("*.json"):
        try:
            log = json.loads(file.read_text())
            if log["args"]["limit"] is not None:
                continue
            if log["model_configs"]["task"] == task:
                found |= {entry["doc_id"]: entry["resps"][0][0] for entry in log["logs"]}
        except Exception:
            continue
    return found


def test_lmms_eval_replays_the_log(tmp_path):
    layout, prompts = LmmsEval(task="WISE"), lmms_prompts(tmp_path / "docs.jsonl")
    folder = fill(layout, prompts, tmp_path / "out")
    assert not problems(layout, folder, prompts)
    responses = replayed(folder, "WISE")
    assert list(responses) == [0, 4]
    [path] = json.loads(responses[4])["images"]
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(path)), picture(10))
    file = folder / "WISE.json"
    log = json.loads(file.read_text())

    def broken(expected, change):
        changed = json.loads(json.dumps(log))
        change(changed)
        file.write_text(json.dumps(changed))
        assert expected in problems(layout, folder, prompts), expected

    broken("no list of lists", lambda c: c["logs"][0].update(resps=["{}"]))
    assert replayed(folder, "WISE")[0] == "{"
    broken("limit is 3", lambda c: c["args"].update(limit=3))
    assert not replayed(folder, "WISE")
    broken("no response to doc_id 4", lambda c: c["logs"].pop())
    broken("of task 'mme'", lambda c: c["model_configs"].update(task="mme"))
    broken("not a log", lambda c: c.pop("logs"))
    broken("expected MMDD_hhmm", lambda c: c.update(time="noon"))
    bad = json.dumps({"images": ["a.png"]})
    broken("no absolute path", lambda c: c["logs"][1].update(resps=[[bad]]))
    broken("not the JSON text of an image", lambda c: c["logs"][1].update(resps=[["[]"]]))
    file.write_text(json.dumps(log))
    (folder / "WISE_4.png").unlink()
    assert "WISE_4.png: missing" in problems(layout, folder, prompts)


def test_bad_prompt_files_say_where(tmp_path):
    path = tmp_path / "p"
    path.write_text('{"tag": "a", "include": [], "prompt": "b"}\n{"tag": 1}\n')
    with pytest.raises(UserError, match="p:2: expected an object with 'tag', str"):
        GenEval().items(path)
    path.write_text("nonsense")
    for layout in (GenEval(), Dpg(), Wise(), LmmsEval()):
        with pytest.raises(UserError, match="not JSON"):
            layout.items(path)
    path.write_text("")
    with pytest.raises(UserError, match="no prompts"):
        GenEval().items(path)
    with pytest.raises(UserError, match="no such folder"):
        check_folder(GenEval(), tmp_path / "none", geneval_prompts(tmp_path / "e.jsonl"))


def test_tiles():
    grid = tiled([picture(0, channels=1)] * 3, 2)
    assert grid.shape == (16, 16, 1) and not grid[8:, 8:].any()
    np.testing.assert_array_equal(grid[8:, :8], picture(0, channels=1))
