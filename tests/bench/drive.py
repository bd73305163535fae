"""Drives a simulated job with the real driver, policy and ledger, and measures what they cost."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from tests.bench.simulated import DriverKilled, Record, SimulatedExecutor, World
from volseg.execution.driver import Driver, Hooks, Tally
from volseg.execution.events import BlockDone, BlockFailed, WorkerLost
from volseg.execution.front import InOrder
from volseg.execution.policy import Strikes
from volseg.geometry import BlockSet
from volseg.planning.task import Task
from volseg.storage import files
from volseg.storage.ledger import Ledger, Receipt

ATTEMPTS = 6
_SAMPLES = 20


@dataclass
class Outcome:
    """What a simulated job came to."""

    record: Record
    blocks: int
    receipts: int = 0
    """Blocks with a receipt, each counted once."""
    failed: int = 0
    retried: int = 0
    notes: int = 0
    total_seconds: float = 0.0
    """CPU time of driver, policy, ledger and simulation, over all drivers."""
    read_seconds: float = 0.0
    """CPU time to read all receipts back at the end."""
    virtual_seconds: float = 0.0
    wall_seconds: float = 0.0
    writes: dict[str, int] = field(default_factory=dict)
    """Files that the ledger wrote, by folder or name."""
    ledger_bytes: int = 0
    resident: list[int] = field(default_factory=list)
    """Resident bytes of the process along the way."""
    objects: list[int] = field(default_factory=list)
    """Receipts and strikes that were alive along the way."""


class _Mortal(Ledger):
    """A ledger whose driver can be killed: from then on nothing is written."""

    def __init__(self, place: str, executor: SimulatedExecutor) -> None:
        super().__init__(place, "job", clock=executor.clock)
        self._executor = executor

    def tick(self, progress: Mapping[str, Any], *, force: bool = False) -> None:
        if not self._executor.killed:
            super().tick(progress, force=force)


def simulate(folder: Path, blocks: int, world: World, *, kills: int = 0, count_objects: bool = False) -> Outcome:
    """Bring a job of `blocks` blocks to its end while `kills` of its drivers are killed, evenly spread.

    With `count_objects` the receipts and strikes alive are counted along the way, which is slow.
    """
    outcome = Outcome(Record(bytearray(blocks)), blocks)
    sample = _sampler(outcome, count_objects)
    started = time.perf_counter()
    with _counted(outcome.writes):
        while _drive(folder, world, outcome, sample, kill=outcome.record.kills < kills and blocks // (kills + 1)):
            pass
        before = time.thread_time()
        done = BlockSet(receipt.index for receipt in Ledger(str(folder / "out"), "job").receipts())
        outcome.read_seconds = time.thread_time() - before
    outcome.receipts = len(done)
    outcome.wall_seconds = time.perf_counter() - started
    outcome.ledger_bytes = sum(files.sizes_below(str(folder / "out.volseg")).values())
    return outcome


def _drive(folder: Path, world: World, outcome: Outcome, sample: Callable[[int], None], *, kill: int | bool) -> bool:
    """Run one driver, as `volseg.execution.segment` does; return whether it was killed."""
    executor = SimulatedExecutor(world, outcome.record, now=outcome.virtual_seconds, kill_after=kill or None)
    before = time.thread_time()
    ledger = _Mortal(str(folder / "out"), executor)
    assert ledger.take()
    done = BlockSet(receipt.index for receipt in ledger.receipts())
    tally = Tally(outcome.blocks, resumed=len(done), clock=executor.clock)
    notes: list[int] = [0]

    def note(_: str) -> None:
        notes[0] += 1

    hooks = Hooks(
        size=lambda _: 1 << 24, report=lambda tally: sample(tally.done), note=note, check_fingerprint=lambda _, __: None
    )
    driver = Driver(executor, ledger, tally, hooks, attempts=ATTEMPTS)
    try:
        driver.run(InOrder(done.missing(outcome.blocks)))
    except DriverKilled:
        return True
    finally:
        outcome.total_seconds += time.thread_time() - before
        outcome.virtual_seconds = executor.now
        outcome.retried += tally.retried
        outcome.notes += notes[0]
        outcome.failed = len(tally.failed)
        ledger.end(None)
    return False


def bare_seconds(blocks: int, world: World) -> float:
    """Return the CPU time of the simulation alone: the same cluster, served by the shortest loop there is."""
    executor = SimulatedExecutor(world, Record(bytearray(blocks)))
    started = time.thread_time()
    executor.start()
    fresh, again, left = iter(range(blocks)), list[int](), blocks
    index = next(fresh, None)
    while left:
        while executor.capacity():
            if again:
                executor.submit(Task(again.pop()), ())
            elif index is not None:
                executor.submit(Task(index), ())
                index = next(fresh, None)
            else:
                break
        for event in executor.wait(0.5):
            match event:
                case BlockDone():
                    left -= 1
                case BlockFailed():
                    again.append(event.failure.index)
                case WorkerLost():
                    again += event.blocks
                case _:
                    pass
    return time.thread_time() - started


def _sampler(outcome: Outcome, count_objects: bool) -> Callable[[int], None]:
    process = psutil.Process()
    step = max(1, outcome.blocks // _SAMPLES)
    # Whatever else this process holds was there before.
    others = _alive() if count_objects else 0

    def sample(done: int) -> None:
        if done < step * len(outcome.resident):
            return
        outcome.resident.append(process.memory_info().rss)
        if count_objects:
            outcome.objects.append(_alive() - others)

    return sample


def _alive() -> int:
    gc.collect()
    # Not isinstance: stand-ins of other packages warn when they are asked for their class.
    return sum(type(found) in {Receipt, Strikes} for found in gc.get_objects())


@contextmanager
def _counted(writes: dict[str, int]) -> Iterator[None]:
    """Count what is written through `volseg.storage.files`, by the folder below the ledger or the file's name."""

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(uri: str, *rest: Any, **options: Any) -> Any:
            folder, name = uri.rsplit("/", 2)[-2:]
            kind = name if folder == "job" else folder
            writes[kind] = writes.get(kind, 0) + 1
            return real(uri, *rest, **options)

        return write

    with (
        mock.patch.object(files, "create_bytes", counting(files.create_bytes)),
        mock.patch.object(files, "write_bytes", counting(files.write_bytes)),
    ):
        yield
