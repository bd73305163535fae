"""How blocks share the patches at their borders, and what waits meanwhile: columns, order and bytes, by arithmetic.

Seams and cores wait between the block that made them and the block that adds them. With *f* the first block of the
order that is not finished, they are at most

    front   what blocks before *f* give to *f* and later ones: about a layer of seams,
  + ahead   what blocks after *f* made or will make that were begun before their turn: `ahead` bytes, by decision,
  + one     what *f* itself makes.

Where that exceeds the budget the volume is cut into columns, in which the layers are smaller; patches at their borders
are computed on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from volseg.geometry import AXES, BlockGrid, Lattice, Ownership, Sweep, Triple

ITEMSIZE = 4
"""Bytes of one sum."""

PARCEL_FLOOR = 103 << 10
"""Bytes of the smallest parcel with Ray, which returns smaller objects through the memory of the driver (100 KiB)."""

NO_COLUMNS: Triple = (1, 1, 1)
"""Columns of one block: nothing is shared."""

# Into how many columns an axis is cut at most in one try, and the steps in between.
_CUTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 1024)


@dataclass(frozen=True)
class SeamRoom:
    """Where seams wait and how much room there is."""

    budget: int
    """Bytes that waiting seams and cores may take together."""
    floor: int = 0
    """Bytes that the smallest object takes."""
    local: bool = False
    """In the memory of the workers' own process."""
    in_order: bool = False
    """There is one worker, which computes blocks in the order in which they are handed out: none is ever parked."""
    grows: bool = False
    """There may be more workers later: all the room is used where it speeds them up."""


NO_ROOM = SeamRoom(0)


@dataclass(frozen=True)
class Seams:
    """How blocks share patches: `column` is the shape (z, y, x) of a column in blocks, layers lie across axis `along`.

    All else is in bytes. `bound` is what waits at most; `out` is what one block gives at most, `core` what it keeps.
    """

    column: Triple = NO_COLUMNS
    along: int = 0
    ahead: int = 0
    bound: int = 0
    out: int = 0
    core: int = 0
    floor: int = 0
    local: bool = False
    in_order: bool = False

    @property
    def shared(self) -> bool:
        """Tell whether blocks give each other anything."""
        return self.bound > 0

    def bytes_of(self, voxels: int, sums: int) -> int:
        """Return what the sums of so many voxels take."""
        return max(voxels * sums * ITEMSIZE, self.floor)


NOT_SHARED = Seams()


def plan_seams(grid: BlockGrid, lattices: Sequence[Lattice], sums: int, hands: int, room: SeamRoom) -> Seams:
    """Return the columns that compute the fewest patches within the room; columns of one block where none would do.

    `sums` are the channels of the accumulator, `hands` how many blocks all workers have in hand at once.
    """
    whole = Ownership(grid, tuple(lattices), grid.counts)
    kind = Seams(floor=room.floor, local=room.local, in_order=room.in_order)
    sizes = {step: kind.bytes_of(prod(sides), sums) for step, sides in whole.widest().items()}
    core = kind.bytes_of(prod(whole.largest().wanted), sums)

    def tried(column: Triple, along: int) -> Seams | None:
        inside = {step: size for step, size in sizes.items() if all(a < b for a, b in zip(step, column, strict=True))}
        front, out = Sweep(grid.counts, column, along).front(inside), sum(inside.values())
        one = out if room.in_order else out + core
        # No worker should have to leave a block for want of room.
        least = (hands - 1) * one
        left = room.budget - front - out
        if not inside or left < least:
            return None
        ahead = least if room.local else left if room.grows else min(2 * hands * one, left)
        return replace(kind, column=column, along=along, ahead=ahead, bound=front + ahead + out, out=out, core=core)

    if not sizes:
        return Seams()
    one_column = [found for along in range(3) if (found := tried(grid.counts, along)) is not None]
    if one_column:
        return min(one_column, key=lambda seams: seams.bound)
    z, y, x = grid.counts
    if all(tried(column, along) is None for along, column in enumerate(((z, 1, 1), (1, y, 1), (1, 1, x)))):
        # Not even the narrowest columns have room.
        return Seams()
    best, fewest = Seams(), sum(Ownership(grid, tuple(lattices), NO_COLUMNS).computed)
    loads = _ColumnLoads(grid, lattices)
    for column, along in _columns(grid.counts):
        if loads.computed(column) < fewest and (found := tried(column, along)) is not None:
            best, fewest = found, loads.computed(column)
    return best


class _ColumnLoads:
    """Patches that columns of a shape compute, remembered axis by axis."""

    def __init__(self, grid: BlockGrid, lattices: Sequence[Lattice]) -> None:
        self._grid, self._lattices = grid, lattices
        self._known: dict[tuple[int, int], tuple[int, ...]] = {}

    def computed(self, column: Triple) -> int:
        """Return the number of patches, over all views."""
        z, y, x = (self._axis(axis, side) for axis, side in enumerate(column))
        return sum(prod(counts) for counts in zip(z, y, x, strict=True))

    def _axis(self, axis: int, side: int) -> tuple[int, ...]:
        if (axis, side) not in self._known:
            region, spans = self._grid.region, self._grid.axis_spans(axis)
            borders = [
                (max(part[0][0], region.start[axis]), min(part[-1][1], region.stop[axis]))
                for part in (spans[i : i + side] for i in range(0, len(spans), side))
            ]
            self._known[axis, side] = tuple(
                sum(len(of.axes[axis].touching(a, b)) for a, b in borders) for of in self._lattices
            )
        return self._known[axis, side]


def _columns(counts: Triple) -> Iterator[tuple[Triple, int]]:
    """Yield shapes of columns, each as long as the grid along one axis, and that axis."""
    sides = [sorted({-(-count // cut) for cut in _CUTS}, reverse=True) for count in counts]
    for along in range(3):
        options = [[counts[axis]] if axis == along else sides[axis] for axis in range(3)]
        for z, y, x in product(*options):
            yield (z, y, x), along


def describe(seams: Seams, ownership: Ownership) -> dict[str, object]:
    """Return how blocks share patches, as plain JSON values; bytes are those that wait between blocks."""
    grid = ownership.grid
    columns = [-(-count // side) for count, side in zip(grid.counts, seams.column, strict=True)]
    return {
        "shared": seams.shared,
        "columns": prod(columns) if seams.shared else 0,
        "column": [min(a * b, n) for a, b, n in zip(seams.column, grid.block, grid.shape, strict=True)],
        "along": AXES[seams.along],
        "bound_bytes": seams.bound,
        "ahead_bytes": seams.ahead,
    }
