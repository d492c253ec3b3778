"""Compiles a lowered program far enough to know what it needs, and reads what the compiler says.

The TPU compiler knows memory, FLOPs and collectives long before it has generated code, and dumps
them: what comes behind the dump takes ten times longer and is not waited for.
"""

import dataclasses
import pathlib
import re
import tempfile
import threading
import time
from typing import Any

from starflow2_jax.planning import hlo
from starflow2_jax.planning.topology import Topology

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_HLO = "*after_optimizations_after_buffer_assignment.txt"
_MEMORY = "*after_optimizations-memory-usage-report.txt"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program that fits.

    Attributes:
        module: optimised.
        used: bytes of a device's memory, arguments included.
        seconds: that it took.
        text: of the module.
    """

    module: hlo.Module
    used: float
    seconds: float
    text: str


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A program that does not fit: bytes of a device that it needs and that there are."""

    used: float
    available: float
    seconds: float


def too_large(message: str) -> tuple[float, float] | None:
    """(needed, available) bytes from a compiler's message; None where it says something else."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    size = r"([\d.]+)([KMGT]?)i?B?"
    patterns = (
        rf"\({size}\) exceeds available HBM \({size}\)",
        rf"Used {size} of {size} hbm",
        rf"requires {size} memory which exceeds the available {size}",
        rf"needed {size}.*available {size}",
    )
    for pattern in patterns:
        found = re.search(pattern, message)
        if found:
            a, b, c, d = found.groups()
            return float(a) * _UNITS[b], float(c) * _UNITS[d]
    return None


class _Compilation(threading.Thread):
    """A compilation, in a thread of its own: its end need not be waited for."""

    def __init__(self, lowered: Any, options: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._lowered, self._options = lowered, options
        self.compiled: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.compiled = self._lowered.compile(compiler_options=self._options)
        except Exception as error:
            self.error = error


def compile_program(lowered: Any, topology: Topology) -> Compiled | TooLarge:
    """Compiles for a topology. On TPUs the process must exit afterwards by `os._exit`.

    Args:
        lowered: `jax.stages.Lowered`.
        topology: that its mesh is of.

    Raises:
        RuntimeError: the compiler fails for another reason than memory.
    """
    began = time.monotonic()
    passed = lambda: time.monotonic() - began
    tpu = topology.chip.platform == "tpu"
    with tempfile.TemporaryDirectory(prefix="starflow2_plan_", ignore_cleanup_errors=True) as name:
        folder = pathlib.Path(name)
        options = {"xla_dump_to": name, "xla_dump_hlo_as_text": True} if tpu else {}
        compilation = _Compilation(lowered, options)
        compilation.start()
        while compilation.is_alive():
            compilation.join(0.5)
            if tpu and (dump := _dumped(folder)) is not None:
                return Compiled(hlo.parse(dump[0]), dump[1], passed(), dump[0])
        if compilation.error is not None:
            sizes = too_large(str(compilation.error))
            if sizes is None:
                raise RuntimeError(f"the compiler failed: {compilation.error}")
            return TooLarge(*sizes, passed())
        if tpu and (dump := _dumped(folder)) is not None:
            return Compiled(hlo.parse(dump[0]), dump[1], passed(), dump[0])
        stats = compilation.compiled.memory_analysis()
        text = compilation.compiled.as_text()
        used = (
            stats.argument_size_in_bytes
            + stats.output_size_in_bytes
            - stats.alias_size_in_bytes
            + stats.temp_size_in_bytes
        )
        if used > topology.chip.hbm_bytes:
            return TooLarge(used, topology.chip.hbm_bytes, passed())
        return Compiled(hlo.parse(text), used, passed(), text)


def _dumped(folder: pathlib.Path) -> tuple[str, float] | None:
    """The optimised module's text and the bytes of main memory, once both are written whole.

    Of several modules the largest is the program.
    """
    modules = sorted(folder.glob(_HLO), key=lambda p: p.stat().st_size)
    reports = sorted(folder.glob(_MEMORY), key=lambda p: p.stat().st_size)
    if not modules or not reports:
        return None
    text, report = modules[-1].read_text(), reports[-1].read_text()
    ends = re.search(r"^ENTRY .*?^}$", text, re.MULTILINE | re.DOTALL)
    total = re.search(r"Memory Space: default[^\n]*\nTotal bytes: (\d+)", report)
    if ends is None or total is None:
        return None
    return text, float(total.group(1))
