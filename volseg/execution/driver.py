"""The driver's loop: hand out blocks, take receipts, apply the policy, keep the ledger. It never sees a voxel."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from volseg.errors import InputError, JobError, WorkersLostError
from volseg.execution.events import (
    BlockDone,
    BlockFailed,
    Event,
    Executor,
    WorkerFailed,
    WorkerLost,
    WorkerReady,
)
from volseg.execution.policy import Decision, Strikes, after_error, after_loss, losses_exhausted, starts_exhausted
from volseg.inference.attempt import Failure
from volseg.storage.ledger import Ledger, Receipt

TICK_SECONDS = 0.5


@dataclass
class Tally:
    """What a run has done so far; also what a progress bar shows."""

    total: int
    resumed: int = 0
    computed: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    retried: int = 0
    workers_lost: int = 0
    workers: int = 0
    voxels: int = 0
    peak_memory: int = 0
    stats: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    ready: float | None = None
    """When the first worker was ready; on the clock of `started`."""
    ended: float | None = None
    """When the last block was done or set aside."""
    stop_seconds: float = 0.0
    """How long the executor took to stop."""

    @property
    def done(self) -> int:
        """Blocks with a receipt."""
        return self.resumed + self.computed

    def take(self, receipt: Receipt) -> None:
        """Add up a receipt's figures."""
        for name, value in receipt.stats.items():
            self.stats[name] = self.stats.get(name, 0) + value

    def as_dict(self) -> dict[str, int]:
        """Return the counts of blocks."""
        return {"total": self.total, "computed": self.computed, "resumed": self.resumed, "failed": len(self.failed)}


Reporter = Callable[[Tally], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Hooks:
    """What the driver asks and tells those who started it."""

    size: Callable[[int], int]
    """Voxels of a block."""
    report: Reporter
    """Called with the tally at least twice a second."""
    note: Note
    """Called with lines worth reading."""
    check_fingerprint: Callable[[dict[str, str]], None]
    """Called with every new worker's fingerprint; raises InputError where it must not take part."""


class Driver:
    """Drives one job's pending blocks through an executor."""

    def __init__(
        self, executor: Executor, ledger: Ledger, tally: Tally, hooks: Hooks, *, attempts: int, workers: int
    ) -> None:
        self._executor, self._ledger, self._tally, self._hooks = executor, ledger, tally, hooks
        self._attempts, self._workers = attempts, workers
        self._strikes: dict[int, Strikes] = {}
        self._said: dict[int, str] = {}
        self._again: deque[int] = deque()
        self._alone: deque[int] = deque()
        self._in_flight: set[int] = set()
        self._failed_starts = self._losses = 0

    def run(self, pending: Iterator[int]) -> None:
        """Work off `pending`; returns when every block is done or set aside.

        Raises JobError where no block can be done, InputError where no worker can take the job. Receipts taken so far
        are in the ledger whatever is raised.
        """
        try:
            self._executor.start()
            waiting = next(pending, None)
            while True:
                waiting = self._hand_out(pending, waiting)
                if waiting is None and not (self._in_flight or self._again or self._alone):
                    self._tally.ended = time.monotonic()
                    return
                for event in self._executor.wait(TICK_SECONDS):
                    self._handle(event)
                self._ledger.tick(self._tally.as_dict())
                self._hooks.report(self._tally)
        finally:
            stopping = time.monotonic()
            try:
                self._executor.stop()
            finally:
                self._tally.stop_seconds = time.monotonic() - stopping
                self._ledger.tick(self._tally.as_dict(), force=True)

    def _hand_out(self, pending: Iterator[int], waiting: int | None) -> int | None:
        while self._alone and self._executor.capacity(alone=True):
            self._submit(self._alone.popleft(), alone=True)
        # A suspect waits for an idle worker; with others in the queue none would ever be idle.
        if self._alone:
            return waiting
        while self._executor.capacity(alone=self._last_round()):
            if self._again:
                self._submit(self._again.popleft())
            elif waiting is not None:
                self._submit(waiting)
                waiting = next(pending, None)
            else:
                break
        return waiting

    def _last_round(self) -> bool:
        """Tell whether what is left suffices for one block a worker.

        Then no worker takes a second one ahead: it would lie there while another worker is idle, or still starting.
        """
        tally = self._tally
        left = tally.total - tally.done - len(tally.failed) - len(self._in_flight)
        return self._workers > 1 and left <= self._workers

    def _submit(self, index: int, *, alone: bool = False) -> None:
        self._in_flight.add(index)
        self._executor.submit(index, alone=alone)

    def _handle(self, event: Event) -> None:
        match event:
            case WorkerReady():
                self._hooks.check_fingerprint(event.fingerprint)
                self._failed_starts = 0
                self._tally.ready = self._tally.ready or time.monotonic()
                self._tally.workers += 1
            case BlockDone():
                self._done(event)
            case BlockFailed():
                self._failed(event.failure)
            case WorkerLost():
                self._lost(event)
            case WorkerFailed():
                self._not_started(event)

    def _done(self, event: BlockDone) -> None:
        index = event.receipt.index
        self._in_flight.discard(index)
        self._losses = 0
        self._ledger.add(event.receipt)
        self._tally.computed += 1
        self._tally.voxels += self._hooks.size(index)
        self._tally.peak_memory = max(self._tally.peak_memory, event.peak_memory)
        self._tally.take(event.receipt)

    def _failed(self, failure: Failure) -> None:
        self._in_flight.discard(failure.index)
        before = self._strikes.get(failure.index, Strikes())
        strikes = Strikes(before.errors + 1, before.crashes)
        self._strikes[failure.index] = strikes
        if failure.details:
            self._ledger.trace(failure.index, failure.message, failure.details)
        decision = after_error(strikes, failure.kind, self._attempts)
        if decision == "stop the job":
            raise JobError(failure.message)
        if decision == "set aside":
            self._set_aside(failure.index, failure.message)
        else:
            # Said once: the same words after every attempt would bury the rest.
            if self._said.get(failure.index) != failure.message:
                self._said[failure.index] = failure.message
                self._hooks.note(f"block {failure.index} is tried again: {failure.message}")
            self._try_again(failure.index, decision)

    def _lost(self, event: WorkerLost) -> None:
        self._tally.workers -= 1
        self._tally.workers_lost += 1
        what = f"its {len(event.blocks)} block(s) go to another" if event.blocks else "it had no block in hand"
        self._hooks.note(f"worker {event.worker} was lost ({event.cause}); {what}")
        self._losses += not event.infrastructure
        if losses_exhausted(self._losses):
            raise WorkersLostError(
                f"{self._losses} workers died one after the other and no block was finished between them, the last "
                f"one: {event.cause}; the job stopped: fewer --workers or less --memory may help, then run it again"
            )
        for index in event.blocks:
            self._in_flight.discard(index)
            before = self._strikes.get(index, Strikes())
            strikes = Strikes(before.errors, before.crashes + (not event.infrastructure))
            self._strikes[index] = strikes
            decision = after_loss(strikes, infrastructure=event.infrastructure)
            if decision == "set aside":
                cause = f"{strikes.crashes} workers died while they held it, the last one: {event.cause}"
                self._set_aside(index, cause)
            else:
                self._try_again(index, decision)

    def _not_started(self, event: WorkerFailed) -> None:
        if event.fatal:
            raise InputError(event.message)
        self._failed_starts += 1
        self._hooks.note(f"worker {event.worker} could not start: {event.message}")
        if starts_exhausted(self._failed_starts, self._workers):
            raise WorkersLostError(
                f"{self._failed_starts} workers in a row could not start, the last one: {event.message}; the job "
                "stopped and can be resumed with the same command"
            )

    def _try_again(self, index: int, decision: Decision) -> None:
        self._tally.retried += 1
        (self._alone if decision == "retry alone" else self._again).append(index)

    def _set_aside(self, index: int, message: str) -> None:
        self._tally.failed[index] = message
        self._hooks.note(f"block {index} is set aside: {message}")
