"""SerialExecutor: one worker in this process, no Ray. Two threads keep reading and writing beside the computing."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from volseg.errors import JobInterrupted
from volseg.execution.events import BlockDone, BlockFailed, Event, WorkerReady
from volseg.inference.attempt import Failure
from volseg.planning.memory import IN_HAND
from volseg.storage.ledger import Receipt


class LocalWorker(Protocol):
    """What the executor needs of a worker; `volseg.inference.worker.Worker` is one."""

    fingerprint: dict[str, str]

    def attempt(self, index: int) -> Receipt | Failure:
        """Process one block."""
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
        self._in_hand = 0
        self._alone = False

    def start(self) -> None:
        """Load the model."""
        self._worker = self._make_worker()
        self._events.put(WorkerReady(0, self._worker.fingerprint))

    def capacity(self, *, alone: bool = False) -> bool:
        """Tell whether a block can be handed out."""
        return self._worker is not None and not self._alone and self._in_hand < (1 if alone else IN_HAND)

    def submit(self, index: int, *, alone: bool = False) -> None:
        """Hand out a block."""
        self._in_hand += 1
        self._alone = alone
        self._pool.submit(self._run, index)

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
                self._in_hand -= 1
                self._alone = False
            events.append(found)
            if self._events.empty():
                return events
            found = self._events.get()

    def stop(self) -> None:
        """Stop blocks under way within one forward, and end the threads."""
        if self._worker is not None:
            self._worker.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, index: int) -> None:
        assert self._worker is not None
        try:
            outcome = self._worker.attempt(index)
        except JobInterrupted:
            return
        except Exception as error:  # noqa: BLE001 - an error of volseg itself: it is raised where the driver waits
            self._events.put(error)
            return
        if isinstance(outcome, Failure):
            self._events.put(BlockFailed(outcome))
        else:
            self._events.put(BlockDone(outcome, 0, self._worker.peak_memory()))
