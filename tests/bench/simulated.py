"""A simulated cluster in virtual time: workers that fail, vanish and dawdle, for the real driver, policy and ledger.

Nothing is computed and nobody waits: `wait` moves the clock to the next thing that happens. What happens to a block is
drawn from a seeded generator, so a run can be repeated.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from volseg.execution.events import BlockDone, BlockFailed, Event, WorkerLost, WorkerReady
from volseg.execution.policy import Loss
from volseg.inference.attempt import Failure
from volseg.planning.memory import IN_HAND
from volseg.planning.task import Task
from volseg.storage.ledger import Receipt

Fate = Literal["done", "error", "crash", "node", "preemption"]


class DriverKilled(BaseException):
    """Stands for a SIGKILL of the driver."""


@dataclass(frozen=True)
class World:
    """What happens in the cluster; rates are shares of the attempts, times are in seconds.

    A lost machine takes the blocks of all its workers along, so the rates of machines are small. With those below, 5 %
    of all attempts end without a result.
    """

    workers: int = 1000
    workers_a_node: int = 8
    seconds: float = 20.0
    """Usual time of a block; it varies by a quarter of that."""
    start: float = 40.0
    """From the start of a worker until it is ready."""
    errors: float = 0.04
    crashes: float = 0.005
    nodes: float = 0.0004
    preemptions: float = 0.0003
    stragglers: float = 0.005
    slowness: float = 10.0
    """How much longer a straggler takes."""
    written: float = 0.02
    """Share of the computing blocks of a lost worker that are written, but whose receipt got lost with it."""
    seed: int = 0


@dataclass
class Record:
    """What happened, over all drivers of a job."""

    finished: bytearray
    """How often each block was computed to its end."""
    attempts: int = 0
    lost: int = 0
    """Attempts without a result, those that a killed driver left included."""
    busy: float = 0.0
    """Seconds that workers computed."""
    wasted: float = 0.0
    """Of these, seconds without a result."""
    stragglers: int = 0
    kills: int = 0
    losses: dict[str, int] = field(default_factory=dict)

    @property
    def twice(self) -> int:
        """Blocks computed to their end again after they had been."""
        return sum(self.finished) - sum(1 for count in self.finished if count)


@dataclass
class _Worker:
    """One simulated worker; `life` tells events of an earlier process from those of this one."""

    life: int = 0
    ready: bool = False
    alone: bool = False
    hand: deque[int] = field(default_factory=deque)
    since: float = 0.0


class SimulatedExecutor:
    """Runs blocks nowhere; see `volseg.execution.events.Executor`. `now` is the virtual time in seconds.

    With `kill_after`, `wait` raises DriverKilled once so many blocks were finished in all.
    """

    def __init__(self, world: World, record: Record, *, now: float = 0.0, kill_after: int | None = None) -> None:
        self.now = now
        self.killed = False
        self._world, self._record, self._kill_after = world, record, kill_after
        self._random = random.Random(f"{world.seed} {record.kills}")
        self._workers = [_Worker() for _ in range(world.workers)]
        self._by_load: list[dict[int, None]] = [{} for _ in range(IN_HAND)]
        self._due: list[tuple[float, int, int, int, Fate | Literal["ready"]]] = []
        self._count = 0
        self._done = 0

    def clock(self) -> float:
        """Return the virtual time."""
        return self.now

    def start(self) -> None:
        """Begin to start the workers: they are ready one after the other."""
        for number in range(len(self._workers)):
            self._begin(number)

    def adjust(self, left: int) -> int:
        """Return the number of workers: all that there are, whatever is left."""
        return len(self._workers)

    def refuse(self, worker: int) -> None:
        """Raise: all simulated machines are alike."""
        raise RuntimeError(f"worker {worker} was refused")

    def capacity(self, *, alone: bool = False) -> bool:
        """Tell whether a worker has room."""
        return any(self._by_load[:1] if alone else self._by_load)

    def hand(self, *, alone: bool = False) -> Collection[int]:
        """Return what the worker has in hand that would take the next block."""
        return self._workers[self._next()[1]].hand

    def _next(self) -> tuple[int, int]:
        """Return how many blocks a worker with least has in hand, and its number."""
        load = next(load for load, numbers in enumerate(self._by_load) if numbers)
        return load, next(iter(self._by_load[load]))

    def submit(self, task: Task, inbox: Sequence[Any], *, alone: bool = False) -> None:
        """Hand out a block to a worker that has least in hand."""
        index = task.index
        load, number = self._next()
        worker = self._workers[number]
        assert not alone or not load, "handed out without capacity"
        worker.alone = alone
        self._move(number, load, load + 1)
        worker.hand.append(index)
        if not load:
            self._compute(number)

    def wait(self, timeout: float) -> list[Event]:
        """Return what happens next, at most `timeout` seconds of virtual time from now."""
        if self._kill_after is not None and self._done >= self._kill_after:
            self.killed = True
            self._drop_all()
            raise DriverKilled
        if not self._due or self._due[0][0] > self.now + timeout:
            self.now += timeout
            return []
        self.now, _, number, life, fate = heapq.heappop(self._due)
        worker = self._workers[number]
        if life != worker.life:
            return []
        if fate == "ready":
            worker.ready = True
            self._by_load[0][number] = None
            return [WorkerReady(number, {"name": "simulated"})]
        if fate in {"done", "error"}:
            return [self._finish(number, fate)]
        size = 1 if fate == "crash" else self._world.workers_a_node
        first = number - number % size
        gone = range(first, min(first + size, len(self._workers)))
        self._record.losses[fate] = self._record.losses.get(fate, 0) + 1
        return [self._lose(n, fate) for n in gone if self._workers[n].ready]

    def missing(self) -> str:
        """Say what workers wait for."""
        return "they start"

    def stop(self) -> None:
        """End all workers."""
        self._due.clear()

    def _begin(self, number: int) -> None:
        self._push(self._world.start * self._random.uniform(0.8, 1.5), number, "ready")

    def _push(self, delay: float, number: int, fate: Fate | Literal["ready"]) -> None:
        self._count += 1
        heapq.heappush(self._due, (self.now + delay, self._count, number, self._workers[number].life, fate))

    def _move(self, number: int, old: int, new: int) -> None:
        """Put a worker among those with `new` blocks in hand; those that are full or alone stand nowhere."""
        if old < IN_HAND:
            self._by_load[old].pop(number, None)
        if new < IN_HAND and not (new and self._workers[number].alone):
            self._by_load[new][number] = None

    def _compute(self, number: int) -> None:
        world, draw = self._world, self._random
        worker = self._workers[number]
        worker.since = self.now
        seconds = world.seconds * draw.uniform(0.75, 1.25)
        if draw.random() < world.stragglers:
            seconds *= world.slowness
            self._record.stragglers += 1
        fate = self._fate(draw.random())
        self._record.attempts += 1
        self._push(seconds if fate == "done" else seconds * draw.random(), number, fate)

    def _fate(self, value: float) -> Fate:
        world = self._world
        rates: tuple[tuple[Fate, float], ...] = (
            ("error", world.errors), ("crash", world.crashes), ("node", world.nodes), ("preemption", world.preemptions),
        )  # fmt: skip
        for fate, rate in rates:
            if value < rate:
                return fate
            value -= rate
        return "done"

    def _finish(self, number: int, fate: Fate) -> Event:
        worker, record = self._workers[number], self._record
        index = worker.hand.popleft()
        seconds = self.now - worker.since
        record.busy += seconds
        self._move(number, len(worker.hand) + 1, len(worker.hand))
        worker.alone = False
        if worker.hand:
            self._compute(number)
        if fate == "done":
            self._done += 1
            record.finished[index] = min(record.finished[index] + 1, 255)
            return BlockDone(_receipt(index, seconds), number, 1 << 30)
        record.wasted += seconds
        record.lost += 1
        return BlockFailed(Failure(index, "retryable", "OSError: the network is down", "Traceback: simulated"))

    def _lose(self, number: int, fate: Fate) -> Event:
        assert fate != "done"
        assert fate != "error"
        worker = self._workers[number]
        loss: Loss = fate
        self._drop(number)
        blocks = tuple(worker.hand)
        if len(worker.hand) < IN_HAND:
            self._by_load[len(worker.hand)].pop(number, None)
        self._workers[number] = _Worker(worker.life + 1)
        self._begin(number)
        return WorkerLost(number, blocks, f"simulated {fate}", loss)

    def _drop(self, number: int) -> None:
        """Count what a worker had under way as lost."""
        worker, record = self._workers[number], self._record
        if worker.hand:
            record.busy += self.now - worker.since
            record.wasted += self.now - worker.since
            if self._random.random() < self._world.written:
                record.finished[worker.hand[0]] = min(record.finished[worker.hand[0]] + 1, 255)
        record.lost += bool(worker.hand)

    def _drop_all(self) -> None:
        self._record.kills += 1
        for number in range(len(self._workers)):
            self._drop(number)


def _receipt(index: int, seconds: float) -> Receipt:
    """Return a receipt as long as a real one."""
    objects = {f"0/c/{index // 10000}/{index // 100 % 100}/{index % 100}": 4_000_000 + index % 1000}
    stats = {
        "absent_chunks": 0.0, "forwards": 27, "forward_seconds": seconds * 0.95, "compute_seconds": seconds * 0.97,
        "read_seconds": 0.1234567, "write_seconds": 0.2345678, "class_0": 1_000_000 + index, "class_1": 97_152,
    }  # fmt: skip
    return Receipt(index, {"0": f"{index:064x}"}, objects, stats)
