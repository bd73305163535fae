"""Where the labelled voxels are: counts by tile and class, taken once by streaming over the labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from volseg.errors import VolumeError
from volseg.geometry.box import Box, Triple
from volseg.training.view import NetworkView

MAX_CLASSES = 1024
QUARTERS = 4

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RegionIndex:
    """Labelled voxels of a `region`: `counts` (tiles, classes) beside the `tiles`, boxes in network coordinates.

    `extent` is the box around all regions of the same volume; tiles do not cross its quarters.
    """

    region: Box
    extent: Box
    tiles: tuple[Box, ...]
    counts: Counts

    @property
    def totals(self) -> Counts:
        """Labelled voxels of each class (classes,)."""
        totals: Counts = self.counts.sum(axis=0)
        return totals

    def widened(self, classes: int) -> RegionIndex:
        """Return the same counts for so many classes, those beyond without a voxel."""
        more = classes - self.counts.shape[1]
        return RegionIndex(self.region, self.extent, self.tiles, np.pad(self.counts, ((0, 0), (0, more))))

    def quarters(self, axes: tuple[int, int]) -> Counts:
        """Return the counts by quarters of the extent along two axes, (QUARTERS, QUARTERS, classes)."""
        cells = np.zeros((QUARTERS, QUARTERS, self.counts.shape[1]), np.int64)
        for tile, counts in zip(self.tiles, self.counts, strict=True):
            a, b = (sum(mark <= tile.start[axis] for mark in _marks(self.extent, axis)) for axis in axes)
            cells[a, b] += counts
        return cells


@dataclass(frozen=True, eq=False)
class LabelIndex:
    """Labelled voxels of all training regions, one of `parts` a region, with equal numbers of classes."""

    parts: tuple[RegionIndex, ...]

    @property
    def totals(self) -> Counts:
        """Labelled voxels of each class (classes,)."""
        totals: Counts = np.sum([part.totals for part in self.parts], axis=0)
        return totals

    def place_tells(self, axes: tuple[int, int]) -> float:
        """Return how much of a voxel's class its place in the plane of two axes gives away, from 0 to 1.

        The mutual information of class and place, in quarters of a volume's regions along each axis, as a share of the
        entropy of the classes. Measured: 0.01 for cells, 0.04 for pores in a matrix, 0.2 to 0.3 for organs in a body.
        """
        cells: Counts = np.sum([part.quarters(axes) for part in self.parts], axis=0)
        whole = _entropy(cells.sum((0, 1)))
        return (whole + _entropy(cells.sum(2)) - _entropy(cells)) / whole if whole else 0.0


@dataclass(frozen=True, slots=True)
class Asked:
    """What the labels of a region are held against: `classes` where their number is known, the unlabelled value.

    `where` and `name` tell in messages which region of which labels it is.
    """

    classes: int | None
    ignore: int
    where: str
    name: str


def build_index(labels: NetworkView, roi: Box, asked: Asked, extent: Box | None = None) -> RegionIndex:
    """Count the labels inside `roi` (network coordinates); where the classes are not known, the highest label decides.

    Raises VolumeError where a label lies beyond the classes or nothing in the region is labelled.
    """
    extent = extent or roi
    tiles: list[Box] = []
    rows: list[Counts] = []
    for tile in _pieces(roi, extent, labels.tile):
        values = labels.read(tile).reshape(-1)
        kept = values[values != asked.ignore]
        if kept.size == 0:
            continue
        low, high = int(kept.min()), int(kept.max())
        limit = asked.classes or MAX_CLASSES
        if low < 0 or high >= limit:
            raise VolumeError(_beyond(low if low < 0 else high, asked, labels.locate(tile)))
        tiles.append(tile)
        rows.append(np.bincount(kept.astype(np.int64)))
    if not rows:
        raise VolumeError(
            f"the {asked.where} region holds no labelled voxel: every label of {asked.name} in {labels.locate(roi)} is "
            f"{asked.ignore} or masked, which means unlabelled; nothing was trained: choose a region that covers "
            "labelled slices"
        )
    width = asked.classes or max(2, *(len(row) for row in rows))
    counts = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        counts[i, : len(row)] = row
    return RegionIndex(roi, extent, tuple(tiles), counts)


def count_slices(labels: NetworkView, boxes: Sequence[Box], ignore: int) -> tuple[Counts, Counts, Counts]:
    """Return the labelled voxels of all `boxes` in each slice of the volume, along the three axes of the network."""
    counts = tuple(np.zeros(n, np.int64) for n in labels.shape)
    for box in boxes:
        for tile in _pieces(box, box, labels.tile):
            known = labels.read(tile)[0] != ignore
            for axis, row in enumerate(counts):
                others = tuple(i for i in range(3) if i != axis)
                row[tile.start[axis] : tile.stop[axis]] += known.sum(others, dtype=np.int64)
    return counts[0], counts[1], counts[2]


def _pieces(roi: Box, extent: Box, tile: Triple) -> Iterator[Box]:
    """Yield the tiles that meet `roi`, cut where quarters of the extent meet: they tile it."""
    spans = []
    for axis, (start, stop, side) in enumerate(zip(roi.start, roi.stop, tile, strict=True)):
        inner = {k * side for k in range(start // side + 1, -(-stop // side))}
        marks = {mark for mark in _marks(extent, axis) if start < mark < stop}
        spans.append(list(pairwise(sorted({start, stop} | inner | marks))))
    for (z0, z1), (y0, y1), (x0, x1) in product(*spans):
        yield Box((z0, y0, x0), (z1, y1, x1))


def _marks(region: Box, axis: int) -> list[int]:
    """Return where the quarters of `region` meet along `axis`."""
    return [region.start[axis] + region.shape[axis] * k // QUARTERS for k in range(1, QUARTERS)]


def _entropy(counts: Counts) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _beyond(value: int, asked: Asked, place: Box) -> str:
    found = f"label {value} in the {asked.where} region ({place} of {asked.name})"
    if asked.classes is None and value >= 0:
        return (
            f"{found} is above {MAX_CLASSES - 1}: these look like object numbers, not classes; nothing was trained: "
            "hand in a volume with one value a class"
        )
    last = "the classes" if asked.classes is None else f"the classes 0..{asked.classes - 1}"
    return (
        f"{found} is beyond {last}; nothing was trained: name all classes (--classes), correct the labels, or say "
        f"--ignore {value} if it means unlabelled (now {asked.ignore})"
    )
