"""LocalExecutor: workers that are threads of this process, one or one a core; no Ray.

The workers share the networks. What holds Python's lock is short beside a forward, in which torch lets go of it. For
every worker two threads of a pool keep reading and writing beside the computing.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from volseg.errors import JobInterrupted
from volseg.execution.events import BlockDone, BlockFailed, BlockParked, Event, WorkerReady
from volseg.execution.prepare import Prepared
from volseg.inference.attempt import Answer, Failure
from volseg.planning.memory import IN_HAND
from volseg.planning.task import Parcel, Task

if TYPE_CHECKING:
    from volseg.inference.worker import Worker


class LocalWorker(Protocol):
    """What the executor needs of a worker; `volseg.inference.worker.Worker` is one."""

    fingerprint: dict[str, str]

    def announce(self, index: int) -> None:
        """Say that a task of this block comes next."""
        ...

    def attempt(self, task: Task, inbox: Sequence[NDArray[np.int32]] = ()) -> Answer | Failure:
        """Do one task."""
        ...

    def peak_memory(self) -> int:
        """Return the resident peak of the process in bytes."""
        ...

    def close(self) -> None:
        """Stop what is under way."""
        ...


@dataclass(eq=False)
class _Slot:
    """A worker and what it has in hand; `alone` while that is one block which nothing may run beside."""

    number: int
    worker: LocalWorker
    blocks: list[int] = field(default_factory=list)
    alone: bool = False


def local_executor(job: Prepared, kept: list[Worker] | None = None) -> LocalExecutor:
    """Return the executor of a job that was planned for one process.

    `kept` holds a worker from one job to the next, whose networks are used again where they fit.
    """

    def make_workers() -> Sequence[LocalWorker]:
        from volseg.inference.worker import workers_of

        workers = workers_of(job.spec, job.plan, job.bundle_digest, kept.pop() if kept else None)
        if kept is not None:
            kept.append(workers[0])
        return workers

    return LocalExecutor(make_workers)


class LocalExecutor:
    """Runs blocks in this process; see `volseg.execution.events.Executor`."""

    def __init__(self, make_workers: Callable[[], Sequence[LocalWorker]]) -> None:
        self._make_workers = make_workers
        self._slots: list[_Slot] = []
        self._pool: ThreadPoolExecutor | None = None
        self._events: queue.SimpleQueue[tuple[_Slot, Event | Exception]] = queue.SimpleQueue()

    def start(self) -> None:
        """Load the model."""
        self._slots = [_Slot(number, worker) for number, worker in enumerate(self._make_workers())]
        self._pool = ThreadPoolExecutor(IN_HAND * len(self._slots), thread_name_prefix="volseg-block")
        for slot in self._slots:
            self._events.put((slot, WorkerReady(slot.number, slot.worker.fingerprint)))

    def adjust(self, left: int) -> int:
        """Return the number of workers: all that there will be."""
        return len(self._slots)

    def capacity(self, *, alone: bool = False) -> bool:
        """Tell whether a block can be handed out."""
        return self._open(alone) is not None

    def hand(self, *, alone: bool = False) -> Collection[int]:
        """Return what the worker has in hand that would take the next block."""
        slot = self._open(alone)
        return tuple(slot.blocks) if slot is not None else ()

    def submit(self, task: Task, inbox: Sequence[Any], *, alone: bool = False) -> None:
        """Hand a task to the worker that has least in hand."""
        slot = self._open(alone)
        if slot is None or self._pool is None:
            raise RuntimeError(f"no worker has room for block {task.index}: ask capacity() first")
        slot.blocks.append(task.index)
        slot.alone = alone
        slot.worker.announce(task.index)
        self._pool.submit(self._run, slot, task, inbox)

    def wait(self, timeout: float) -> list[Event]:
        """Return what happened, after at most `timeout` seconds."""
        try:
            slot, found = self._events.get(timeout=timeout)
        except queue.Empty:
            return []
        events: list[Event] = []
        while True:
            if isinstance(found, Exception):
                if not events:
                    raise found
                # What was finished before is told first.
                self._events.put((slot, found))
                return events
            if not isinstance(found, WorkerReady):
                slot.blocks.remove(_index(found))
                slot.alone = False
            events.append(found)
            if self._events.empty():
                return events
            slot, found = self._events.get()

    def refuse(self, worker: int) -> None:
        """Raise: all workers are of one kind, and where none may take part, the driver stops the job."""
        raise RuntimeError(f"worker {worker} is of this process and cannot be let go")

    def missing(self) -> str:
        """Return an empty string: the workers are ready when `start` returns."""
        return ""

    def stop(self) -> None:
        """Stop blocks under way within one forward, and end the threads."""
        # The first one knows how many threads torch had before all of them.
        for slot in reversed(self._slots):
            slot.worker.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _open(self, alone: bool) -> _Slot | None:
        """Return the worker that would take the next block, None where all have enough."""
        most = 1 if alone else IN_HAND
        slots = [slot for slot in self._slots if not slot.alone and len(slot.blocks) < most]
        return min(slots, key=lambda slot: len(slot.blocks), default=None)

    def _run(self, slot: _Slot, task: Task, inbox: Sequence[NDArray[np.int32]]) -> None:
        try:
            outcome = slot.worker.attempt(task, inbox)
        except JobInterrupted:
            return
        except Exception as error:  # noqa: BLE001 - an error of volseg itself: it is raised where the driver waits
            self._events.put((slot, error))
            return
        if isinstance(outcome, Failure):
            self._events.put((slot, BlockFailed(outcome)))
            return
        # The process is all workers': each has its share of it, as in the plan.
        peak = slot.worker.peak_memory() // len(self._slots)
        self._events.put((slot, event_of(outcome, slot.number, peak, outcome.parcels)))


def event_of(answer: Answer, worker: int, peak: int, parcels: Mapping[Parcel, Any]) -> BlockDone | BlockParked:
    """Return what an answer tells the driver; `parcels` are the handles of its parcels."""
    if answer.receipt is None:
        return BlockParked(answer.index, worker, peak, parcels, answer.stats)
    return BlockDone(answer.receipt, worker, peak, parcels)


def _index(event: Event) -> int:
    match event:
        case BlockDone():
            return event.receipt.index
        case BlockFailed():
            return event.failure.index
        case BlockParked():
            return event.index
    raise TypeError(f"{event} is about no block")
