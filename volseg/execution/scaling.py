"""How many workers a job has, who goes first, and how jobs share a cluster: plain functions of counts, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_AHEAD = 4
MOST_AHEAD = 32
"""Workers that a job asks for beyond what there is room for, so that an autoscaler sees what it lacks: as many again as
are at work, within these limits."""

RETURN_SECONDS = 3.0
"""How long before its machine is taken away a block in hand is handed to another worker: clocks differ a little."""

HUNGER_SECONDS = 5.0
"""How long another job must have had less than its share before this one gives some of its workers away."""


@dataclass(frozen=True)
class Crowd:
    """What a job has and could have; all are numbers of workers but `left`."""

    limit: int
    """Most that the job may have."""
    left: int
    """Blocks that are neither done nor set aside."""
    ready: int = 0
    starting: int = 0
    """That have a place and load the model."""
    asked: int = 0
    """That have no place yet."""
    leaving: int = 0
    """That finish what they have in hand and go; they count for the limit and for nothing else."""
    free: int = 0
    """Free places of the cluster; those just asked for may still be counted among them."""
    share: int | None = None
    """What the job may keep while others lack their part of the cluster; None while nobody does."""

    @property
    def target(self) -> int:
        """Return how many should stay or come if there were room; with those that leave, at least one."""
        share = self.limit if self.share is None else self.share
        least = 0 if self.leaving or not self.left else 1
        return max(least, min(self.limit - self.leaving, self.left, share))

    @property
    def here(self) -> int:
        """Return how many the job can count on without anything new in the cluster."""
        return max(1, min(self.target, self.ready + self.starting + self.free))


def change(crowd: Crowd) -> int:
    """Return how many workers to ask for, or, below zero, to let go.

    What is asked for beyond the free places is bounded. Workers are let go only above the target, which no longer
    depends on how many there are: so what was started is never stopped for having been started.
    """
    have = crowd.ready + crowd.starting + crowd.asked
    if have > crowd.target:
        return crowd.target - have
    ahead = min(MOST_AHEAD, max(LEAST_AHEAD, crowd.ready))
    return max(0, min(crowd.target, crowd.ready + crowd.starting + crowd.free + ahead) - have)


def shares(places: int, wants: Sequence[int]) -> list[int]:
    """Divide `places` among jobs that want so many: equally, and what one does not want goes to the others.

    Where it does not come out even, the first ones have one more. Max-min fairness, see Bertsekas and Gallager, Data
    Networks, 6.5.2.
    """
    given = [0] * len(wants)
    left = places
    while left > 0 and (hungry := [i for i, want in enumerate(wants) if given[i] < want]):
        each = left // len(hungry)
        for i in hungry[: left if each == 0 else None]:
            more = min(max(1, each), wants[i] - given[i])
            given[i] += more
            left -= more
    return given


def keep_block(elapsed: float, remaining: float | None, usual: float | None) -> bool:
    """Tell whether a block stays with a worker whose machine is taken away in `remaining` seconds, None for no date.

    It has been in hand for `elapsed` seconds, and blocks `usual`ly take so long, None where none was finished yet. One
    that cannot be ready in time goes to another worker at once, one that may be just before the end.
    """
    if remaining is None:
        return True
    if remaining <= RETURN_SECONDS:
        return False
    return usual is None or elapsed + remaining - RETURN_SECONDS >= usual
