"""How large a block should be, and whether blocks share the patches at their borders.

Wanted are few patches computed twice, few bytes passed on, an even load, and enough blocks to resume from. Boundaries
lie on multiples of the stride, where they cut the fewest patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

from volseg.geometry import BlockGrid, Lattice, Triple
from volseg.planning.blockscore import Demand, Score, Tables
from volseg.planning.seams import Seams, plan_seams

CHUNK_SIDE = 64
"""Chunks aim at this side: 256 KiB of uint8, small enough to look at, large enough for object stores inside a shard."""

_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64)
_GOOD_ENOUGH = 0.99


def chunk_for(shard: Triple) -> Triple:
    """Return the chunk of a shard: on each axis the largest divisor up to CHUNK_SIDE, the side where that is tiny."""
    z, y, x = (_divisor(side) for side in shard)
    return z, y, x


def _divisor(side: int) -> int:
    best = max(d for d in range(1, min(side, CHUNK_SIDE) + 1) if side % d == 0)
    return best if best * 4 >= min(side, CHUNK_SIDE) else side


class Choice(NamedTuple):
    """A block shape, how its blocks share patches, and how good that is: less is better."""

    block: Triple
    seams: Seams
    score: Score


def choose_block(demand: Demand, fits: Callable[[Triple, Seams], bool]) -> Choice | None:
    """Return what ends the job first within memory; None when not even the smallest block fits.

    `fits` tells whether a worker can hold a block. The score is the number of patches of the busiest worker, plus a
    little for each block's own cost and for the seams that are passed on; see `volseg.planning.makespan`.
    """
    candidates = _candidates(demand.lattices, demand.unit)
    tables = Tables(demand, candidates)
    kinds = {"auto": (False, True), "on": (True,), "off": (False,)}[demand.mode]
    hopes = sorted((tables.hope(block, shared=kind), block, kind) for block in product(*candidates) for kind in kinds)
    best: Choice | None = None
    for hope, block, shared in hopes:
        # No block does better than its hope; to look for the last per cent is not worth the time.
        if best is not None and hope >= (best.score[0], _GOOD_ENOUGH * best.score[1]):
            break
        if fits(block, Seams()):
            found = _checked(demand, tables, block, shared=shared)
            if found is not None and (best is None or found.score < best.score) and fits(block, found.seams):
                best = found
    return best


def judge_block(demand: Demand, block: Triple, fits: Callable[[Triple, Seams], bool]) -> Choice:
    """Return how blocks of a given shape best share patches; not at all where what waits does not fit."""
    z, y, x = block
    tables = Tables(demand, ([z], [y], [x]))
    alone = Choice(block, Seams(), tables.score(block, Seams()))
    if demand.mode == "off":
        return alone
    shared = _checked(demand, tables, block, shared=True)
    if shared is None or not fits(block, shared.seams):
        return alone
    return shared if demand.mode == "on" or shared.score[1] < alone.score[1] else alone


def _checked(demand: Demand, tables: Tables, block: Triple, *, shared: bool) -> Choice | None:
    """Return a choice with its columns; None where nothing would be shared, unless that is what was asked for."""
    if not shared:
        return Choice(block, Seams(), tables.score(block, Seams()))
    grid = BlockGrid(demand.lattices[0].shape, block, demand.region)
    seams = plan_seams(grid, demand.lattices, demand.sums, demand.hands, demand.room)
    if not seams.shared and demand.mode != "on":
        return None
    return Choice(block, seams, tables.score(block, seams))


def smallest_block(lattices: Sequence[Lattice], unit: Triple | None = None) -> Triple:
    """Return the smallest block that `choose_block` considers."""
    z, y, x = (min(sides) for sides in _candidates(lattices, unit))
    return z, y, x


def _candidates(lattices: Sequence[Lattice], unit: Triple | None) -> tuple[list[int], list[int], list[int]]:
    # A view along an axis has a stride of 1 there: the largest of the strides is a multiple of most others.
    strides = (max(of.stride[axis] for of in lattices) for axis in range(3))
    shape = lattices[0].shape
    z, y, x = (
        _sides(size, stride, unit[axis] if unit else None)
        for axis, (size, stride) in enumerate(zip(shape, strides, strict=True))
    )
    return z, y, x


def _sides(size: int, stride: int, unit: int | None) -> list[int]:
    sides = set()
    for k in _SIDES:
        side = min(k * stride, -(-size // stride) * stride)
        if unit is not None:
            side = -(-side // unit) * unit
        elif side > CHUNK_SIDE and _divisor(side) == side:
            side = -(-side // 32) * 32
        sides.add(side)
    return sorted(sides)
