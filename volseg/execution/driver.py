"""The driver's loop: hand out blocks, take receipts, apply the policy, keep the ledger. It never sees a voxel."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

from volseg.errors import InputError, JobError, WorkersLostError
from volseg.execution import lines
from volseg.execution.desk import Desk
from volseg.execution.events import (
    BlockDone,
    BlockFailed,
    BlockParked,
    Event,
    Executor,
    ParcelsLost,
    Word,
    WorkerFailed,
    WorkerLeft,
    WorkerLost,
    WorkerReady,
)
from volseg.execution.front import Work
from volseg.execution.policy import (
    NODES_TOGETHER,
    Decision,
    Strikes,
    Vigil,
    after_error,
    after_loss,
    losses_exhausted,
    starts_exhausted,
    worth_a_second_copy,
)
from volseg.inference.attempt import Failure
from volseg.journal import Line, Note, silent
from volseg.planning.task import Parcel, Task
from volseg.storage.ledger import Ledger, Receipt

TICK_SECONDS = 0.5
SUBMISSION = "VOLSEG_SUBMISSION"
"""Environment variable with the name of the submission that started this driver."""


@dataclass
class Tally:
    """What a run has done so far; also what a progress bar shows."""

    total: int
    resumed: int = 0
    job: str = ""
    """First digits of the job's key, which metrics and events name it by."""
    attempt: int = 0
    computed: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    retried: int = 0
    second_copies: int = 0
    """Blocks that were started once more because they were slow."""
    seams_lost: int = 0
    """Parcels that were gone when a block needed them."""
    seam_bytes: int = 0
    """Most bytes of seams and cores that waited at the same time."""
    workers_lost: int = 0
    workers: int = 0
    most_workers: int = 0
    """Workers that were ready at the same time, at most."""
    voxels: int = 0
    peak_memory: int = 0
    stats: dict[str, float] = field(default_factory=dict)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False, compare=False)
    """Seconds; what all times here are on."""
    started: float = field(init=False)
    ready: float | None = None
    """When the first worker was ready."""
    ended: float | None = None
    """When the last block was done or set aside."""
    stop_seconds: float = 0.0
    """How long the executor took to stop."""

    def __post_init__(self) -> None:
        """Begin to count time."""
        self.started = self.clock()

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

    def progress(self) -> dict[str, Any]:
        """Return what the heartbeat carries: counts, speed, and the submission that this driver works for."""
        seconds = 0.0 if self.ready is None else (self.ended or self.clock()) - self.ready
        return {
            **self.as_dict(), "workers": self.workers, "voxels": self.voxels, "seconds": round(seconds, 3),
            "submission": os.environ.get(SUBMISSION, ""),
        }  # fmt: skip


Reporter = Callable[[Tally], None]


@dataclass(frozen=True)
class Hooks:
    """What the driver asks and tells those who started it."""

    size: Callable[[int], int]
    """Voxels of a block."""
    report: Reporter
    """Called with the tally at least twice a second."""
    note: Note
    """Called with lines worth reading."""
    check_fingerprint: Callable[[dict[str, str], str], None]
    """Called with every new worker's fingerprint and with what happens where it must not take part; says that in an
    InputError then."""
    trace: Note = silent
    """Called with events that only machines care for, one a block among them."""


class Driver:
    """Drives one job's pending blocks through an executor."""

    def __init__(self, executor: Executor, ledger: Ledger, tally: Tally, hooks: Hooks, *, attempts: int) -> None:
        self._executor, self._ledger, self._tally, self._hooks = executor, ledger, tally, hooks
        self._attempts = attempts
        self._expected = 0
        self._strikes: dict[int, Strikes] = {}
        self._said: dict[int, str] = {}
        self._again: deque[int] = deque()
        self._lacking: deque[int] = deque()
        self._alone: deque[int] = deque()
        self._apart: deque[int] = deque()
        self._suspect: int | None = None
        self._usual: float | None = None
        self._fresh: set[int] = set()
        self._failed_starts = self._crashes = self._machines = 0
        self._vigil = Vigil()

    def run(self, work: Work) -> None:
        """Work off `work`; returns when every block is done or set aside.

        Raises JobError where no block can be done, InputError where no worker can take the job. Receipts taken so far
        are in the ledger whatever is raised.
        """
        try:
            self._executor.start()
            self._desk = Desk(work, self._executor)
            while True:
                # Where nothing is left to begin, a slow block is worth a worker more.
                self._expected = self._executor.adjust(self._left + (len(self._slow()) if work.exhausted else 0))
                self._hand_out()
                if work.exhausted and not (self._desk or self._again or self._alone or self._apart):
                    self._tally.ended = self._tally.clock()
                    return
                for event in self._executor.wait(TICK_SECONDS):
                    self._handle(event)
                self._ledger.tick(self._tally.progress())
                self._say_who_is_missing()
                self._hooks.report(self._tally)
        finally:
            self._tally.seam_bytes = work.most_bytes
            stopping = self._tally.clock()
            try:
                # Who asked this process to stop may kill it seconds later: what is done is kept before the workers end.
                self._ledger.tick(self._tally.progress(), force=True)
            finally:
                try:
                    self._executor.stop()
                finally:
                    self._tally.stop_seconds = self._tally.clock() - stopping
                    self._ledger.tick(self._tally.progress(), force=True)

    @property
    def _left(self) -> int:
        """Blocks that are neither done nor set aside."""
        return self._tally.total - self._tally.done - len(self._tally.failed)

    def _hand_out(self) -> None:
        desk = self._desk
        while queue := self._suspects():
            # A suspect waits for an idle worker; with others handed out before it none would ever be idle.
            if not self._executor.capacity(alone=True):
                return
            if queue is self._apart:
                self._suspect = queue[0]
            desk.submit(desk.work.task(queue.popleft()), self._tally.clock(), alone=True)
        while self._executor.capacity(alone=(alone := self._last_round())):
            task = self._next_task(self._executor.hand(alone=alone))
            if task is None:
                self._start_second_copies()
                return
            desk.submit(task, self._tally.clock())

    def _next_task(self, hand: Collection[int]) -> Task | None:
        work = self._desk.work
        while self._lacking:
            index = self._lacking.popleft()
            # Its call may have ended in the meantime.
            if index in self._desk:
                return work.task(index, hand)
        return work.task(self._again.popleft(), hand) if self._again else work.next(hand)

    def _start_second_copies(self) -> None:
        """Start slow blocks a second time where workers are idle and nothing is left to begin."""
        for index in self._slow():
            if not self._executor.capacity(alone=True):
                return
            if self._desk.work.has_room_for(index):
                self._tally.second_copies += 1
                self._tell(lines.block_copied(index))
                self._desk.submit(self._desk.work.task(index), self._tally.clock())

    def _slow(self) -> list[int]:
        """Return the blocks in hand that are worth a second copy, the oldest first."""
        now = self._tally.clock()
        return [
            index
            for index, since, copies in self._desk.oldest()
            if worth_a_second_copy(now - since, self._usual, copies) and index != self._suspect
        ]

    def _suspects(self) -> deque[int] | None:
        """Return the queue whose first block is to be handed out before all others, None where there is none."""
        if self._alone:
            return self._alone
        return self._apart if self._apart and self._suspect is None else None

    def _last_round(self) -> bool:
        """Tell whether what is left suffices for one block a worker.

        Then no worker takes a second one ahead: it would lie there while another worker is idle, or still starting.
        """
        return self._expected > 1 and self._left - len(self._desk) <= self._expected

    def _handle(self, event: Event) -> None:
        match event:
            case WorkerReady():
                self._ready(event)
            case BlockDone():
                self._done(event)
            case BlockParked():
                self._parked(event)
            case ParcelsLost():
                self._lacks(event)
            case BlockFailed():
                self._failed(event.failure)
            case WorkerLost():
                self._lost(event)
            case WorkerLeft():
                self._tally.workers -= 1
                self._tell(lines.worker_left(event))
            case WorkerFailed():
                self._not_started(event)
            case Word():
                self._tell(Line(event.text, "cluster"))

    def _ready(self, event: WorkerReady) -> None:
        alone = not self._tally.workers
        try:
            self._hooks.check_fingerprint(
                event.fingerprint, "the job stopped" if alone else "the job goes on without that machine"
            )
        except InputError as error:
            if alone:
                raise
            # A machine of another kind that joins the cluster ends no job.
            self._executor.refuse(event.worker)
            self._tell(lines.worker_refused(event, error))
            return
        self._failed_starts = 0
        self._fresh.add(event.worker)
        self._tally.ready = self._tally.ready or self._tally.clock()
        self._tally.workers += 1
        self._tally.most_workers = max(self._tally.most_workers, self._tally.workers)
        self._tell(lines.worker_ready(event))

    def _done(self, event: BlockDone) -> None:
        index = event.receipt.index
        self._tally.peak_memory = max(self._tally.peak_memory, event.peak_memory)
        if not self._came_first(index):
            return
        self._desk.take(event)
        self._crashes = self._machines = self._failed_starts = 0
        # A done block is never tried again: of a million blocks, only those in trouble are remembered.
        self._strikes.pop(index, None)
        self._said.pop(index, None)
        self._ledger.add(event.receipt)
        self._tally.computed += 1
        self._tally.voxels += self._hooks.size(index)
        self._tally.take(event.receipt)
        self._tell(lines.block_done(event))

    def _parked(self, event: BlockParked) -> None:
        self._tally.peak_memory = max(self._tally.peak_memory, event.peak_memory)
        if self._came_first(event.index):
            self._desk.take(event)
            self._crashes = self._machines = 0

    def _came_first(self, index: int) -> bool:
        """Tell whether an answer is the first for a block; that of a second copy is let go."""
        if index not in self._desk:
            return False
        self._not_suspected(index)
        seconds = self._tally.clock() - self._desk.since(index)
        self._usual = seconds if self._usual is None else 0.9 * self._usual + 0.1 * seconds
        return True

    def _lacks(self, event: ParcelsLost) -> None:
        """Give back a block whose call could not begin: that is nobody's fault."""
        if event.index in self._desk and self._desk.back(event.index):
            self._not_suspected(event.index)
            self._again.append(event.index)
        self._lose(event.parcels)

    def _lose(self, parcels: Collection[Parcel]) -> None:
        """Start again, beside the call that may wait for them for long, whatever lacks parcels that are gone."""
        self._tally.seams_lost += len(parcels)
        if parcels:
            self._tell(lines.seams_lost(len(parcels)))
        self._lacking.extend(self._desk.lose(parcels))

    def _not_suspected(self, index: int) -> bool:
        """Take note that a block is not under way any more; return whether it ran apart from other suspects."""
        apart = index == self._suspect
        if apart:
            self._suspect = None
        return apart

    def _failed(self, failure: Failure) -> None:
        if failure.index not in self._desk:
            return
        last = self._desk.back(failure.index)
        self._not_suspected(failure.index)
        before = self._strikes.get(failure.index, Strikes())
        strikes = replace(before, errors=before.errors + 1)
        self._strikes[failure.index] = strikes
        if failure.details:
            self._ledger.trace(failure.index, failure.message, failure.details)
        decision = after_error(strikes, failure.kind, self._attempts)
        if decision == "stop the job":
            raise JobError(failure.message)
        if decision == "set aside":
            self._set_aside(failure.index, failure.message)
        else:
            # Said once to people: the same words after every attempt would bury the rest.
            again = self._said.get(failure.index) == failure.message
            self._said[failure.index] = failure.message
            self._tell(lines.block_failed(failure, strikes.errors, said=again))
            if last:
                self._try_again(failure.index, decision)

    def _lost(self, event: WorkerLost) -> None:
        self._tally.workers -= 1
        self._tally.workers_lost += 1
        self._tell(lines.worker_lost(event))
        self._check_losses(event)
        mine = [index for index in event.blocks if index in self._desk]
        last = {index: self._desk.back(index) for index in mine}
        if event.loss != "crash":
            # Ray itself takes half a minute to see that what lay on a machine went with it.
            self._lose(self._desk.made_by(event.worker))
        for index in mine:
            apart = self._not_suspected(index)
            strikes = self._strikes.get(index, Strikes()).with_loss(event.loss, apart=apart)
            self._strikes[index] = strikes
            decision = after_loss(strikes, event.loss)
            if decision == "set aside":
                self._set_aside(index, _blame(strikes, event))
            else:
                if event.loss == "node" and strikes.nodes == NODES_TOGETHER:
                    self._tell(lines.block_suspected(index, strikes.nodes))
                if last[index]:
                    self._try_again(index, decision)

    def _check_losses(self, event: WorkerLost) -> None:
        """Count losses with no finished block between them; raises WorkersLostError where there are too many."""
        if event.loss == "crash":
            self._crashes += 1
        elif event.loss == "node" and event.worker in self._fresh:
            # Workers that were there when the last machine went may have gone with it, or in the same power cut.
            self._machines += 1
            self._fresh.clear()
        for count, what in ((self._crashes, "workers died"), (self._machines, "machines were lost")):
            if losses_exhausted(count):
                raise WorkersLostError(
                    f"{count} {what} one after the other and no block was finished between them, the last one: "
                    f"{event.cause}; the job stopped: fewer --workers or less --memory may help, then run it again"
                )

    def _not_started(self, event: WorkerFailed) -> None:
        if event.fatal:
            raise InputError(event.message)
        self._failed_starts += 1
        self._tell(lines.worker_failed(event))
        if starts_exhausted(self._failed_starts, self._expected):
            raise WorkersLostError(
                f"{self._failed_starts} workers in a row could not start, the last one: {event.message}; the job "
                "stopped and can be resumed with the same command"
            )

    def _try_again(self, index: int, decision: Decision) -> None:
        self._tally.retried += 1
        self._tell(lines.block_retried(index, decision))
        queues = {"retry alone": self._alone, "retry apart": self._apart}
        queues.get(decision, self._again).append(index)

    def _say_who_is_missing(self) -> None:
        there = self._tally.workers
        if word := self._vigil.word(there, self._expected, self._tally.clock(), self._executor.missing):
            self._tell(lines.workers_missing(there, self._expected, word))

    def _set_aside(self, index: int, message: str) -> None:
        self._tally.failed[index] = message
        self._desk.settle(index)
        self._tell(lines.block_set_aside(index, message))

    def _tell(self, line: Line) -> None:
        """Tell what happened: people, where there is a text for them, else machines."""
        (self._hooks.note if line else self._hooks.trace)(line)


def _blame(strikes: Strikes, event: WorkerLost) -> str:
    if event.loss == "crash":
        return f"{strikes.crashes} workers died while they held it, the last one: {event.cause}"
    return (
        f"{strikes.nodes} machines were lost while they held it, the last {strikes.nodes_apart} with no other suspect, "
        f"the last one: {event.cause}; it may need more memory than they have: try less --memory"
    )
