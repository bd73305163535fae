"""What is in the workers' hands, and what waits between blocks: tasks, their copies, and handles of parcels.

A handle is whatever an executor made of a parcel. It is kept here, passed on, and let go with the last block that needs
it; nobody opens it here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from volseg.execution.events import BlockDone, BlockParked, Executor
from volseg.execution.front import Work
from volseg.planning.task import Parcel, Task


@dataclass
class _Held:
    """A block in one or more hands: how many, the parcels that came along, and when it was first handed out."""

    copies: int
    inbox: set[Parcel]
    since: float


class Desk:
    """Hands out the tasks of `work` through an executor; all times are in seconds of one clock."""

    def __init__(self, work: Work, executor: Executor) -> None:
        self.work, self._executor = work, executor
        self._held: dict[int, _Held] = {}
        self._handles: dict[Parcel, tuple[Any, int]] = {}
        self._stats: dict[int, Mapping[str, float]] = {}

    def __contains__(self, index: int) -> bool:
        """Tell whether a block is in anybody's hands."""
        return index in self._held

    def __len__(self) -> int:
        """Number of blocks in hand."""
        return len(self._held)

    def submit(self, task: Task, now: float, *, alone: bool = False) -> None:
        """Hand out a task."""
        held = self._held.setdefault(task.index, _Held(0, set(), now))
        held.copies += 1
        held.inbox.update(task.inbox)
        task = replace(task, stats={} if task.own else self._stats.get(task.index, {}))
        self._executor.submit(task, [self._handles[parcel][0] for parcel in task.inbox], alone=alone)

    def back(self, index: int) -> bool:
        """Take a block out of one hand; return whether it is in nobody's any more."""
        held = self._held[index]
        held.copies -= 1
        if not held.copies:
            del self._held[index]
        return not held.copies

    def take(self, event: BlockDone | BlockParked) -> None:
        """Keep what a block gives to others; copies of it that are still under way do not count any more."""
        index = event.index if isinstance(event, BlockParked) else event.receipt.index
        del self._held[index]
        self._handles.update({parcel: (handle, event.worker) for parcel, handle in event.parcels.items()})
        if any(taker != index for _, taker in event.parcels):
            self._drop(self.work.given(index))
        if isinstance(event, BlockParked):
            self._stats[index] = event.stats
            self.work.parked(index)
        else:
            self.settle(index)

    def settle(self, index: int) -> None:
        """Take note that a block is done or set aside."""
        self._held.pop(index, None)
        self._stats.pop(index, None)
        self._drop(self.work.settled(index))

    def lose(self, parcels: Iterable[Parcel]) -> list[int]:
        """Take note that parcels are gone; return the blocks in hand that lack them now."""
        gone = {parcel for parcel in parcels if parcel in self._handles}
        self._drop(gone)
        self.work.lost(gone)
        return [index for index, held in self._held.items() if held.inbox & gone]

    def made_by(self, worker: int) -> list[Parcel]:
        """Return the parcels that lie where a worker made them."""
        return [parcel for parcel, (_, maker) in self._handles.items() if maker == worker]

    def since(self, index: int) -> float:
        """Return when a block in hand was first handed out."""
        return self._held[index].since

    def oldest(self) -> Iterator[tuple[int, float, int]]:
        """Yield the blocks in hand, since when and in how many hands, the oldest first."""
        for index, held in sorted(self._held.items(), key=lambda item: item[1].since):
            yield index, held.since, held.copies

    def _drop(self, parcels: Iterable[Parcel]) -> None:
        for parcel in parcels:
            self._handles.pop(parcel, None)
