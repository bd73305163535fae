"""How large a block should be: few border patches computed twice, an even load, and enough blocks to resume from.

Boundaries lie on multiples of the stride, where they cut the fewest patches.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import prod
from typing import NamedTuple

from volseg.geometry import BlockGrid, Box, PatchLattice, Triple

CHUNK_SIDE = 64
"""Chunks aim at this side: 256 KiB of uint8, small enough to look at, large enough for object stores inside a shard."""

_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64)
# A worker should have at least this many blocks where the job is long: what a crash costs is one of them.
_BLOCKS_A_WORKER = 4
_SHORT_JOB = 32  # patches a worker; below this a restart costs less than border patches computed twice


def chunk_for(shard: Triple) -> Triple:
    """Return the chunk of a shard: on each axis the largest divisor up to CHUNK_SIDE, the side where that is tiny."""
    z, y, x = (_divisor(side) for side in shard)
    return z, y, x


def _divisor(side: int) -> int:
    best = max(d for d in range(1, min(side, CHUNK_SIDE) + 1) if side % d == 0)
    return best if best * 4 >= min(side, CHUNK_SIDE) else side


def choose_block(
    lattice: PatchLattice, region: Box, workers: int, fits: Callable[[Triple], bool], unit: Triple | None = None
) -> Triple | None:
    """Return the block shape that ends the job first within memory; None when not even the smallest fits.

    `unit` is what a block must be a multiple of (a given shard or chunk), `fits` tells whether a worker can hold a
    block. The score is the number of forwards of the busiest worker, plus a little for each block's own cost.
    """
    z, y, x = _candidates(lattice, unit)
    tables = [{side: _axis_load(lattice, region, i, side) for side in sides} for i, sides in enumerate((z, y, x))]
    long_job = lattice.count_touching(region) > _SHORT_JOB * workers
    best: tuple[tuple[bool, float], Triple] | None = None
    for block in product(z, y, x):
        loads = [table[side] for table, side in zip(tables, block, strict=True)]
        blocks = prod(load.blocks for load in loads)
        makespan = _makespan(prod(load.total for load in loads), prod(load.largest for load in loads), blocks, workers)
        score = (long_job and blocks < _BLOCKS_A_WORKER * workers, makespan)
        if (best is None or score < best[0]) and fits(block):
            best = (score, block)
    return best[1] if best else None


def smallest_block(lattice: PatchLattice, unit: Triple | None = None) -> Triple:
    """Return the smallest block that `choose_block` considers."""
    z, y, x = (min(sides) for sides in _candidates(lattice, unit))
    return z, y, x


def _candidates(lattice: PatchLattice, unit: Triple | None) -> tuple[list[int], list[int], list[int]]:
    z, y, x = (_sides(axis.size, axis.stride, unit[i] if unit else None) for i, axis in enumerate(lattice.axes))
    return z, y, x


class _AxisLoad(NamedTuple):
    """Patches along one axis: of all blocks together, of the largest block, and the number of blocks."""

    total: int
    largest: int
    blocks: int


def _axis_load(lattice: PatchLattice, region: Box, axis: int, side: int) -> _AxisLoad:
    low, high = region.start[axis], region.stop[axis]
    block: Triple = (side, side, side)
    spans = BlockGrid(lattice.shape, block, region).axis_spans(axis)
    counts = [len(lattice.axes[axis].touching(max(a, low), min(b, high))) for a, b in spans]
    return _AxisLoad(sum(counts), max(counts), len(counts))


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


def _makespan(total: int, largest: int, blocks: int, workers: int) -> float:
    share = total / workers
    # Graham's bound for any order, and the number of rounds where all blocks are alike: the smaller one holds.
    bound = min(share + largest * (1 - 1 / workers), -(-blocks // workers) * largest)
    return max(bound, share) + 0.02 * blocks / workers
