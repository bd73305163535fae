"""Half-open boxes in (z, y, x) voxels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from volseg.errors import SpecError

Triple = tuple[int, int, int]
AXES = ("z", "y", "x")


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """The voxels ``start <= v < stop`` of a volume; both corners are (z, y, x).

    A box may be empty (``stop == start`` on an axis) but never inverted.
    """

    start: Triple
    stop: Triple

    def __post_init__(self) -> None:
        if any(b < a for a, b in zip(self.start, self.stop, strict=True)):
            raise ValueError(f"box {self.start}..{self.stop} is inverted: stop must not lie before start")

    @classmethod
    def of(cls, shape: Triple) -> Box:
        """Return the box of a whole volume of `shape`."""
        return cls((0, 0, 0), shape)

    @classmethod
    def parse(cls, text: str, shape: Triple) -> Box:
        """Read a region such as ``"0:14,:,:"`` within a volume of `shape`, with Python's rules for slices.

        Negative numbers count from the end. Raises SpecError when the text is malformed, or the region is empty or
        leaves the volume.
        """
        parts = text.replace(" ", "").strip("[]()").split(",")
        if len(parts) != 3:
            raise SpecError(
                f"region {text!r} has {len(parts)} ranges, needs one each for z, y, x: write it like 0:14,:,:"
            )
        spans = [_parse_range(part, size, axis, text) for part, size, axis in zip(parts, shape, AXES, strict=True)]
        (z0, z1), (y0, y1), (x0, x1) = spans
        return cls((z0, y0, x0), (z1, y1, x1))

    @property
    def shape(self) -> Triple:
        """Side lengths (z, y, x)."""
        (a, b, c), (d, e, f) = self.start, self.stop
        return d - a, e - b, f - c

    @property
    def size(self) -> int:
        """Number of voxels."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index of this box into an array (z, y, x)."""
        (a, b, c), (d, e, f) = self.start, self.stop
        return slice(a, d), slice(b, e), slice(c, f)

    def intersect(self, other: Box) -> Box:
        """Return the common part; where there is none, an empty box."""
        start = _map3(max, self.start, other.start)
        return Box(start, _map3(max, start, _map3(min, self.stop, other.stop)))

    def hull(self, other: Box) -> Box:
        """Return the smallest box that holds both."""
        return Box(_map3(min, self.start, other.start), _map3(max, self.stop, other.stop))

    def contains(self, other: Box) -> bool:
        """Tell whether `other` lies wholly inside."""
        return self.intersect(other) == other

    def relative_to(self, origin: Triple) -> Box:
        """Return this box in coordinates whose zero is `origin`."""
        return Box(_map3(int.__sub__, self.start, origin), _map3(int.__sub__, self.stop, origin))

    def shifted(self, offset: Triple) -> Box:
        """Return this box moved by `offset`."""
        return Box(_map3(int.__add__, self.start, offset), _map3(int.__add__, self.stop, offset))

    def tiles(self, tile: Triple) -> Iterator[Box]:
        """Yield the cells of a grid anchored at (0, 0, 0) that meet this box, clipped to it, in C order."""
        if self.size == 0:
            return
        ranges = [range(a // t, -(-b // t)) for a, b, t in zip(self.start, self.stop, tile, strict=True)]
        for i, j, k in product(*ranges):
            z, y, x = i * tile[0], j * tile[1], k * tile[2]
            yield Box((z, y, x), (z + tile[0], y + tile[1], x + tile[2])).intersect(self)

    def __str__(self) -> str:
        """Write the region as the command line takes it, such as ``0:14,0:768,0:768``."""
        return ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True))


def _map3(op: Callable[[int, int], int], a: Triple, b: Triple) -> Triple:
    return op(a[0], b[0]), op(a[1], b[1]), op(a[2], b[2])


def _parse_range(part: str, size: int, axis: str, text: str) -> tuple[int, int]:
    head, colon, tail = part.partition(":")
    try:
        start = int(head) if head else 0
        # A single -1 is the last voxel: its stop is the end, not 0.
        stop = (int(tail) if tail else size) if colon else (start + 1 or size)
    except ValueError:
        raise SpecError(f"region {text!r}: {part!r} is no range on axis {axis}: write start:stop or :") from None
    if not colon and not head:
        raise SpecError(f"region {text!r}: the range on axis {axis} is missing: write : for the whole axis")
    start, stop = (v + size if v < 0 else v for v in (start, stop))
    if not 0 <= start < stop <= size:
        raise SpecError(
            f"region {text!r}: {part} on axis {axis} is not inside 0:{size}; nothing was read: choose a range inside it"
        )
    return start, stop
