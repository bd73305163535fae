"""How long a job takes with blocks of some shape: patches, what a block costs beside them, and how even the load is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from volseg.geometry import BlockGrid, Box, Lattice, Ownership, Sweep, Triple
from volseg.geometry.ownership import owned
from volseg.planning.makespan import COUNTED, longest, makespan
from volseg.planning.seams import ITEMSIZE, SeamRoom, Seams

# Where the job is long, a worker should have at least this many blocks, and none that takes longer where more of them
# compute no patch twice: what a crash costs is one block, and progress is told block by block.
_BLOCKS_A_WORKER = 4
_LONG_BLOCK = 30.0  # seconds
_SHORT_JOB = 32  # patches a worker; below this a restart costs less than border patches computed twice
# What a block costs beside its patches: to read it and to store it for good; and what sharing adds: to cut, keep and
# add seams, each of their bytes once on its way (copied twice, added once), and with Ray the objects of a call.
_SECONDS_A_BLOCK = 0.02
_SECONDS_A_SHARING_BLOCK = 0.002
_SECONDS_A_BYTE = 3e-9
_SECONDS_A_CALL = 0.03


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


Score = tuple[bool, float]
"""Whether there are too few blocks to resume from, and about how long the job takes, in patches of one worker."""


@dataclass(frozen=True)
class _AxisLoad:
    """Every block position along one axis, for one view: what is computed there, and how long the block is."""

    computed: tuple[int, ...]
    """Patches that touch it: what it computes where nothing is shared."""
    own: tuple[int, ...]
    """Patches that belong to it: what it computes where all is shared."""
    spans: tuple[int, ...]
    extents: tuple[int, ...]
    """Its sides, and the same with all that its own patches answer."""

    def patches(self, *, shared: bool) -> tuple[int, ...]:
        """Return how many patches each position computes."""
        return self.own if shared else self.computed


class Tables:
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
        self._sums = {
            (v, axis, side, shared): (sum(found := load.patches(shared=shared)), max(found))
            for v, view in enumerate(self._views)
            for axis, loads in enumerate(view)
            for side, load in loads.items()
            for shared in (False, True)
        }
        self._once = sum(of.count_touching(demand.region) for of in demand.lattices)

    def hope(self, block: Triple, *, shared: bool) -> Score:
        """Return what the block shape can reach at best."""
        total, largest = self._patches(block, shared=shared)
        blocks = self._blocks(block)
        if blocks > COUNTED:
            return self._few(blocks, largest, shared=shared), self._bound(block, total, largest, shared=shared)
        each = self._overhead(block, shared=shared) / self._demand.workers
        return self._few(blocks, largest, shared=shared), max(total / self._demand.workers + each, float(largest))

    def score(self, block: Triple, seams: Seams) -> Score:
        """Return about how long the job takes with blocks that share patches like this."""
        grid = BlockGrid(self._demand.lattices[0].shape, block, self._demand.region)
        blocks, shared = len(grid), seams.shared
        total, largest = self._patches(block, shared=shared)
        if shared and seams.column != grid.counts:
            total = sum(Ownership(grid, tuple(self._demand.lattices), seams.column).computed)
        elif blocks <= COUNTED:
            order = Sweep(grid.counts, seams.column, seams.along).position if shared else grid.position
            costs = [self._cost(block, order(place), shared=shared) for place in range(blocks)]
            return self._few(blocks, largest, shared=shared), makespan(costs, self._demand.workers)
        return self._few(blocks, largest, shared=shared), self._bound(block, total, largest, shared=shared)

    def _few(self, blocks: int, largest: int, *, shared: bool) -> bool:
        """Tell whether there are too few blocks to resume from."""
        workers = self._demand.workers
        most = max(1.0, _LONG_BLOCK / self._demand.patch_seconds)
        few = blocks < _BLOCKS_A_WORKER * workers or (shared and largest > most)
        return self._once > _SHORT_JOB * workers and few

    def _at(self, block: Triple) -> list[list[_AxisLoad]]:
        return [[table[side] for table, side in zip(view, block, strict=True)] for view in self._views]

    def _blocks(self, block: Triple) -> int:
        return prod(len(load.spans) for load in self._at(block)[0])

    def _patches(self, block: Triple, *, shared: bool) -> tuple[int, int]:
        """Return how many patches all blocks compute, and the one that has most."""
        keys = [[(v, axis, side, shared) for axis, side in enumerate(block)] for v in range(len(self._views))]
        total, largest = (sum(prod(self._sums[key][of] for key in axes) for axes in keys) for of in (0, 1))
        return total, largest

    def _overhead(self, block: Triple, *, shared: bool) -> float:
        """Return what all blocks cost beside their patches, in patches."""
        loads = self._at(block)
        passed = 0
        if shared:
            extents = [
                [max(sides) for sides in zip(*(of.extents for of in axis), strict=True)] for axis in _by_axis(loads)
            ]
            passed = prod(map(sum, extents)) - prod(sum(load.spans) for load in loads[0])
        return self._priced(self._blocks(block), passed, shared=shared)

    def _cost(self, block: Triple, position: Triple, *, shared: bool) -> float:
        """Return what the block at a position (z, y, x) of the grid costs, in patches."""
        loads = self._at(block)
        patches = sum(
            prod(load.patches(shared=shared)[at] for load, at in zip(view, position, strict=True)) for view in loads
        )
        passed = 0
        if shared and patches:
            extent = [max(of.extents[at] for of in axis) for axis, at in zip(_by_axis(loads), position, strict=True)]
            passed = prod(extent) - prod(load.spans[at] for load, at in zip(loads[0], position, strict=True))
        return patches + self._priced(1, passed, shared=shared)

    def _priced(self, blocks: int, passed: int, *, shared: bool) -> float:
        demand, seconds = self._demand, _SECONDS_A_BLOCK
        if shared:
            seconds += _SECONDS_A_SHARING_BLOCK + (_SECONDS_A_CALL if demand.room.floor else 0.0)
        return (blocks * seconds + passed * demand.sums * ITEMSIZE * _SECONDS_A_BYTE) / demand.patch_seconds

    def _bound(self, block: Triple, total: int, largest: int, *, shared: bool) -> float:
        workers = self._demand.workers
        return longest(total, largest, self._blocks(block), workers) + self._overhead(block, shared=shared) / workers


def _by_axis(loads: list[list[_AxisLoad]]) -> list[tuple[_AxisLoad, ...]]:
    return list(zip(*loads, strict=True))


def _axis_load(lattice: Lattice, region: Box, axis: int, side: int) -> _AxisLoad:
    low, high = region.start[axis], region.stop[axis]
    line = lattice.axes[axis]
    block: Triple = (side, side, side)
    spans = [(max(a, low), min(b, high)) for a, b in BlockGrid(lattice.shape, block, region).axis_spans(axis)]
    own = [owned(line, span, low, high) for span in spans]
    ends = [
        max(b, min(line.origin(indices[-1]) + line.side, high)) if indices else b
        for (_, b), indices in zip(spans, own, strict=True)
    ]
    return _AxisLoad(
        tuple(len(line.touching(a, b)) for a, b in spans),
        tuple(map(len, own)),
        tuple(b - a for a, b in spans),
        tuple(end - a for (a, _), end in zip(spans, ends, strict=True)),
    )
