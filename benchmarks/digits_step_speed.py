"""Time of a training step of the digits job, on two CPU devices, with its own batches.

    python benchmarks/digits_step_speed.py --json digits_step.json

Steps with the allocator's own settings and with `keep_freed_memory` take turns in one process, so
that a busy machine slows both alike; the first is the peer of the second.
"""

import argparse
import ctypes
import json
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")

import jax
from flax import nnx

from starflow2_jax.data.pipeline import BatchShape, packed_batches
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.parallel import mesh as meshes
from starflow2_jax.parallel import rules
from starflow2_jax.parallel.cpu import keep_freed_memory
from starflow2_jax.training.config_file import step_config
from starflow2_jax.training.stages import STAGES
from starflow2_jax.training.step import init_state, train_step

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "configs"))
import digits


def return_freed_memory() -> None:
    """The thresholds that glibc itself arrives at in a process that frees large blocks."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 32 * 2**20)
    libc.mallopt(-1, 64 * 2**20)
    libc.malloc_trim(0)


def measure(stage_name: str, steps: int, turns: int) -> tuple[float, float]:
    """Median seconds of a step: with freed memory returned, and with it kept."""
    config = digits.get_config()
    config.data.copies = 1
    data = digits.make_data(config)
    mesh = meshes.make_mesh(meshes.MeshConfig(**config.mesh))
    stage = next(s for s in STAGES if s.name == stage_name)
    group = config.stages[stage_name]
    with rules.use(mesh):
        model_config = digits.make_model_config(config, data)
        model = rules.born_sharded(lambda: Pretzel(model_config, rngs=nnx.Rngs(0)), mesh)
        codec = jax.device_put(data.codec, jax.NamedSharding(mesh, jax.P()))
        graphdef, trainable, frozen = nnx.split(model, stage.trainable, ...)
        hyper = step_config(group)
        loss = stage.loss(hyper, training=True)
        state = jax.jit(lambda t: init_state(t, hyper, 0))(trainable)
        step = jax.jit(
            train_step,
            static_argnames=("graphdef", "loss", "config"),
            donate_argnames=("state",),
        )
        stream = iter(
            packed_batches(data.documents(stage_name, False, 0), BatchShape(**group.batch))
        )
        batch = next(stream)
        batch = jax.device_put(batch, rules.batch_shardings(batch, mesh))
        seconds: dict[str, list[float]] = {"returned": [], "kept": []}
        for turn in range(turns + 1):
            for name, setting in (("returned", return_freed_memory), ("kept", keep_freed_memory)):
                setting()
                for n in range(steps + 1):
                    start = time.perf_counter()
                    state, metrics = step(graphdef, state, frozen, codec, batch, loss, hyper)
                    jax.block_until_ready((state, metrics))
                    if turn and n:  # The first turn compiles, the first step pays for the setting.
                        seconds[name].append(time.perf_counter() - start)
    return statistics.median(seconds["returned"]), statistics.median(seconds["kept"])


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, required=True, help="file of the rows")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for stage in ("text_to_image", "joint"):
        returned, kept = measure(stage, args.steps, args.turns)
        rows.append(
            {
                "name": f"digits, step of {stage}, freed memory kept",
                "value": kept,
                "unit": "s",
                "peer": returned,
                "ratio": kept / returned,
            }
        )
        print(f"{stage}: {1e3 * kept:.1f} ms, {1e3 * returned:.1f} ms with freed memory returned")
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
