"""Where the labelled voxels are: counts by tile and class, taken once by streaming over the labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from volseg.errors import VolumeError
from volseg.geometry.box import Box
from volseg.training.view import NetworkView

MAX_CLASSES = 1024


@dataclass(frozen=True, eq=False)
class LabelIndex:
    """Labelled voxels of a region: `counts` (tiles, classes) beside the `tiles`, boxes in network coordinates."""

    tiles: tuple[Box, ...]
    counts: NDArray[np.int64]

    @property
    def totals(self) -> NDArray[np.int64]:
        """Labelled voxels of each class (classes,)."""
        totals: NDArray[np.int64] = self.counts.sum(axis=0)
        return totals


def build_index(labels: NetworkView, roi: Box, classes: int | None, ignore: int, where: str) -> LabelIndex:
    """Count the labels inside `roi` (network coordinates).

    `classes` is the number of classes where it is known; otherwise the highest label decides. `where` names the region
    in messages. Raises VolumeError where a label lies beyond the classes or nothing in the region is labelled.
    """
    tiles: list[Box] = []
    rows: list[NDArray[np.int64]] = []
    for tile in _tiles_of(roi, labels):
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
    return LabelIndex(tuple(tiles), counts)


def _tiles_of(roi: Box, labels: NetworkView) -> list[Box]:
    return list(roi.tiles(labels.tile))


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
