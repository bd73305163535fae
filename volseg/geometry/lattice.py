"""The lattice of patch origins: anchored to the volume, a product of three axes, pure arithmetic.

One axis of size 10 with patch 4 and stride 3 (the last patch is shifted to end at the edge)::

    voxel   0 1 2 3 4 5 6 7 8 9
    patch 0 [-----)
    patch 1       [-----)
    patch 2             [-----)

Where the volume is smaller than the patch there is one patch at 0, and what it reads beyond the edge is replicated.

An unpadded network answers for less than it reads, by a margin on each side. The lattice is then that of the answers,
which cover the volume; what the patches read is larger by the margin, and beyond the volume's edge it is replicated.
With a patch of 6, a margin of 1 and stride 3 the answers are those drawn above, and patch 0 reads -1 to 5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Protocol

from volseg.geometry.box import Box, Triple


class Line(Protocol):
    """One axis of a lattice: what `AxisLattice` and `tiles.AxisTiles` have in common."""

    @property
    def size(self) -> int:
        """Voxels of the volume."""

    @property
    def side(self) -> int:
        """Voxels that one patch answers for."""

    @property
    def stride(self) -> int:
        """Distance between patches."""

    @property
    def count(self) -> int:
        """Number of patches."""

    def origin(self, i: int) -> int:
        """First voxel that patch `i` answers for."""

    def touching(self, start: int, stop: int) -> range:
        """Return the indices of all patches whose answer shares a voxel with ``start:stop``."""

    def beginning(self, start: int, stop: int) -> range:
        """Return the indices of all patches whose origin lies in ``start:stop``; an empty range where there is none."""

    def neighbours(self, i: int) -> range:
        """Return the indices of all patches whose answer shares a voxel with that of patch `i`, itself included."""

    def read(self, first: int, last: int) -> tuple[int, int]:
        """Return first voxel and end of what patches `first` to `last` read, inside the volume."""

    def lengths(self, start: int, stop: int) -> Counter[int]:
        """Return how many of the patches that touch ``start:stop`` read how many voxels."""

    def __hash__(self) -> int:
        """Lines are plain values: what follows from them is remembered."""


@dataclass(frozen=True, slots=True)
class AxisLattice:
    """Answers along one axis, each `side` voxels from an origin ``min(i * stride, size - side)``, never negative.

    `patch` is what the network reads, `margin` by how much less it answers for on each side.
    """

    size: int
    patch: int
    stride: int
    margin: int = 0

    def __post_init__(self) -> None:
        if min(self.size, self.side, self.stride) < 1 or self.margin < 0 or self.stride > self.side:
            raise ValueError(
                f"lattice needs size >= 1, side = patch - 2 * margin >= 1 and 1 <= stride <= side, got {self}"
            )

    @property
    def side(self) -> int:
        """Voxels that one patch answers for."""
        return self.patch - 2 * self.margin

    @property
    def count(self) -> int:
        """Number of patches on this axis."""
        return 1 if self.size <= self.side else -(-(self.size - self.side) // self.stride) + 1

    def origin(self, i: int) -> int:
        """First voxel that patch `i` answers for."""
        return min(i * self.stride, max(self.size - self.side, 0))

    def touching(self, start: int, stop: int) -> range:
        """Return the indices of all patches whose answer shares a voxel with ``start:stop``."""
        if stop <= start:
            return range(0)
        last = self.count - 1
        # Regular patches: the first i with i*stride + side > start, and the last i with i*stride < stop.
        first = min(max((start - self.side) // self.stride + 1, 0), last)
        end = min((stop - 1) // self.stride, last)
        if end < last and self.origin(last) < stop:
            end = last
        return range(first, end + 1)

    def beginning(self, start: int, stop: int) -> range:
        """Return the indices of all patches whose origin lies in ``start:stop``; an empty range where there is none."""
        first = self._from(start)
        return range(first, max(first, self._from(stop)))

    def _from(self, voxel: int) -> int:
        """Return the first patch whose origin is not before `voxel`, `count` where there is none."""
        last = self.count - 1
        first = max(-(-voxel // self.stride), 0)
        return first if first < last else last + (self.origin(last) < voxel)

    def read(self, first: int, last: int) -> tuple[int, int]:
        """Return first voxel and end of what patches `first` to `last` read, inside the volume."""
        return max(self.origin(first) - self.margin, 0), min(self.origin(last) + self.side + self.margin, self.size)

    def neighbours(self, i: int) -> range:
        """Return the indices of all patches whose answer shares a voxel with that of patch `i`, itself included."""
        origin = self.origin(i)
        return self.touching(origin, min(origin + self.side, self.size))

    def lengths(self, start: int, stop: int) -> Counter[int]:
        """Return how many of the patches that touch ``start:stop`` read how many voxels."""
        return Counter({self.patch: len(self.touching(start, stop))})


class Lattice(ABC):
    """The product of three axes; a patch is named by its index triple (z, y, x)."""

    if TYPE_CHECKING:
        # Fields of one kind of lattice, computed by the other: at run time a property here would be in the way.

        @property
        def axes(self) -> tuple[Line, Line, Line]:
            """Return the three axes, z first."""

        @property
        def shape(self) -> Triple:
            """Sides (z, y, x) of the volume."""

        @property
        def patch(self) -> Triple:
            """Sides (z, y, x) of the largest input that the network is given."""

        @property
        def stride(self) -> Triple:
            """Distance (z, y, x) between patches."""

        @property
        def margin(self) -> Triple:
            """Voxels (z, y, x) by which an answer is smaller than its input on each side."""

    @cached_property
    def answer(self) -> Triple:
        """Sides (z, y, x) of what one patch answers for."""
        z, y, x = (axis.side for axis in self.axes)
        return z, y, x

    @property
    def count(self) -> int:
        """Number of patches of the whole volume."""
        z, y, x = self.axes
        return z.count * y.count * x.count

    def box(self, index: Triple) -> Box:
        """Return the voxels that one patch answers for; beyond the volume where the volume is smaller."""
        z, y, x = (axis.origin(i) for axis, i in zip(self.axes, index, strict=True))
        a, b, c = self.answer
        return Box((z, y, x), (z + a, y + b, x + c))

    @abstractmethod
    def source(self, index: Triple) -> Box:
        """Return the voxels that one patch reads; beyond the volume at its edges."""

    @abstractmethod
    def kept(self, index: Triple) -> tuple[slice, slice, slice]:
        """Return which part of the network's answer (z, y, x) counts, its first voxel being that of `box`."""

    def touching(self, box: Box) -> Iterator[Triple]:
        """Yield the patches whose answer shares a voxel with `box`, in C order."""
        yield from product(*self.ranges(box))

    def ranges(self, box: Box) -> tuple[range, range, range]:
        """Return, axis by axis, the indices of the patches whose answer shares a voxel with `box`."""
        z, y, x = (axis.touching(a, b) for axis, a, b in zip(self.axes, box.start, box.stop, strict=True))
        return z, y, x

    def count_touching(self, box: Box) -> int:
        """Return how many patches have an answer that shares a voxel with `box`."""
        z, y, x = self.ranges(box)
        return len(z) * len(y) * len(x)

    def lengths(self, box: Box) -> tuple[Counter[int], Counter[int], Counter[int]]:
        """Return, axis by axis, how many of the patches that touch `box` read how many voxels."""
        z, y, x = (axis.lengths(a, b) for axis, a, b in zip(self.axes, box.start, box.stop, strict=True))
        return z, y, x

    def voxels(self, box: Box) -> int:
        """Return how many voxels are read, and computed, by all the patches that touch `box`."""
        return prod(sum(n * count for n, count in of.items()) for of in self.lengths(box))

    def read(self, ranges: tuple[range, range, range]) -> Box:
        """Return what some patches read, inside the volume: those of all index triples in `ranges`, none empty."""
        (z0, z1), (y0, y1), (x0, x1) = (axis.read(of[0], of[-1]) for axis, of in zip(self.axes, ranges, strict=True))
        return Box((z0, y0, x0), (z1, y1, x1))


@dataclass(frozen=True)
class PatchLattice(Lattice):
    """Patches of one shape that may overlap."""

    shape: Triple
    patch: Triple
    stride: Triple
    margin: Triple = (0, 0, 0)

    @cached_property
    def axes(self) -> tuple[AxisLattice, AxisLattice, AxisLattice]:
        """Return the three axis lattices, z first."""
        z, y, x = (AxisLattice(*v) for v in zip(self.shape, self.patch, self.stride, self.margin, strict=True))
        return z, y, x

    def source(self, index: Triple) -> Box:
        """Return the voxels that one patch reads, as many as `patch`; beyond the volume at its edges."""
        z, y, x = (axis.origin(i) - axis.margin for axis, i in zip(self.axes, index, strict=True))
        return Box((z, y, x), (z + self.patch[0], y + self.patch[1], x + self.patch[2]))

    def kept(self, index: Triple) -> tuple[slice, slice, slice]:
        """Return all of the answer."""
        return slice(None), slice(None), slice(None)


def stride_for(answer: Triple, overlap: float) -> Triple:
    """Return the distance between patches for an overlap of ``0 <= overlap < 1`` of their answers (z, y, x).

    At least one voxel.
    """
    z, y, x = (max(1, round(side * (1.0 - overlap))) for side in answer)
    return z, y, x
