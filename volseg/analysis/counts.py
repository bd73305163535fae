"""One pass over two label volumes, box by box: the confusion matrix, and the same counts a slab."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from volseg.errors import VolumeError
from volseg.geometry.box import Box, Triple
from volseg.storage.volume import Volume

MAX_CLASSES = 1024
BOX_VOXELS = 2**22
"""About this many voxels are read at once, whole chunks at least; counting takes about 20 bytes a voxel of these."""


@dataclass(frozen=True)
class Slabs:
    """The slabs that a region is cut into: slab i holds ``edges[i] <= v < edges[i + 1]`` along `axis` (0: z)."""

    axis: int
    edges: tuple[int, ...]

    @classmethod
    def cut(cls, region: Box, axis: int | None, most: int) -> Slabs:
        """Cut `region` across `axis` (None: its longest) into at most `most` slabs of equal thickness."""
        if axis is None:
            axis = region.shape.index(max(region.shape))
        length, start = region.shape[axis], region.start[axis]
        count = min(most, length)
        return cls(axis, tuple(start + length * i // count for i in range(count + 1)))

    @property
    def count(self) -> int:
        """Number of slabs."""
        return len(self.edges) - 1

    def parts(self, box: Box) -> Iterator[tuple[int, tuple[slice, slice, slice]]]:
        """Yield each slab that meets `box`, and the index of their common voxels into an array of the box."""
        low, high = box.start[self.axis], box.stop[self.axis]
        for number in range(self.count):
            start, stop = max(low, self.edges[number]), min(high, self.edges[number + 1])
            if start < stop:
                index = [slice(None)] * 3
                index[self.axis] = slice(start - low, stop - low)
                yield number, (index[0], index[1], index[2])


@dataclass
class Counts:
    """What was counted: `confusion` (truth, prediction), and voxels that were left out or read from absent chunks.

    `slabs` is (slabs, classes, 3): voxels of the class in both volumes, in the truth, in the prediction.
    """

    confusion: NDArray[np.int64]
    slabs: NDArray[np.int64]
    ignored: int = 0
    absent: int = 0


def count(
    prediction: Volume, truth: Volume, region: Box, ignore: int | None, slabs: Slabs, tick: Callable[[], None]
) -> Counts:
    """Count the voxels of `region` whose truth is not `ignore`; `tick` is called after each box of `boxes`.

    Raises VolumeError where a volume holds something else than classes.
    """
    counts = Counts(np.zeros((1, 1), np.int64), np.zeros((slabs.count, MAX_CLASSES, 3), np.int64))
    for box in boxes(truth, region):
        pair = [volume.read(box)[0] for volume in (truth, prediction)]
        counts.absent += sum(v.absent_chunks(box, box, region) for v in (truth, prediction) if not v.all_written)
        for number, index in slabs.parts(box):
            true, predicted = (labels[index].reshape(-1) for labels in pair)
            if ignore is not None:
                counted = true != ignore
                if not counted.all():
                    counts.ignored += true.size - int(counted.sum())
                    true, predicted = true[counted], predicted[counted]
            for start in range(0, true.size, BOX_VOXELS):
                part = slice(start, start + BOX_VOXELS)
                _add(counts, number, _table(true[part], truth.uri, predicted[part], prediction.uri))
        tick()
    return counts


def boxes(volume: Volume, region: Box) -> Iterator[Box]:
    """Cut `region` into boxes of whole chunks of `volume`, as large as fits and at most one stored object."""
    return region.tiles(_tile(volume))


def box_count(volume: Volume, region: Box) -> int:
    """Return how many `boxes` there are."""
    spans = zip(region.start, region.stop, _tile(volume), strict=True)
    return int(np.prod([-(-stop // tile) - start // tile for start, stop, tile in spans], dtype=np.int64))


def _tile(volume: Volume) -> Triple:
    tile = list(volume.chunks)
    for axis in (2, 1, 0):
        room = max(1, BOX_VOXELS // int(np.prod(tile, dtype=np.int64)))
        tile[axis] *= min(room, volume.storage_tile[axis] // volume.chunks[axis])
    z, y, x = tile
    return z, y, x


def _table(true: NDArray[np.integer], truth: str, predicted: NDArray[np.integer], prediction: str) -> NDArray[np.int64]:
    """Return the confusion matrix of some voxels, as small as their labels allow."""
    for labels, uri in ((true, truth), (predicted, prediction)):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= MAX_CLASSES:
            raise VolumeError(
                f"{uri} holds label {low if low < 0 else high}: classes are 0 to {MAX_CLASSES - 1}; nothing was "
                "scored: name a volume of classes, not of numbered objects"
            )
    size = max(int(true.max()), int(predicted.max())) + 1
    places = true.astype(np.int64) * size + predicted.astype(np.int64)
    table: NDArray[np.int64] = np.bincount(places, minlength=size * size).reshape(size, size)
    return table


def _add(counts: Counts, slab: int, table: NDArray[np.int64]) -> None:
    size = len(table)
    for column, part in enumerate((table.diagonal(), table.sum(axis=1), table.sum(axis=0))):
        counts.slabs[slab, :size, column] += part
    if size > len(counts.confusion):
        grown = np.zeros((size, size), np.int64)
        grown[: len(counts.confusion), : len(counts.confusion)] = counts.confusion
        counts.confusion = grown
    counts.confusion[:size, :size] += table
