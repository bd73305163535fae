"""The lattice of patch origins: anchored to the volume, a product of three axes, pure arithmetic.

One axis of size 10 with patch 4 and stride 3 (the last patch is shifted to end at the edge)::

    voxel   0 1 2 3 4 5 6 7 8 9
    patch 0 [-----)
    patch 1       [-----)
    patch 2             [-----)

Where the volume is smaller than the patch there is one patch at 0, and what it reads beyond the edge is replicated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from volseg.geometry.box import Box, Triple


@dataclass(frozen=True, slots=True)
class AxisLattice:
    """Patch origins along one axis: ``min(i * stride, size - patch)``, never negative."""

    size: int
    patch: int
    stride: int

    def __post_init__(self) -> None:
        if min(self.size, self.patch, self.stride) < 1 or self.stride > self.patch:
            raise ValueError(f"lattice needs size, patch >= 1 and 1 <= stride <= patch, got {self}")

    @property
    def count(self) -> int:
        """Number of patches on this axis."""
        return 1 if self.size <= self.patch else -(-(self.size - self.patch) // self.stride) + 1

    def origin(self, i: int) -> int:
        """First voxel of patch `i`."""
        return min(i * self.stride, max(self.size - self.patch, 0))

    def touching(self, start: int, stop: int) -> range:
        """Return the indices of all patches that share a voxel with ``start:stop``."""
        if stop <= start:
            return range(0)
        last = self.count - 1
        # Regular patches: the first i with i*stride + patch > start, and the last i with i*stride < stop.
        first = min(max((start - self.patch) // self.stride + 1, 0), last)
        end = min((stop - 1) // self.stride, last)
        if end < last and self.origin(last) < stop:
            end = last
        return range(first, end + 1)

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """Return first voxel and end of what the patches that touch ``start:stop`` cover, inside the volume."""
        indices = self.touching(start, stop)
        return self.origin(indices[0]), min(self.origin(indices[-1]) + self.patch, self.size)

    def neighbours(self, i: int) -> range:
        """Return the indices of all patches that share a voxel with patch `i`, itself included."""
        origin = self.origin(i)
        return self.touching(origin, min(origin + self.patch, self.size))


@dataclass(frozen=True)
class PatchLattice:
    """The product of three axis lattices; a patch is named by its index triple (z, y, x)."""

    shape: Triple
    patch: Triple
    stride: Triple

    @cached_property
    def axes(self) -> tuple[AxisLattice, AxisLattice, AxisLattice]:
        """Return the three axis lattices, z first."""
        z, y, x = (AxisLattice(*v) for v in zip(self.shape, self.patch, self.stride, strict=True))
        return z, y, x

    @property
    def count(self) -> int:
        """Number of patches of the whole volume."""
        z, y, x = self.axes
        return z.count * y.count * x.count

    def box(self, index: Triple) -> Box:
        """Return the voxels of one patch; beyond the volume where the volume is smaller than the patch."""
        z, y, x = (axis.origin(i) for axis, i in zip(self.axes, index, strict=True))
        return Box((z, y, x), (z + self.patch[0], y + self.patch[1], x + self.patch[2]))

    def touching(self, box: Box) -> Iterator[Triple]:
        """Yield the patches that share a voxel with `box`, in C order."""
        yield from product(*self.ranges(box))

    def ranges(self, box: Box) -> tuple[range, range, range]:
        """Return, axis by axis, the indices of the patches that share a voxel with `box`."""
        z, y, x = (axis.touching(a, b) for axis, a, b in zip(self.axes, box.start, box.stop, strict=True))
        return z, y, x

    def count_touching(self, box: Box) -> int:
        """Return how many patches share a voxel with `box`."""
        z, y, x = self.ranges(box)
        return len(z) * len(y) * len(x)

    def reach(self, box: Box) -> Box:
        """Return what must be read to compute every patch that touches `box`: block plus halo, inside the volume."""
        if box.size == 0:
            return Box(box.start, box.start)
        (z0, z1), (y0, y1), (x0, x1) = (
            axis.reach(a, b) for axis, a, b in zip(self.axes, box.start, box.stop, strict=True)
        )
        return Box((z0, y0, x0), (z1, y1, x1))


def stride_for(patch: Triple, overlap: float) -> Triple:
    """Return the distance between patches for an overlap of ``0 <= overlap < 1`` of the patch, at least one voxel."""
    z, y, x = (max(1, round(p * (1.0 - overlap))) for p in patch)
    return z, y, x
