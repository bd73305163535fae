"""The order in which blocks are begun: column after column, layer after layer, diagonal after diagonal.

A layer of a column, its blocks by their place in the order::

    0 1 3 6
    2 4 7 9
    5 8 10 11

A block comes after all blocks that give it something, and the blocks of a diagonal give each other nothing. Places and
blocks follow from each other by arithmetic, so that an order of 10^9 blocks costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from volseg.geometry.box import Triple


@dataclass(frozen=True)
class Sweep:
    """An order of a grid of `counts` blocks in columns of `column` blocks; layers lie across axis `along` (0 = z)."""

    counts: Triple
    column: Triple
    along: int

    @cached_property
    def _axes(self) -> Triple:
        first, second = (axis for axis in range(3) if axis != self.along)
        return self.along, first, second

    @cached_property
    def _turned(self) -> tuple[Triple, Triple]:
        """Counts and column, the axis of the layers first."""
        return self._turn(self.counts), self._turn(self.column)

    def _turn(self, sides: Triple) -> Triple:
        a, b, c = self._axes
        return sides[a], sides[b], sides[c]

    def place(self, position: Triple) -> int:
        """Return the place in the order of the block at a position (z, y, x) of the grid."""
        (na, nb, nc), (ga, gb, gc) = self._turned
        a, b, c = self._turn(position)
        # Blocks in whole slabs of columns before, then in whole rows of columns, then in columns.
        da, db, dc = min(ga, na - a // ga * ga), min(gb, nb - b // gb * gb), min(gc, nc - c // gc * gc)
        before = (a // ga * ga) * nb * nc + da * (b // gb * gb) * nc + da * db * (c // gc * gc)
        y, x = b % gb, c % gc
        return before + (a % ga) * db * dc + _cells_before(y + x, db, dc) + y - max(0, y + x - dc + 1)

    def position(self, place: int) -> Triple:
        """Return the position (z, y, x) of the block at a place in the order."""
        (na, nb, nc), (ga, gb, gc) = self._turned
        slab, rest = divmod(place, ga * nb * nc)
        da = min(ga, na - slab * ga)
        row, rest = divmod(rest, da * gb * nc)
        db = min(gb, nb - row * gb)
        number, rest = divmod(rest, da * db * gc)
        dc = min(gc, nc - number * gc)
        layer, rest = divmod(rest, db * dc)
        low, high = 0, db + dc - 2
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if _cells_before(middle, db, dc) <= rest else (low, middle - 1)
        y = rest - _cells_before(low, db, dc) + max(0, low - dc + 1)
        turned = (slab * ga + layer, row * gb + y, number * gc + low - y)
        found = [0, 0, 0]
        for axis, at in zip(self._axes, turned, strict=True):
            found[axis] = at
        return found[0], found[1], found[2]

    def front(self, sizes: Mapping[Triple, int]) -> int:
        """Return what pairs of blocks with only the first before a place add up to at most, whatever the place.

        `sizes` says what one pair counts, by how far the second lies beyond the first (z, y, x), never before it.
        """
        sides = [min(side, count) for side, count in zip(*reversed(self._turned), strict=True)]
        total = 0
        for step, size in sizes.items():
            a, b, c = self._turn(step)
            free = [side - at for side, at in zip(sides, (a, b, c), strict=True)]
            if min(free) > 0:
                # A layer's worth for each layer between, and a diagonal's for each diagonal between.
                pairs = a * free[1] * free[2] + (b + c) * min(sides[1:])
                total += min(pairs, prod(free)) * size
        return total


def _cells_before(diagonal: int, rows: int, columns: int) -> int:
    """Return how many cells of a layer lie on diagonals before one."""
    return (
        _triangle(diagonal) - _triangle(diagonal - rows) - _triangle(diagonal - columns)
        + _triangle(diagonal - rows - columns)
    )  # fmt: skip


def _triangle(n: int) -> int:
    return n * (n + 1) // 2 if n > 0 else 0
