"""The order of blocks in simulated schedules, with any workers and any failures: nobody waits, the bound holds."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.test_ownership import cells, given_by, needed, ownerships
from volseg.execution.front import Front, InOrder
from volseg.geometry import BlockGrid, BlockSet, Box, Ownership, PatchLattice, Triple
from volseg.planning import Plan, Seams
from volseg.planning.memory import IN_HAND
from volseg.planning.seams import SeamRoom, plan_seams
from volseg.planning.task import Parcel, Task


def make_plan(of: Ownership, workers: int, room: SeamRoom, sums: int = 1) -> Plan:
    """A plan as far as a front looks at it."""
    seams = plan_seams(of.grid, of.lattices, sums, IN_HAND * workers, room)
    values: dict[str, Any] = dict.fromkeys(Plan.__dataclass_fields__)
    values |= {"shape": of.grid.shape, "block": of.grid.block, "region": of.grid.region, "workers": workers}
    plan = Plan(**{**values, "classes": 2, "seams": seams, "views": ()})
    plan.__dict__.update(lattices=of.lattices, grid=of.grid)
    return plan


class Simulation:
    """Workers that compute what they are handed in any order of events that `choose` makes up.

    It holds what exists as sets of contributions, so that every sum is known to be made of what it should be made of.
    """

    def __init__(self, plan: Plan, done: set[int], choose: random.Random, trouble: float = 0.0) -> None:
        self.plan, self.owner, self.choose, self.trouble = plan, plan.ownership, choose, trouble
        self.front = Front(plan, BlockSet(done))
        self.workers: list[list[Task]] = [[] for _ in range(plan.workers)]
        self.kept: list[dict[Parcel, Counter[Any]]] = [{} for _ in range(plan.workers)]
        self.exists: dict[Parcel, Counter[Any]] = {}
        self.again: list[int] = []
        self.settled = set(done)
        self.most = self.calls = 0
        self.computed: Counter[Any] = Counter()

    def bytes(self) -> int:
        """What exists."""
        boxes = (self.owner.wanted(a) if a == b else self.owner.seam(a, b) for a, b in self.exists)
        return sum(self.plan.seams.bytes_of(box.size, self.plan.sums) for box in boxes)

    def run(self) -> None:
        self.hand_out()
        while not (self.front.exhausted and not any(self.workers)):
            busy = [w for w, hand in enumerate(self.workers) if hand]
            assert busy, "nothing can be begun and nothing is under way"
            self.finish(self.choose.choice(busy))
            self.most = max(self.most, self.bytes())
            assert self.front.most_bytes <= self.plan.seams.bound
            assert self.calls < 100_000
            self.hand_out()
        assert not self.exists, "parcels were left behind"
        assert self.most <= self.front.most_bytes <= self.plan.seams.bound

    def hand_out(self) -> None:
        for hand in sorted(self.workers, key=len):
            while len(hand) < IN_HAND:
                mine = [task.index for task in hand]
                if self.again:
                    task: Task | None = self.front.task(self.again.pop(0), mine)
                else:
                    task = self.front.next(mine)
                if task is None:
                    break
                assert set(task.hoped) <= set(mine)
                assert all(parcel in self.exists for parcel in task.inbox)
                assert task.index not in self.settled
                hand.append(task)

    def finish(self, worker: int) -> None:
        self.calls += 1
        task = self.workers[worker].pop(0)
        if self.choose.random() < self.trouble:
            self.fail(task.index)
        elif all(parcel in self.exists for parcel in task.inbox):
            self.compute(worker, task)
        else:
            # What came along is gone: the call could not begin.
            self.again.append(task.index)

    def fail(self, index: int) -> None:
        """The block fails and is tried again or set aside, or its worker is lost with parcels that lay there."""
        kind = self.choose.choice(["fails", "lost", "aside"])
        if kind == "aside":
            self.settle(index)
            return
        if kind == "lost" and self.exists:
            gone = self.choose.sample(sorted(self.exists), k=1 + len(self.exists) // 3)
            for parcel in gone:
                del self.exists[parcel]
            self.front.lost(gone)
        self.again.append(index)

    def compute(self, worker: int, task: Task) -> None:
        assert task.finish or not (task.inbox or task.hoped or task.again)
        index, wanted = task.index, self.owner.wanted(task.index)
        total: Counter[Any] = Counter()
        hoped = [self.kept[worker].get((giver, index)) for giver in task.hoped]
        parcels = [self.exists[parcel] for parcel in task.inbox] + [parcel for parcel in hoped if parcel is not None]
        if task.own:
            total += given_by(self.owner, index, wanted)
            self.computed.update((p.view, patch) for p in self.owner.own(index) for patch in p)
            seams = {(index, seam.block): given_by(self.owner, index, seam.box) for seam in self.owner.receivers(index)}
            self.kept[worker] = dict(seams)
            self.exists.update(seams)
            for parcel in self.front.given(index):
                del self.exists[parcel]
        if not task.finish or None in hoped:
            self.exists[index, index] = total
            self.front.parked(index)
            return
        for giver in task.again:
            total += self.made_again(giver, index, wanted)
        assert sum(parcels, total) == needed(self.owner, index)
        self.settle(index)

    def made_again(self, giver: int, index: int, wanted: Box) -> Counter[Any]:
        found: Counter[Any] = Counter()
        for patches in self.owner.shared(giver, index):
            for patch in patches:
                box = self.owner.lattices[patches.view].box(patch).intersect(wanted)
                assert box.size
                found.update((patches.view, patch, voxel) for voxel in cells(box))
        return found

    def settle(self, index: int) -> None:
        self.settled.add(index)
        for parcel in self.front.settled(index):
            del self.exists[parcel]


rooms = st.builds(
    SeamRoom,
    st.sampled_from([0, 300, 3_000, 10**9]),
    st.sampled_from([0, 50]),
    st.booleans(),
)


@given(ownerships(), st.integers(1, 4), rooms, st.integers(0, 10**6))
def test_every_block_is_finished_within_the_bound(of: Ownership, workers: int, room: SeamRoom, seed: int) -> None:
    plan = make_plan(of, workers, room)
    assert plan.seams.bound <= room.budget
    run = Simulation(plan, set(), random.Random(seed))
    run.run()
    assert run.settled == set(range(len(of.grid)))
    # Each patch once a column; with one column, once.
    assert sum(run.computed.values()) == sum(plan.ownership.computed)


@given(ownerships(), st.integers(0, 10**6))
def test_one_worker_in_one_process_parks_nothing(of: Ownership, seed: int) -> None:
    """Where blocks are computed in the order in which they are handed out."""
    run = Simulation(make_plan(of, 1, SeamRoom(10**9, local=True, in_order=True)), set(), random.Random(seed))
    run.run()
    assert run.calls == len(of.grid)


@given(ownerships(), st.integers(1, 4), rooms, st.integers(0, 10**6), st.data())
def test_trouble_and_resumption_lose_nothing(
    of: Ownership, workers: int, room: SeamRoom, seed: int, data: st.DataObject
) -> None:
    done = data.draw(st.sets(st.integers(0, len(of.grid) - 1)))
    run = Simulation(make_plan(of, workers, room), done, random.Random(seed), trouble=0.2)
    run.run()
    assert run.settled == set(range(len(of.grid)))


def large(shape: Triple, block: Triple) -> Ownership:
    grid = BlockGrid(shape, block, Box.of(shape))
    return Ownership(grid, (PatchLattice(shape, (64,) * 3, (32,) * 3),), grid.counts)


@pytest.mark.parametrize("workers", [1, 2, 3, 16])
@pytest.mark.parametrize("shape", [(1280, 128, 128), (256, 256, 256), (640, 640, 640)])
def test_workers_have_something_to_do(shape: Triple, workers: int) -> None:
    """In a row of blocks as in a cube: with so many blocks, every worker gets one whenever it has none."""
    of = large(shape, (128, 128, 128))
    front = Front(make_plan(of, workers, SeamRoom(10**12)), BlockSet())
    hands: list[list[Task]] = [[] for _ in range(workers)]
    begun = 0
    while not front.exhausted or any(hands):
        for hand in sorted(hands, key=len):
            while len(hand) < IN_HAND and (task := front.next([t.index for t in hand])):
                hand.append(task)
                begun += task.own
        # All that could be begun was, before a worker is without one.
        assert all(hands) or begun == len(of.grid)
        for hand in hands:
            if hand:
                task = hand.pop(0)
                if task.own:
                    front.given(task.index)
                front.settled(task.index) if task.finish else front.parked(task.index)
    assert begun == len(of.grid)


def test_few_blocks_are_parked_where_diagonals_are_long() -> None:
    of = large((640, 640, 640), (64, 64, 64))
    plan = make_plan(of, 2, SeamRoom(10**12))
    front, parked = Front(plan, BlockSet()), 0
    hands: list[list[Task]] = [[], []]
    while not front.exhausted or any(hands):
        for hand in hands:
            while len(hand) < IN_HAND and (task := front.next([t.index for t in hand])):
                hand.append(task)
        for hand in hands:
            if hand:
                task = hand.pop(0)
                if task.own:
                    front.given(task.index)
                if task.finish:
                    front.settled(task.index)
                else:
                    parked += 1
                    front.parked(task.index)
    assert parked <= 20


def test_a_front_of_many_blocks_stays_small() -> None:
    """Bookkeeping is kept for blocks at the front only."""
    of = large((3200, 320, 320), (64, 64, 64))
    front = Front(make_plan(of, 1, SeamRoom(10**12, local=True, in_order=True)), BlockSet())
    most = 0
    hand: list[Task] = []
    while not front.exhausted or hand:
        while len(hand) < IN_HAND and (task := front.next([t.index for t in hand])):
            hand.append(task)
        task = hand.pop(0)
        front.given(task.index)
        front.settled(task.index)
        kept = [v for v in vars(front).values() if isinstance(v, dict | set | list)]
        most = max(most, sum(map(len, kept)))
    assert most < 500


def test_in_order() -> None:
    work = InOrder(iter(range(3)))
    assert [work.next(()) for _ in range(4)] == [Task(0), Task(1), Task(2), None]
    assert work.exhausted
    assert work.task(1) == Task(1)
    assert (work.given(1), work.settled(1), work.most_bytes) == ([], [], 0)


def test_columns_keep_within_any_budget() -> None:
    """The smaller the budget, the more patches are computed twice, and never more than without seams."""
    of = large((1024, 1024, 1024), (128, 128, 128))
    alone = replace(of, column=(1, 1, 1))
    found = []
    for budget in (10**12, 10**9, 4 * 10**8, 2 * 10**8, 10**8, 10**7):
        seams: Seams = plan_seams(of.grid, of.lattices, 1, 4, SeamRoom(budget))
        assert seams.bound <= budget
        found.append(sum(replace(of, column=seams.column).computed))
    assert found[0] == of.lattices[0].count
    assert found == sorted(found)
    assert found[-1] == sum(alone.computed)
    assert len(set(found)) > 3
