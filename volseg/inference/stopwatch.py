"""Time spent on a device: on a GPU work is only queued, so a clock on the host would measure the queueing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up how long a device works on what is asked of it inside `running`; never waits for it there."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._spans: list[tuple[torch.Event, torch.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done inside."""
        if self._cuda:
            begun, ended = torch.Event("cuda", enable_timing=True), torch.Event("cuda", enable_timing=True)
            begun.record()
            yield
            ended.record()
            self._spans.append((begun, ended))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    @property
    def seconds(self) -> float:
        """Seconds counted up to now; waits until the device has done what was counted."""
        for begun, ended in self._spans:
            ended.synchronize()
            self._seconds += begun.elapsed_time(ended) / 1000
        self._spans.clear()
        return self._seconds


class Waits:
    """How long computing stood still although a block was in hand: its input was still read, or another one written."""

    def __init__(self) -> None:
        self._ended = 0.0

    def begin(self, came: float) -> float:
        """Return the seconds lost before the block that came at `came` is computed; call it when that begins."""
        return time.perf_counter() - max(came, self._ended)

    def end(self) -> None:
        """Say that the computing of a block is over."""
        self._ended = time.perf_counter()
