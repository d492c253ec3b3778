"""How fast a run is, and what it waits for: numbers for the rows of metrics; traces on demand."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator

import jax


class Meter:
    """Times between the rows of metrics of a stage."""

    def __init__(
        self,
        flops: float,
        peak_flops: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts.

        Args:
            flops: of a step, on all devices: see `training.flops`.
            peak_flops: of one device, FLOP/s; None where unknown: then no MFU is given.
            clock: seconds.
        """
        self._flops = flops
        self._peak = peak_flops
        self._clock = clock
        self._began: float | None = None
        self._steps = 0
        self._waited = 0.0
        self._counts = {"images": 0, "tokens": 0}
        self._seconds_of_all = 0.0
        self._counts_of_all = {"images": 0, "tokens": 0}

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for input."""
        began = self._clock()
        yield
        self._waited += self._clock() - began

    def finished(self, counts: dict[str, int]) -> None:
        """A step is done, of so many `images` and `tokens`; the first one starts the clock."""
        if self._began is None:  # it compiles, and is in no rate
            self._restart()
            return
        self._steps += 1
        for name in self._counts:
            self._counts[name] += counts[name]

    def _restart(self) -> None:
        self._began, self._steps, self._waited = self._clock(), 0, 0.0
        self._counts = dict.fromkeys(self._counts, 0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training: evaluation, drawing, saving."""
        began = self._clock()
        yield
        if self._began is not None:
            self._began += self._clock() - began

    def row(self) -> dict[str, float]:
        """What has been since the last row; nothing where no step was.

        Returns:
            `step_seconds` and of them `input_wait_seconds`, for one step; `tokens_per_second` and
            `images_per_second`, for one device; `mfu`; `hbm_gb` in use, of 2^30 bytes, and its
            peak, on this process's first device. Those that cannot be known are left out.
        """
        if self._began is None or not self._steps:
            return {}
        elapsed, devices = max(self._clock() - self._began, 1e-9), jax.device_count()
        found = {
            "step_seconds": elapsed / self._steps,
            "input_wait_seconds": self._waited / self._steps,
            "tokens_per_second_per_device": self._counts["tokens"] / elapsed / devices,
            "images_per_second_per_device": self._counts["images"] / elapsed / devices,
        }
        if self._peak:
            found["mfu"] = self._flops * self._steps / elapsed / (self._peak * devices)
        memory = jax.local_devices()[0].memory_stats() or {}
        names = {"bytes_in_use": "hbm_gb", "peak_bytes_in_use": "hbm_peak_gb"}
        found |= {name: memory[key] / 2**30 for key, name in names.items() if key in memory}
        self._seconds_of_all += elapsed
        for name, count in self._counts.items():
            self._counts_of_all[name] += count
        self._restart()
        return found

    def total(self) -> dict[str, float]:
        """`images_per_second` and `tokens_per_second` of the stage, on all devices together."""
        self.row()
        seconds = max(self._seconds_of_all, 1e-9)
        return {f"{name}_per_second": n / seconds for name, n in self._counts_of_all.items()}


TIMES = (
    "step_seconds",
    "input_wait_seconds",
    "tokens_per_second_per_device",
    "images_per_second_per_device",
    "mfu",
    "hbm_gb",
    "hbm_peak_gb",
    "stage_seconds",
    "images_per_second",
    "tokens_per_second",
    "peak_memory_gb",
)
"""Metrics that differ from run to run."""


class Profiler:
    """A trace of the steps from `first` to `last`, for TensorBoard's profile page or Perfetto."""

    def __init__(self, folder: pathlib.Path, steps: tuple[int, int] | None) -> None:
        """`steps`: first and last; None or (0, 0): no trace."""
        self._folder = folder
        self._first, self._last = steps or (0, 0)
        self._running = False

    def before(self, step: int) -> None:
        """Call before each step; the trace begins before the first of its steps."""
        if self._first and self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: object) -> None:
        """Call after each step with what it returns; the trace ends with the last of its steps."""
        if self._running and step >= self._last:
            jax.block_until_ready(result)
            self.stop()

    def stop(self) -> None:
        """Ends a trace that is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
