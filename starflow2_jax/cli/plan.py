"""What a run would need on a TPU slice or a GPU cluster, by its compiler, without the hardware.

Compiles the config's train step of a stage (or the decode step) for the named topology and prints,
for each device, memory, FLOPs, bytes of collectives, and what the chip's rates make of them. TPUs
need the extra `tpu`; GPUs the extra `gpu-plan`, in an environment of its own.
"""

import argparse
import os
import pathlib
import sys

from starflow2_jax.cli.config import load_config
from starflow2_jax.errors import UserError

SUMMARY = "what a run would need on a named TPU or GPU topology"

_EPILOG = """\
topologies:
  v5e:16x16, v6e:16x16    chips of a 2-D slice
  v5p:4x4x4, tpu7x:4x4x4  chips of a 3-D slice
  h100:4x8                nodes x GPUs of a node

A config file may have settings for the topology (a function `for_topology`).

overrides:
  --config.a.b=VALUE    replace an entry of the config, and of those settings; may be repeated
  --config.smoke=True   the config's tiny sizes

examples:
  starflow2 plan --config configs/starflow2_7b.py --topology v5p:4x4x4 --stage joint
  starflow2 plan --config configs/starflow2_7b.py --topology v5e:16x16 --slices 2
  starflow2 plan --config configs/starflow2_7b.py --topology v6e:2x4 --sample
  starflow2 plan --config configs/starflow2_7b.py --topology v6e:16x16 --stage joint --search

exit codes: 0 every stage fits (in a search: with some setting); 1 one does not fit; 2 bad input
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--config", metavar="FILE", required=True, help="Python file with get_config()"
    )
    parser.add_argument(
        "--topology", metavar="NAME", required=True, help="chips and their arrangement, see below"
    )
    parser.add_argument(
        "--slices", metavar="K", type=int, default=1, help="TPU slices of that shape (default 1)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stage", metavar="S", help="one stage (default: all of the config)")
    what.add_argument(
        "--sample", action="store_true", help="the decode step with guidance, not training"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try meshes, remat policies and accumulation, and rank those that fit",
    )
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write the numbers here")
    parser.add_argument("--answer", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.usage = (
        "starflow2 plan --config FILE --topology NAME [--slices K] [--stage S | --sample] "
        "[--search] [--json FILE] [--config.KEY=VALUE ...]"
    )
    parser.epilog = _EPILOG
    parser.set_defaults(overrides=[])


def run(args: argparse.Namespace) -> None:
    """Plans, prints, and writes the numbers.

    Raises:
        UserError: bad config or topology, or no compiler for it.
        SystemExit: with 1 where something does not fit.
    """
    from starflow2_jax.planning import topology as topologies

    topology = topologies.parse(args.topology, args.slices)
    topologies.prepare_environment()
    settings = [("topology", args.topology), ("slices", str(args.slices))]
    config, module = load_config(args.config, args.overrides, settings)
    from starflow2_jax.planning import plan as planning
    from starflow2_jax.planning import report, search

    def request(stage: str | None) -> planning.Request:
        path = os.path.abspath(args.config)
        return planning.Request(path, args.overrides, args.topology, args.slices, stage)

    if args.answer is not None:
        found = planning.answer(request(args.stage), config, module)
        report.write(args.answer, [found])
        sys.stdout.flush()
        os._exit(0)  # the compiler may still be at work
    if args.stage is not None and args.stage not in config.stages:
        raise UserError(f"no stage {args.stage}; the config has {', '.join(config.stages)}")
    if args.json is not None:
        report.check_place(args.json)  # compiling takes long
    stages = [None] if args.sample else [args.stage] if args.stage else list(config.stages)
    plans = []
    fits = True
    for stage in stages:
        if args.search:
            found = search.search(request(stage), config, topology, print)
        else:
            found = [planning.plan(request(stage))]
            print(report.text(found[0]), flush=True)
        fits &= any(plan.fits for plan in found)
        plans += found
    if args.json is not None:
        report.write(args.json, plans)
    if not fits:
        raise SystemExit(1)
