"""Which block is begun next, so that no worker waits for a seam and what waits stays within its bound.

Pure bookkeeping on indices, without time and without voxels. Words: a block is *given* when the seams of its own
patches exist (or never will), *parked* when its core waits for the seams of others, *settled* when it has its receipt
or was set aside. *First* is the first block of the order that is not settled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple, Protocol

from volseg.geometry import BlockSet
from volseg.planning.plan import Plan
from volseg.planning.task import Parcel, Task


class Work(Protocol):
    """What there is to be done; see `Front`."""

    def next(self, hand: Collection[int]) -> Task | None:
        """Return a task for a worker that has `hand` in hand; None where none may be begun now."""
        ...

    def task(self, index: int, hand: Collection[int] = ()) -> Task:
        """Return the task of a block that was handed out before, for another attempt."""
        ...

    def given(self, index: int) -> list[Parcel]:
        """Take note that a block's seams exist; return those that nobody needs any more."""
        ...

    def parked(self, index: int) -> None:
        """Take note that a block's core exists."""
        ...

    def settled(self, index: int) -> list[Parcel]:
        """Take note that a block is done or set aside; return the parcels that nobody needs any more."""
        ...

    def lost(self, parcels: Iterable[Parcel]) -> None:
        """Take note that parcels are gone: who needs them computes them again."""
        ...

    def has_room_for(self, index: int) -> bool:
        """Tell whether a second copy of a block that is under way may make its parcels once more."""
        ...

    @property
    def exhausted(self) -> bool:
        """Tell whether nothing is left to be handed out for the first time, or to be finished."""
        ...

    @property
    def most_bytes(self) -> int:
        """Return the most bytes of parcels that ever waited at the same time."""
        ...


class InOrder:
    """Blocks that share nothing, one after the other."""

    most_bytes = 0

    def __init__(self, pending: Iterable[int]) -> None:
        self._pending: Iterator[int] = iter(pending)
        self._next = next(self._pending, None)

    @property
    def exhausted(self) -> bool:
        """Tell whether all were handed out."""
        return self._next is None

    def next(self, hand: Collection[int]) -> Task | None:
        """Return the next block, None where all were handed out."""
        index = self._next
        if index is None:
            return None
        self._next = next(self._pending, None)
        return Task(index)

    def task(self, index: int, hand: Collection[int] = ()) -> Task:
        """Return the same task again."""
        return Task(index)

    def given(self, index: int) -> list[Parcel]:
        """Nothing is given."""
        return []

    def parked(self, index: int) -> None:
        """Nothing is ever parked."""

    def settled(self, index: int) -> list[Parcel]:
        """Nothing is freed."""
        return []

    def lost(self, parcels: Iterable[Parcel]) -> None:
        """Nothing can be lost."""

    def has_room_for(self, index: int) -> bool:
        """Tell that nothing is in the way."""
        return True


@dataclass
class _Begun:
    """What a block that was begun holds, or will hold: bytes of its seams, and of its core where it may be parked."""

    out: int
    core: int


class _Links(NamedTuple):
    """What a block shares: its place, its givers, and its receivers with the bytes of their seams."""

    place: int
    givers: tuple[int, ...]
    receivers: tuple[tuple[int, int], ...]
    has_own: bool
    core: int


class Front:
    """The blocks of a plan whose neighbours share patches; those in `done` are settled from the beginning.

    Blocks are opened in the order of the plan's sweep. One whose givers are all given is ready; one that is not may be
    begun in the hand that holds the givers it lacks, or, where nothing is ready, to be parked. Whatever comes after the
    first block is begun only while all such blocks hold no more than the plan's `ahead` bytes.
    """

    def __init__(self, plan: Plan, done: BlockSet) -> None:
        self._grid, self._sweep, self._owner, self._seams = plan.grid, plan.sweep, plan.ownership, plan.seams
        self._sums, self._done = plan.sums, done
        self._count = len(plan.grid)
        self._look = 4 * plan.workers + 16
        """So many blocks are open at once that cannot be begun yet."""
        self._first = self._opened = 0
        """Places in the order: of the first block that is not settled, and of the first that was not looked at."""
        self._later: set[int] = set()  # places beyond the first that are settled
        self._given: set[int] = set()  # blocks from the first on that are given
        self._fresh: set[int] = set()  # opened and never handed out
        self._parked: set[int] = set()  # parked and in nobody's hand
        self._missing: dict[int, set[int]] = {}  # givers that an opened block lacks, where it lacks any
        self._waiters: dict[int, list[int]] = {}  # the other way round
        # Heaps of places; one that left the state of its heap stays there until it comes up.
        self._ready: list[int] = []
        self._blocked: list[int] = []
        self._finishable: list[int] = []
        self._live: dict[Parcel, int] = {}  # bytes of parcels that exist
        self._live_bytes = self._most_bytes = 0
        self._known: dict[int, _Links] = {}  # of blocks from the first on
        self._begun: dict[int, _Begun] = {}  # by place, from the first on
        self._begun_bytes = 0
        self._skip()

    @property
    def exhausted(self) -> bool:
        """Tell whether nothing is left to be handed out for the first time, or to be finished."""
        return self._opened >= self._count and not self._fresh and not self._parked

    @property
    def most_bytes(self) -> int:
        """Return the most bytes of parcels that ever waited at the same time."""
        return self._most_bytes

    def next(self, hand: Collection[int]) -> Task | None:
        """Return a task for a worker that has `hand` in hand; None where none may be begun now."""
        while self._finishable:
            index = self._at(heappop(self._finishable))
            if index in self._parked:
                return self.task(index)
        chosen = self._choose(hand)
        if chosen is None:
            return None
        index, place = self._at(chosen), chosen
        missing = self._missing.get(index)
        # Where one worker computes all in this order, what is hoped for is there.
        surely = not missing or (self._seams.in_order and missing <= set(hand))
        links = self._links(index)
        begun = _Begun(sum(size for _, size in links.receivers), 0 if surely else links.core)
        cost = begun.out + begun.core
        if place != self._first and self._begun_bytes + cost > self._seams.ahead:
            return None
        self._begun[place] = begun
        self._begun_bytes += cost
        self._fresh.discard(index)
        return self.task(index, hand)

    def task(self, index: int, hand: Collection[int] = ()) -> Task:
        """Return what is to be done with a block, now."""
        self._parked.discard(index)
        own = (index, index) not in self._live
        missing = self._missing.get(index, set())
        hoped = tuple(sorted(missing)) if missing <= set(hand) else ()
        if missing and not hoped:
            # Whatever else it needs is added when it is finished.
            return Task(index, own, finish=False)
        inbox, again = [] if own else [(index, index)], []
        for giver in self._links(index).givers:
            if (giver, index) in self._live:
                inbox.append((giver, index))
            elif giver not in missing:
                again.append(giver)
        return Task(index, own, True, tuple(inbox), hoped, tuple(again))

    def given(self, index: int) -> list[Parcel]:
        """Take note that a block's seams exist; return those that nobody needs any more."""
        useless = []
        for receiver, size in self._links(index).receivers:
            if self._is_settled(receiver):
                useless.append((index, receiver))
            else:
                self._arrive((index, receiver), size)
        self._release(index)
        return useless

    def parked(self, index: int) -> None:
        """Take note that a block's core exists."""
        self._arrive((index, index), self._links(index).core)
        self._parked.add(index)
        if index not in self._missing:
            heappush(self._finishable, self._place(index))

    def settled(self, index: int) -> list[Parcel]:
        """Take note that a block is done or set aside; return the parcels that nobody needs any more."""
        links = self._links(index)
        used = [(giver, index) for giver in (*links.givers, index) if (giver, index) in self._live]
        self.lost(used)
        self._parked.discard(index)
        self._fresh.discard(index)
        self._missing.pop(index, None)
        self._later.add(links.place)
        if (begun := self._begun.get(links.place)) is not None:
            self._begun_bytes -= begun.core
            begun.core = 0
        self._release(index)
        self._skip()
        return used

    def lost(self, parcels: Iterable[Parcel]) -> None:
        """Take note that parcels are gone: who needs them computes them again."""
        for parcel in parcels:
            self._live_bytes -= self._live.pop(parcel, 0)

    def has_room_for(self, index: int) -> bool:
        """Tell whether a second copy of a block under way may make its parcels once more; they count from then on."""
        links = self._links(index)
        cost = sum(size for _, size in links.receivers) + links.core
        if self._begun_bytes + cost > self._seams.ahead:
            return False
        begun = self._begun.setdefault(links.place, _Begun(0, 0))
        # Both copies' until the block is settled: the answer of the second may come at any time.
        begun.core += cost
        self._begun_bytes += cost
        return True

    def _choose(self, hand: Collection[int]) -> int | None:
        """Return the place of what to begin: the first that is ready, or will be in that hand; else to be parked."""
        while (ready := self._top(self._ready, blocked=False)) is None and self._opened < self._count:
            if len(self._fresh) >= self._look:
                break
            self._open()
        hoped = [
            self._place(waiter)
            for giver in hand
            for waiter in self._waiters.get(giver, ())
            if waiter in self._fresh and self._missing[waiter] <= set(hand) and self._links(waiter).has_own
        ]
        places = hoped if ready is None else [*hoped, ready]
        return min(places) if places else self._top(self._blocked, blocked=True)

    def _top(self, heap: list[int], *, blocked: bool) -> int | None:
        while heap:
            index = self._at(heap[0])
            if index in self._fresh and (index in self._missing) is blocked:
                return heap[0]
            heappop(heap)
        return None

    def _open(self) -> None:
        """Look at the next block of the order."""
        place, index = self._opened, self._at(self._opened)
        self._opened += 1
        if self._is_settled(index):
            return
        self._fresh.add(index)
        links = self._links(index)
        missing = {giver for giver in links.givers if not self._is_given(giver)}
        for giver in missing:
            self._waiters.setdefault(giver, []).append(index)
        if not missing:
            heappush(self._ready, place)
            return
        self._missing[index] = missing
        if links.has_own:
            # Without patches of its own it has nothing to do before it is ready.
            self._top(self._blocked, blocked=True)
            heappush(self._blocked, place)

    def _release(self, giver: int) -> None:
        """Let go of what waited for a block."""
        if self._place(giver) >= self._first:
            self._given.add(giver)
        for waiter in self._waiters.pop(giver, ()):
            missing = self._missing.get(waiter)
            if missing is None:
                continue
            missing.discard(giver)
            if not missing:
                del self._missing[waiter]
                if waiter in self._parked:
                    heappush(self._finishable, self._place(waiter))
                elif waiter in self._fresh:
                    heappush(self._ready, self._place(waiter))

    def _skip(self) -> None:
        """Move the first block on."""
        while self._first < self._count and self._is_settled(index := self._at(self._first)):
            self._later.discard(self._first)
            self._given.discard(index)
            self._known.pop(index, None)
            if (begun := self._begun.pop(self._first, None)) is not None:
                self._begun_bytes -= begun.out + begun.core
            self._first += 1
        self._opened = max(self._opened, self._first)

    def _arrive(self, parcel: Parcel, size: int) -> None:
        self._live_bytes += size - self._live.get(parcel, 0)
        self._live[parcel] = size
        self._most_bytes = max(self._most_bytes, self._live_bytes)

    def _is_settled(self, index: int) -> bool:
        place = self._place(index)
        return place < self._first or place in self._later or index in self._done

    def _is_given(self, index: int) -> bool:
        return index in self._given or self._is_settled(index)

    def _place(self, index: int) -> int:
        known = self._known.get(index)
        return self._sweep.place(self._grid.position(index)) if known is None else known.place

    def _at(self, place: int) -> int:
        return self._grid.index(self._sweep.position(place))

    def _links(self, index: int) -> _Links:
        if (known := self._known.get(index)) is not None:
            return known
        receivers = tuple(
            (seam.block, self._seams.bytes_of(seam.box.size, self._sums)) for seam in self._owner.receivers(index)
        )
        links = _Links(
            self._place(index), tuple(seam.block for seam in self._owner.givers(index)), receivers,
            bool(self._owner.own(index)), self._seams.bytes_of(self._owner.wanted(index).size, self._sums),
        )  # fmt: skip
        if links.place >= self._first:
            self._known[index] = links
        return links
