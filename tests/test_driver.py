"""The driver against a scripted executor: who is tried how often, what is kept, and when the job stops."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from volseg.errors import InputError, JobError, WorkersLostError
from volseg.execution import policy
from volseg.execution.driver import Driver, Hooks, Tally
from volseg.execution.events import (
    BlockDone,
    BlockFailed,
    Event,
    Word,
    WorkerFailed,
    WorkerLeft,
    WorkerLost,
    WorkerReady,
)
from volseg.execution.front import InOrder
from volseg.execution.policy import MAX_CRASHES, MAX_LOSSES, NODES_APART, NODES_TOGETHER, Loss
from volseg.geometry import BlockSet
from volseg.inference.attempt import Failure, Kind
from volseg.planning.task import Task
from volseg.storage.ledger import Ledger, Receipt

Fate = Literal["done", "retryable", "hopeless", "job", "crash", "node", "preemption", "ctrl-c"]
IN_HAND = 2


@dataclass
class Scripted:
    """Workers in memory. `script` has the fates of a block's attempts in order, the last one for ever; others are done.

    Each `wait` brings the oldest block of one worker to its end. A crash takes all blocks of the worker with it, and a
    lost machine those of all its workers: as many as `machine` side by side share one.
    """

    script: dict[int, list[Fate]] = field(default_factory=dict)
    workers: int = 1
    machine: int = 1
    before: list[Event] = field(default_factory=list)
    stop_error: Exception | None = None
    replaced: bool = True
    expected: int = 1
    refused: list[int] = field(default_factory=list)
    lefts: list[int] = field(default_factory=list)
    invoked: list[int] = field(default_factory=list)
    alone: list[int] = field(default_factory=list)
    stopped: int = 0

    def start(self) -> None:
        self.hands: list[list[int]] = [[] for _ in range(self.workers)]
        self.lonely = [False] * self.workers
        self.gone: set[int] = set()
        self.turn = 0
        self.events: list[Event] = [*self.before, *(WorkerReady(w, {"name": f"cpu{w}"}) for w in range(self.workers))]

    def adjust(self, left: int) -> int:
        self.lefts.append(left)
        return self.expected

    def refuse(self, worker: int) -> None:
        self.refused.append(worker)
        self.gone.add(worker)

    def free(self, alone: bool) -> int | None:
        room = 1 if alone else IN_HAND
        free = [
            w for w in range(self.workers) if len(self.hands[w]) < room and not self.lonely[w] and w not in self.gone
        ]
        return min(free, key=lambda w: len(self.hands[w]), default=None)

    def capacity(self, *, alone: bool = False) -> bool:
        return self.free(alone) is not None

    def hand(self, *, alone: bool = False) -> list[int]:
        worker = self.free(alone)
        assert worker is not None
        return self.hands[worker]

    def submit(self, task: Task, inbox: Sequence[Any], *, alone: bool = False) -> None:
        worker, index = self.free(alone), task.index
        assert worker is not None, "handed out without capacity"
        assert not any(index in hand for hand in self.hands), "handed out twice"
        self.hands[worker].append(index)
        self.lonely[worker] = alone
        if alone:
            self.alone.append(index)

    def wait(self, timeout: float) -> list[Event]:
        if self.events:
            return [self.events.pop(0)]
        for step in range(self.workers):
            worker = (self.turn + step) % self.workers
            if self.hands[worker]:
                self.turn = worker + 1
                return self.finish(worker)
        raise AssertionError("the driver waits for nothing")

    def finish(self, worker: int) -> list[Event]:
        index = self.hands[worker][0]
        fates = self.script.get(index, ["done"])
        tries = self.invoked.count(index)
        fate = fates[min(tries, len(fates) - 1)]
        self.invoked.append(index)
        if fate == "ctrl-c":
            raise KeyboardInterrupt
        if fate in {"crash", "node", "preemption"}:
            first = worker - worker % self.machine
            gone = [worker] if fate == "crash" else range(first, min(first + self.machine, self.workers))
            return [self.lose(w, f"{fate} of worker {worker}", fate) for w in gone]
        self.hands[worker].pop(0)
        self.lonely[worker] = False
        if fate == "done":
            stats = {"forwards": 2.0, "class_1": float(index)}
            return [BlockDone(Receipt(index, {"0": "ab"}, {f"0/c/{index}": 9}, stats), worker, 1000 + index)]
        kind: Kind = "retryable" if fate == "retryable" else "hopeless" if fate == "hopeless" else "job"
        return [BlockFailed(Failure(index, kind, f"{fate} error of block {index}", "Traceback: here"))]

    def lose(self, worker: int, cause: str, loss: Loss) -> Event:
        lost, self.hands[worker], self.lonely[worker] = tuple(self.hands[worker]), [], False
        if self.replaced:
            self.events.append(WorkerReady(worker, {"name": "cpu"}))
        else:
            self.gone.add(worker)
        return WorkerLost(worker, lost, cause, loss)

    def missing(self) -> str:
        return "no room" if self.gone else ""

    def stop(self) -> None:
        self.stopped += 1
        if self.stop_error is not None:
            raise self.stop_error


class Run:
    """One driver's run over `pending` blocks, with what it noted and reported."""

    def __init__(
        self, output: Path, executor: Scripted, attempts: int = 3, workers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        executor.expected = workers
        self.ledger = Ledger(str(output), "key")
        assert self.ledger.take()
        self.tally = Tally(0, clock=clock)
        self.notes: list[str] = []
        self.reports: list[dict[str, int]] = []
        self.check: Callable[[dict[str, str]], None] = lambda found: None
        hooks = Hooks(
            size=lambda index: 10,
            report=lambda tally: self.reports.append(tally.as_dict()),
            note=self.notes.append,
            check_fingerprint=lambda found, _: self.check(found),
        )
        self.driver = Driver(executor, self.ledger, self.tally, hooks, attempts=attempts)

    def __call__(self, pending: Iterable[int]) -> Tally:
        blocks = list(pending)
        self.tally.total = len(blocks)
        self.driver.run(InOrder(blocks))
        return self.tally

    @property
    def receipts(self) -> set[int]:
        return {receipt.index for receipt in self.ledger.receipts()}


# ---------------------------------------------------------------- a job without trouble


@pytest.mark.parametrize("workers", [1, 3])
def test_every_block_is_computed_once(tmp_path: Path, workers: int) -> None:
    executor = Scripted(workers=workers)
    run = Run(tmp_path / "out", executor, workers=workers)
    tally = run(range(20))
    assert Counter(executor.invoked) == Counter(range(20))
    assert run.receipts == set(range(20))
    assert tally.as_dict() == {"total": 20, "computed": 20, "resumed": 0, "failed": 0}
    assert (tally.done, tally.voxels, tally.peak_memory, tally.workers) == (20, 200, 1019, workers)
    assert tally.stats == {"forwards": 40, "class_1": sum(range(20))}
    assert (tally.retried, tally.workers_lost, executor.stopped) == (0, 0, 1)
    assert run.reports[-1] == tally.as_dict()
    assert run.notes == []


def test_blocks_are_handed_out_one_after_the_other_and_two_in_hand(tmp_path: Path) -> None:
    most = []

    class Watched(Scripted):
        def wait(self, timeout: float) -> list[Event]:
            most.append(len(self.hands[0]))
            return super().wait(timeout)

    executor = Watched()
    Run(tmp_path / "out", executor)(range(9))
    assert executor.invoked == list(range(9))
    assert max(most) == IN_HAND


def test_nothing_pending_is_no_work(tmp_path: Path) -> None:
    executor = Scripted()
    assert Run(tmp_path / "out", executor)([]).computed == 0
    assert executor.invoked == []
    assert executor.stopped == 1


def test_pending_blocks_are_taken_one_by_one(tmp_path: Path) -> None:
    """A grid of 10^9 blocks must never be a list."""
    taken = []

    def pending() -> Any:
        for index in range(10**9):
            taken.append(index)
            yield index

    executor = Scripted({5: ["job"]})
    run = Run(tmp_path / "out", executor)
    with pytest.raises(JobError):
        run.driver.run(InOrder(pending()))
    assert len(taken) < 12


# ---------------------------------------------------------------- slow blocks


class Dawdling(Scripted):
    """Two workers; the first never gets on with `slow`, and the clock is moved by hand: ten seconds a wait."""

    slow = 8
    now = 0.0
    ending: Fate = "done"

    def submit(self, task: Task, inbox: Sequence[Any], *, alone: bool = False) -> None:
        worker = self.free(alone)
        assert worker is not None
        assert task.index not in self.hands[worker], "twice to the same worker"
        self.hands[worker].append(task.index)
        self.invoked.append(task.index)

    def wait(self, timeout: float) -> list[Event]:
        self.now += 10.0
        if self.events:
            return [self.events.pop(0)]
        hand = next((hand for hand in self.hands if hand and hand[0] != self.slow), None)
        if hand is None and self.invoked.count(self.slow) < 2:
            return []
        # The second copy ends first, the first one right after it.
        worker = self.hands.index(hand) if hand is not None else 1 if self.slow in self.hands[1] else 0
        index = self.hands[worker].pop(0)
        return [BlockDone(Receipt(index, {"0": f"{index}"}, {}, {"forwards": 1.0}), worker, 1)]


def test_a_slow_block_is_started_once_more_and_the_first_receipt_counts(tmp_path: Path) -> None:
    executor = Dawdling(workers=2)
    run = Run(tmp_path / "out", executor, clock=lambda: executor.now)
    tally = run(range(12))
    assert executor.invoked.count(8) == 2
    # So is the one that waits behind it.
    assert tally.second_copies == 2
    assert (tally.computed, tally.failed, tally.retried) == (12, {}, 0)
    assert tally.stats == {"forwards": 12.0}
    assert run.receipts == set(range(12))
    assert "block 8 takes unusually long; another worker computes it, too" in run.notes


# ---------------------------------------------------------------- errors of blocks


def test_an_error_is_tried_again_until_it_works(tmp_path: Path) -> None:
    executor = Scripted({4: ["retryable", "retryable", "done"]})
    run = Run(tmp_path / "out", executor, attempts=3)
    tally = run(range(8))
    assert Counter(executor.invoked)[4] == 3
    assert (tally.computed, tally.retried, tally.failed) == (8, 2, {})
    assert run.notes == ["block 4 is tried again: retryable error of block 4"]


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_a_block_is_set_aside_after_its_attempts_and_the_rest_goes_on(tmp_path: Path, attempts: int) -> None:
    executor = Scripted({0: ["retryable"], 7: ["retryable"]})
    run = Run(tmp_path / "out", executor, attempts=attempts)
    tally = run(range(12))
    assert Counter(executor.invoked) == Counter({**dict.fromkeys(range(12), 1), 0: attempts, 7: attempts})
    assert tally.failed == {0: "retryable error of block 0", 7: "retryable error of block 7"}
    assert run.receipts == set(range(12)) - {0, 7}
    assert tally.as_dict() == {"total": 12, "computed": 10, "resumed": 0, "failed": 2}
    assert "block 0 is set aside: retryable error of block 0" in run.notes


def test_what_must_fail_again_is_set_aside_at_once(tmp_path: Path) -> None:
    executor = Scripted({3: ["hopeless"]})
    tally = Run(tmp_path / "out", executor, attempts=100)(range(6))
    assert Counter(executor.invoked)[3] == 1
    assert (set(tally.failed), tally.computed, tally.retried) == ({3}, 5, 0)


def test_an_error_that_no_rule_foresaw_leaves_its_traceback(tmp_path: Path) -> None:
    run = Run(tmp_path / "out", Scripted({3: ["retryable", "done"]}))
    run(range(5))
    (trace,) = Path(run.ledger.path, "failures").iterdir()
    assert trace.read_text() == "retryable error of block 3\n\nTraceback: here"


def test_what_concerns_every_block_stops_the_job_at_once(tmp_path: Path) -> None:
    executor = Scripted({5: ["job"]})
    run = Run(tmp_path / "out", executor, attempts=100)
    with pytest.raises(JobError, match="job error of block 5"):
        run(range(100))
    assert executor.invoked == [0, 1, 2, 3, 4, 5]
    assert executor.stopped == 1
    assert run.receipts == {0, 1, 2, 3, 4}


class Slow(Scripted):
    """All workers but the first are ready only after the first block is done; `took` says who got which block."""

    def start(self) -> None:
        super().start()
        self.gone = set(range(1, self.workers))
        self.took: dict[int, int] = {}
        self.most = 0

    def hand(self, *, alone: bool = False) -> list[int]:
        worker = self.free(alone)
        assert worker is not None
        return self.hands[worker]

    def submit(self, task: Task, inbox: Sequence[Any], *, alone: bool = False) -> None:
        worker, index = self.free(alone), task.index
        super().submit(task, inbox, alone=alone)
        assert worker is not None
        self.took[index] = worker
        self.most = max(self.most, *map(len, self.hands))

    def finish(self, worker: int) -> list[Event]:
        self.gone = set()
        return super().finish(worker)


def test_the_last_blocks_wait_for_workers_that_still_start(tmp_path: Path) -> None:
    """A worker that takes two of the last two blocks ahead would leave the other one idle."""
    executor = Slow(workers=2)
    Run(tmp_path / "out", executor, workers=2)(range(2))
    assert executor.most == 1


def test_the_last_round_has_one_block_a_worker(tmp_path: Path) -> None:
    executor = Slow(workers=3)
    Run(tmp_path / "out", executor, workers=3)(range(12))
    assert len({executor.took[index] for index in (9, 10, 11)}) == 3


# ---------------------------------------------------------------- losses of workers


def test_crashes_are_counted_apart_from_errors(tmp_path: Path) -> None:
    trouble: list[Fate] = ["retryable", "crash", "crash", "retryable", "crash", "crash", "done"]
    executor = Scripted({4: trouble})
    tally = Run(tmp_path / "out", executor, attempts=3)(range(8))
    assert Counter(executor.invoked)[4] == len(trouble)
    assert (tally.failed, tally.computed, tally.workers_lost, tally.workers) == ({}, 8, 4, 1)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_block_that_kills_its_workers_is_set_aside_alone(tmp_path: Path, workers: int) -> None:
    executor = Scripted({4: ["crash"]}, workers=workers)
    run = Run(tmp_path / "out", executor, workers=workers)
    tally = run(range(12))
    assert Counter(executor.invoked)[4] == MAX_CRASHES
    assert set(tally.failed) == {4}
    assert tally.failed[4].startswith("5 workers died while they held it, the last one: crash of worker")
    assert run.receipts == set(range(12)) - {4}
    assert tally.workers_lost == MAX_CRASHES


def test_workers_that_die_whatever_they_hold_stop_the_job(tmp_path: Path) -> None:
    """Otherwise a machine without enough memory would go through all blocks of a large job, five crashes each."""
    executor = Scripted({index: ["crash"] for index in range(3, 1000)}, workers=2)
    run = Run(tmp_path / "out", executor, workers=2)
    with pytest.raises(WorkersLostError, match="20 workers died one after the other"):
        run(range(1000))
    assert run.receipts == {0, 1, 2}


def test_machines_that_are_taken_away_with_notice_are_no_strike(tmp_path: Path) -> None:
    executor = Scripted({4: [*["preemption"] * 50, "done"]})  # type: ignore[list-item]
    run = Run(tmp_path / "out", executor, attempts=1)
    tally = run(range(8))
    assert (tally.failed, tally.computed, tally.workers_lost) == ({}, 8, 50)
    assert executor.alone == []
    assert Counter(executor.invoked)[4] == 51


@pytest.mark.parametrize(("workers", "machine"), [(1, 1), (3, 1), (4, 2), (3, 3)])
def test_a_block_that_takes_its_machine_down_is_set_aside_alone(tmp_path: Path, workers: int, machine: int) -> None:
    """Also where other blocks are computed on the same machine and go down with it each time."""
    executor = Scripted({4: ["node"]}, workers=workers, machine=machine)
    run = Run(tmp_path / "out", executor, workers=workers)
    tally = run(range(60))
    assert set(tally.failed) == {4}
    assert re.fullmatch(
        r"\d+ machines were lost while they held it, the last 5 with no other suspect, the last one: node of worker .*"
        "; it may need more memory than they have: try less --memory",
        tally.failed[4],
    )
    assert run.receipts == set(range(60)) - {4}
    assert Counter(executor.invoked)[4] == NODES_TOGETHER + NODES_APART
    assert sum("3 machines were lost with block 4 in hand" in note for note in run.notes) == 1


def test_two_blocks_that_take_machines_down_do_not_hide_behind_each_other(tmp_path: Path) -> None:
    executor = Scripted({4: ["node"], 5: ["node"]}, workers=4, machine=4)
    run = Run(tmp_path / "out", executor, workers=4)
    tally = run(range(60))
    assert set(tally.failed) == {4, 5}
    assert run.receipts == set(range(60)) - {4, 5}


def test_of_suspects_whose_machines_went_one_is_computed_at_a_time(tmp_path: Path) -> None:
    class Watched(Scripted):
        def submit(self, task: Task, inbox: Sequence[Any], *, alone: bool = False) -> None:
            super().submit(task, inbox, alone=alone)
            assert sum(self.lonely) <= 1
            together.append(sum(map(len, self.hands)))

    together: list[int] = []
    executor = Watched({index: ["node", "node", "node", "done"] for index in range(6)}, workers=3)
    tally = Run(tmp_path / "out", executor, workers=3)(range(30))
    assert (tally.failed, tally.computed) == ({}, 30)
    assert set(executor.alone) >= set(range(6))
    # The others go on meanwhile.
    assert max(together) > 3


def test_machines_that_go_whatever_is_on_them_stop_the_job(tmp_path: Path) -> None:
    """Otherwise too little memory would take every machine that comes, eight times a block."""
    executor = Scripted({index: ["node"] for index in range(3, 1000)}, workers=2)
    run = Run(tmp_path / "out", executor, workers=2)
    with pytest.raises(WorkersLostError, match="20 machines were lost one after the other"):
        run(range(1000))
    assert run.receipts == {0, 1, 2}


def test_machines_that_go_together_are_one_loss(tmp_path: Path) -> None:
    many = 3 * MAX_LOSSES
    gone: list[Event] = [WorkerLost(w, (), "no answer", "node") for w in range(many)]
    back: list[Event] = [WorkerReady(w, {}) for w in range(many)]
    run = Run(tmp_path / "out", Scripted(before=[*back, *gone, *back, *gone, *back]), workers=1)
    assert run(range(3)).computed == 3


def test_a_suspect_runs_alone_from_its_second_crash_on(tmp_path: Path) -> None:
    """Also after an error, and after the loss of a node, which are not its crashes."""
    executor = Scripted({2: ["crash", "crash", "retryable", "node", "crash", "done"]}, workers=2)
    tally = Run(tmp_path / "out", executor, workers=2)(range(9))
    assert executor.alone.count(2) == 4
    # Its neighbours were there at most twice, by accident, and lost nothing but time.
    assert (tally.failed, tally.computed) == ({}, 9)


def test_a_suspect_waits_for_an_idle_worker_and_then_the_others_go_on(tmp_path: Path) -> None:
    order = []

    class Watched(Scripted):
        def submit(self, task: Task, inbox: Sequence[Any], *, alone: bool = False) -> None:
            super().submit(task, inbox, alone=alone)
            order.append((task.index, alone))

    executor = Watched({0: ["crash", "crash", "done"]})
    Run(tmp_path / "out", executor)(range(6))
    # Blocks 0 and 1 fall together twice, then each proves itself alone before anything else is handed out.
    assert order == [(0, False), (1, False)] * 2 + [
        (0, True),
        (1, True),
        (2, False),
        (3, False),
        (4, False),
        (5, False),
    ]


def test_a_suspect_does_not_starve_where_lost_workers_are_not_replaced(tmp_path: Path) -> None:
    """The last worker always has something in hand: nothing new may be handed out until it is idle."""
    executor = Scripted({0: ["crash", "crash", "done"]}, workers=3, replaced=False)
    tally = Run(tmp_path / "out", executor, workers=3)(range(60))
    assert (tally.computed, tally.failed) == (60, {})
    assert executor.alone.count(0) == 1
    last = len(executor.invoked) - 1 - executor.invoked[::-1].index(0)
    assert last < 20


def test_a_worker_without_a_block_may_die(tmp_path: Path) -> None:
    lost = WorkerLost(0, (), "killed", "crash")
    run = Run(tmp_path / "out", Scripted(before=[WorkerReady(0, {}), lost]))
    tally = run(range(3))
    assert (tally.computed, tally.workers_lost, tally.workers) == (3, 1, 1)
    assert run.notes == ["worker 0 was lost (killed); it had no block in hand"]


def test_a_line_says_what_missing_workers_wait_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "PATIENCE_SECONDS", 0.0)
    executor = Scripted({0: ["crash", "done"]}, workers=2, replaced=False)
    run = Run(tmp_path / "out", executor, workers=2)
    assert run(range(9)).computed == 9
    assert [note for note in run.notes if "ready" in note] == ["1 of 2 workers are ready; no room"]


def test_no_line_where_workers_come_in_time(tmp_path: Path) -> None:
    run = Run(tmp_path / "out", Scripted({0: ["crash", "done"]}, workers=2, replaced=False), workers=2)
    run(range(9))
    assert not [note for note in run.notes if "ready" in note]


def test_a_worker_that_is_let_go_is_no_loss(tmp_path: Path) -> None:
    left: list[Event] = [WorkerReady(1, {}), WorkerLeft(1, "its machine is taken away"), Word("the head is away")]
    run = Run(tmp_path / "out", Scripted(before=[*left, WorkerReady(2, {}), WorkerLeft(2)]))
    tally = run(range(3))
    assert (tally.computed, tally.workers, tally.most_workers, tally.workers_lost) == (3, 1, 1, 0)
    assert run.notes == ["worker 1 finished its blocks and left: its machine is taken away", "the head is away"]


def test_the_executor_is_told_what_is_left(tmp_path: Path) -> None:
    """Blocks that are tried again are left, blocks that are set aside are not."""
    executor = Scripted({1: ["hopeless"], 2: ["crash", "done"]})
    Run(tmp_path / "out", executor)(range(4))
    assert (executor.lefts[0], executor.lefts[-1]) == (4, 0)
    assert executor.lefts == sorted(executor.lefts, reverse=True)
    resumed = Scripted()
    run = Run(tmp_path / "other", resumed)
    run.tally.resumed = 5
    run.tally.total = 9
    run.driver.run(InOrder(range(5, 9)))
    assert resumed.lefts[0] == 4


def test_what_is_done_is_kept_before_the_workers_end(tmp_path: Path) -> None:
    """Who asked the driver to stop kills it where that takes long."""
    kept: list[set[int]] = []

    class Watched(Scripted):
        def stop(self) -> None:
            kept.append(run.receipts)

    run = Run(tmp_path / "out", Watched({4: ["ctrl-c"]}))
    with pytest.raises(KeyboardInterrupt):
        run(range(9))
    assert kept == [set(range(4))]


# ---------------------------------------------------------------- workers that do not start


def test_a_few_workers_may_fail_to_start(tmp_path: Path) -> None:
    failures: list[Event] = [WorkerFailed(w, "no room", fatal=False) for w in range(4)]
    run = Run(tmp_path / "out", Scripted(before=[*failures, WorkerReady(0, {}), *failures]), workers=2)
    assert run(range(3)).computed == 3
    assert run.notes.count("worker 1 could not start: no room") == 2


def test_when_none_in_a_row_could_start_the_job_stops(tmp_path: Path) -> None:
    executor = Scripted(before=[WorkerFailed(w, "no room", fatal=False) for w in range(99)])
    run = Run(tmp_path / "out", executor, workers=2)
    with pytest.raises(WorkersLostError, match="5 workers in a row could not start, the last one: no room"):
        run(range(3))
    assert executor.stopped == 1


def test_machines_that_start_nothing_stop_no_job_whose_others_work(tmp_path: Path) -> None:
    class Lame(Scripted):
        """Some worker cannot start whenever a block is done."""

        def finish(self, worker: int) -> list[Event]:
            return [WorkerFailed(9, "no room", fatal=False), *super().finish(worker)]

    assert Run(tmp_path / "out", Lame(), workers=1)(range(50)).computed == 50


def test_a_machine_of_another_kind_ends_no_job(tmp_path: Path) -> None:
    executor = Scripted(before=[WorkerReady(5, {"name": "cpu"}), WorkerReady(7, {"name": "gpu"})])
    run = Run(tmp_path / "out", executor)

    def refuse(found: dict[str, str]) -> None:
        if found["name"] == "gpu":
            raise InputError("another device; the job goes on")

    run.check = refuse
    tally = run(range(4))
    assert (tally.computed, tally.workers, executor.refused) == (4, 2, [7])
    assert run.notes == ["worker 7 takes no part: another device; the job goes on"]


def test_what_no_worker_can_load_is_the_user_s_input(tmp_path: Path) -> None:
    executor = Scripted(before=[WorkerFailed(0, "the bundle is damaged", fatal=True)])
    with pytest.raises(InputError, match="the bundle is damaged"):
        Run(tmp_path / "out", executor, workers=9)(range(3))
    assert executor.stopped == 1


def test_every_worker_s_device_is_checked(tmp_path: Path) -> None:
    seen = []
    run = Run(tmp_path / "out", Scripted({1: ["crash", "done"]}, workers=2), workers=2)
    run.check = lambda found: seen.append(found["name"])
    run(range(4))
    assert seen == ["cpu0", "cpu1", "cpu"]

    def refuse(found: dict[str, str]) -> None:
        raise InputError("another device")

    executor = Scripted()
    run = Run(tmp_path / "other", executor)
    run.check = refuse
    with pytest.raises(InputError, match="another device"):
        run(range(4))
    assert executor.invoked == []


# ---------------------------------------------------------------- whatever is raised, receipts are kept


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    executor = Scripted({6: ["ctrl-c"]})
    run = Run(tmp_path / "out", executor)
    with pytest.raises(KeyboardInterrupt):
        run(range(10))
    assert run.receipts == set(range(6))
    assert executor.stopped == 1


def test_receipts_are_kept_even_where_the_workers_do_not_stop(tmp_path: Path) -> None:
    run = Run(tmp_path / "out", Scripted({6: ["job"]}, stop_error=RuntimeError("cannot stop")))
    with pytest.raises(RuntimeError, match="cannot stop"):
        run(range(10))
    assert run.receipts == set(range(6))


def test_receipts_are_kept_where_an_executor_does_not_start(tmp_path: Path) -> None:
    class Broken(Scripted):
        def start(self) -> None:
            raise InputError("no cluster there")

    executor = Broken()
    run = Run(tmp_path / "out", executor)
    run.ledger.add(Receipt(77, {}, {}))
    with pytest.raises(InputError, match="no cluster there"):
        run(range(10))
    assert (run.receipts, executor.stopped) == ({77}, 1)


def test_a_resumed_run_computes_only_what_has_no_receipt(tmp_path: Path) -> None:
    first = Run(tmp_path / "out", Scripted({6: ["ctrl-c"]}))
    with pytest.raises(KeyboardInterrupt):
        first(range(10))
    first.ledger.end(None)
    executor = Scripted()
    second = Run(tmp_path / "out", executor)
    second(BlockSet(second.receipts).missing(10))
    assert executor.invoked == [6, 7, 8, 9]
    assert second.receipts == set(range(10))


def test_a_driver_forgets_the_blocks_that_are_done(tmp_path: Path) -> None:
    """What it remembered of each would be all that grows in a job of a million blocks."""
    script: dict[int, list[Fate]] = {index: ["retryable", "crash", "done"] for index in range(0, 40, 8)}
    run = Run(tmp_path / "out", Scripted({**script, 3: ["hopeless"]}, workers=2), workers=2)
    run(range(40))
    assert run.receipts == set(range(40)) - {3}
    assert set(run.driver._strikes) == {3}
    assert run.driver._said == {}
