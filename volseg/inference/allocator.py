"""Keep freed tensors mapped: on Linux, mapping them anew for every layer costs more than the layer's arithmetic."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_large_tensors_mapped() -> bool:
    """Tell glibc to serve large requests from its heap and not to give the heap back; return whether it took it.

    All threads share the main heap: the heaps of other threads end at 64 MiB and map everything larger anew. The same
    as MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_ARENA_MAX in the environment, but it works in a process
    that runs already. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    largest = 2**31 - 1
    libc = ctypes.CDLL(None)
    settings = ((_M_MMAP_THRESHOLD, largest), (_M_TRIM_THRESHOLD, largest), (_M_ARENA_MAX, 1))
    return all(libc.mallopt(name, value) for name, value in settings)
