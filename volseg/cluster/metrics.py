"""What Prometheus can scrape from Ray's metrics endpoints while a job runs on Ray.

All but the GPU memory is counted by the driver, from receipts that it takes once: a block that was computed twice, or
whose worker died behind it, counts once. What failed attempts read is therefore not in it. Ray puts `ray_` before the
names and `_total` behind those of counters, says on which node a process runs, and forgets a gauge that is not set
again; it sends what is left when a process ends. Series of counters stay until a node's agent ends, one a driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import ray
from ray.util.metrics import Counter, Gauge

from volseg.execution.driver import Reporter, Tally

TAGS = ("volseg_job", "device")
"""Prometheus calls what it scrapes `job` itself and would rename ours."""

COUNTERS: Mapping[str, tuple[str, Callable[[Tally], float]]] = {
    "volseg_blocks_done": ("Blocks computed, written and read back", lambda t: t.computed),
    "volseg_blocks_failed": ("Blocks set aside after their attempts", lambda t: len(t.failed)),
    "volseg_blocks_retried": ("Blocks handed out once more after an error or a lost worker", lambda t: t.retried),
    "volseg_workers_lost": ("Workers that died or went with their machine", lambda t: t.workers_lost),
    "volseg_voxels": ("Voxels labelled", lambda t: t.voxels),
    "volseg_forwards": ("Patches that went through the network", lambda t: t.stats.get("forwards", 0)),
    "volseg_forward_seconds": ("Time of forwards, summed over workers", lambda t: t.stats.get("forward_seconds", 0)),
    "volseg_compute_seconds": (
        "Time of forwards, blending and transfers, summed over workers",
        lambda t: t.stats.get("compute_seconds", 0),
    ),
    "volseg_input_wait_seconds": (
        "Time that workers had blocks in hand and computed none, because of reading or writing",
        lambda t: t.stats.get("waiting_seconds", 0),
    ),
    "volseg_read_seconds": ("Time of reading, summed over workers", lambda t: t.stats.get("read_seconds", 0)),
    "volseg_write_seconds": (
        "Time of writing and reading back, summed over workers",
        lambda t: t.stats.get("write_seconds", 0),
    ),
    "volseg_read_bytes": ("Bytes of voxels read, halos included, decoded", lambda t: t.stats.get("read_bytes", 0)),
    "volseg_written_bytes": ("Bytes of objects written, as stored", lambda t: t.stats.get("written_bytes", 0)),
}
"""Description by name, and how a tally says it."""

GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "volseg_job_active": ("1 while a driver works on the job, 0 when it has left", TAGS),
    "volseg_job_blocks": ("Blocks of the job by state: total, done (earlier attempts included), failed",
                          (*TAGS, "state")),
    "volseg_job_progress_timestamp_seconds": ("When a block was done or set aside last, else the job's start", TAGS),
    "volseg_workers": ("Workers that are ready", TAGS),
    "volseg_gpu_memory_bytes": ("GPU memory of a worker by kind: allocated, reserved, peak, total",
                                ("volseg_job", "kind")),
}  # fmt: skip
"""Description and tags by name."""


@cache
def _counter(name: str) -> Counter:
    return Counter(name, COUNTERS[name][0], TAGS)


@cache
def _gauge(name: str) -> Gauge:
    return Gauge(name, *GAUGES[name])


@dataclass
class Meter:
    """Adds to the metrics what is new in each tally; without `job` it goes by the tally's own."""

    device: str
    job: str = ""

    def __post_init__(self) -> None:
        self._told: dict[str, float] = {}
        self._settled = -1
        self._progress = time.time()
        self._job = self.job

    def take(self, tally: Tally) -> None:
        """Tell what `tally` has that was not told before."""
        self._job = self.job or tally.job
        for name, (_, value) in COUNTERS.items():
            new = value(tally) - self._told.get(name, 0)
            if new > 0:
                _counter(name).inc(new, self._tags)
                self._told[name] = value(tally)
        self._tell_state(tally)

    def leave(self) -> None:
        """Say that nobody works on the job any more."""
        # A Ray that ended with the job has no endpoint any more.
        if self._job and ray.is_initialized():
            _gauge("volseg_job_active").set(0, self._tags)
            _gauge("volseg_workers").set(0, self._tags)

    @property
    def _tags(self) -> dict[str, str]:
        return {"volseg_job": self._job, "device": self.device}

    def _tell_state(self, tally: Tally) -> None:
        settled = tally.done + len(tally.failed)
        if settled != self._settled:
            self._progress = self._progress if self._settled < 0 else time.time()
            self._settled = settled
        _gauge("volseg_job_active").set(1, self._tags)
        _gauge("volseg_workers").set(tally.workers, self._tags)
        _gauge("volseg_job_progress_timestamp_seconds").set(self._progress, self._tags)
        for state, count in (("total", tally.total), ("done", tally.done), ("failed", len(tally.failed))):
            _gauge("volseg_job_blocks").set(count, {**self._tags, "state": state})


@contextmanager
def metered(report: Reporter, device: str, job: str = "") -> Iterator[Reporter]:
    """Lend a reporter that tells the metrics, too; `job` names what it counts for, where it is no single job."""
    meter = Meter(device, job)

    def told(tally: Tally) -> None:
        meter.take(tally)
        report(tally)

    try:
        yield told
    finally:
        meter.leave()


def tell_gpu_memory(job: str, memory: Mapping[str, int]) -> None:
    """Tell what a worker's process holds of its GPU, by kind in bytes; nothing on a CPU."""
    for kind, count in memory.items():
        _gauge("volseg_gpu_memory_bytes").set(count, {"volseg_job": job, "kind": kind})
