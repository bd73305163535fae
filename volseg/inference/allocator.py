"""Keep freed tensors mapped: on Linux, mapping large tensors anew for every layer costs more than the layer's arithmetic."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_large_tensors_mapped() -> bool:
    """Tell glibc to serve large requests from its heap and not to give the heap back; return whether it took it.

    The same as MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ in the environment, but it works in a process that
    runs already. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    largest = 2**31 - 1
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, largest) and libc.mallopt(_M_TRIM_THRESHOLD, largest))
