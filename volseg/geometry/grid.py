"""The grid of blocks: index to box by arithmetic, so that a plan of 10^9 blocks costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from volseg.geometry.box import Box, Triple


@dataclass(frozen=True)
class BlockGrid:
    """Blocks of one shape, anchored at (0, 0, 0), clipped to the volume; only those that meet `region` count.

    Blocks are numbered in C order within the region. A block is not clipped to the region: whoever writes it owns the
    whole of its shards.
    """

    shape: Triple
    block: Triple
    region: Box

    @cached_property
    def _first(self) -> Triple:
        z, y, x = (a // b for a, b in zip(self.region.start, self.block, strict=True))
        return z, y, x

    @cached_property
    def counts(self) -> Triple:
        """Number of blocks along z, y, x."""
        z, y, x = (
            -(-stop // b) - first for stop, b, first in zip(self.region.stop, self.block, self._first, strict=True)
        )
        return z, y, x

    def __len__(self) -> int:
        """Number of blocks."""
        z, y, x = self.counts
        return z * y * x

    def position(self, index: int) -> Triple:
        """Return how many blocks lie before block `index` along z, y, x; raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} is not in 0..{len(self) - 1}")
        _, ny, nx = self.counts
        return index // (ny * nx), index // nx % ny, index % nx

    def index(self, position: Triple) -> int:
        """Return the block at a position."""
        _, ny, nx = self.counts
        z, y, x = position
        return (z * ny + y) * nx + x

    def box(self, index: int) -> Box:
        """Return the voxels of block `index`, clipped to the volume."""
        position = self.position(index)
        z, y, x = ((p + f) * b for p, f, b in zip(position, self._first, self.block, strict=True))
        return Box((z, y, x), (z + self.block[0], y + self.block[1], x + self.block[2])).intersect(Box.of(self.shape))

    def axis_spans(self, axis: int) -> list[tuple[int, int]]:
        """Return ``(start, stop)`` of every block position along `axis` (0 = z), clipped to the volume."""
        size, block, first = self.shape[axis], self.block[axis], self._first[axis]
        return [((first + i) * block, min((first + i + 1) * block, size)) for i in range(self.counts[axis])]
