"""When the last worker is done with blocks that are handed out one after the other: counted, or bounded."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

COUNTED = 256
"""Blocks up to which a schedule is played through; beyond, the largest block is small against a worker's share."""


def makespan(costs: Iterable[float], workers: int) -> float:
    """Return when the last block ends: in this order each goes to whom has room first, and fewer in hand.

    A worker has two blocks in hand (`volseg.planning.memory.IN_HAND`): who computes one is settled a block ahead.
    """
    ends = [0.0] * workers
    # From when on a worker has room, how many blocks it then has in hand, and which worker it is.
    room = [(0.0, 0, worker) for worker in range(workers)]
    for cost in costs:
        since, _, worker = heapq.heappop(room)
        before, ends[worker] = ends[worker], max(ends[worker], since) + cost
        heapq.heappush(room, (before, 1, worker))
    return max(ends)


def longest(total: float, largest: float, blocks: int, workers: int) -> float:
    """Return about the worst end of any order of blocks, where `largest` is the cost of one and `total` of all.

    Graham's bound (1969) for workers that take one block after another, and the number of rounds where all blocks are
    alike: the smaller one holds. No block waits for another: one whose seams are not there yet is finished later.
    """
    share = total / workers
    return max(share, min(share + largest * (1 - 1 / workers), -(-blocks // workers) * largest))
