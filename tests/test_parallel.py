"""Meshes, shardings, and that eight devices compute what one does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from jax.sharding import PartitionSpec as P

from starflow2_jax.models.pretzel import Kind, Parts, Pretzel
from starflow2_jax.nn import partition
from starflow2_jax.parallel import rules
from starflow2_jax.parallel.mesh import AXES, MeshConfig, arrange, check_batch, make_mesh
from starflow2_jax.training.objective import ObjectiveConfig, objective

DEVICES = 8
LENGTH = 32


def eight():
    """The mesh tests' devices; fewer of them is a failure, not a reason to skip."""
    devices = jax.devices()
    assert len(devices) == DEVICES, f"these tests need {DEVICES} devices, got {len(devices)}"
    return devices


# The mesh.


@pytest.mark.parametrize(
    "config, sizes",
    [
        (MeshConfig(), (1, 8, 1, 1, 1)),
        (MeshConfig(data=2), (2, 4, 1, 1, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), (2, 2, 1, 2, 1)),
        (MeshConfig(fsdp=2, tensor=2, sequence=-1), (1, 2, 1, 2, 2)),
        (MeshConfig(data=8, fsdp=-1), (8, 1, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2, sequence=1), (2, 2, 1, 2, 1)),
    ],
)
def test_sizes_are_filled_in(config, sizes):
    assert config.sizes(8) == sizes


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(fsdp=4), "multiply to 4, but there are 8 devices"),
        (MeshConfig(data=3), "3, which does not divide 8"),
        (MeshConfig(data=-1), "only one size may be -1"),
        (MeshConfig(tensor=0), "a size is a positive number"),
        (MeshConfig(tensor=-2), "a size is a positive number"),
        (MeshConfig(data=16), "16, which does not divide 8"),
    ],
)
def test_sizes_that_do_not_fit(config, message):
    with pytest.raises(ValueError, match=message) as error:
        config.sizes(8)
    assert f"tensor={config.tensor}" in str(error.value)
    assert "\n" not in str(error.value)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "fake"
    device_kind: str = "fake"


def slices_of(config, slices, each=4):
    devices = [FakeDevice(s * each + i, s) for s in range(slices) for i in range(each)]
    return np.vectorize(lambda d: d.slice_index)(arrange(config, devices))


def test_data_lies_across_slices():
    where = slices_of(MeshConfig(data=2, fsdp=2, tensor=2), 2)
    assert where.shape == (2, 2, 1, 2, 1)
    np.testing.assert_array_equal(where, np.broadcast_to([[[[[0]]]], [[[[1]]]]], where.shape))
    # Without enough data, fsdp is the next to span them; a tensor group never does.
    where = slices_of(MeshConfig(data=2, fsdp=4, tensor=2), 4)
    assert (where == where[:, :, :1]).all()
    assert len(np.unique(where)) == 4
    assert set(where[0].ravel()).isdisjoint(where[1].ravel())


def test_a_mesh_that_slices_cannot_carry():
    with pytest.raises(ValueError, match="2 slices need data .* a multiple of 2"):
        slices_of(MeshConfig(fsdp=1, tensor=-1), 2)
    uneven = [FakeDevice(i, int(i > 4)) for i in range(8)]
    with pytest.raises(ValueError, match="slices of different sizes"):
        arrange(MeshConfig(), uneven)


@pytest.mark.distributed
def test_mesh_of_all_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2), eight())
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {
        "data": 2,
        "fsdp": 2,
        "columns": 1,
        "tensor": 1,
        "sequence": 2,
    }
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert set(mesh.devices.ravel()) == set(jax.devices())
    check_batch(8, mesh)
    with pytest.raises(ValueError, match=r"6 rows .* data x fsdp = 2 x 2 = 4 devices") as error:
        check_batch(6, mesh)
    assert "\n" not in str(error.value)


# Shardings.


@pytest.mark.distributed
def test_every_logical_name_is_in_the_table():
    names = set()
    for _, leaf in nnx.to_flat_state(
        nnx.state(nnx.eval_shape(lambda: Pretzel(tiny.config(), rngs=nnx.Rngs(0))))
    ):
        assert len(leaf.get_metadata()["logical"]) <= leaf.ndim
        names |= set(leaf.get_metadata()["logical"])
    assert names - {None} <= set(rules.RULES)
    mesh = make_mesh(MeshConfig(), eight())
    wrong = nnx.State({"a": nnx.Param(jnp.zeros((8,)), logical=("embbed",))})
    with pytest.raises(KeyError, match="embbed"):
        rules.shardings(wrong, mesh)


@pytest.mark.distributed
def test_parameters_are_born_sharded():
    cfg = tiny.config(shallow_layers=(1,), shallow_orders=("keep",))
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), eight())
    make = lambda: Pretzel(cfg, rngs=nnx.Rngs(3))
    model = rules.born_sharded(make, mesh)
    assert isinstance(model, Pretzel)
    whole = held = 0
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        shards = leaf[...].addressable_shards
        assert {s.device for s in shards} == set(mesh.devices.ravel())
        size = max(s.data.size for s in shards)
        # A head's bias and a start vector have C numbers; everything else is cut.
        if "embed" in leaf.get_metadata()["logical"]:
            assert size < leaf.size, path
        whole, held = whole + leaf.size, held + size
    assert held < whole / 4
    kernel = model.vlm.decoder.layers.attention.qkv.kernel[...]
    assert kernel.sharding.spec == P(None, "fsdp", ("columns", "tensor"))
    assert model.vlm.embedding[...].sharding.spec == P(None, ("fsdp", "columns"))
    # The values do not depend on the mesh, but for the last bit of a program of another shape.
    unsharded = tiny.jit(lambda: nnx.state(make()))()
    tiny.close_trees(nnx.state(model), unsharded, 1e-6)


@pytest.mark.distributed
def test_optimiser_state_is_sharded_as_its_parameters():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), eight())
    shapes = nnx.state(nnx.eval_shape(lambda: Pretzel(tiny.config(), rngs=nnx.Rngs(0))))
    state = jax.eval_shape(
        lambda p: {"step": jnp.int32(0), "p": p, "opt": optax.adamw(1e-3).init(p)}, shapes
    )
    found = rules.shardings(state, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    adam = found["opt"][0]
    wanted = jax.tree.leaves(found["p"])
    assert jax.tree.leaves(adam.mu) == jax.tree.leaves(adam.nu) == wanted
    assert any(not s.is_fully_replicated for s in wanted)
    assert found["step"].is_fully_replicated and adam.count.is_fully_replicated
    first = jax.tree.leaves(rules.abstract(state, mesh)["p"])
    assert [leaf.sharding for leaf in first] == wanted
    assert [leaf.shape for leaf in first] == [leaf.shape for leaf in jax.tree.leaves(shapes)]


def packed_rows(cfg, count=8):
    """Rows of 32 positions whose images lie across, or start at, the border of two shards of 16."""
    rows = []
    for r in range(count):
        shift = r % 4
        first = tiny.document(cfg, [2 + shift, "image", 1], 10 * r)  # 9 + shift positions
        second = tiny.document(cfg, [4 - (shift + r // 4) % 3, "image", 2, "image", 1], 10 * r + 1)
        rows.append([first, second])
    rows, x = tiny.pack(cfg, rows, LENGTH)
    border = np.asarray(rows.kinds)[:, LENGTH // 2 - 1 : LENGTH // 2 + 1] == Kind.LATENT
    assert border.all(1).any()  # an image on both sides
    assert (~border[:, 0] & border[:, 1]).any()  # one whose first token is the next shard's first
    assert (np.asarray(rows.segments).max(1) == 2).all()
    return rows, x


@pytest.mark.distributed
def test_batch_shardings():
    cfg = tiny.config()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), eight())
    batch = {"rows": packed_rows(cfg)[0], "images": np.zeros((8, 2, 4, 4, 3)), "seed": np.int32(0)}
    found = rules.batch_shardings(batch, mesh)
    assert found["rows"].tokens.spec == P(("data", "fsdp", "columns"))
    assert found["rows"].positions.spec == P(None, ("data", "fsdp", "columns"))
    assert found["images"].spec == P(("data", "fsdp", "columns"))
    assert found["seed"].is_fully_replicated
    placed = jax.device_put(batch, found)
    assert placed["rows"].positions.addressable_shards[0].data.shape == (3, 2, 32)
    on_host = rules.batch_shardings({"positions": np.zeros((8, 32, 3))}, mesh)
    assert on_host["positions"].spec == P(("data", "fsdp", "columns"))


@pytest.mark.distributed
def test_batches_of_one_process_are_placed_as_a_whole():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), eight())
    batch = {"tokens": np.arange(24).reshape(8, 3), "images": np.ones((8, 2, 4, 4, 3), np.uint8)}
    assert rules.local_rows(8, mesh) == slice(0, 8)
    placed = rules.place_batch(batch, 8, mesh)
    for name, leaf in placed.items():
        assert leaf.sharding == rules.batch_shardings(batch, mesh)[name]
        np.testing.assert_array_equal(leaf, batch[name])


@pytest.mark.distributed
def test_a_batch_that_the_mesh_does_not_divide():
    cfg = tiny.config()
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), eight())
    rows, x = packed_rows(cfg)
    six = jax.tree.map(lambda a: a[:, :6] if a.ndim == 3 else a[:6], rows)
    for batch in (six, {"x": x[:6]}):
        with pytest.raises(ValueError, match="a batch of 6 rows .* 2 x 4 = 8 devices"):
            rules.batch_shardings(batch, mesh)


def test_rules_without_a_mesh_change_nothing():
    x = jnp.ones((4, 4))
    assert partition.constrain(x, ("batch", None)) is x
    assert partition.axis_extent("length") == 1


# Eight devices against one.


def losses_and_gradients(state, rows, x, graphdef):
    def loss(state, x):
        model = nnx.merge(graphdef, state)
        return objective(model, rows, x, Parts(), ObjectiveConfig())

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)


@pytest.fixture(scope="module")
def unsharded():
    cfg = tiny.config()
    graphdef, state = nnx.split(tiny.pretzel(cfg))
    batch = packed_rows(cfg)
    run = tiny.jit(losses_and_gradients, static_argnums=3)
    return graphdef, state, batch, jax.device_get(run(state, *batch, graphdef))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(fsdp=8),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(fsdp=2, tensor=2, sequence=2),
        MeshConfig(data=2, fsdp=2, columns=2),
        MeshConfig(fsdp=2, columns=2, tensor=2),
    ],
    ids=[
        "fsdp",
        "data-fsdp-tensor",
        "fsdp-tensor-sequence",
        "data-fsdp-columns",
        "fsdp-columns-tensor",
    ],
)
def test_eight_devices_compute_what_one_does(unsharded, config, capfd):
    graphdef, state, batch, ((loss, metrics), gradients) = unsharded
    assert set(metrics) == {"loss_image", "loss_text", "latent_norm"}
    mesh = make_mesh(config, eight())
    of_state, of_batch = rules.shardings(state, mesh), rules.batch_shardings(batch, mesh)
    run = tiny.jit(
        losses_and_gradients, static_argnums=3, out_shardings=(None, (of_state, of_batch[1]))
    )
    placed = (jax.device_put(state, of_state), *jax.device_put(batch, of_batch))
    with rules.use(mesh):
        ours, of_ours = run(*placed, graphdef)
    # The compiler's complaint when it copies a whole array to every device to change its sharding.
    assert "full rematerialization" not in capfd.readouterr().err
    tiny.close(ours[0], loss, 1e-5)
    for name, value in metrics.items():
        tiny.close(ours[1][name], value, 1e-5, name)
    tiny.close_trees(of_ours, gradients, 1e-4)
    kernel = of_ours[0]["deep"]["decoder"]["layers"]["mlp"]["up"]["kernel"][...]
    assert len(kernel.addressable_shards) == DEVICES
    assert not kernel.sharding.is_fully_replicated
