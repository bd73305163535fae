"""A limit on how many requests this process sends to S3: a token bucket for all of its threads and event loops."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable

from volseg.errors import InputError

VARIABLE = "VOLSEG_S3_RATE"
"""Environment variable: requests a second that one job may send, all its processes together; no limit without it."""


class TokenBucket:
    """Grants `rate` requests a second on average, and up to one second's worth at once."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._free = clock() - 1
        """When everything granted so far would be paid for."""

    def delay(self) -> float:
        """Take one request; return the seconds to wait before it is sent."""
        with self._lock:
            now = self._clock()
            self._free = max(self._free, now - 1) + 1 / self.rate
            return max(0.0, self._free - now)


_bucket: TokenBucket | None = None
_lock = threading.Lock()
_sharers = 1


def share(processes: int) -> None:
    """Say how many processes of a job share its limit; each takes an equal part of it. One without this call."""
    global _bucket, _sharers
    with _lock:
        _sharers, _bucket = max(1, processes), None


def limit() -> float | None:
    """Return this process' limit in requests a second, None without one; raises InputError."""
    given = os.environ.get(VARIABLE, "").strip()
    if not given:
        return None
    try:
        rate = float(given)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise InputError(
            f"{VARIABLE} is {given!r}: it is the number of requests a second that a job may send to S3, more than 0; "
            "nothing was sent: correct it, or unset it for no limit"
        )
    return rate / _sharers


async def turn() -> None:
    """Wait until this process may send one more request; raises InputError."""
    global _bucket  # noqa: PLW0603 - one limit a process
    rate = limit()
    if rate is None:
        return
    with _lock:
        if _bucket is None or _bucket.rate != rate:
            _bucket = TokenBucket(rate)
        delay = _bucket.delay()
    if delay:
        await asyncio.sleep(delay)
