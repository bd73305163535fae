"""Decoded chunks of a volume, kept for the next block: what is a halo now was, or will be, read for a neighbour."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from itertools import groupby, product
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.geometry.box import Box, Triple
from volseg.storage.volume import Volume

# Fewer chunks than these in the bounds would hardly ever hold one that is asked for again.
_LEAST_CHUNKS = 4


class ChunkCache:
    """Reads boxes of a volume and keeps the chunks read last, at most `limit` bytes of them.

    For several threads: they read one after another, so that none decodes what another is decoding. Where chunks are so
    large that only a few would fit, nothing is kept.
    """

    def __init__(self, volume: Volume, limit: int) -> None:
        self._volume = volume
        self._limit = limit
        self._bytes_of_voxel = (volume.channels or 1) * volume.dtype.itemsize
        self._kept: OrderedDict[Triple, NDArray[Any]] = OrderedDict()
        self._size = self._read = 0
        self._lock = threading.Lock()
        self._useful = _LEAST_CHUNKS * prod(volume.chunks) * self._bytes_of_voxel <= limit

    def read(self, box: Box) -> NDArray[Any]:
        """Return the voxels of `box` (c, z, y, x), an array of its own; raises as `Volume.read` does."""
        if not self._useful or not Box.of(self._volume.shape).contains(box):
            return self._counted(self._volume.read(box))
        found = np.empty((self._volume.channels or 1, *box.shape), self._volume.dtype)
        spans = [range(a // n, -(-b // n)) for a, b, n in zip(box.start, box.stop, self._volume.chunks, strict=True)]
        with self._lock:
            for z in spans[0]:
                layer = [(z, y, x) for y, x in product(spans[1], spans[2])]
                for index in layer:
                    if index in self._kept:
                        self._copy(index, self._kept[index], found, box)
                        self._kept.move_to_end(index)
                for first, last in _boxes([index for index in layer if index not in self._kept], layer):
                    self._load(first, last, found, box)
        return found

    def taken(self) -> int:
        """Return how many bytes of voxels were read from the volume since this was asked last."""
        with self._lock:
            read, self._read = self._read, 0
        return read

    def _load(self, first: Triple, last: Triple, found: NDArray[Any], box: Box) -> None:
        """Read the chunks from `first` to `last` at once, copy what `box` needs of them, and keep them."""
        whole = Box(self._box(first).start, self._box(last).stop)
        voxels = self._volume.read(whole)
        self._read += voxels.nbytes
        for index in product(*(range(a, b + 1) for a, b in zip(first, last, strict=True))):
            z, y, x = index
            part = voxels[(slice(None), *self._box((z, y, x)).relative_to(whole.start).slices)]
            self._copy((z, y, x), part, found, box)
            self._keep((z, y, x), part)

    def _counted(self, voxels: NDArray[Any]) -> NDArray[Any]:
        with self._lock:
            self._read += voxels.nbytes
        return voxels

    def _keep(self, index: Triple, part: NDArray[Any]) -> None:
        # A view would hold the whole layer.
        self._kept[index] = part.copy()
        self._size += part.nbytes
        while self._size > self._limit:
            _, oldest = self._kept.popitem(last=False)
            self._size -= oldest.nbytes

    def _copy(self, index: Triple, chunk: NDArray[Any], found: NDArray[Any], box: Box) -> None:
        own = self._box(index)
        common = own.intersect(box)
        source, target = common.relative_to(own.start).slices, common.relative_to(box.start).slices
        found[(slice(None), *target)] = chunk[(slice(None), *source)]

    def _box(self, index: Triple) -> Box:
        a, b, c = (i * n for i, n in zip(index, self._volume.chunks, strict=True))
        d, e, f = ((i + 1) * n for i, n in zip(index, self._volume.chunks, strict=True))
        return Box((a, b, c), (d, e, f)).intersect(Box.of(self._volume.shape))


def _boxes(missing: list[Triple], layer: list[Triple]) -> Iterator[tuple[Triple, Triple]]:
    """Yield the first and last chunk of boxes that make up what is missing of a layer: all of it, or runs along x."""
    if len(missing) == len(layer):
        yield layer[0], layer[-1]
        return
    # Along a run, x grows by one from each chunk to the next, so that x minus the place stays the same.
    for _, run in groupby(enumerate(missing), key=lambda item: (item[1][:2], item[1][2] - item[0])):
        chunks = [index for _, index in run]
        yield chunks[0], chunks[-1]
