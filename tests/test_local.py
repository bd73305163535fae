"""Workers in this process: two blocks in hand each, errors that surface where the driver waits, a stop that stops."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from volseg.errors import BundleError, JobInterrupted
from volseg.execution.driver import Driver, Hooks, Tally
from volseg.execution.events import BlockDone, BlockFailed, Event, WorkerReady
from volseg.execution.front import InOrder
from volseg.execution.local import LocalExecutor
from volseg.inference.attempt import Answer, Failure
from volseg.planning.memory import IN_HAND
from volseg.planning.task import Task
from volseg.storage.ledger import Ledger, Receipt

LONG = 60.0


class Local:
    """A worker whose blocks wait until they are let go, and end when it is closed."""

    fingerprint = {"name": "cpu"}  # noqa: RUF012

    def __init__(self, outcome: Callable[[int], Receipt | Failure] | None = None, held: bool = False) -> None:
        self.outcome = outcome or (lambda index: Receipt(index, {}, {}))
        self.gate = threading.Event()
        self.closed = threading.Event()
        self.begun: list[int] = []
        self.announced: list[int] = []
        self.inside = threading.Semaphore(0)
        self.threads: set[str] = set()
        if not held:
            self.gate.set()

    def announce(self, index: int) -> None:
        self.announced.append(index)

    def attempt(self, task: Task, inbox: Sequence[Any] = ()) -> Answer | Failure:
        self.begun.append(task.index)
        self.threads.add(threading.current_thread().name)
        self.inside.release()
        assert self.gate.wait(LONG)
        if self.closed.is_set():
            raise JobInterrupted("stopped")
        outcome = self.outcome(task.index)
        return outcome if isinstance(outcome, Failure) else Answer(task.index, outcome)

    def peak_memory(self) -> int:
        return 12345

    def close(self) -> None:
        self.closed.set()
        self.gate.set()


@pytest.fixture
def started() -> Iterator[Callable[..., LocalExecutor]]:
    executors = []

    def start(*workers: Local) -> LocalExecutor:
        executor = LocalExecutor(lambda: workers)
        executors.append(executor)
        executor.start()
        assert executor.wait(LONG) == [WorkerReady(number, {"name": "cpu"}) for number in range(len(workers))]
        return executor

    yield start
    for executor in executors:
        executor.stop()


def collect(executor: LocalExecutor, count: int) -> list[Event]:
    found: list[Event] = []
    while len(found) < count:
        new = executor.wait(LONG)
        assert new
        found += new
    return found


Start = Callable[..., LocalExecutor]


def test_a_block_comes_back_with_its_receipt(started: Start) -> None:
    executor = started(Local())
    executor.submit(Task(7), [])
    assert collect(executor, 1) == [BlockDone(Receipt(7, {}, {}), 0, 12345)]


def test_a_failure_comes_back_as_one(started: Start) -> None:
    failure = Failure(7, "retryable", "it did not work")
    executor = started(Local(lambda index: failure))
    executor.submit(Task(7), [])
    assert collect(executor, 1) == [BlockFailed(failure)]


def test_so_many_blocks_are_in_hand_and_no_more(started: Start) -> None:
    worker = Local(held=True)
    executor = started(worker)
    for index in range(IN_HAND):
        assert executor.capacity()
        executor.submit(Task(index), [])
    assert not executor.capacity()
    # All of them run at the same time: reading beside computing beside writing.
    for _ in range(IN_HAND):
        assert worker.inside.acquire(timeout=LONG)
    assert len(worker.threads) == IN_HAND
    assert worker.announced == list(range(IN_HAND))
    worker.gate.set()
    collect(executor, IN_HAND)
    assert executor.capacity()


def test_a_suspect_waits_for_an_empty_hand_and_keeps_it(started: Start) -> None:
    worker = Local(held=True)
    executor = started(worker)
    executor.submit(Task(0), [])
    assert executor.capacity()
    assert not executor.capacity(alone=True)
    worker.gate.set()
    collect(executor, 1)
    worker.gate.clear()
    assert executor.capacity(alone=True)
    executor.submit(Task(1), [], alone=True)
    assert not executor.capacity()
    assert not executor.capacity(alone=True)
    worker.gate.set()
    collect(executor, 1)
    assert executor.capacity()


def test_a_block_goes_to_the_worker_with_least_in_hand() -> None:
    """So all workers begin at once, and what `hand` says is of the one that takes the next block."""
    workers = [Local(held=True), Local(held=True)]
    executor = LocalExecutor(lambda: workers)
    executor.start()
    assert executor.adjust(99) == 2
    for index in range(2 * IN_HAND):
        assert executor.capacity()
        before = executor.hand()
        executor.submit(Task(index), [])
        (taker,) = (worker for worker in workers if index in worker.announced)
        assert list(before) == taker.announced[:-1]
    assert not executor.capacity()
    assert [worker.announced for worker in workers] == [[0, 2], [1, 3]]
    # Each worker computes its own: no block of one waits for a thread that another's hold.
    for worker in workers:
        for _ in range(IN_HAND):
            assert worker.inside.acquire(timeout=LONG)
    executor.stop()
    assert executor.wait(LONG) == [WorkerReady(0, {"name": "cpu"}), WorkerReady(1, {"name": "cpu"})]
    assert executor.wait(0.001) == []


def test_a_suspect_keeps_one_worker_and_the_other_goes_on(started: Start) -> None:
    workers = [Local(held=True), Local(held=True)]
    executor = started(*workers)
    executor.submit(Task(0), [], alone=True)
    executor.submit(Task(1), [])
    assert not executor.capacity(alone=True)
    executor.submit(Task(2), [])
    assert not executor.capacity()
    assert [worker.announced for worker in workers] == [[0], [1, 2]]
    workers[0].gate.set()
    assert collect(executor, 1) == [BlockDone(Receipt(0, {}, {}), 0, 12345 // 2)]
    assert executor.capacity(alone=True)


def test_a_worker_of_several_has_its_share_of_the_process(started: Start) -> None:
    executor = started(Local(), Local(), Local())
    for index in range(3):
        executor.submit(Task(index), [])
    found = collect(executor, 3)
    assert {(event.worker, event.peak_memory) for event in found if isinstance(event, BlockDone)} == {
        (number, 12345 // 3) for number in range(3)
    }


def test_the_first_worker_is_closed_last() -> None:
    """It knows how many threads torch had before; see `volseg.inference.worker.Worker.close`."""
    closed: list[str] = []

    class Noted(Local):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def close(self) -> None:
            closed.append(self.name)
            super().close()

    executor = LocalExecutor(lambda: [Noted("first"), Noted("second")])
    executor.start()
    executor.stop()
    assert closed == ["second", "first"]


def test_nothing_can_be_handed_out_before_the_start() -> None:
    executor = LocalExecutor(lambda: [Local()])
    assert not executor.capacity()
    executor.stop()


def test_a_worker_that_cannot_be_made_raises_at_the_start() -> None:
    def make() -> list[Local]:
        raise BundleError("the bundle is damaged")

    executor = LocalExecutor(make)
    with pytest.raises(BundleError, match="damaged"):
        executor.start()
    executor.stop()


def test_waiting_gives_up_after_its_time(started: Start) -> None:
    assert started(Local(held=True)).wait(0.001) == []


def test_an_error_of_volseg_itself_surfaces_after_what_was_done_before(started: Start) -> None:
    order = threading.Event()

    def outcome(index: int) -> Receipt:
        if index == 1:
            assert order.wait(LONG)
            raise ZeroDivisionError("a bug")
        return Receipt(index, {}, {})

    executor = started(Local(outcome))
    executor.submit(Task(0), [])
    executor.submit(Task(1), [])
    found = collect(executor, 1)
    order.set()
    assert found == [BlockDone(Receipt(0, {}, {}), 0, 12345)]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        executor.wait(LONG)


def test_what_was_done_before_an_error_is_not_lost(started: Start) -> None:
    """Both have happened when the driver looks: the receipt comes first, the error at the next look."""
    executor = started(Local())
    done = BlockDone(Receipt(0, {}, {}), 0, 12345)
    (slot,) = executor._slots
    slot.blocks.append(0)
    executor._events.put((slot, done))
    executor._events.put((slot, ZeroDivisionError("a bug")))
    assert executor.wait(LONG) == [done]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        executor.wait(LONG)


def test_stopping_ends_the_blocks_under_way_and_drops_the_others(started: Start) -> None:
    worker = Local(held=True)
    executor = started(worker)
    executor.submit(Task(0), [])
    executor.submit(Task(1), [])
    for _ in range(2):
        assert worker.inside.acquire(timeout=LONG)
    executor.stop()
    assert worker.closed.is_set()
    assert executor.wait(0.001) == []
    assert not any(thread.name.startswith("volseg-block") for thread in threading.enumerate())


def test_the_driver_works_off_a_job(tmp_path: Path) -> None:
    failures = {3: [Failure(3, "retryable", "once")], 5: [Failure(5, "hopeless", "never")]}

    def outcome(index: int) -> Receipt | Failure:
        return failures[index].pop() if failures.get(index) else Receipt(index, {}, {})

    ledger, tally = Ledger(str(tmp_path / "out"), "key"), Tally(20)
    assert ledger.take()
    hooks = Hooks(lambda index: 1, lambda tally: None, lambda text: None, lambda found, otherwise: None)
    executor = LocalExecutor(lambda: [Local(outcome)])
    Driver(executor, ledger, tally, hooks, attempts=3).run(InOrder(range(20)))
    assert (tally.computed, tally.retried, tally.failed) == (19, 1, {5: "never"})
    assert {receipt.index for receipt in ledger.receipts()} == set(range(20)) - {5}
    assert tally.peak_memory == 12345
