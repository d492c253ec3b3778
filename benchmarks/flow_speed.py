"""Speed of a small STARFlow and a small TarFlow against the family's PyTorch release.

    python benchmarks/flow_speed.py --json flow_speed.json

Two CPU devices of one thread each share every batch (`JAX_NUM_CPU_DEVICES` changes that), and freed
memory is kept (`starflow2_jax.parallel.cpu`), as in training. Machines are compared by what
they reach in a 2048^3 float32 matrix product through JAX, timed just before and just after each
call: ratio = (seconds x GFLOP/s) / (the release's seconds x 210), the median over the calls. Below
1 is faster than the release.

How many passes Jacobi sampling takes hangs on the weights. They are drawn here, the release's were
other ones: the passes of each block are printed and written.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from starflow2_jax.models.af_block import Given
from starflow2_jax.models.guidance import GaussianGuidance, Guidance, LogScaleGuidance
from starflow2_jax.models.starflow import ImageFlow, ImageFlowConfig, StarFlowConfig, TarFlowConfig
from starflow2_jax.parallel import mesh as meshes
from starflow2_jax.parallel import rules
from starflow2_jax.parallel.cpu import keep_freed_memory
from starflow2_jax.sampling import jacobi

# Whole-call medians of the PyTorch release on the same shapes: torch 2.13.0 on CPU, float32, 2
# threads, random weights, on a 2-core AMD EPYC that reaches 210 GFLOP/s in the product; seconds.
RELEASE = {
    "starflow": {
        "forward": 0.174,
        "forward_backward": 0.472,
        "train_step": 0.509,
        "sample": 2.482,
        "sample_guided": 2.795,
        "sample_jacobi": 1.432,
    },
    "tarflow": {
        "forward": 0.253,
        "forward_backward": 0.434,
        "sample": 1.436,
        "sample_guided": 3.757,
    },
}
RELEASE_GFLOPS = 210.0
PRODUCT_SIDE = 2048
# Of the heads' weights, times their uniform fan-in initialisation; at zero, every sample is noise.
HEAD_SCALE = 0.3

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Timing:
    """One call between two products: seconds of the call, GFLOP/s of the products."""

    seconds: float
    gflops: float


def ratio(timings: list[Timing], release_seconds: float) -> float:
    """Median of (seconds x GFLOP/s) / (release's seconds x its GFLOP/s)."""
    return statistics.median(
        t.seconds * t.gflops / (release_seconds * RELEASE_GFLOPS) for t in timings
    )


def row(name: str, timings: list[Timing], release_seconds: float) -> Row:
    """The row of one measurement: value and rate are medians."""
    return {
        "name": name,
        "value": statistics.median(t.seconds for t in timings),
        "unit": "s",
        "gflops": statistics.median(t.gflops for t in timings),
        "peer": release_seconds,
        "peer_gflops": RELEASE_GFLOPS,
        "ratio": ratio(timings, release_seconds),
    }


def timed(call: Callable[[], Any]) -> float:
    """Seconds until the results of a call are there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def product_of(side: int = PRODUCT_SIDE) -> Callable[[], jax.Array]:
    """A product of side^3 on one device with all threads; to be made where no mesh is in context.

    On a mesh, each of its devices would compute all of it.
    """
    a = jnp.asarray(np.random.default_rng(0).normal(size=(side, side)), jnp.float32)
    compiled = jax.jit(lambda a: a @ a).lower(a).compile()
    return lambda: compiled(a)


def measure(
    call: Callable[[], Any], product: Callable[[], Any], pairs: int, side: int = PRODUCT_SIDE
) -> list[Timing]:
    """Times a compiled call `pairs` times, each between two products of side^3."""
    timed(product)
    timed(call)
    timings = []
    for _ in range(pairs):
        before, seconds, after = timed(product), timed(call), timed(product)
        timings.append(Timing(seconds, 2 * 2 * side**3 / 1e9 / (before + after)))
    return timings


def random_model(config: ImageFlowConfig) -> ImageFlow:
    """The model as it is initialised, but for its heads, which start at zero."""
    model = jax.jit(lambda: ImageFlow(config, rngs=nnx.Rngs(0)))()
    rng = np.random.default_rng(1)
    for block in model.blocks:
        kernel = block.head.proj.kernel
        bound = HEAD_SCALE / np.sqrt(kernel.shape[0])
        kernel[...] = jnp.asarray(rng.uniform(-bound, bound, kernel.shape), jnp.float32)
    return model


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and what it is measured with: a batch of 4."""

    config: ImageFlowConfig
    images: jax.Array
    noise: jax.Array
    given: Given
    unconditional: Given
    guidance: Guidance


def cases() -> dict[str, Case]:
    """The two models of the release's measurement."""
    rng = np.random.default_rng(2)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    starflow = StarFlowConfig(
        channels=4,
        side=16,
        width=256,
        deep_width=256,
        depths=(2, 2, 8),
        head_dim=64,
        text_length=32,
        text_width=64,
    )
    tarflow = TarFlowConfig(
        channels=3, size=32, patch=2, width=256, count=4, depth=3, classes=10, head_dim=64
    )
    return {
        "starflow": Case(
            starflow,
            normal(4, 16, 16, 4),
            normal(4, 16, 16, 4),
            Given(text=normal(4, 32, 64)),
            Given(text=jnp.zeros((4, 32, 64))),
            GaussianGuidance(2.5),
        ),
        "tarflow": Case(
            tarflow,
            normal(4, 32, 32, 3),
            normal(4, 16, 16, 12),
            Given(labels=jnp.arange(4)),
            Given(),
            LogScaleGuidance(1.0),
        ),
    }


def programs(case: Case, model: ImageFlow) -> Iterator[tuple[str, Callable, tuple]]:
    """Name, function and arguments of each measurement."""
    graphdef, parameters = nnx.split(model)
    optimizer = optax.adamw(1e-4)
    merged = lambda p: nnx.merge(graphdef, p)

    def loss(p: nnx.State, images: jax.Array, given: Given) -> jax.Array:
        return merged(p).forward(images, given).loss

    def train_step(p: nnx.State, state: Any, images: jax.Array, given: Given) -> tuple:
        value, gradients = jax.value_and_grad(loss)(p, images, given)
        updates, state = optimizer.update(gradients, state, p)
        return value, optax.apply_updates(p, updates), state

    def guided(p: nnx.State, noise: jax.Array, given: Given, other: Given, **how: Any) -> tuple:
        sequence, notes = merged(p).reverse(noise, given, case.guidance, other, **how)
        return sequence[-1], notes

    def by_jacobi(*args: Any) -> tuple:
        # Blocks of 16 tokens, threshold 1e-3.
        return guided(*args, invert=jacobi.inverter(jacobi.JacobiConfig(16, 1e-3, 32)))

    images, drawing = (case.images, case.given), (case.noise, case.given)
    yield "forward", lambda p, *a: merged(p).forward(*a).log_prob, (parameters, *images)
    yield "forward_backward", jax.value_and_grad(loss), (parameters, *images)
    yield "train_step", train_step, (parameters, optimizer.init(parameters), *images)
    yield "sample", lambda p, *a: merged(p).reverse(*a)[0][-1], (parameters, *drawing)
    yield "sample_guided", guided, (parameters, *drawing, case.unconditional)
    yield "sample_jacobi", by_jacobi, (parameters, *drawing, case.unconditional)


def run(pairs: int, only: str | None = None) -> Iterator[Row]:
    """Measures all rows whose names contain `only`."""
    product = product_of()
    mesh = meshes.make_mesh(meshes.MeshConfig(data=-1, fsdp=1))
    whole = jax.NamedSharding(mesh, jax.P())
    with rules.use(mesh) if mesh.size > 1 else contextlib.nullcontext():
        for name, case in cases().items():
            split = lambda tree: jax.device_put(tree, rules.batch_shardings(tree, mesh))
            case = dataclasses.replace(
                case,
                images=split(case.images),
                noise=split(case.noise),
                given=split(case.given),
                unconditional=split(case.unconditional),
            )
            model = jax.device_put(random_model(case.config), whole)
            for what, function, args in programs(case, model):
                full = f"{name}/{what}"
                if what not in RELEASE[name] or (only and only not in full):
                    continue
                start = time.perf_counter()
                program = jax.jit(function).lower(*args).compile()
                compiling = time.perf_counter() - start
                timings = measure(functools.partial(program, *args), product, pairs)
                result = row(full, timings, RELEASE[name][what])
                if what == "sample_jacobi":
                    notes = program(*args)[1]
                    result["passes"] = [np.asarray(passes).tolist() for passes in notes]
                yield result
                yield {"name": f"{full}/compile", "value": compiling, "unit": "s"}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, required=True, help="file of the rows")
    parser.add_argument("--pairs", type=int, default=7, help="timed calls of each row, at least 5")
    parser.add_argument("--only", help="rows whose names contain this")
    args = parser.parse_args()
    if args.pairs < 5:
        parser.error(f"--pairs {args.pairs}: a median wants at least 5")
    keep_freed_memory()
    rows = []
    for result in run(args.pairs, args.only):
        rows.append(result)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
        rate = (
            f"  {result['gflops']:.0f} GFLOP/s  ratio {result['ratio']:.3f}"
            if "ratio" in result
            else ""
        )
        print(f"{result['name']:36s} {result['value']:.3f} {result['unit']}{rate}", flush=True)
        if "passes" in result:
            print("  passes:", [statistics.mean(passes) for passes in result["passes"]])


if __name__ == "__main__":
    main()
