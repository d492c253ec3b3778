#!/usr/bin/env python3
"""Runs one command in several processes on this machine, connected over loopback, on the CPU.

    python launch/local.py --processes 2 --devices-per-process 4 -- train --config C --workdir DIR

It is a job as on a cluster, in small. When one process fails, the others are ended. SIGINT and
SIGTERM ask all of them to end, a second one kills them.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from typing import IO

GRACE_SECONDS = 10
"""Between asking the other processes of a failed job to end, and killing them."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; what follows `--` is `command`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--processes", type=int, required=True, metavar="N")
    parser.add_argument(
        "--devices-per-process", type=int, default=1, metavar="K", help="CPU devices (default 1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and end")
    parser.add_argument(
        "command",
        nargs="+",
        help="a starflow2 command line, behind --; the word starflow2 may be left out",
    )
    args = parser.parse_args(argv)
    if args.processes < 1 or args.devices_per_process < 1:
        parser.error("--processes and --devices-per-process are at least 1")
    return args


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def process_environment(index: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """What one process has in its environment beside the launcher's own."""
    return {
        "STARFLOW2_DISTRIBUTED": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
    }


def show(environment: Mapping[str, str], command: Sequence[str]) -> str:
    """The process as a line for a shell."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join(["env", *settings, shlex.join(command)])


def relay(source: IO[str], target: IO[str], name: str) -> None:
    """Copies lines, with the name of the process before them."""
    for line in source:
        target.write(f"{name} {line}")
        target.flush()


def outcome(code: int) -> str:
    """A return code in words."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


class Job:
    """The processes, and what is to be done when one of them ends or a signal comes."""

    def __init__(self, environments: Sequence[Mapping[str, str]], command: Sequence[str]) -> None:
        self.signals = 0
        self.relays: list[threading.Thread] = []
        self.processes = [
            subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C reaches them once, from here
            )
            for environment in environments
        ]
        for index, process in enumerate(self.processes):
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                thread = threading.Thread(target=relay, args=(source, target, f"[{index}]"))
                thread.start()
                self.relays.append(thread)

    def pass_on(self, number: int, frame: types.FrameType | None) -> None:
        """Handles SIGINT and SIGTERM; the processes agree on where to stop after SIGTERM only."""
        del number, frame
        self.signals += 1
        self.send(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)

    def send(self, number: int) -> None:
        """Sends a signal to all processes that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Waits for the end.

        Returns:
            The exit code of the first process that failed, else 0.
        """
        first = 0
        while True:
            codes = [process.poll() for process in self.processes]
            failed = [i for i, code in enumerate(codes) if code]
            if failed and not first:
                first = codes[failed[0]]
                if not self.signals:
                    self._end_others(failed[0], first)
            if None not in codes:
                return 128 - first if first < 0 else first
            time.sleep(0.1)

    def _end_others(self, index: int, code: int) -> None:
        running = [process for process in self.processes if process.poll() is None]
        if not running:
            return
        print(
            f"launch: process {index} of {len(self.processes)} {outcome(code)}; ending the others",
            file=sys.stderr,
            flush=True,
        )
        self.send(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(p.poll() is None for p in running):
            time.sleep(0.1)
        self.send(signal.SIGKILL)
        for process in running:
            process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job.

    Returns:
        0, or the exit code of the first process that failed (128 + signal where it was killed).
    """
    args = parse(sys.argv[1:] if argv is None else argv)
    words = args.command[1:] if args.command[0] == "starflow2" else args.command
    command = [sys.executable, "-m", "starflow2_jax", *words]
    port = free_port()
    environments = [
        process_environment(index, args.processes, args.devices_per_process, port)
        for index in range(args.processes)
    ]
    if args.dry_run:
        for environment in environments:
            print(show(environment, command))
        return 0
    job = Job(environments, command)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, job.pass_on)
    code = job.wait()
    for thread in job.relays:
        thread.join()
    return code


if __name__ == "__main__":
    sys.exit(main())
