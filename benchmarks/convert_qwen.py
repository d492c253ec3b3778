"""Memory and rate of `starflow2 convert qwen2_5_vl` on a checkpoint of the true 7B shapes.

    python benchmarks/convert_qwen.py --dir DIR --json FILE

The values are random, in bfloat16: 16.6 GB in several safetensors files with an index. DIR needs
twice that, and 5 GB, for a while; all is deleted afterwards. Measured are the largest RssAnon of
the converting process, sampled from /proc (pages of mapped files, which the system may drop, are
not in it), and the time from its start until the written files are on the disk (sync). The peer of
the rate is `cp` of the same files to the same disk, with sync. Before each, the files leave the
page cache.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np

PARAMETERS, TENSORS = 8_292_166_656, 729
LIMIT_GB = 6.0


def random_bfloat16(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Finite numbers: random sign and mantissa, exponents over three bits, as of small weights."""
    words = rng.integers(0, 2**64, -(-math.prod(shape) // 4), np.uint64)
    words &= np.uint64(0x83FF83FF83FF83FF)
    words |= np.uint64(0x3800380038003800)
    return words.view(ml_dtypes.bfloat16)[: math.prod(shape)].reshape(shape)


def write_checkpoint(folder: pathlib.Path) -> None:
    """A folder as it is published, with random values."""
    import transformers

    from starflow2_jax.convert import stored, table
    from starflow2_jax.convert.qwen2_5_vl import entries_for
    from starflow2_jax.convert.tensor_files import write_safetensors_folder
    from starflow2_jax.models.qwen2_5_vl import Qwen25VL, from_hf, qwen2_5_vl_7b

    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
        },
        vision_config={"hidden_size": 1280, "out_hidden_size": 3584},
        tie_word_embeddings=False,
    )
    folder.mkdir()
    config.save_pretrained(folder)
    ours = from_hf(json.loads((folder / "config.json").read_text()))
    assert ours == qwen2_5_vl_7b(), ours
    from flax import nnx

    shapes = table.shapes_of(lambda: Qwen25VL(ours, rngs=nnx.Rngs(0)))
    wanted = stored.wanted_tensors(entries_for(ours), shapes)
    assert len(wanted) == TENSORS and sum(map(math.prod, wanted.values())) == PARAMETERS
    rng = np.random.default_rng(0)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in wanted.items():
            yield name, random_bfloat16(rng, shape)

    types = dict.fromkeys(wanted, np.dtype(ml_dtypes.bfloat16))
    write_safetensors_folder(folder, wanted, types, tensors())


def largest_memory(command: Sequence[str]) -> dict[str, float]:
    """Runs a command; its largest RssAnon and RssFile, GB."""
    process = subprocess.Popen(command)
    largest = {"RssAnon": 0.0, "RssFile": 0.0}
    while process.poll() is None:
        try:
            lines = pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for name, *rest in (line.split() for line in lines):
            if name[:-1] in largest:
                largest[name[:-1]] = max(largest[name[:-1]], int(rest[0]) * 1024 / 1e9)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return largest


def forget(folder: pathlib.Path) -> None:
    """Drops a folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Makes the checkpoint in a process of its own, copies it, converts it, writes the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", metavar="DIR", help="where to work; default: a temporary one")
    parser.add_argument("--json", metavar="FILE", help="writes the rows")
    parser.add_argument("--make", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        write_checkpoint(pathlib.Path(args.make))
        return
    if args.dir is not None:
        pathlib.Path(args.dir).mkdir(parents=True, exist_ok=True)
    work = pathlib.Path(tempfile.mkdtemp(prefix="convert_qwen_", dir=args.dir))
    try:
        free, needed = shutil.disk_usage(work).free / 1e9, (2 * 2 * PARAMETERS) / 1e9 + 5
        if free < needed:
            raise SystemExit(f"{work}: {free:.0f} GB free, {needed:.0f} needed; give another --dir")
        source, target = work / "random", work / "model"
        subprocess.run([sys.executable, __file__, "--make", str(source)], check=True)
        size = sum(f.stat().st_size for f in source.glob("*.safetensors")) / 1e9

        forget(source)
        began = time.monotonic()
        subprocess.run(["cp", "-r", "--reflink=never", str(source), str(work / "copy")], check=True)
        os.sync()
        copying = time.monotonic() - began
        shutil.rmtree(work / "copy")

        forget(source)
        command = [sys.executable, "-m", "starflow2_jax", "convert", "qwen2_5_vl", str(source)]
        began = time.monotonic()
        memory = largest_memory([*command, "--out", str(target)])
        os.sync()
        seconds = time.monotonic() - began
        written = sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 1e9
    finally:
        shutil.rmtree(work)
    rate, copied = 1e3 * size / seconds, 1e3 * size / copying
    rows = [
        {"name": "parameters", "value": PARAMETERS, "unit": "1"},
        {"name": "checkpoint", "value": size, "unit": "GB"},
        {"name": "written", "value": written, "unit": "GB"},
        {"name": "largest RssAnon", "value": memory["RssAnon"], "unit": "GB", "limit": LIMIT_GB},
        {"name": "largest RssFile", "value": memory["RssFile"], "unit": "GB"},
        {"name": "rate", "value": rate, "unit": "MB/s", "peer": copied, "ratio": rate / copied},
    ]
    for row in rows:
        print(json.dumps(row))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if memory["RssAnon"] >= LIMIT_GB:
        raise SystemExit(f"the largest RssAnon is not under {LIMIT_GB:.0f} GB")


if __name__ == "__main__":
    main()
