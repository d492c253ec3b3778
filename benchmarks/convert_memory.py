"""Memory of `starflow2 convert starflow` on a checkpoint of the released 3B model's true shapes.

    python benchmarks/convert_memory.py --folder DIR --json FILE

The values are random. DIR needs three times the checkpoint's size for a while: 47 GB in float32.
What is measured is the largest RssAnon of the converting process, sampled from /proc: pages of
mapped files, which the system may drop, are not in it. Everything is deleted afterwards.
"""

import argparse
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

SIZE = "starflow_3b_t2i_256"
PARAMETERS = 3_858_281_544
LIMIT_GB = 6.0


def shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the released file that the model uses."""
    from flax import nnx

    from starflow2_jax.convert import starflow, table
    from starflow2_jax.models import starflow as models

    config = getattr(models, SIZE)()
    make = lambda: models.ImageFlow(config, rngs=nnx.Rngs(0))
    return table.source_shapes(starflow.table(config), table.shapes_of(make))


def write_checkpoint(path: pathlib.Path) -> None:
    """A torch state dict of random float32 tensors that lie in one mapped file meanwhile."""
    import torch

    sizes = shapes()
    count = sum(math.prod(shape) for shape in sizes.values())
    assert count == PARAMETERS, count
    raw = path.with_suffix(".raw")
    rng, piece = np.random.default_rng(0), 2**24
    with raw.open("wb") as file:
        for start in range(0, count, piece):
            size = min(piece, count - start)
            file.write((0.02 * (rng.random(size, np.float32) - 0.5)).tobytes())
    values = np.memmap(raw, np.float32, mode="r+")
    tensors, at = {}, 0
    for name, shape in sizes.items():
        size = math.prod(shape)
        tensors[name] = torch.from_numpy(values[at : at + size].reshape(shape))
        at += size
    torch.save(tensors, path)
    raw.unlink()


def memory(pid: int) -> dict[str, float]:
    """RssAnon and RssFile of a process, GB; empty once it has ended."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    words = [line.split() for line in lines]
    return {
        w[0][:-1]: int(w[1]) * 1024 / 1e9 for w in words if w and w[0] in ("RssAnon:", "RssFile:")
    }


def measure(command: list[str]) -> dict[str, float]:
    """Runs a command; its largest RssAnon and RssFile (GB), and its seconds."""
    began = time.monotonic()
    process = subprocess.Popen(command)
    largest = {"RssAnon": 0.0, "RssFile": 0.0}
    while process.poll() is None:
        for name, value in memory(process.pid).items():
            largest[name] = max(largest[name], value)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return largest | {"seconds": time.monotonic() - began}


def main() -> None:
    """Makes the checkpoint in a process of its own, converts it, and writes the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", metavar="DIR", help="where to work; default: a temporary one")
    parser.add_argument("--json", metavar="FILE", help="writes the rows")
    parser.add_argument("--make", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        write_checkpoint(pathlib.Path(args.make))
        return
    work = pathlib.Path(tempfile.mkdtemp(prefix="convert_memory_", dir=args.folder))
    try:
        free = shutil.disk_usage(work).free
        if free < 3 * 4 * PARAMETERS:
            raise SystemExit(f"{work}: {free / 1e9:.0f} GB free, 47 needed; give another --folder")
        source, target = work / "random.pth", work / "model"
        subprocess.run([sys.executable, __file__, "--make", str(source)], check=True)
        size = source.stat().st_size / 1e9
        convert = [sys.executable, "-m", "starflow2_jax", "convert", "starflow", str(source)]
        found = measure([*convert, "--out", str(target), "--size", SIZE])
        written = sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 1e9
    finally:
        shutil.rmtree(work)
    rows = [
        {"name": "parameters", "value": PARAMETERS, "unit": "1"},
        {"name": "checkpoint", "value": size, "unit": "GB"},
        {"name": "written", "value": written, "unit": "GB"},
        {"name": "largest_rss_anon", "value": found["RssAnon"], "unit": "GB", "limit": LIMIT_GB},
        {"name": "largest_rss_file", "value": found["RssFile"], "unit": "GB"},
        {"name": "seconds", "value": found["seconds"], "unit": "s"},
        {"name": "rate", "value": 1e3 * size / found["seconds"], "unit": "MB/s"},
    ]
    for row in rows:
        print(f"{row['name']:20} {row['value']:.6g} {row['unit']}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if found["RssAnon"] >= LIMIT_GB:
        raise SystemExit(f"the largest RssAnon is not under {LIMIT_GB:.0f} GB")


if __name__ == "__main__":
    main()
