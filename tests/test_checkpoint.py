import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore

from starflow2_jax.errors import UserError
from starflow2_jax.training import digest, tree_files
from starflow2_jax.training.checkpoint import Checkpoints, checksum, load_tree, save_tree


def mesh_of(count):
    return jax.make_mesh(
        (count,),
        ("fsdp",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:count],
    )


def make_state(offset=0.0, devices=8):
    mesh = mesh_of(devices)
    weights = jnp.arange(64.0).reshape(16, 4) / 7 + offset
    trainable = {
        "deep": {"kernel": jax.device_put(weights, jax.NamedSharding(mesh, jax.P("fsdp")))},
        "layers": {0: jnp.full(3, offset, jnp.bfloat16), 1: jnp.ones(3, jnp.bfloat16)},
    }
    return {
        "step": jnp.int32(offset),
        "trainable": trainable,
        "ema": jax.tree.map(lambda x: x * 2, trainable),
        "opt_state": optax.adamw(1e-3).init(trainable),
        "seed": np.uint32(7),
    }


def abstract_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        state,
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def make_data():
    return grain.MapDataset.range(100).seed(0).shuffle().repeat().batch(4).to_iter_dataset()


def test_state_iterator_and_metadata_come_back(tmp_path):
    state, data = make_state(3.0), make_data()
    iterator = iter(data)
    next(iterator)
    metadata = {"stage": "joint", "config": {"a": [1, None, 0.1]}}
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.save(5, state, iterator, metadata)
        following = next(iterator)  # at once: the save is still running
        assert checkpoints.latest() == 5
        assert checkpoints.metadata(5) == metadata
        fresh = iter(data)
        restored, found = checkpoints.restore(5, abstract_of(state), fresh)
    assert found == metadata
    assert_same(restored, state)
    kernel = restored["trainable"]["deep"]["kernel"]
    assert kernel.sharding == state["trainable"]["deep"]["kernel"].sharding
    assert next(fresh).tolist() == following.tolist()


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    state = {"w": jnp.arange(2_000_000.0)}
    expected = checksum(state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        assert checksum(checkpoints.restore(1, state)[0]) == expected


def test_restore_onto_another_mesh(tmp_path):
    state = make_state(devices=8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        restored, _ = checkpoints.restore(1, abstract_of(make_state(devices=2)))
    assert_same(restored, state)
    assert len(restored["trainable"]["deep"]["kernel"].sharding.device_set) == 2


def test_which_steps_stay(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, keep_every=10) as checkpoints:
        for step in (5, 10, 12, 14, 16):
            assert checkpoints.save(step, {"a": jnp.int32(step)})
        assert checkpoints.steps() == [10, 14, 16]
        # An existing step stays as it is; an older one can be written still.
        assert not checkpoints.save(16, {"a": jnp.int32(0)})
        assert int(checkpoints.restore(16, {"a": jnp.int32(0)})[0]["a"]) == 16
        assert checkpoints.save(15, {"a": jnp.int32(15)})
        assert 15 in checkpoints.steps()


def test_a_reader_beside_a_running_training(tmp_path):
    with pytest.raises(UserError, match="no checkpoint directory"):
        Checkpoints(tmp_path / "none", read_only=True)
    with Checkpoints(tmp_path) as writer:
        writer.save(1, {"a": jnp.int32(1)})
        writer.wait()
        running = tmp_path / "2.orbax-checkpoint-tmp"
        running.mkdir()
        with Checkpoints(tmp_path, keep_last=1, read_only=True) as reader:
            assert reader.latest() == 1
            writer.save(3, {"a": jnp.int32(3)})
            writer.wait()
            assert reader.steps() == [1, 3]
            with pytest.raises(ValueError, match="reading only"):
                reader.save(4, {"a": jnp.int32(4)})
        assert running.exists()


@pytest.mark.parametrize("opened", [False, True])
def test_a_step_that_is_deleted_while_a_reader_looks(tmp_path, monkeypatch, opened):
    with Checkpoints(tmp_path, best_by="loss") as writer:
        for step in (1, 2):
            writer.save(step, {"a": jnp.int32(step)}, measured={"loss": 1.0})
        names = type(writer._manager._step_name_format)
    listing = names.find_all

    def find_all(self, base):
        found = list(listing(self, base))
        shutil.rmtree(tmp_path / "1", ignore_errors=True)
        return found

    if opened:
        reader = Checkpoints(tmp_path, read_only=True, best_by="loss")
    monkeypatch.setattr(names, "find_all", find_all)
    if not opened:
        reader = Checkpoints(tmp_path, read_only=True, best_by="loss")
    with reader:
        assert reader.steps() == [2]


def bytes_read():
    metrics = tensorstore.experimental_collect_matching_metrics(
        "/tensorstore/kvstore/file/bytes_read"
    )
    return sum(value["value"] for metric in metrics for value in metric["values"])


def test_weights_alone(tmp_path):
    state = make_state(2.0)
    noise = np.random.default_rng(0).bytes(4_000_000)
    state["opt_state"] = {"mu": np.frombuffer(noise, np.uint8)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, metadata={"stage": "t2i"})
        checkpoints.wait()
        before = bytes_read()
        weights, metadata = checkpoints.restore_weights_only(1, "ema", "trainable")
        assert 0 < bytes_read() - before < 1_000_000
        assert metadata == {"stage": "t2i"} and sorted(weights) == ["ema", "trainable"]
        layer = weights["ema"]["layers"]["0"]
        assert isinstance(layer, np.ndarray) and layer.dtype == jnp.bfloat16
        assert checksum(weights["ema"]) == checksum(state["ema"])
        # On devices, in another dtype.
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), state["ema"]
        )
        weights, _ = checkpoints.restore_weights_only(1, "ema", abstract={"ema": abstract})
        assert_same(weights["ema"], jax.tree.map(lambda x: x.astype(jnp.float32), state["ema"]))
        with pytest.raises(
            UserError, match="has no emma; it has ema, opt_state, seed, step, train"
        ):
            checkpoints.restore_weights_only(1, "emma")


def test_another_tree_lists_all_differences(tmp_path):
    state = {"a": jnp.zeros(3), "b": {"c": jnp.zeros(2), "d": jnp.zeros(1)}}
    wanted = {"a": jnp.zeros(4), "b": {"c": jnp.zeros(2, jnp.int32), "e": jnp.zeros(1)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        with pytest.raises(UserError) as error:
            checkpoints.restore(1, wanted)
    for part in (
        str(tmp_path / "1"),
        "b/e is missing",
        "b/d is not wanted",
        "a has shape (3,), wanted (4,)",
        "b/c is float32, wanted int32",
    ):
        assert part in str(error.value)


def test_a_missing_step_names_those_that_exist(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="no checkpoint of step 1; it has none"):
            checkpoints.restore(1, {"a": jnp.zeros(1)})
        checkpoints.save(2, {"a": jnp.zeros(1)})
        with pytest.raises(UserError, match="no checkpoint of step 1; it has of 2"):
            checkpoints.restore(1, {"a": jnp.zeros(1)})


def test_another_format_version(tmp_path, monkeypatch):
    state = {"a": jnp.zeros(1)}
    monkeypatch.setattr(tree_files, "FORMAT_VERSION", 99)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, state)
    save_tree(tmp_path / "tree", state, {})
    monkeypatch.undo()
    with Checkpoints(tmp_path / "run") as checkpoints:
        for restore in (
            lambda: checkpoints.restore(1, state),
            lambda: checkpoints.restore_weights_only(1, "a"),
            lambda: load_tree(tmp_path / "tree"),
        ):
            with pytest.raises(UserError, match="has format version 99, this package reads 1"):
                restore()
    with pytest.raises(ValueError, match="taken"):
        save_tree(tmp_path / "other", state, {"format_version": 3})


class ElasticIterator(grain.DatasetIterator):
    """Each process counts on by itself; their sum is the position."""

    def __init__(self):
        super().__init__()
        self.at = 0

    def __next__(self):
        self.at += 1
        return self.at

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]

    def set_states(self, states):
        self.at = sum(state["at"] for state in states)


def test_iterator_of_other_process_counts(tmp_path):
    state, data = {"a": jnp.zeros(1)}, make_data()
    with Checkpoints(tmp_path) as checkpoints:
        for step, iterator in ((1, iter(data)), (2, ElasticIterator())):
            next(iterator)
            checkpoints.save(step, state, iterator)
        checkpoints.save(3, state)
        checkpoints.wait()
        for step in (1, 2):
            folder = tmp_path / str(step) / "data"
            content = (folder / "process_0-of-1.json").read_text()
            (folder / "process_0-of-1.json").unlink()
            for index in range(2):
                (folder / f"process_{index}-of-2.json").write_text(content)
        with pytest.raises(UserError, match="saved by 2 processes, .* cannot continue in 1"):
            checkpoints.restore(1, state, iter(data))
        fresh = ElasticIterator()
        checkpoints.restore(2, state, fresh)
        assert fresh.at == 2
        with pytest.raises(UserError, match="saved without one"):
            checkpoints.restore(3, state, iter(data))
        (tmp_path / "2" / "data" / "process_1-of-2.json").unlink()
        with pytest.raises(UserError, match="damaged or missing.*1 of 2 positions"):
            checkpoints.restore(2, state, ElasticIterator())


def test_an_iterator_on_another_mesh(tmp_path, monkeypatch):
    # As many processes as before, but each of them holds other rows now.
    state, saved = {"a": jnp.zeros(1)}, ElasticIterator()
    next(saved)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, saved)
        checkpoints.wait()
        folder = tmp_path / "1" / "data"
        (folder / "process_0-of-1.json").rename(folder / "process_0-of-2.json")
        (folder / "process_1-of-2.json").write_text('{"at": 10}')
        monkeypatch.setattr("starflow2_jax.training.checkpoint.jax.process_count", lambda: 2)
        fresh = ElasticIterator()
        checkpoints._restore_iterator(1, fresh)
        assert fresh.at == 11


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("item", ["metadata", "data", "state", "_METADATA"])
@pytest.mark.parametrize("harm", ["delete", "truncate", "flip"])
# Orbax's reader threads may still call back into the loop that failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint(tmp_path, item, harm, caplog):
    state, data = make_state(1.0), make_data()
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, iter(data))
    pattern = {
        "metadata": "metadata/metadata",
        "data": "data/process*",
        "state": "state/d/*",
        "_METADATA": "state/_METADATA",
    }[item]
    (file,) = (tmp_path / "2").glob(pattern)
    content = file.read_bytes()
    middle = len(content) // 2
    if harm == "delete":
        file.unlink()
    elif harm == "truncate":
        file.write_bytes(content[:middle])
    else:
        flipped = bytes([content[middle] ^ 0xFF])
        file.write_bytes(content[:middle] + flipped + content[middle + 1 :])
    before = contents(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 2
        with pytest.raises(UserError) as error:
            checkpoints.restore(2, abstract_of(state), iter(data))
        message = str(error.value)
        assert f"checkpoint {tmp_path / '2'} cannot be read" in message and "\n" not in message
        assert "delete that step directory to fall back to step 1" in message
        # The step before is still good.
        assert_same(checkpoints.restore(1, abstract_of(state), iter(data))[0], state)
    assert contents(tmp_path) == before
    assert not [record for record in caplog.records if record.name == "asyncio"]


def run_until_killed(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


# Orbax renames each item of a step, then the step itself: the last rename is the commit.
@pytest.mark.parametrize("fatal", ["item", "commit"])
def test_killed_in_the_middle_of_a_save(tmp_path, fatal):
    run_until_killed(f"""
        import os, signal
        import jax.numpy as jnp
        from starflow2_jax.training.checkpoint import Checkpoints

        rename = os.rename

        def kill(source, target, *args, **kwargs):
            committing = str(target).endswith("/2")
            if "/2" in str(source) and committing == ({fatal!r} == "commit"):
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(source, target, *args, **kwargs)

        os.rename = kill
        checkpoints = Checkpoints({str(tmp_path)!r})
        for step in (1, 2):
            checkpoints.save(step, {{"w": jnp.arange(1000.0) * step}}, metadata={{"step": step}})
            checkpoints.wait()
    """)
    left = [path.name for path in tmp_path.iterdir()]
    assert "2" not in left and len(left) == 2
    expected = {"w": jnp.arange(1000.0)}
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() == 1
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        restored, metadata = checkpoints.restore(1, expected)
        assert_same(restored, expected)
        assert metadata == {"step": 1}
        # What was left of step 2 is in nobody's way.
        assert checkpoints.save(2, expected)
        assert checkpoints.steps() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_killed_in_the_middle_of_an_export(tmp_path):
    path = tmp_path / "weights"
    run_until_killed(f"""
        import os, signal
        import jax.numpy as jnp
        from starflow2_jax.training.checkpoint import save_tree

        rename = os.rename

        def kill(source, target, *args, **kwargs):
            if str(target) == {str(path)!r}:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(source, target, *args, **kwargs)

        os.rename = kill
        save_tree({str(path)!r}, {{"w": jnp.arange(1000.0)}}, {{}})
    """)
    assert not path.exists() and list(tmp_path.iterdir())
    save_tree(path, {"w": jnp.arange(3.0)}, {})
    assert checksum(load_tree(path)[0]) == checksum({"w": jnp.arange(3.0)})
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_disk_errors_are_clear(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_tree(tmp_path / "file" / "tree", {"a": jnp.zeros(1)}, {})
    with pytest.raises(UserError, match="cannot write checkpoints"):
        Checkpoints(tmp_path / "file" / "run")


def test_export(tmp_path):
    tree = make_state(1.0)["trainable"]
    path = tmp_path / "new" / "vlm"
    save_tree(path, tree, {"name": "tiny"})
    loaded, metadata = load_tree(path)
    assert metadata == {"name": "tiny"}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded))
    assert checksum(loaded) == checksum(tree)
    sharded, _ = load_tree(path, abstract_of(tree))
    assert_same(sharded, tree)
    assert sharded["deep"]["kernel"].sharding == tree["deep"]["kernel"].sharding
    half, _ = load_tree(
        path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float16"), tree)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype("float16")}
    with pytest.raises(UserError, match="already exists"):
        save_tree(path, tree, {})
    save_tree(path, {"a": jnp.ones(2)}, {"name": "other"}, overwrite=True)
    assert load_tree(path)[1] == {"name": "other"}
    assert [p.name for p in path.parent.iterdir()] == ["vlm"]
    with pytest.raises(UserError, match="b is missing, a is not wanted"):
        load_tree(path, {"b": jnp.ones(2)})
    (file,) = path.glob("tree/d/*")
    file.unlink()
    with pytest.raises(UserError, match="damaged or missing; write or convert them again"):
        load_tree(path)
    with pytest.raises(UserError, match="there is no directory"):
        load_tree(tmp_path / "none")


def test_checksum():
    tree = make_state(1.0)["trainable"]
    expected = checksum(tree)
    assert len(expected) == 64
    host = jax.tree.map(np.asarray, tree)
    host["layers"] = {"1": host["layers"][1], "0": host["layers"][0]}
    assert checksum(host) == expected
    kernel = host["deep"]["kernel"]
    for other in (
        kernel.reshape(4, 16),
        kernel.astype(np.float64),
        kernel.T.copy().T + np.float32(1e-6),
        kernel.view(np.int32),
    ):
        assert checksum({**host, "deep": {"kernel": other}}) != expected
    assert checksum({**host, "deep": {"kernel": np.asfortranarray(kernel)}}) == expected
    assert checksum({**host, "dep": host["deep"]}) != expected
    assert checksum({"a": np.float32(1)}) == checksum({"a": jnp.float32(1)})


def test_checksum_by_parts(monkeypatch):
    tree = make_state(1.0)["trainable"]
    tree["scalar"] = jax.device_put(jnp.float32(3), jax.NamedSharding(mesh_of(8), jax.P()))
    expected = checksum(tree)
    # As if parts of it lay on other hosts, with parts of 3 rows (16 = 5 * 3 + 1).
    replicated = jax.NamedSharding(mesh_of(8), jax.P())
    tree["layers"] = jax.device_put(tree["layers"], replicated)
    monkeypatch.setattr(digest, "_is_local", lambda leaf: False)
    monkeypatch.setattr(digest, "_CHUNK_BYTES", 3 * 4 * 4)
    assert checksum(tree) == expected


def test_the_best_step_stays(tmp_path):
    state = {"w": jnp.arange(3.0)}
    losses = {1: 3.0, 2: 1.5, 3: float("nan"), 4: 2.0, 5: None}
    for steps in ((1, 2, 3), (4, 5)):  # the second time, the first ones' losses are read again
        with Checkpoints(tmp_path, keep_last=1, best_by="loss") as checkpoints:
            for step in steps:
                measured = {} if losses[step] is None else {"loss": losses[step]}
                checkpoints.save(step, state, measured=measured)
            assert checkpoints.steps() == [2, steps[-1]]
            assert checkpoints.best() == 2
    with Checkpoints(tmp_path, keep_last=1, best_by="loss") as checkpoints:
        checkpoints.save(6, state, measured={"loss": 1.0})
        assert checkpoints.steps() == [6] and checkpoints.best() == 6
    with Checkpoints(tmp_path / "none", best_by="loss") as checkpoints:
        checkpoints.save(1, state)
        assert checkpoints.best() is None


def test_ambiguous_trees_are_refused():
    with pytest.raises(ValueError):
        checksum({1: jnp.zeros(1), "1": jnp.zeros(1)})
    with pytest.raises(ValueError, match="no unique path"):
        checksum(jnp.zeros(1))


TWO_PROCESSES = """
    import sys
    from pathlib import Path

    import jax

    port, index, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    jax.distributed.initialize(f"localhost:{port}", 2, index)

    import grain
    import jax.numpy as jnp
    import numpy as np

    from starflow2_jax.training import checkpoint, digest

    def make(mesh_shape, offset=0.0):
        mesh = jax.make_mesh(
            mesh_shape, ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
        )
        values = np.arange(44, dtype=np.float32).reshape(22, 2) + offset
        put = lambda x, *spec: jax.make_array_from_callback(
            x.shape, jax.NamedSharding(mesh, jax.P(*spec)), lambda i: x[i]
        )
        tree = {"w": put(values, "a"), "s": put(np.float32(offset))}
        return tree, {"w": values, "s": np.float32(offset)}

    digest._CHUNK_BYTES = 3 * 8
    state, host = make((2, 1))
    assert not state["w"].is_fully_addressable
    assert checkpoint.checksum(state) == checkpoint.checksum(host)

    data = grain.MapDataset.range(100).shuffle(seed=0)[index::2].batch(2).to_iter_dataset()
    iterator = iter(data)
    with checkpoint.Checkpoints(folder / "run") as checkpoints:
        for step in (1, 2):
            next(iterator)
            checkpoints.save(step, state, iterator, {"step": step})
        following = next(iterator)
        assert checkpoints.latest() == 2
        abstract, _ = make((1, 2), 5.0)
        fresh = iter(data)
        restored, metadata = checkpoints.restore(2, abstract, fresh)
        assert metadata == {"step": 2}
        assert restored["w"].sharding == abstract["w"].sharding
        assert checkpoint.checksum(restored) == checkpoint.checksum(host)
        assert next(fresh).tolist() == following.tolist()

    for offset in (0.0, 1.0):
        state, host = make((2, 1), offset)
        checkpoint.save_tree(folder / "tree", state, {}, overwrite=True)
    tree, _ = checkpoint.load_tree(folder / "tree", state)
    assert checkpoint.checksum(tree) == checkpoint.checksum(host)
"""


@pytest.mark.distributed
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES), str(port)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(index), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    # One process reads what two wrote.
    weights, _ = load_tree(tmp_path / "tree")
    assert weights["w"].shape == (22, 2) and weights["s"] == 1
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.restore_weights_only(2, "w")[0]["w"][21, 1] == 43
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tree"]
