"""Plans the 7B config on every topology of docs/scale.md, and writes its table.

    python benchmarks/scale.py --json scale.json --gpu-python .venv-gpu/bin/python

Nothing runs on an accelerator: this compiles, about a minute for each row on two idle cores. Each
row is written as soon as it is there, and rows that the JSON file has already are not planned
again; `--only TEXT` plans just those whose command holds the text. GPU rows need an environment
with the extra `gpu-plan`, whose Python is given.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

SEVEN = ("--config", "configs/starflow2_7b.py")
STAGES = ("text_to_image", "image_to_text", "joint")
TRAINING = (
    ("v5e:16x16", 1),
    ("v5e:16x16", 2),
    ("v6e:16x16", 1),
    ("v5p:4x4x4", 1),
    ("tpu7x:4x4x4", 1),
)


def commands() -> list[tuple[str, ...]]:
    """Arguments of `starflow2 plan`, a row each."""
    found = []
    for name, slices in TRAINING:
        where = ("--topology", name, *(("--slices", str(slices)) if slices > 1 else ()))
        found += [(*SEVEN, *where, "--stage", stage) for stage in reversed(STAGES)]
    for name in ("v5e:4x4", "v6e:2x4"):
        found.append((*SEVEN, "--topology", name, "--sample"))
    found.append((*SEVEN, "--topology", "h100:4x8", "--stage", "joint"))
    full = ("--config.remat=full", "--config.stages.joint.optimizer.accumulate=1")
    found.append((*SEVEN, "--topology", "v5e:16x16", "--stage", "joint", *full))
    three = ("--config", "configs/starflow2_3b.py", "--topology", "v5e:8x8", "--stage", "joint")
    return [*found, three]


def planned(python: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """The record that the command writes.

    Raises:
        RuntimeError: it writes none.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "plan.json"
        command = [python, "-m", "starflow2_jax", "plan", *arguments, "--json", str(path)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not path.is_file():
            raise RuntimeError(f"{' '.join(arguments)}:\n{run.stderr[-3000:]}")
        return json.loads(path.read_text())


def line(arguments: str, plan: dict[str, Any]) -> str:
    """A row of the table."""
    settings = plan["settings"]
    how = settings["mesh"].replace("columns", "col")
    if plan["name"] != "decode":
        how += f"; {settings['remat']}; {settings['accumulate']} part(s)"
    memory = f"{plan['hbm_used_gb']:.1f} / {plan['hbm_gb']:.1f}"
    if not plan["fits"]:
        cells = ["does not fit", *"––––"]
    elif plan["name"] == "decode":
        moved = plan["bytes_moved"] / plan["bytes_needed"]
        cells = [f"moves {moved:.3f} of needed", times(plan), "–", "–", sent(plan)]
    else:
        ratio = plan["compiled_flops"] / plan["model_flops"]
        kernels = plan["kernel_flops"] / plan["model_flops"]
        cells = [
            f"{ratio:.3f} ({kernels:.3f} in kernels)",
            times(plan),
            f"{plan['mfu_bound']:.2f}",
            f"{plan['mfu_bound_serial']:.2f}",
            sent(plan),
        ]
    columns = [plan["name"], plan["topology"], how, memory, *cells, f"`{arguments}`"]
    return "| " + " | ".join(columns) + " |"


def times(plan: dict[str, Any]) -> str:
    """Milliseconds of each unit."""
    seconds = plan["seconds"]
    names = ("matrix units", "memory", "links", "network")
    return " / ".join(f"{seconds[name] * 1e3:.3g}" for name in names)


def sent(plan: dict[str, Any]) -> str:
    """GB that a device sends."""
    return f"{math.fsum(plan['bytes_by_collective'].values()) / 1e9:.2f}"


def missing(rows: list[dict[str, Any]]) -> list[str]:
    """The commands of `commands()` that the rows lack."""
    known = {row["name"] for row in rows}
    return [name for name in map(" ".join, commands()) if name not in known]


def write_table(rows: list[dict[str, Any]]) -> None:
    """Into docs/scale.md, between the markers: all rows, or none."""
    if lacking := missing(rows):
        print(f"{TABLE.name} stays as it is; {len(lacking)} rows are missing: {lacking[0]}, ...")
        return
    head = (
        "| program | topology | mesh; remat; parts | memory GB | compiled / model FLOPs | "
        "ms of matrix units / memory / links / network | MFU at most | the same, interconnect "
        "apart | GB sent | `starflow2 plan` |\n|" + " --- |" * 10
    )
    lines = [line(row["name"], row["plan"]) for row in rows]
    before, rest = TABLE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    body = "\n".join([head, *lines])
    TABLE.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")


def main() -> None:
    """Plans what is missing, one program at a time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--gpu-python", default="")
    parser.add_argument("--only", metavar="TEXT", default="", help="rows whose command holds it")
    args = parser.parse_args()
    rows = json.loads(args.json.read_text()) if args.json.is_file() else []
    known = {row["name"]: row for row in rows}
    for arguments in commands():
        name = " ".join(arguments)
        gpu = "h100" in name
        if name in known or args.only not in name or (gpu and not args.gpu_python):
            continue
        plan = planned(args.gpu_python if gpu else sys.executable, arguments)
        seconds = plan["step_seconds_bound"]
        known[name] = {"name": name, "value": seconds, "unit": "s a step at least", "plan": plan}
        rows = [known[n] for n in map(" ".join, commands()) if n in known]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
        print(line(name, plan), flush=True)
    write_table(rows)


if __name__ == "__main__":
    main()
