"""How large a block should be, and whether blocks share the patches at their borders.

Wanted are few patches computed twice, few bytes passed on, an even load, and enough blocks to resume from. Boundaries
lie on multiples of the stride, where they cut the fewest patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal, NamedTuple

from volseg.geometry import BlockGrid, Box, Lattice, Ownership, Triple
from volseg.geometry.ownership import owned
from volseg.planning.seams import ITEMSIZE, SeamRoom, Seams, plan_seams

CHUNK_SIDE = 64
"""Chunks aim at this side: 256 KiB of uint8, small enough to look at, large enough for object stores inside a shard."""

_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64)
# A worker should have at least this many blocks where the job is long: what a crash costs is one of them.
_BLOCKS_A_WORKER = 4
_SHORT_JOB = 32  # patches a worker; below this a restart costs less than border patches computed twice
# What a block costs beside its patches: to read it and to store it for good; and what sharing adds: to cut, keep and
# add seams, each of their bytes once on its way (copied twice, added once), and with Ray the objects of a call.
_SECONDS_A_BLOCK = 0.02
_SECONDS_A_SHARING_BLOCK = 0.002
_SECONDS_A_BYTE = 3e-9
_SECONDS_A_CALL = 0.03
_GOOD_ENOUGH = 0.99


def chunk_for(shard: Triple) -> Triple:
    """Return the chunk of a shard: on each axis the largest divisor up to CHUNK_SIDE, the side where that is tiny."""
    z, y, x = (_divisor(side) for side in shard)
    return z, y, x


def _divisor(side: int) -> int:
    best = max(d for d in range(1, min(side, CHUNK_SIDE) + 1) if side % d == 0)
    return best if best * 4 >= min(side, CHUNK_SIDE) else side


@dataclass(frozen=True)
class Demand:
    """What a block shape is chosen for."""

    lattices: Sequence[Lattice]
    """Those of all views."""
    region: Box
    workers: int
    hands: int
    """Blocks that all workers have in hand at once."""
    sums: int
    """Channels of the accumulator."""
    patch_seconds: float
    """About how long one worker takes for one patch."""
    mode: Literal["auto", "on", "off"]
    """Whether blocks may share patches; auto: where that is sooner done."""
    room: SeamRoom
    unit: Triple | None = None
    """What a block must be a multiple of: a given shard or chunk."""


class Choice(NamedTuple):
    """A block shape, how its blocks share patches, and about how long the job takes, in patches of one worker."""

    block: Triple
    seams: Seams
    score: tuple[bool, float]


def choose_block(demand: Demand, fits: Callable[[Triple, Seams], bool]) -> Choice | None:
    """Return what ends the job first within memory; None when not even the smallest block fits.

    `fits` tells whether a worker can hold a block. The score is the number of patches of the busiest worker, plus a
    little for each block's own cost and for the seams that are passed on.
    """
    candidates = _candidates(demand.lattices, demand.unit)
    tables = _Tables(demand, candidates)
    kinds = {"auto": (False, True), "on": (True,), "off": (False,)}[demand.mode]
    hopes = sorted((tables.score(block, shared=kind), block, kind) for block in product(*candidates) for kind in kinds)
    best: Choice | None = None
    for score, block, shared in hopes:
        # No block does better than its hope; to look for the last per cent is not worth the time.
        if best is not None and score >= (best.score[0], _GOOD_ENOUGH * best.score[1]):
            break
        if fits(block, Seams()):
            found = _checked(demand, tables, block, score, shared=shared)
            if found is not None and (best is None or found.score < best.score) and fits(block, found.seams):
                best = found
    return best


def judge_block(demand: Demand, block: Triple, fits: Callable[[Triple, Seams], bool]) -> Choice:
    """Return how blocks of a given shape best share patches; not at all where what waits does not fit."""
    z, y, x = block
    tables = _Tables(demand, ([z], [y], [x]))
    alone = Choice(block, Seams(), tables.score(block, shared=False))
    if demand.mode == "off":
        return alone
    shared = _checked(demand, tables, block, tables.score(block, shared=True), shared=True)
    if shared is None or not fits(block, shared.seams):
        return alone
    return shared if demand.mode == "on" or shared.score < alone.score else alone


def _checked(
    demand: Demand, tables: _Tables, block: Triple, score: tuple[bool, float], *, shared: bool
) -> Choice | None:
    """Return a choice with its columns; None where nothing would be shared, unless that is what was asked for."""
    if not shared:
        return Choice(block, Seams(), score)
    grid = BlockGrid(demand.lattices[0].shape, block, demand.region)
    seams = plan_seams(grid, demand.lattices, demand.sums, demand.hands, demand.room)
    if not seams.shared:
        return Choice(block, seams, tables.score(block, shared=False)) if demand.mode == "on" else None
    if seams.column != grid.counts:
        computed = sum(Ownership(grid, tuple(demand.lattices), seams.column).computed)
        score = tables.score(block, shared=True, total=computed)
    return Choice(block, seams, score)


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


class _AxisLoad(NamedTuple):
    """Patches along one axis, for one view: of all blocks together, of the largest block, and the number of blocks."""

    total: int
    largest: int
    blocks: int
    owned: int
    """Patches that belong to the block that has most."""
    span: int
    extent: int
    """Largest block, and the same with all that its own patches answer."""


class _Tables:
    """What the score of a block shape is made of, axis by axis and side by side."""

    def __init__(self, demand: Demand, candidates: tuple[list[int], list[int], list[int]]) -> None:
        self._demand = demand
        self._views = [
            [
                {side: _axis_load(of, demand.region, axis, side) for side in sides}
                for axis, sides in enumerate(candidates)
            ]
            for of in demand.lattices
        ]
        self._once = sum(of.count_touching(demand.region) for of in demand.lattices)

    def score(self, block: Triple, *, shared: bool, total: int | None = None) -> tuple[bool, float]:
        """Return whether there are too few blocks to resume from, and about how long the job takes.

        `total` is the number of patches of all blocks, where it is not what one column, or none, makes of it.
        """
        demand = self._demand
        views = [[table[side] for table, side in zip(view, block, strict=True)] for view in self._views]
        blocks = prod(load.blocks for load in views[0])
        if shared:
            total = self._once if total is None else total
            largest = sum(prod(load.owned for load in loads) for loads in views)
            passed = prod(max(load.extent for load in axis) for axis in zip(*views, strict=True))
            passed -= prod(load.span for load in views[0])
            seconds = _SECONDS_A_SHARING_BLOCK + passed * demand.sums * ITEMSIZE * _SECONDS_A_BYTE
            if demand.room.floor:
                seconds += _SECONDS_A_CALL
        else:
            total = sum(prod(load.total for load in loads) for loads in views)
            largest = sum(prod(load.largest for load in loads) for loads in views)
            seconds = 0.0
        each = (_SECONDS_A_BLOCK + seconds) / demand.patch_seconds
        few = self._once > _SHORT_JOB * demand.workers and blocks < _BLOCKS_A_WORKER * demand.workers
        return few, _makespan(total, largest, blocks, demand.workers, each)


def _axis_load(lattice: Lattice, region: Box, axis: int, side: int) -> _AxisLoad:
    low, high = region.start[axis], region.stop[axis]
    line = lattice.axes[axis]
    block: Triple = (side, side, side)
    spans = [(max(a, low), min(b, high)) for a, b in BlockGrid(lattice.shape, block, region).axis_spans(axis)]
    counts = [len(line.touching(a, b)) for a, b in spans]
    own = [owned(line, span, low, high) for span in spans]
    extents = [
        max(b, min(line.origin(indices[-1]) + line.side, high)) - a if indices else b - a
        for (a, b), indices in zip(spans, own, strict=True)
    ]
    return _AxisLoad(
        sum(counts), max(counts), len(counts), max(map(len, own)), max(b - a for a, b in spans), max(extents)
    )


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


def _makespan(total: int, largest: int, blocks: int, workers: int, each: float) -> float:
    share = total / workers
    # Graham's bound for any order, and the number of rounds where all blocks are alike: the smaller one holds. No block
    # waits for another: one whose seams are not there yet is computed and finished later.
    bound = min(share + largest * (1 - 1 / workers), -(-blocks // workers) * largest)
    return max(bound, share) + each * blocks / workers
