"""Where the labelled voxels are: counts by tile and class, taken once by streaming over the labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from volseg.errors import VolumeError
from volseg.geometry.box import Box, Triple
from volseg.training.view import NetworkView

MAX_CLASSES = 1024
QUARTERS = 4


@dataclass(frozen=True, eq=False)
class LabelIndex:
    """Labelled voxels of a `region`: `counts` (tiles, classes) beside the `tiles`, boxes in network coordinates."""

    region: Box
    tiles: tuple[Box, ...]
    counts: NDArray[np.int64]

    @property
    def totals(self) -> NDArray[np.int64]:
        """Labelled voxels of each class (classes,)."""
        totals: NDArray[np.int64] = self.counts.sum(axis=0)
        return totals

    def place_tells(self, axes: tuple[int, int]) -> float:
        """Return how much of a voxel's class its place in the plane of two axes gives away, from 0 to 1.

        The mutual information of class and place, in quarters of the region along each axis, as a share of the entropy
        of the classes. Measured: 0.01 for cells, 0.04 for pores in a matrix, 0.2 to 0.3 for organs in a body.
        """
        cells = np.zeros((QUARTERS, QUARTERS, self.counts.shape[1]), np.int64)
        for tile, counts in zip(self.tiles, self.counts, strict=True):
            a, b = (self._quarter(tile, axis) for axis in axes)
            cells[a, b] += counts
        whole = _entropy(cells.sum((0, 1)))
        return (whole + _entropy(cells.sum(2)) - _entropy(cells)) / whole if whole else 0.0

    def _quarter(self, tile: Box, axis: int) -> int:
        return sum(mark <= tile.start[axis] for mark in _marks(self.region, axis))


def build_index(labels: NetworkView, roi: Box, classes: int | None, ignore: int, where: str) -> LabelIndex:
    """Count the labels inside `roi` (network coordinates).

    `classes` is the number of classes where it is known; otherwise the highest label decides. `where` names the region
    in messages. Raises VolumeError where a label lies beyond the classes or nothing in the region is labelled.
    """
    tiles: list[Box] = []
    rows: list[NDArray[np.int64]] = []
    for tile in _pieces(roi, labels.tile):
        values = labels.read(tile).reshape(-1)
        kept = values[values != ignore]
        if kept.size == 0:
            continue
        low, high = int(kept.min()), int(kept.max())
        limit = classes or MAX_CLASSES
        if low < 0 or high >= limit:
            raise VolumeError(_beyond(low if low < 0 else high, classes, ignore, where, tile))
        tiles.append(tile)
        rows.append(np.bincount(kept.astype(np.int64)))
    if not rows:
        raise VolumeError(
            f"the {where} region holds no labelled voxel: every label in it is {ignore}, which means unlabelled; "
            "nothing was trained: choose a region that covers labelled slices"
        )
    width = classes or max(2, *(len(row) for row in rows))
    counts = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        counts[i, : len(row)] = row
    return LabelIndex(roi, tuple(tiles), counts)


def _pieces(roi: Box, tile: Triple) -> Iterator[Box]:
    """Yield the tiles that meet `roi`, cut where quarters of the region meet: they tile it."""
    spans = []
    for axis, (start, stop, side) in enumerate(zip(roi.start, roi.stop, tile, strict=True)):
        inner = {k * side for k in range(start // side + 1, -(-stop // side))}
        spans.append(list(pairwise(sorted({start, stop, *inner, *_marks(roi, axis)}))))
    for (z0, z1), (y0, y1), (x0, x1) in product(*spans):
        yield Box((z0, y0, x0), (z1, y1, x1))


def _marks(region: Box, axis: int) -> list[int]:
    """Return where the quarters of `region` meet along `axis`."""
    return [region.start[axis] + region.shape[axis] * k // QUARTERS for k in range(1, QUARTERS)]


def _entropy(counts: NDArray[np.int64]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _beyond(value: int, classes: int | None, ignore: int, where: str, tile: Box) -> str:
    found = f"label {value} in the {where} region"
    if classes is None and value >= 0:
        return (
            f"{found} is above {MAX_CLASSES - 1}: these look like object numbers, not classes; nothing was trained: "
            "hand in a volume with one value a class"
        )
    last = "the classes" if classes is None else f"the classes 0..{classes - 1}"
    return (
        f"{found} is beyond {last} (slice {tile.start[0]} onward); nothing was trained: name all classes "
        f"(--classes), correct the labels, or say --ignore {value} if it means unlabelled (now {ignore})"
    )
