"""Settings of glibc's allocator that forwards on a CPU depend on: up to twice the speed, and foreseeable memory.

By default every large tensor is mapped afresh, and its pages are zeroed when first touched, on every use. With freed
memory kept for reuse that cost is gone, but small objects that live on must not settle in the gaps between tensors.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_KEEP = 2**31 - 1
_MAP_ABOVE = 128 * 1024


def keep_freed_memory() -> bool:
    """Make this process keep freed memory of any size for reuse; return whether the system lets it.

    Does what ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_ARENA_MAX`` do in the environment of a
    new process. Threads started later share the main heap: their own would end at 64 MiB and map what is larger anew.
    """
    return _set(_M_MMAP_THRESHOLD, _KEEP) and _set(_M_TRIM_THRESHOLD, _KEEP) and _set(_M_ARENA_MAX, 1)


@contextmanager
def large_blocks_mapped() -> Iterator[None]:
    """Map large blocks one by one inside, keep freed memory afterwards.

    A first forward belongs in here: what oneDNN keeps for good then lies together, not between two tensors, and the
    heap of later forwards stays the same from one to the next.
    """
    _set(_M_MMAP_THRESHOLD, _MAP_ABOVE)
    try:
        yield
    finally:
        keep_freed_memory()


def release_freed_memory(above: int) -> bool:
    """Give free memory back where this process has more than `above` bytes of its own; return whether any was given.

    Between blocks: two threads of a worker cut the heap up, and its holes can add up to half of what is in use. Not
    more often than needed: to touch all pages anew costs a block of a few patches a tenth of its time.
    """
    held = status_bytes("RssAnon")
    trim = _function("malloc_trim")
    return held is not None and held > above and trim is not None and trim(0) == 1


def status_bytes(name: str) -> int | None:
    """Return a size from what Linux says of this process (``VmHWM``, ``RssAnon``, ...); None where it says nothing."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


def _set(option: int, value: int) -> bool:
    mallopt = _function("mallopt")
    return mallopt is not None and mallopt(option, value) == 1


@cache
def _function(name: str) -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    # musl has neither of them.
    return getattr(ctypes.CDLL(None), name, None)
