"""The CPU backend's devices and threads, and the memory that its programs work in."""

import ctypes
import os
import sys

import jax

NARROW_ALL_REDUCES = "--xla_disable_hlo_passes=all-reduce-promotion"
# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1


def claim_devices(count: int | None) -> None:
    """Makes the CPU that many devices; to be called before any device is looked at.

    Elementwise work runs on one thread per device, so that one device per core is fastest.

    Args:
        count: of devices; None leaves them as they are, and so does `JAX_NUM_CPU_DEVICES`.
    """
    # XLA's CPU compiler widens bfloat16 all-reduces, and some end the process there (a CHECK:
    # "Invalid binary instruction opcode copy"). They run as they are, too.
    flags = os.environ.get("XLA_FLAGS", "")
    if NARROW_ALL_REDUCES not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {NARROW_ALL_REDUCES}".strip()
    if count is None or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    jax.config.update("jax_num_cpu_devices", count)
    # XLA's pool has a thread per core, and a thread that waits in an all-reduce is taken: two of
    # one device's at a time would leave none to the device that they wait for.
    os.environ.setdefault("NPROC", str(2 * count))


def keep_freed_memory() -> bool:
    """Makes this process keep the memory it frees, for its next allocation.

    A compiled program asks for its temporary memory anew each time it runs. By default glibc gets
    large blocks from the kernel and returns them at once, and the kernel clears every page of them
    again: on CPU that is a large part of a training step (`docs/performance.md`). The process then
    stays as large as it ever was.

    Returns:
        Whether the allocator took the settings: False, and nothing is changed, without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)
    return all([mallopt(setting, _LARGEST) == 1 for setting in settings])
