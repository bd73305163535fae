"""Who computes which patch, and what blocks give each other: a product of three axes, pure arithmetic.

A patch belongs to the block that holds the first voxel of its answer inside the block's column. One axis, patches of
4 with stride 2, blocks of 4, one column::

    voxel   0 1 2 3 4 5 6 7 8 9
    block   [--0---)[--1---)[-2-)
    patch 0 [-----)                  belongs to block 0
    patch 1     [-----)              belongs to block 0; its part from voxel 4 on is a seam for block 1
    patch 2         [-----)          belongs to block 1
    patch 3             [-----)      belongs to block 1; a seam for block 2, which has no patch of its own

A column is a box of blocks. Nothing crosses its border: patches there are computed by the columns on both sides. With
columns of one block every block computes all that it needs; with one column every patch is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from itertools import product
from math import prod
from typing import NamedTuple

from volseg.geometry.box import Box, Triple
from volseg.geometry.grid import BlockGrid
from volseg.geometry.lattice import Lattice, Line

Ranges = tuple[range, range, range]


class Seam(NamedTuple):
    """What one block gives another: sums over `box`; `block` is the other one's index."""

    block: int
    box: Box


@dataclass(frozen=True, slots=True)
class Patches:
    """Patches of one view: all of a box of lattice indices."""

    view: int
    ranges: Ranges

    def __iter__(self) -> Iterator[Triple]:
        """Yield the lattice indices in C order."""
        return product(*self.ranges)

    @property
    def count(self) -> int:
        """Number of patches."""
        return prod(map(len, self.ranges))


class Sides(NamedTuple):
    """Largest sides (z, y, x) of blocks."""

    wanted: Triple
    extent: Triple
    read: Triple


@dataclass(frozen=True, slots=True)
class _Part:
    """One block position along one axis; tuples have one entry a view."""

    start: int
    stop: int
    own: tuple[range, ...]
    ends: tuple[int, ...]
    """Where the answers of its own patches end inside the column; `start` where it has none."""
    last: tuple[int, ...]
    """The last position that they reach."""
    first: int
    """The first position whose patches reach this one, in any view."""


@dataclass(frozen=True)
class Ownership:
    """Which block computes which patches; `column` is the shape (z, y, x) of a column in blocks, from the first on."""

    grid: BlockGrid
    lattices: tuple[Lattice, ...]
    column: Triple

    @cached_property
    def _axes(self) -> tuple[_Axis, _Axis, _Axis]:
        grid, region = self.grid, self.grid.region
        z, y, x = (
            _axis(
                tuple(of.axes[a] for of in self.lattices), grid.block[a], (region.start[a], region.stop[a]),
                min(self.column[a], grid.counts[a]),
            )
            for a in range(3)
        )  # fmt: skip
        return z, y, x

    def _at(self, index: int) -> tuple[_Part, _Part, _Part]:
        z, y, x = self.grid.position(index)
        parts = self._axes
        return parts[0].parts[z], parts[1].parts[y], parts[2].parts[x]

    def wanted(self, index: int) -> Box:
        """Return the voxels of a block that lie in the region."""
        return _box([(part.start, part.stop) for part in self._at(index)])

    def own(self, index: int) -> list[Patches]:
        """Return the patches that belong to a block; views without one are left out."""
        parts = self._at(index)
        found = [Patches(v, _ranges([part.own[v] for part in parts])) for v in range(len(self.lattices))]
        return [patches for patches in found if patches.count]

    def shared(self, giver: int, taker: int) -> list[Patches]:
        """Return the patches of `giver` whose answers touch what `taker` wants."""
        wanted = self.wanted(taker)
        found = []
        for patches in self.own(giver):
            touching = self.lattices[patches.view].ranges(wanted)
            both = [_common(a, b) for a, b in zip(patches.ranges, touching, strict=True)]
            found.append(Patches(patches.view, _ranges(both)))
        return [patches for patches in found if patches.count]

    def extent(self, index: int) -> Box:
        """Return the smallest box that holds a block's own voxels and all that its own patches answer."""
        return reduce(Box.hull, (seam.box for seam in self.receivers(index)), self.wanted(index))

    def source(self, patches: Patches) -> Box:
        """Return what some patches read, inside the volume."""
        return self.lattices[patches.view].read(patches.ranges)

    def hull(self, groups: Sequence[Patches], index: int) -> Box:
        """Return what several groups of patches read together; without any, an empty box at the start of a block."""
        start = self.wanted(index).start
        return reduce(Box.hull, map(self.source, groups)) if groups else Box(start, start)

    def receivers(self, index: int) -> list[Seam]:
        """Return the blocks that need sums of this one's patches, in order of their index, and where."""
        here = self.grid.position(index)
        parts = self._at(index)
        reached: set[Triple] = set()
        for v in range(len(self.lattices)):
            if all(part.own[v] for part in parts):
                z, y, x = (range(at, part.last[v] + 1) for at, part in zip(here, parts, strict=True))
                reached.update(product(z, y, x))
        reached.discard(here)
        return [Seam(self.grid.index(there), self._seam(here, there)) for there in sorted(reached)]

    def givers(self, index: int) -> list[Seam]:
        """Return the blocks whose patches this one needs sums of, in order of their index, and where."""
        here = self.grid.position(index)
        z, y, x = (range(part.first, at + 1) for at, part in zip(here, self._at(index), strict=True))
        found = [(there, self._seam(there, here)) for there in product(z, y, x) if there != here]
        return [Seam(self.grid.index(there), box) for there, box in found if box.size]

    def seam(self, giver: int, taker: int) -> Box:
        """Return where the patches of `giver` meet what `taker` wants, in any view: the smallest box, perhaps empty."""
        return self._seam(self.grid.position(giver), self.grid.position(taker))

    def _seam(self, giver: Triple, taker: Triple) -> Box:
        given = [axis.parts[at] for axis, at in zip(self._axes, giver, strict=True)]
        taken = [axis.parts[at] for axis, at in zip(self._axes, taker, strict=True)]
        ends = [
            [min(a.ends[v], b.stop) for a, b in zip(given, taken, strict=True)]
            for v in range(len(self.lattices))
            if all(a.own[v] and a.ends[v] > b.start for a, b in zip(given, taken, strict=True))
        ]
        if not ends:
            return _box([(b.start, b.start) for b in taken])
        return _box([(b.start, max(axis)) for b, axis in zip(taken, zip(*ends, strict=True), strict=True)])

    @property
    def computed(self) -> tuple[int, ...]:
        """Number of patches that all blocks compute together, a view: those at borders of columns once a column."""
        return tuple(map(prod, zip(*(axis.computed for axis in self._axes), strict=True)))

    @property
    def most_own(self) -> tuple[int, ...]:
        """Return how many patches a block owns at most, a view."""
        return tuple(map(prod, zip(*(axis.most_own for axis in self._axes), strict=True)))

    @property
    def read(self) -> int:
        """Return how many voxels all blocks read together for their own patches, halos included."""
        return prod(axis.read for axis in self._axes)

    def largest(self) -> Sides:
        """Return the largest sides of what a block wants, of its extent and of what its own patches read."""
        wanted, extent, read = (_triple(sides) for sides in zip(*(axis.largest for axis in self._axes), strict=True))
        return Sides(wanted, extent, read)

    def widest(self) -> dict[Triple, Triple]:
        """Return sides that no seam exceeds, by how many blocks further on its receiver lies (z, y, x)."""
        found: dict[Triple, Triple] = {}
        for v in range(len(self.lattices)):
            a, b, c = (axis.widths[v] for axis in self._axes)
            for i, j, k in product(range(len(a)), range(len(b)), range(len(c))):
                if i or j or k:
                    z, y, x = found.get((i, j, k), (0, 0, 0))
                    found[i, j, k] = max(z, a[i]), max(y, b[j]), max(x, c[k])
        return found


@dataclass(frozen=True)
class _Axis:
    """All block positions along one axis, and what follows from them; lists have one entry a view."""

    parts: tuple[_Part, ...]
    computed: tuple[int, ...]
    most_own: tuple[int, ...]
    widths: tuple[list[int], ...]
    """By how many positions further on, the largest width of what own patches answer there."""
    largest: Triple
    """Largest span, extent and read."""
    read: int


# A plan asks for the same few axes again and again.
@lru_cache(maxsize=256)
def _axis(lines: tuple[Line, ...], block: int, region: tuple[int, int], column: int) -> _Axis:
    parts = _parts(lines, _spans(block, *region), column)
    views = range(len(lines))
    reads = [_read(lines, part) for part in parts]
    return _Axis(
        parts=tuple(parts),
        computed=tuple(sum(len(part.own[v]) for part in parts) for v in views),
        most_own=tuple(max(len(part.own[v]) for part in parts) for v in views),
        widths=tuple(_widths(parts, v) for v in views),
        largest=(
            max(part.stop - part.start for part in parts),
            max(max(part.stop, *part.ends) - part.start for part in parts),
            max(reads),
        ),
        read=sum(reads),
    )


def _spans(block: int, low: int, high: int) -> list[tuple[int, int]]:
    """Return what the blocks of one axis want of a region ``low:high``."""
    return [(max(at, low), min(at + block, high)) for at in range(low // block * block, high, block)]


def _parts(lines: Sequence[Line], spans: list[tuple[int, int]], side: int) -> list[_Part]:
    """Return the positions of one axis, cut into columns of `side` blocks."""
    parts: list[_Part] = []
    for head in range(0, len(spans), side):
        column = spans[head : head + side]
        low, high = column[0][0], column[-1][1]
        own = [[owned(line, span, low, high) for line in lines] for span in column]
        ends = [
            [min(line.origin(i[-1]) + line.side, high) if i else a for line, i in zip(lines, indices, strict=True)]
            for (a, _), indices in zip(column, own, strict=True)
        ]
        last = [[_last(column, at, end) for end in found] for at, found in enumerate(ends)]
        first: list[int] = []
        for at, reached in enumerate(last):
            first += [at] * (max(reached) + 1 - len(first))
        parts += [
            _Part(a, b, tuple(own[at]), tuple(ends[at]), tuple(head + n for n in last[at]), head + first[at])
            for at, (a, b) in enumerate(column)
        ]
    return parts


def owned(line: Line, span: tuple[int, int], low: int, high: int) -> range:
    """Return the patches that touch the column ``low:high`` and whose first voxel in it lies in `span`."""
    start, stop = span
    found = line.beginning(start, stop)
    return range(line.touching(low, high).start, found.stop) if start == low else found


def _last(column: Sequence[tuple[int, int]], at: int, end: int) -> int:
    """Return the last position that voxels before `end` lie in, not before `at`."""
    while at + 1 < len(column) and column[at + 1][0] < end:
        at += 1
    return at


def _widths(parts: list[_Part], view: int) -> list[int]:
    """Return, by how many positions further on, the largest width of what a position's patches answer there."""
    widths: list[int] = []
    for at, part in enumerate(parts):
        if not part.own[view]:
            continue
        for step in range(part.last[view] - at + 1):
            there = parts[at + step]
            width = min(part.ends[view], there.stop) - there.start
            if step < len(widths):
                widths[step] = max(widths[step], width)
            else:
                widths.append(width)
    return widths


def _read(lines: Sequence[Line], part: _Part) -> int:
    """Return how many voxels a position's own patches read, over all views."""
    spans = [line.read(own[0], own[-1]) for line, own in zip(lines, part.own, strict=True) if own]
    return max(b for _, b in spans) - min(a for a, _ in spans) if spans else 0


def _ranges(axes: Sequence[range]) -> Ranges:
    z, y, x = axes
    return z, y, x


def _triple(sides: Sequence[int]) -> Triple:
    z, y, x = sides
    return z, y, x


def _common(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


def _box(spans: Sequence[tuple[int, int]]) -> Box:
    (a, b), (c, d), (e, f) = spans
    return Box((a, c, e), (b, d, f))
