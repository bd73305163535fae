"""The lattice of exact mode: tiles that cover the volume once, each read with what its answer depends on.

The reference is one forward over the *whole input*: the volume, its margin on both sides where the network is unpadded,
and what brings its side to the next one that the network takes, at the high side; all of it continued edge voxels. A
tile is read by a *window* into that input. A window begins on a multiple of the pooling step, so that its pools gather
the same voxels as those of the whole input, and it is clipped where the whole input ends, so that the network pads with
zeros nowhere else than there. Away from the ends, the answers within `before` voxels of a window's begin and within
`after` of its end are spoilt by what it does not see; the window is as small as it can be without them in its tile.

One axis of size 20 with tile 8, before 2, after 3 and a step of 4::

    whole input   [0                  20)
    tile 1                [8     16)
    window 1          [4                20)
    answers kept      ....[       )....
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

from volseg.geometry.box import Box, Triple
from volseg.geometry.lattice import Lattice


@dataclass(frozen=True, slots=True)
class Halo:
    """What spoils the answers of a window on a part of the input, in voxels (z, y, x).

    They are wrong within `before` of its begin and `after` of its end. A window has to begin on a multiple of `step`,
    and to end a multiple of `step` before the end of the whole input.
    """

    before: Triple
    after: Triple
    step: Triple

    def symmetric(self) -> Halo:
        """Return the halo that also serves mirrored windows."""
        a, b, c = map(max, self.before, self.after)
        return Halo((a, b, c), (a, b, c), self.step)


@dataclass(frozen=True)
class AxisTiles:
    """Tiles of `side` voxels along one axis from 0 on, the last one clipped; all that a network asks of its input.

    The network takes a side n where ``n >= smallest and (n - phase) % step == 0`` and answers for `margin` voxels less
    on each side.
    """

    size: int
    side: int
    before: int
    after: int
    step: int
    phase: int = 0
    smallest: int = 1
    margin: int = 0

    def __post_init__(self) -> None:
        if min(self.size, self.side, self.step, self.smallest) < 1 or min(self.before, self.after, self.margin) < 0:
            raise ValueError(f"tiles need sides of at least 1 and halos of at least 0, got {self}")
        if (self.smallest - self.phase) % self.step:
            raise ValueError(f"the smallest side must be one that the network takes, got {self}")

    @property
    def stride(self) -> int:
        """Distance between tiles: they do not overlap."""
        return self.side

    @property
    def count(self) -> int:
        """Number of tiles."""
        return -(-self.size // self.side)

    @cached_property
    def whole(self) -> int:
        """Side of the whole input, margins and what fills it up included."""
        least = max(self.size + 2 * self.margin, self.smallest)
        return least + (self.phase - least) % self.step

    def origin(self, i: int) -> int:
        """First voxel of tile `i`."""
        return i * self.side

    def end(self, i: int) -> int:
        """End of tile `i`, clipped to the volume."""
        return min((i + 1) * self.side, self.size)

    def touching(self, start: int, stop: int) -> range:
        """Return the indices of the tiles that share a voxel with ``start:stop``."""
        return range(start // self.side, -(-stop // self.side)) if stop > start else range(0)

    def beginning(self, start: int, stop: int) -> range:
        """Return the indices of the tiles that begin in ``start:stop``."""
        first = min(-(-start // self.side), self.count)
        return range(first, max(first, min(-(-stop // self.side), self.count)))

    def neighbours(self, i: int) -> range:
        """Return the indices of the tiles that share a voxel with tile `i`: itself alone."""
        return range(i, i + 1)

    def window(self, i: int) -> tuple[int, int]:
        """Return first voxel and end of what is read for tile `i`; beyond the volume at the ends of the whole input."""
        # Places in the whole input: there a volume's voxel v has place v + margin, and its answer as well.
        first = max(0, (self.origin(i) - self.before) // self.step * self.step)
        needed = self.end(i) + 2 * self.margin + self.after
        last = self.whole - max(0, (self.whole - needed) // self.step * self.step)
        if last - first < self.smallest:
            last = min(self.whole, first + self.smallest)
            first = last - self.smallest
        return first - self.margin, last - self.margin

    def kept(self, i: int) -> slice:
        """Return where tile `i` lies in the answer to its window."""
        # The answer is `margin` smaller than the window, which begins `margin` before its place in the whole input.
        shift = self.window(i)[0] + self.margin
        return slice(self.origin(i) - shift, self.end(i) - shift)

    def read(self, first: int, last: int) -> tuple[int, int]:
        """Return first voxel and end of what tiles `first` to `last` read, inside the volume."""
        return max(self.window(first)[0], 0), min(self.window(last)[1], self.size)

    def lengths(self, start: int, stop: int) -> Counter[int]:
        """Return how many of the tiles that touch ``start:stop`` have a window of each length."""
        return Counter(_length(self, i) for i in self.touching(start, stop))

    @cached_property
    def longest(self) -> int:
        """Length of the longest window."""
        return max(_all_lengths(self))


def _length(axis: AxisTiles, i: int) -> int:
    first, last = axis.window(i)
    return last - first


@lru_cache(maxsize=1024)
def _all_lengths(axis: AxisTiles) -> Counter[int]:
    return axis.lengths(0, axis.size)


@dataclass(frozen=True)
class TileLattice(Lattice):
    """Tiles that cover the volume once, each read by a window of a shape of its own."""

    axes: tuple[AxisTiles, AxisTiles, AxisTiles]

    @property
    def shape(self) -> Triple:
        """Sides (z, y, x) of the volume."""
        z, y, x = (axis.size for axis in self.axes)
        return z, y, x

    @property
    def stride(self) -> Triple:
        """Sides (z, y, x) of a tile."""
        z, y, x = (axis.side for axis in self.axes)
        return z, y, x

    @cached_property
    def patch(self) -> Triple:
        """Sides (z, y, x) of the largest window."""
        z, y, x = (axis.longest for axis in self.axes)
        return z, y, x

    @property
    def margin(self) -> Triple:
        """See `Lattice`."""
        z, y, x = (axis.margin for axis in self.axes)
        return z, y, x

    @property
    def halo(self) -> tuple[Triple, Triple]:
        """What spoils the answers of a window at its begin and at its end, (z, y, x) each."""
        (a, d), (b, e), (c, f) = ((axis.before, axis.after) for axis in self.axes)
        return (a, b, c), (d, e, f)

    def box(self, index: Triple) -> Box:
        """Return the voxels of one tile, clipped to the volume."""
        (a, d), (b, e), (c, f) = ((axis.origin(i), axis.end(i)) for axis, i in zip(self.axes, index, strict=True))
        return Box((a, b, c), (d, e, f))

    def source(self, index: Triple) -> Box:
        """Return the window of one tile; beyond the volume at the ends of the whole input."""
        (a, d), (b, e), (c, f) = (axis.window(i) for axis, i in zip(self.axes, index, strict=True))
        return Box((a, b, c), (d, e, f))

    def kept(self, index: Triple) -> tuple[slice, slice, slice]:
        """Return where the tile lies in the answer to its window."""
        z, y, x = (axis.kept(i) for axis, i in zip(self.axes, index, strict=True))
        return z, y, x
