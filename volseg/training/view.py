"""Reading a volume again and again in patches: tiles kept in memory up to a limit, axes in the network's order."""

from __future__ import annotations

import threading
from collections import OrderedDict
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from volseg.geometry.box import AXES, Box, Triple
from volseg.models.config import Axis, to_network, to_volume

# Small enough to look through in a fraction of a millisecond, large enough that a patch meets few.
_TILE_VOXELS = 64**3


class Readable(Protocol):
    """The part of a volume that training needs."""

    @property
    def shape(self) -> Triple:
        """Sides (z, y, x)."""

    @property
    def chunks(self) -> Triple:
        """Chunk shape (z, y, x)."""

    @property
    def channels(self) -> int | None:
        """Number of channels, None without a channel axis."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a voxel."""

    def read(self, box: Box) -> NDArray[Any]:
        """Return the voxels of `box` as (c, z, y, x)."""


class NetworkView:
    """A volume in network coordinates (slice axis first for a 2D network), read through a cache of aligned tiles.

    The cache holds at most `capacity` bytes, but always the tile that is being read. Safe for several threads.
    """

    def __init__(self, volume: Readable, axis: Axis, capacity: int) -> None:
        self._volume = volume
        self._axis = axis
        self._capacity = capacity
        self._tile = _tile_shape(volume.chunks, volume.shape)
        self._tiles: OrderedDict[Triple, NDArray[Any]] = OrderedDict()
        self._held = 0
        self._voxel_bytes = volume.dtype.itemsize * (volume.channels or 1)
        self._lock = threading.Lock()

    @property
    def shape(self) -> Triple:
        """Sides in network coordinates."""
        return to_network(self._volume.shape, self._axis)

    @property
    def tile(self) -> Triple:
        """Tile shape in network coordinates."""
        return to_network(self._tile, self._axis)

    def fits(self, box: Box) -> float:
        """Return the share of `box` that the cache can hold, 1 or more where all of it."""
        return self._capacity / (box.size * self._voxel_bytes)

    @property
    def tiles_held(self) -> float:
        """Number of whole tiles that the cache can hold."""
        return self._capacity / (prod(self._tile) * self._voxel_bytes)

    def read(self, box: Box) -> NDArray[Any]:
        """Return `box` (network coordinates) as (c, ...) with axes in the network's order."""
        wanted = Box(to_volume(box.start, self._axis), to_volume(box.stop, self._axis))
        tiles = [(tile.intersect(wanted), tile) for tile in self._aligned(wanted)]
        first = self._load(tiles[0][1])
        if len(tiles) == 1:
            part = first[(slice(None), *wanted.relative_to(tiles[0][1].start).slices)]
        else:
            part = np.empty((first.shape[0], *wanted.shape), first.dtype)
            for piece, tile in tiles:
                source = self._load(tile)[(slice(None), *piece.relative_to(tile.start).slices)]
                part[(slice(None), *piece.relative_to(wanted.start).slices)] = source
        return np.moveaxis(part, 1 + AXES.index(self._axis), 1)

    def _aligned(self, box: Box) -> list[Box]:
        whole = Box.of(self._volume.shape)
        low = [a // t for a, t in zip(box.start, self._tile, strict=True)]
        high = [-(-b // t) for b, t in zip(box.stop, self._tile, strict=True)]
        z, y, x = (t * a for t, a in zip(self._tile, low, strict=True))
        z1, y1, x1 = (t * b for t, b in zip(self._tile, high, strict=True))
        grown = Box((z, y, x), (z1, y1, x1))
        return [tile.intersect(whole) for tile in grown.tiles(self._tile)]

    def _load(self, tile: Box) -> NDArray[Any]:
        with self._lock:
            if tile.start in self._tiles:
                self._tiles.move_to_end(tile.start)
                return self._tiles[tile.start]
            values = self._volume.read(tile)
            self._tiles[tile.start] = values
            self._held += values.nbytes
            while self._held > self._capacity and len(self._tiles) > 1:
                _, old = self._tiles.popitem(last=False)
                self._held -= old.nbytes
            return values


def _tile_shape(chunks: Triple, shape: Triple) -> Triple:
    """Double the chunk, shortest side first, until a tile is worth a look-up."""
    sides = [min(c, s) for c, s in zip(chunks, shape, strict=True)]
    while 2 * prod(sides) <= _TILE_VOXELS and any(a < b for a, b in zip(sides, shape, strict=True)):
        i = min((i for i in range(3) if sides[i] < shape[i]), key=lambda i: sides[i])
        sides[i] *= 2
    z, y, x = sides
    return z, y, x
