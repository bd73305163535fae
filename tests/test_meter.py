"""What is told to Ray's metrics: differences of tallies, once each; a real endpoint is asked in test_watch.py."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import pytest

from volseg.cluster import metrics
from volseg.cluster.metrics import COUNTERS, GAUGES, Meter, metered, tell_gpu_memory
from volseg.execution.driver import Tally
from volseg.storage.ledger import Receipt

Tags = dict[str, str]


@dataclass
class Heard:
    """Stands for Ray: sums of counters and last values of gauges, by name and tags."""

    counted: Counter[tuple[str, ...]] = field(default_factory=Counter)
    shown: dict[tuple[str, ...], float] = field(default_factory=dict)

    def counter(self, name: str) -> Heard.One:
        return Heard.One(self, name, {"volseg_job", "device"})

    def gauge(self, name: str) -> Heard.One:
        return Heard.One(self, name, set(GAUGES[name][1]))

    @dataclass
    class One:
        """One metric."""

        heard: Heard
        name: str
        tags: set[str]

        def inc(self, value: float, tags: Tags) -> None:
            assert value > 0, "Ray refuses nothing and less"
            self.heard.counted[self.name, *self._values(tags)] += value  # type: ignore[assignment]

        def set(self, value: float, tags: Tags) -> None:
            self.heard.shown[self.name, *self._values(tags)] = value

        def _values(self, tags: Tags) -> list[str]:
            assert set(tags) == self.tags, "Ray refuses tags that are missing"
            return [tags[name] for name in sorted(tags)]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    heard = Heard()
    monkeypatch.setattr(metrics, "_counter", heard.counter)
    monkeypatch.setattr(metrics, "_gauge", heard.gauge)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    return heard


def take(tally: Tally, index: int) -> None:
    """Count a block as the driver does."""
    tally.computed += 1
    tally.voxels += 100
    tally.take(Receipt(index, {}, {}, {"forwards": 8, "forward_seconds": 0.5, "read_bytes": 400, "class_0": 100}))


def test_every_block_counts_once(heard: Heard) -> None:
    meter, tally = Meter("cpu"), Tally(4, resumed=1, job="abc")
    for index in range(2):
        meter.take(tally)
        take(tally, index)
        meter.take(tally)
    tally.failed[3] = "bad"
    tally.retried = 2
    for _ in range(3):
        meter.take(tally)
    assert heard.counted == {
        ("volseg_blocks_done", "cpu", "abc"): 2,
        ("volseg_blocks_failed", "cpu", "abc"): 1,
        ("volseg_blocks_retried", "cpu", "abc"): 2,
        ("volseg_voxels", "cpu", "abc"): 200,
        ("volseg_forwards", "cpu", "abc"): 16,
        ("volseg_forward_seconds", "cpu", "abc"): 1.0,
        ("volseg_read_bytes", "cpu", "abc"): 800,
    }
    states = {key[2]: value for key, value in heard.shown.items() if key[0] == "volseg_job_blocks"}
    assert states == {"total": 4, "done": 3, "failed": 1}


def test_progress_is_when_a_block_was_settled(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    key = ("volseg_job_progress_timestamp_seconds", "cuda", "abc")
    meter, tally = Meter("cuda"), Tally(4, resumed=1, job="abc")
    for settle, expected in ((False, 1000), (False, 1000), (True, 1020), (False, 1020)):
        if settle:
            take(tally, 0)
        meter.take(tally)
        assert heard.shown[key] == expected
        now[0] += 10


def test_a_batch_is_counted_as_one(heard: Heard) -> None:
    """Ten thousand volumes must not make a hundred thousand series."""
    reported: list[Tally] = []
    for number in range(3):
        tally = Tally(1, job=f"volume {number}")
        with metered(reported.append, "cpu", "batch-1") as told:
            take(tally, 0)
            told(tally)
            assert heard.shown["volseg_job_active", "cpu", "batch-1"] == 1
        assert heard.shown["volseg_job_active", "cpu", "batch-1"] == 0
    assert heard.counted["volseg_blocks_done", "cpu", "batch-1"] == 3
    assert len(reported) == 3
    assert {key[-1] for key in heard.counted} == {"batch-1"}


def test_a_job_that_never_began_is_not_active(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    with metered(lambda _: None, "cpu"):
        pass
    assert not heard.shown
    # And where Ray ended with the job, nobody is told that it left.
    with metered(lambda _: None, "cpu") as told:
        told(Tally(1, job="abc"))
        monkeypatch.setattr("ray.is_initialized", lambda: False)
    assert heard.shown["volseg_job_active", "cpu", "abc"] == 1


def test_memory_of_gpus(heard: Heard) -> None:
    tell_gpu_memory("abc", {})
    assert not heard.shown
    tell_gpu_memory("abc", {"allocated": 5, "total": 9})
    assert heard.shown == {
        ("volseg_gpu_memory_bytes", "allocated", "abc"): 5, ("volseg_gpu_memory_bytes", "total", "abc"): 9,
    }  # fmt: skip


def test_names_are_good_ones() -> None:
    """Base units at the end, no suffix that Ray adds, and all told apart."""
    names = [*COUNTERS, *GAUGES]
    assert len(set(names)) == len(names)
    assert all(name.startswith("volseg_") and not name.endswith("_total") for name in names)
    for name in names:
        assert not set(name.split("_")) & {"ms", "mb", "mib", "milliseconds", "kilobytes"}
