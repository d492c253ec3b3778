"""Planning: HLO read and counted, against programs counted by hand; what a topology needs."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from starflow2_jax.cli.main import main
from starflow2_jax.errors import UserError
from starflow2_jax.planning import compiler, hlo, report, roofline, search, topology
from starflow2_jax.planning import plan as planning
from starflow2_jax.planning.cost import Collective, Cost, KernelCall, cost, groups

ROOT = pathlib.Path(__file__).parents[1]
HLO = ROOT / "tests" / "hlo"

# A loop of 5 turns over a layer [64, 32] of stacked weights, which lies in a fusion; a batched
# product of 3 as TPUs write them; and a branch.
LOOP = (HLO / "loop.txt").read_text()


def test_a_loop_is_counted_as_often_as_it_runs():
    module = hlo.parse(LOOP)
    assert module.partitions == 4
    assert [(run.computation.name, run.times) for run in hlo.runs(module)] == [
        ("main", 1.0),
        ("body", 5.0),
    ]
    found = cost(module, {"data": 2, "fsdp": 2})
    in_loop = 5 * 2 * 16 * 64 * 32
    # Each of the 3 results meets one of the 3 dilated inputs of its window.
    batched = 3 * 2 * 8 * 8 * 16
    assert found.matrix_flops == in_loop + batched
    # The all-reduce of 2 devices sends 2 x 1/2 of its 1024 bytes, 5 times.
    assert found.bytes_by_collective() == {"all-reduce over fsdp": 5 * 1024}
    # In the loop: a slice of the weights read with its tiles filled up to 128 lanes, a result
    # written, and both sides of the all-reduce. Behind it: the operands; the result is in S(1).
    lanes = lambda rows: rows * 128
    loop = 5 * 2 * (lanes(64) + lanes(16) + 2 * lanes(16))
    assert found.memory_bytes == loop + 4 * 3 * (lanes(8) + lanes(16))


def test_loops_with_and_without_a_bound():
    known = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert hlo.runs(hlo.parse(known))[1].times == 7
    goes_on = LOOP.replace("direction=LT", "direction=NE")
    module = hlo.parse(goes_on)
    assert hlo.runs(module)[1].times == 1
    [turn] = hlo.runs_of_open_loop(module)
    assert turn.computation.name == "body"
    found = cost(module, {"data": 2, "fsdp": 2}, open_loop=True)
    assert found.matrix_flops == 2 * 16 * 64 * 32
    with pytest.raises(ValueError, match="0 loops without a bound"):
        hlo.runs_of_open_loop(hlo.parse(LOOP))


ASYNC = (HLO / "async.txt").read_text()


def test_a_collective_in_pieces_counts_once_and_a_reduce_scatter_is_one():
    found = cost(hlo.parse(ASYNC), {"fsdp": 2, "columns": 4}, [0, 0, 0, 0, 1, 1, 1, 1])
    assert found.bytes_by_collective() == {
        "reduce-scatter over columns": 64 * 64 * 4 * 3 / 4,
        "all-gather over fsdp+columns": 64 * 64 * 2 * 7 / 8,
    }
    gather, scatter = found.collectives
    assert (gather.group, gather.crosses) == (8, 2)
    assert (scatter.group, scatter.crosses) == (4, 1)


def test_a_collective_that_another_core_does():
    found = cost(hlo.parse((HLO / "sparsecore.txt").read_text()), {"fsdp": 4, "columns": 2})
    assert found.bytes_by_collective() == {"all-gather over columns": 16 * 128 * 2 / 2}


def test_sums_over_slices_go_across_the_network():
    module = hlo.parse((HLO / "slices.txt").read_text())
    found = cost(module, {"data": 2, "fsdp": 4}, [0, 0, 0, 0, 1, 1, 1, 1])
    sent = 2 * 8 * 128 * 4 / 2
    assert found.bytes_by_collective() == {"all-reduce over data": sent}
    times = roofline.roofline(found, CHIP, 0.0)
    assert (times.links, times.network) == (0.0, sent / CHIP.network_bandwidth)


@pytest.mark.parametrize(
    "text, ids",
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_forms_of_replica_groups(text, ids):
    np.testing.assert_array_equal(groups(text), ids)


def test_arrays_of_a_shape_and_a_dtype_that_is_not_known():
    found = hlo.arrays_of("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, token[], f8e8m0fnu[4])")
    assert [(array.dtype, array.bytes, array.space) for array in found] == [
        ("bf16", 12, 1),
        ("token", 0, 0),
        ("f8e8m0fnu", 4, 0),
    ]
    with pytest.raises(ValueError, match="dtype f9, whose size is not known"):
        hlo.arrays_of("f9[4]")


def test_an_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="unknown form"):
        groups("replica_groups=everyone")
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty\n")


UPDATE = (HLO / "update.txt").read_text()


def test_an_update_in_place_moves_the_update():
    found = cost(hlo.parse(UPDATE), {"data": 1})
    assert found.memory_bytes == 2 * 8 * 128 * 4 + 4  # the update read and written, the index read


def test_of_several_results_one_may_be_an_update_in_place():
    found = cost(hlo.parse((HLO / "updates.txt").read_text()), {"data": 1})
    piece = 8 * 128 * 4
    # A slice of the second operand read, once; written into the stack, and doubled beside it.
    assert found.memory_bytes == 3 * piece + 4


def test_what_a_fusion_in_a_fusion_hands_on_is_read():
    found = cost(hlo.parse((HLO / "nested.txt").read_text()), {"data": 1})
    assert found.memory_bytes == 2 * (8 * 128 + 256 * 128 + 8 * 256)
    assert found.matrix_flops == 2 * 8 * 128 * 256


def test_a_compiled_program_is_counted_as_it_is_by_hand():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    layers, rows, width = 6, 16, 32

    def program(x, weights):
        def layer(x, weight):
            weight = jax.lax.with_sharding_constraint(weight, jax.P())
            return jnp.sin(x @ weight), None

        return jax.lax.scan(layer, x, weights)[0]

    place = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(*spec))
    )
    arguments = (
        place((rows, width), ("data", "fsdp")),
        place((layers, width, width), None, "fsdp"),
    )
    with jax.set_mesh(mesh):
        text = jax.jit(program).lower(*arguments).compile().as_text()
    found = cost(hlo.parse(text), dict(mesh.shape))
    assert found.matrix_flops == layers * 2 * (rows // 8) * width * width
    gathered = layers * width * width * 4 * 3 / 4
    assert found.bytes_by_collective() == {"all-gather over fsdp": gathered}


# Topologies and rates.


@pytest.mark.parametrize(
    "name, slices, message",
    [
        ("v9:4x4", 1, "no chip 'v9'; there are v5e"),
        ("v5e:4", 1, "expected 2 sizes behind the chip, as in v5e:4x4"),
        ("v5p:4x4", 1, "expected 3 sizes behind the chip, as in v5p:4x4x4"),
        ("v5e:0x4", 1, "has no devices"),
        ("h100:2x8", 2, "give GPUs more nodes"),
    ],
)
def test_topologies_that_there_are_not(name, slices, message):
    with pytest.raises(UserError, match=message):
        topology.parse(name, slices)


def test_topologies():
    assert topology.parse("v5e:16x16", 2).chips == 512
    seven = topology.parse("tpu7x:4x4x4")
    assert seven.chips == 64
    assert seven.chip.per_device().hbm_bytes == seven.chip.hbm_bytes / 2
    assert all(chip.source for chip in topology.CHIPS.values())


def test_peaks_of_devices_by_what_they_call_themselves():
    peak = topology.device_peak_flops
    assert (peak("TPU v5 lite"), peak("TPU v5"), peak("TPU7x")) == (197e12, 459e12, 1153.5e12)
    assert peak("NVIDIA H100 80GB HBM3") == topology.CHIPS["h100"].flops
    assert peak("cpu") is None


def test_without_a_compiler_a_line_says_what_to_install(capsys):
    command = ["plan", "--config", str(ROOT / "configs/starflow2_7b.py"), "--topology", "h100:4x8"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "starflow2-jax[gpu-plan]" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "message, sizes",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (128.00G) exceeds available HBM (15.75G).",
            (128.0, 15.75),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 41.72G of 31.24G hbm.", (41.72, 31.24)),
    ],
)
def test_what_does_not_fit(message, sizes):
    found = compiler.too_large(message)
    assert found == tuple(size * 2**30 for size in sizes)
    assert compiler.too_large("INTERNAL: something else (1.0G)") is None
    plan = report.Plan("joint", "v5e:4x4", {}, False, 41.72, 31.24, 10.0)
    assert "by 10.48 GB: 41.72 of 31.24 GB" in report.text(plan)


CHIP = topology.Chip("tpu", 100.0, 1e9, 50.0, 10.0, 1.0, "made up")


def test_roofline():
    found = Cost(1000.0, [], 200.0, [])
    times = roofline.roofline(found, CHIP, 800.0)
    assert (times.matrix, times.memory, times.links) == (10.0, 4.0, 0.0)
    assert (times.mfu, times.mfu_serial) == (0.8, 0.8)
    text = hlo.parse(ASYNC)
    inside = cost(text, {"fsdp": 2, "columns": 4})
    times = roofline.roofline(inside, CHIP, 0.0)
    assert times.links == sum(inside.bytes_by_collective().values()) / 10.0
    # Over two slices of 4, each device sends its own eighth to its peer, and the rest stays inside.
    across = cost(text, {"fsdp": 2, "columns": 4}, [0, 0, 0, 0, 1, 1, 1, 1])
    times = roofline.roofline(across, CHIP, 0.0)
    whole = 64 * 64 * 2
    assert times.network == pytest.approx(whole / 8 / 1.0)
    assert times.links == pytest.approx((whole * 6 / 8 + 64 * 64 * 4 * 3 / 4) / 10.0)
    assert times.seconds_serial == times.memory + times.links + times.network


@pytest.mark.parametrize(
    "kind, group, crosses, sent, outside",
    [
        # An array of 1; what leaves a slice, step by step. Gather: 1 of 16 parts to one peer.
        ("all-gather", 16, 2, 15 / 16, 1 / 16),
        ("all-gather", 16, 4, 15 / 16, 3 / 16),
        ("reduce-scatter", 16, 2, 15 / 16, 1 / 16),
        # Scattered inside to 1/8 each, which 2 devices sum: 2 x 1/2 of it.
        ("all-reduce", 16, 2, 2 * 15 / 16, 1 / 8),
        # 16 pieces of 1/16, 8 of them for the other slice.
        ("all-to-all", 16, 2, 15 / 16, 8 / 16),
        # One device of each slice: all of it.
        ("all-reduce", 4, 4, 2 * 3 / 4, 2 * 3 / 4),
        ("collective-permute", 2, 2, 1.0, 1.0),
    ],
)
def test_what_leaves_a_slice(kind, group, crosses, sent, outside):
    found = Cost(0.0, [], 0.0, [Collective(kind, ("fsdp",), group, crosses, sent, 1.0)])
    times = roofline.roofline(found, CHIP, 0.0)
    assert times.network * CHIP.network_bandwidth == pytest.approx(outside)
    inside = sent - outside if crosses < group else 0.0
    assert times.links * CHIP.link_bandwidth == pytest.approx(inside)


def searched(monkeypatch, name, answer, stage="joint"):
    """The settings that a search tries, what it says, and its plans; `answer` plans each."""
    request = planning.Request("c.py", [], name, 1, stage)
    config = ml_collections.ConfigDict({"stages": {"joint": {"batch": {"rows": 64}}}})
    tried, said = [], []

    def plan(one):
        tried.append(dict(one.overrides))
        return answer(len(tried))

    monkeypatch.setattr(search, "plan", plan)
    monkeypatch.setattr(search, "check_installed", lambda topology: None)
    try:
        found = search.search(request, config, topology.parse(name), said.append)
    except UserError as error:
        found = error
    return tried, said, found


def too_big(number):
    return report.Plan("joint", "h100:4x8", {}, False, 100.0, 80.0, 1.0)


def test_a_search_has_data_over_the_nodes(monkeypatch):
    tried, _, _ = searched(monkeypatch, "h100:4x8", too_big)
    assert {one["mesh.data"] for one in tried} == {"4"}
    assert {"8"} < {one["mesh.fsdp"] for one in tried}
    tried, _, _ = searched(monkeypatch, "v5e:4x8", too_big)
    assert {one["mesh.data"] for one in tried} == {"1"}


def test_a_search_says_what_is_wrong_with_all(monkeypatch):
    def wrong(number):
        raise UserError(f"wrong {number}")

    def one_fails(number):
        raise RuntimeError("compiler") if number == 2 else UserError("wrong")

    tried, said, found = searched(monkeypatch, "h100:4x8", wrong)
    assert isinstance(found, UserError) and str(found) == "wrong 1" and len(said) == len(tried)
    assert searched(monkeypatch, "h100:4x8", one_fails)[2] == []


def test_a_search_without_a_compiler_says_so_once(capsys):
    command = ["plan", "--config", str(ROOT / "configs/starflow2_7b.py"), "--topology", "h100:4x8"]
    assert main([*command, "--stage", "joint", "--search"]) == 2
    said = capsys.readouterr()
    assert "starflow2-jax[gpu-plan]" in said.err and said.err.count("\n") == 1 and not said.out


def test_numbers_that_cannot_be_written_are_said_before_compiling(tmp_path, monkeypatch, capsys):
    def compiles(request):
        raise AssertionError("this takes an hour")

    monkeypatch.setattr(planning, "plan", compiles)
    (tmp_path / "file").touch()
    command = ["plan", "--config", str(ROOT / "configs/starflow2_7b.py"), "--topology", "v5e:16x16"]
    for place in (tmp_path / "file" / "plan.json", tmp_path):
        assert main([*command, "--sample", "--json", str(place)]) == 2
        said = capsys.readouterr().err
        assert f"cannot write {place}" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_flops_of_kernels():
    q = hlo.Array("bf16", (2, 48, 1024, 64))
    mask = hlo.Array("s8", (1, 2, 2))
    call = KernelCall("splash_mha_fwd_segmented_residuals", (mask, q, q, q), 1.0)
    # Blocks of 512: 3 of the 4 are not masked whole; two products of each.
    assert roofline.kernel_flops(call) == 2 * 2 * 2 * 48 * 3 * 512 * 512 * 64
    positions_last = hlo.Array("bf16", (2, 48, 64, 1024))
    other = dataclasses.replace(call, operands=(mask, *(positions_last,) * 3))
    assert roofline.kernel_flops(other) == roofline.kernel_flops(call)
    for kind, products in {"dq": 3, "dkv": 4}.items():
        other = dataclasses.replace(call, name=f"splash_mha_{kind}_no_residuals")
        assert roofline.kernel_flops(other) * 2 == roofline.kernel_flops(call) * products
    with pytest.raises(ValueError, match="'unheard_of'"):
        roofline.kernel_flops(dataclasses.replace(call, name="unheard_of"))


def test_shapes_of_a_batch_are_those_of_the_pipeline():
    import resume_config

    from starflow2_jax.data.packing import BatchShape
    from starflow2_jax.planning.programs import batch_shapes

    config = resume_config.get_config()
    config.stages.joint.batch.targets = 48
    task = resume_config.make_task(config, None)
    batch = next(iter(task.batches("joint", False, 0)))
    image = jax.ShapeDtypeStruct(task.constants.shape, jnp.uint8)
    found = batch_shapes(BatchShape(**config.stages.joint.batch), image)
    assert set(found) == set(batch)
    for name, leaf in found.items():
        assert (leaf.shape, leaf.dtype) == (batch[name].shape, batch[name].dtype), name


# Compilers.


def run_plan(python, tmp_path, *arguments):
    """Of the smoke config: the JSON record, what was printed, and the exit code."""
    path = tmp_path / "plan.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):  # of tests that run what they compile
        environment.pop(name, None)
    config = ["--config", "configs/starflow2_7b.py", "--config.smoke=True"]
    run = subprocess.run(
        [python, "-m", "starflow2_jax", "plan", *config, *arguments, "--json", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert path.is_file(), run.stderr[-3000:]
    return json.loads(path.read_text()), run.stdout, run.returncode


@pytest.mark.slow
@pytest.mark.parametrize("which", [["--stage", "joint"], ["--sample"]], ids=["joint", "sample"])
def test_the_smoke_config_on_a_tpu_slice(tmp_path, which):
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.columns=2"] if which != ["--sample"] else []
    found, printed, status = run_plan(
        sys.executable, tmp_path, "--topology", "v5e:2x2", *which, *mesh
    )
    assert status == 0 and found["fits"]
    assert 0 < found["hbm_used_gb"] < found["hbm_gb"] < 17.2
    assert "step, all overlapped" in printed
    if which == ["--sample"]:
        assert found["bytes_moved"] > 0 and found["bytes_needed"] > 0
        assert found["mfu_bound"] is None
    else:
        assert found["kernels"]["splash_mha_dkv_segmented_no_residuals"] > 0
        assert 1.0 < found["compiled_flops"] / found["model_flops"]
        assert 0 < found["mfu_bound_serial"] <= found["mfu_bound"] <= 1
        kinds = {name.split(" over ")[0] for name in found["bytes_by_collective"]}
        assert {"all-gather", "reduce-scatter", "all-to-all"} <= kinds


@pytest.mark.skipif(
    "STARFLOW2_GPU_PYTHON" not in os.environ,
    reason="STARFLOW2_GPU_PYTHON: the Python of an environment with the extra gpu-plan",
)
def test_the_smoke_config_on_gpus(tmp_path):
    # Not among the slow tests, though it is: whoever names the environment wants to know.
    python = os.environ["STARFLOW2_GPU_PYTHON"]
    found, _, status = run_plan(python, tmp_path, "--topology", "h100:2x2", "--stage", "joint")
    assert status == 0 and found["fits"]
    assert found["seconds"]["links"] > 0 and found["seconds"]["network"] > 0  # in a node, between
    assert {name for name in found["kernels"] if name.startswith("__cudnn")}
