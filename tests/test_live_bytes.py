"""No device holds more than its share of the parameters: at init, save and restore."""

import collections
import functools
import threading

import jax
import pytest
import tiny
from flax import nnx

from starflow2_jax.models.pretzel import Pretzel, PretzelConfig
from starflow2_jax.parallel import rules
from starflow2_jax.parallel.mesh import MeshConfig, make_mesh
from starflow2_jax.training.checkpoint import Checkpoints
from starflow2_jax.training.stages import JOINT
from starflow2_jax.training.step import StepConfig, init_state

CONFIG = PretzelConfig(
    tiny.vlm(width=256, vocab_size=512, mlp_width=512, layers=1),
    tiny.flow(width=256, deep_layers=1, shallow_layers=(1, 1)),
    tiny.SPECIAL,
    dtype="float32",
)


def live_bytes(before):
    """Bytes on each device of the arrays that are there now and were not before."""
    total, seen = collections.Counter(), set()
    for array in jax.live_arrays():
        if id(array) not in before and not array.is_deleted():
            for shard in array.addressable_shards:
                # A shard that is looked at is an array of its own, in the same memory.
                buffer = shard.data.unsafe_buffer_pointer()
                if buffer not in seen:
                    seen.add(buffer)
                    total[shard.device] += shard.data.nbytes
    return total


class Watch:
    """The most that was alive on any device, looked at all the time."""

    def __enter__(self):
        self.most = 0
        self._before = {id(array) for array in jax.live_arrays()}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self):
        while not self._end.wait(0.002):
            try:
                self._count()
            except RuntimeError:  # an array was deleted while it was looked at
                continue

    def _count(self):
        self.most = max(self.most, *live_bytes(self._before).values(), 0)

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()
        self._count()  # on a busy machine nothing may have been seen of the last moments


@pytest.mark.distributed
def test_no_whole_parameter_on_any_device(tmp_path):
    assert len(jax.devices()) >= 8
    mesh = make_mesh(MeshConfig(fsdp=8), jax.devices()[:8])
    config = StepConfig(10, 1e-3, 1)
    make = lambda: Pretzel(CONFIG, rngs=nnx.Rngs(0))
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(make))))
    make_state = functools.partial(init_state, config=config, seed=0)
    with rules.use(mesh), Watch() as watch, Checkpoints(tmp_path) as checkpoints:
        model = rules.born_sharded(make, mesh)
        graphdef, trainable, frozen = nnx.split(model, JOINT.trainable, ...)
        trained = sum(leaf.size * 4 for leaf in jax.tree.leaves(trainable))
        abstract = rules.abstract(jax.eval_shape(make_state, trainable), mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        compiled = jax.jit(make_state, out_shardings=shardings).lower(trainable).compile()
        state = compiled(trainable)
        checkpoints.save(1, state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(1, abstract)
    # The model, twice the state: parameters, two moments, EMA. Vectors and heads are on every one.
    share = (whole + 2 * 4 * trained) / 8
    assert share < watch.most < 1.25 * share
    used = compiled.memory_analysis()
    assert used.temp_size_in_bytes + used.output_size_in_bytes < 1.25 * 4 * trained / 8
    assert len(jax.tree.leaves(restored)) == len(jax.tree.leaves(state))
    del graphdef, frozen
