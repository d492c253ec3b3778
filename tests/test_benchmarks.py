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
    timings = flow_speed.measure(lambda: call(x), pairs=5, side=64)
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
