"""The benchmarks' own arithmetic, and their shapes."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from starflow2_jax.data.decoding import decode
from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.models.starflow import ImageFlow

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flow_speed():
    return script("flow_speed")


def test_ratio_is_the_median_of_the_pairs(flow_speed):
    # 1 s at 105 GFLOP/s is as fast as 0.5 s at 210; the rate belongs to its own call.
    pairs = [(1.0, 105.0), (0.25, 210.0), (8.0, 210.0)]
    timings = [flow_speed.Timing(*pair) for pair in pairs]
    assert flow_speed.ratio(timings, 0.5) == 1.0
    assert flow_speed.ratio(timings[:1], 1.0) == 0.5
    row = flow_speed.row("x", timings, 0.5)
    assert (row["value"], row["unit"], row["gflops"], row["ratio"]) == (1.0, "s", 210.0, 1.0)


def test_real_timings_make_a_row(flow_speed):
    x = jnp.ones((64, 64))
    call = jax.jit(lambda x: x @ x)
    timings = flow_speed.measure(lambda: call(x), flow_speed.product_of(64), pairs=5, side=64)
    assert len(timings) == 5
    assert all(t.seconds > 0 and t.gflops > 0 for t in timings)
    assert flow_speed.row("x", timings, 1.0)["ratio"] > 0


@pytest.mark.slow
def test_every_row_of_the_release_has_a_program_of_its_size(flow_speed):
    sizes = {"starflow": 9.50e6, "tarflow": 9.79e6}
    for name, case in flow_speed.cases().items():
        model = nnx.eval_shape(lambda c=case: ImageFlow(c.config, rngs=nnx.Rngs(0)))
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        assert count == pytest.approx(sizes[name], abs=0.005e6)
        # Every program traces: guidance, cache and Jacobi of these shapes fit together.
        found = set()
        for what, function, args in flow_speed.programs(case, flow_speed.random_model(case.config)):
            if what in flow_speed.RELEASE[name]:
                jax.eval_shape(function, *args)
                found.add(what)
        assert found == set(flow_speed.RELEASE[name])


@pytest.mark.slow
def test_every_kind_of_source_is_timed(tmp_path, monkeypatch, capsys):
    """On a few records; the pipeline's images are those that Pillow makes."""
    data_speed = script("data_speed")
    monkeypatch.setattr("sys.argv", ["data_speed.py", "--records", "20", "--dir", str(tmp_path)])
    data_speed.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"].split(",")[0] for row in rows] == list(data_speed.WRITERS)
    assert all(row["value"] > 0 and row["peer"] > 0 and row["ratio"] > 0 for row in rows)
    assert not list(tmp_path.iterdir())
    for path in data_speed.write_jpegs(tmp_path, 4):
        ours = decode(path.read_bytes(), ImageShape(256, 256, 3, 16))
        theirs = data_speed.with_pillow(path)
        np.testing.assert_array_equal(ours, theirs)


# The table of docs/scale.md, against what a run has to keep to.

# MFU of stage 3 at most, by roofline: everything overlapped, and the interconnect not at all.
MFU_BOUNDS = {"v5p": (0.85, 0.75), "v6e": (0.80, 0.50), "v5e": (0.85, 0.55)}


@pytest.fixture(scope="module")
def scale():
    return script("scale")


def table_rows(scale):
    """The rows of the table, each as a dictionary by the heads of the columns."""
    inside = scale.TABLE.read_text().split(scale.BEGIN)[1].split(scale.END)[0]
    lines = [line for line in inside.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set(cells[1]) == {"---"} and {len(row) for row in cells} == {10}
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def leading(text):
    """The number that a text begins with."""
    return float(text.split()[0])


def check_row(row):
    """Fails where a row of the table breaks a bound."""
    used, there = map(float, row["memory GB"].split("/"))
    assert used <= there, row
    mesh, *remat = row["mesh; remat; parts"].split("; ")
    work = row["compiled / model FLOPs"]
    assert work != "does not fit", row
    if row["program"] == "decode":
        assert leading(work.removeprefix("moves ")) <= 1.10, row
        return
    full = remat[0] == "full"
    assert 0.9 <= leading(work) <= (1.35 if full else 1.10), row
    chip = row["topology"].split("slices of ")[-1].split(":")[0]
    seven = "starflow2_7b.py" in row["`starflow2 plan`"]
    if row["program"] == "joint" and chip in MFU_BOUNDS and seven and not full:
        overlapped, apart = MFU_BOUNDS[chip]
        assert float(row["MFU at most"]) >= overlapped, row
        assert float(row["the same, interconnect apart"]) >= apart, row


def test_the_scale_table_is_whole_and_keeps_to_the_bounds(scale):
    rows = table_rows(scale)
    assert [row["`starflow2 plan`"].strip("`") for row in rows] == [
        " ".join(command) for command in scale.commands()
    ]
    for row in rows:
        check_row(row)


@pytest.mark.parametrize(
    "column, value",
    [
        ("memory GB", "17.3 / 17.2"),
        ("compiled / model FLOPs", "does not fit"),
        ("compiled / model FLOPs", "1.101 (0.052 in kernels)"),
        ("MFU at most", "0.84"),
        ("the same, interconnect apart", "0.54"),
    ],
)
def test_a_row_that_breaks_a_bound_is_seen(scale, column, value):
    row = table_rows(scale)[0]
    assert (row["program"], row["topology"]) == ("joint", "v5e:16x16")
    with pytest.raises(AssertionError):
        check_row(row | {column: value})


def test_the_scale_table_is_not_cut_short(scale, tmp_path, monkeypatch, capsys):
    table = tmp_path / "scale.md"
    table.write_text(scale.TABLE.read_text())
    monkeypatch.setattr(scale, "TABLE", table)
    monkeypatch.setattr(scale, "line", lambda arguments, plan: f"| {arguments} |")
    rows = [{"name": " ".join(command), "plan": {}} for command in scale.commands()]
    before = table.read_text()
    for some in ([], rows[:1], rows[1:]):
        scale.write_table(some)
        assert table.read_text() == before and "stays as it is" in capsys.readouterr().out
    scale.write_table(rows)
    found = table.read_text()
    assert found != before and all(f"| {row['name']} |\n" in found for row in rows)
    assert found.split(scale.BEGIN)[0] == before.split(scale.BEGIN)[0]
    assert found.split(scale.END)[1] == before.split(scale.END)[1]
