"""Train a model as a config file describes it.

The work directory holds everything of the run: config.json, checkpoints, metrics.jsonl, TensorBoard
files. The same command on the same directory continues where the last one stopped; a directory of
another config is refused.
"""

import argparse

from starflow2_jax.cli.arguments import OVERRIDES, add_run, load_run
from starflow2_jax.errors import UserError
from starflow2_jax.provenance import claim_workdir, missing_folders, release_workdir

SUMMARY = "train a model, or continue a run"

_EPILOG = f"""\
{OVERRIDES}
jobs of several processes (see docs/launch.md): give this command through a script of launch/

exit codes: 0 finished; 2 bad input; 130 interrupted, with the state saved
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_run(parser, "folder of the run; made where missing, continued where the run has begun")
    parser.usage = (
        "starflow2 train --config FILE --workdir DIR [--vlm DIR] [--fae DIR] "
        "[--config.KEY=VALUE ...]"
    )
    parser.epilog = _EPILOG


def run(args: argparse.Namespace) -> None:
    """Trains; then the config file's `report(config, workdir)`, if it defines one.

    Raises:
        UserError: bad config or work directory.
        Interrupted: stopped from outside, state saved.
    """
    config, module = load_run(args)
    import jax

    from starflow2_jax.data.batches import skipped_log
    from starflow2_jax.parallel.cpu import claim_devices
    from starflow2_jax.parallel.distributed import join_job
    from starflow2_jax.planning.topology import device_peak_flops
    from starflow2_jax.training import loop

    claim_devices(config.get("cpu_devices"))
    join_job()
    missing = missing_folders(args.workdir)
    workdir = claim_workdir(args.workdir, config)
    try:
        with skipped_log(workdir / f"skipped_records_{jax.process_index()}.log"):
            loop.run(config, module, workdir, device_peak_flops(jax.devices()[0].device_kind))
    except UserError:
        release_workdir(workdir, missing)  # the config that is mended may be given the same one
        raise
    report = getattr(module, "report", None)
    if report is None:
        return
    if jax.process_count() == 1:
        report(config, workdir)
    elif jax.process_index() == 0:
        print(f"for the report, give the same command in one process; {workdir} is finished")
