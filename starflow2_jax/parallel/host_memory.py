"""Memory of the host's own allocator, which the CPU backend's programs work in."""

import ctypes
import sys

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1


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
