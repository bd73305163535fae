"""SerialExecutor: one worker in this process, no Ray. Two threads keep reading and writing beside the computing."""

from __future__ import annotations

import queue
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from volseg.errors import JobInterrupted
from volseg.execution.events import BlockDone, BlockFailed, BlockParked, Event, WorkerReady
from volseg.inference.attempt import Answer, Failure
from volseg.planning.memory import IN_HAND
from volseg.planning.task import Parcel, Task


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
        """Return the resident peak in bytes."""
        ...

    def close(self) -> None:
        """Stop what is under way."""
        ...


class SerialExecutor:
    """Runs blocks in this process; see `volseg.execution.events.Executor`."""

    def __init__(self, make_worker: Callable[[], LocalWorker]) -> None:
        self._make_worker = make_worker
        self._worker: LocalWorker | None = None
        self._pool = ThreadPoolExecutor(IN_HAND, thread_name_prefix="volseg-block")
        self._events: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._in_hand: list[int] = []
        self._alone = False

    def start(self) -> None:
        """Load the model."""
        self._worker = self._make_worker()
        self._events.put(WorkerReady(0, self._worker.fingerprint))

    def adjust(self, left: int) -> int:
        """Return one: this process is the only worker."""
        return 1

    def capacity(self, *, alone: bool = False) -> bool:
        """Tell whether a block can be handed out."""
        return self._worker is not None and not self._alone and len(self._in_hand) < (1 if alone else IN_HAND)

    def hand(self, *, alone: bool = False) -> Collection[int]:
        """Return what the worker has in hand."""
        return tuple(self._in_hand)

    def submit(self, task: Task, inbox: Sequence[Any], *, alone: bool = False) -> None:
        """Hand out a task."""
        assert self._worker is not None
        self._in_hand.append(task.index)
        self._alone = alone
        self._worker.announce(task.index)
        self._pool.submit(self._run, task, inbox)

    def wait(self, timeout: float) -> list[Event]:
        """Return what happened, after at most `timeout` seconds."""
        try:
            first = self._events.get(timeout=timeout)
        except queue.Empty:
            return []
        events: list[Event] = []
        found: Event | Exception = first
        while True:
            if isinstance(found, Exception):
                if not events:
                    raise found
                # What was finished before is told first.
                self._events.put(found)
                return events
            if not isinstance(found, WorkerReady):
                self._in_hand.remove(_index(found))
                self._alone = False
            events.append(found)
            if self._events.empty():
                return events
            found = self._events.get()

    def refuse(self, worker: int) -> None:
        """Raise: where the only worker must not take part, the driver stops the job."""
        raise RuntimeError(f"worker {worker} is the only one and cannot be let go")

    def missing(self) -> str:
        """Return an empty string: the worker is ready when `start` returns."""
        return ""

    def stop(self) -> None:
        """Stop blocks under way within one forward, and end the threads."""
        if self._worker is not None:
            self._worker.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, task: Task, inbox: Sequence[NDArray[np.int32]]) -> None:
        assert self._worker is not None
        try:
            outcome = self._worker.attempt(task, inbox)
        except JobInterrupted:
            return
        except Exception as error:  # noqa: BLE001 - an error of volseg itself: it is raised where the driver waits
            self._events.put(error)
            return
        if isinstance(outcome, Failure):
            self._events.put(BlockFailed(outcome))
        else:
            self._events.put(event_of(outcome, 0, self._worker.peak_memory(), outcome.parcels))


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
