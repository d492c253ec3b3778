"""What the time of a layer goes to on CPU: pieces of one layer, and of a sampler's step.

    python benchmarks/layer_cost.py --json layer_cost.json

The layer of the models of `flow_speed.py`: width 256, 4 heads of 64, 4 rows of 256 positions. Times
are CPU time of the process on one core, the least of several calls, so that other processes count
little; the share is that of the layer's forward and backward pass.
"""

import argparse
import json
import os
import pathlib
import resource
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
from digits_step_speed import return_freed_memory
from flax import nnx

from starflow2_jax.models.af_block import AFBlock, BlockConfig
from starflow2_jax.nn import attention, decoder, layers
from starflow2_jax.parallel.cpu import keep_freed_memory

ROWS, LENGTH, WIDTH, HEADS, HIDDEN = 4, 256, 256, 4, 1024


def cpu_time(function: Callable, *args: Any, calls: int = 7) -> tuple[float, int]:
    """Seconds of CPU of a jitted call, the least of several; and its page faults, the last's."""
    program = jax.jit(function)
    jax.block_until_ready(program(*args))
    least, faults = float("inf"), 0
    for _ in range(calls):
        faults = -resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.process_time()
        jax.block_until_ready(program(*args))
        least = min(least, time.process_time() - start)
        faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return least, faults


def pullback(function: Callable) -> Callable:
    """Forward and backward pass of a function of parameters and x, or of x alone."""

    def both(*args: Any) -> Any:
        *primals, tangent = args
        return jax.vjp(function, *primals)[1](tangent)

    return both


def pieces() -> dict[str, tuple[Callable, tuple]]:
    """Name, function and arguments of each piece's forward and backward pass."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x = normal(ROWS, LENGTH, WIDTH)
    q = normal(ROWS, LENGTH, HEADS, 1, WIDTH // HEADS)
    hidden = normal(ROWS, LENGTH, HIDDEN)
    config = BlockConfig(4, WIDTH, WIDTH // HEADS, 1).decoder()
    stack = decoder.Decoder(config, rngs=nnx.Rngs(0))
    graphdef, parameters = nnx.split(stack)
    angles = jnp.ones((1, LENGTH, WIDTH // HEADS // 2))
    spec = attention.AttentionSpec()
    whole = lambda p, x: nnx.merge(graphdef, p)(x, angles, spec)[0]
    norm = layers.LayerNorm(WIDTH, rngs=nnx.Rngs(0))
    maps = [
        layers.Linear(m, n, rngs=nnx.Rngs(0), logical=(None, None))
        for m, n in ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    ]
    linear = lambda x, h, maps: [m(h if m is maps[3] else x) for m in maps]

    def products(maps: list, x: jax.Array, h: jax.Array, *out: jax.Array) -> Any:
        return jax.vjp(lambda maps, x, h: linear(x, h, maps), maps, x, h)[1](list(out))

    outs = [normal(ROWS, LENGTH, n) for n in (3 * WIDTH, WIDTH, HIDDEN, WIDTH)]
    attend = lambda q, k, v: attention.attend(q, k, v, spec)
    gelu = lambda h: jax.nn.gelu(h, approximate=False)
    return {
        "layer": (pullback(whole), (parameters, x, x)),
        "products": (products, (maps, x, hidden, *outs)),
        "attention": (pullback(attend), (q, q[:, :, :, 0], q[:, :, :, 0], q)),
        "GELU": (pullback(gelu), (hidden, hidden)),
        "two norms": (pullback(lambda x: norm(norm(x))), (x, x)),
        "layer, forward only": (whole, (parameters, x)),
        "attention, forward only": (attend, (q, q[:, :, :, 0], q[:, :, :, 0])),
    }


def products(vectors: int, width: int, features: int) -> tuple[float, float]:
    """Seconds of x W and of `product_by_rows` with 12 matrices [width, features]."""
    draw = np.random.default_rng(0).normal
    kernels = [jnp.asarray(draw(size=(width, features)), jnp.float32) for _ in range(12)]
    x = jnp.asarray(draw(size=(vectors, width)), jnp.float32)

    def chain(product: Callable) -> Callable:
        def through(x: jax.Array, kernels: list[jax.Array]) -> jax.Array:
            for kernel in kernels:
                x = product(x, kernel)[:, : x.shape[1]] / kernel.size
            return x

        return through

    plain, _ = cpu_time(chain(jnp.matmul), x, kernels)
    by_rows, _ = cpu_time(chain(layers.product_by_rows), x, [kernel.T.copy() for kernel in kernels])
    return plain, by_rows


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, required=True, help="file of the rows")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def add(name: str, seconds: float, **more: Any) -> None:
        rows.append({"name": name, "value": seconds, "unit": "s of CPU", **more})
        print(f"{name:40s} {1e3 * seconds:8.2f} ms", more or "", flush=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")

    functions = pieces()
    function, arguments = functions["layer"]
    return_freed_memory()
    seconds, faults = cpu_time(function, *arguments)
    add("layer, freed memory returned", seconds, page_faults=faults)
    keep_freed_memory()
    whole = None
    for name, (function, arguments) in functions.items():
        seconds, faults = cpu_time(function, *arguments)
        whole = whole or seconds
        add(name, seconds, page_faults=faults, share=seconds / whole)

    # Twelve of the first no cache holds together, of the second a processor's own does.
    for width, features in ((768, 4096), (128, 768)):
        for vectors in (1, 2, 4, 8, 16, 32, 64):
            plain, by_rows = products(vectors, width, features)
            name = f"{width} x {features}, {vectors} vectors, by rows"
            add(name, by_rows, peer=plain, ratio=by_rows / plain)

    block = AFBlock(BlockConfig(4, WIDTH, WIDTH // HEADS, 4), rngs=nnx.Rngs(0))
    z = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, LENGTH, 4)), jnp.float32)
    angles = jnp.ones((1, LENGTH, WIDTH // HEADS // 2))
    sample = lambda block, z: block.inverse(z, angles, jnp.float32)
    unrolled, _ = cpu_time(sample, block, z, calls=3)
    limit, decoder.UNROLLED_BYTES = decoder.UNROLLED_BYTES, 0
    scanned, _ = cpu_time(lambda *args: sample(*args), block, z, calls=3)
    decoder.UNROLLED_BYTES = limit
    steps = LENGTH * block.config.layers
    add("sampler, a layer's step", unrolled / steps, peer=scanned / steps, ratio=unrolled / scanned)


if __name__ == "__main__":
    main()
