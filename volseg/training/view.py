"""Reading volumes again and again in patches: tiles kept in memory up to a limit, axes in the network's order."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from itertools import product
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from volseg.geometry.box import AXES, Box, Triple
from volseg.models.config import Axis, to_network, to_volume

# Small enough to look through in a fraction of a millisecond, large enough that a patch meets few.
_TILE_VOXELS = 64**3

Array = NDArray[Any]


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

    def read(self, box: Box) -> Array:
        """Return the voxels of `box` as (c, z, y, x)."""


class TileCache:
    """Tiles of several volumes, the last used ones, at most `limit` bytes but always the one that is being read.

    `capacity`, in bytes, is what a training may count on when it chooses its patches: the same on every machine, so
    that they are the same; `limit` is what this machine has to give [default: as much]. Several threads may read at a
    time; of those that want the same tile one reads it.
    """

    def __init__(self, capacity: int, limit: int | None = None) -> None:
        self.capacity = capacity
        self._limit = capacity if limit is None else min(limit, capacity)
        self._tiles: OrderedDict[Hashable, Array] = OrderedDict()
        self._pending: dict[Hashable, Future[Array]] = {}
        self._held = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, read: Callable[[], Array]) -> Array:
        """Return the tile `key`, from `read` where it is not held; raises what `read` raises."""
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
                return self._tiles[key]
            waiting = self._pending.get(key)
            if waiting is None:
                mine: Future[Array] = Future()
                self._pending[key] = mine
        if waiting is not None:
            return waiting.result()
        try:
            values = read()
        except BaseException as error:
            with self._lock:
                del self._pending[key]
            mine.set_exception(error)
            raise
        self._keep(key, values)
        mine.set_result(values)
        return values

    def _keep(self, key: Hashable, values: Array) -> None:
        with self._lock:
            del self._pending[key]
            self._tiles[key] = values
            self._held += values.nbytes
            while self._held > self._limit and len(self._tiles) > 1:
                _, old = self._tiles.popitem(last=False)
                self._held -= old.nbytes


class NetworkView:
    """A volume in network coordinates (slice axis first for a 2D network), read through a cache of aligned tiles.

    Boxes count from `origin`, a voxel (z, y, x) of the volume: where labels of a crop begin in their image.
    """

    def __init__(self, volume: Readable, axis: Axis, cache: TileCache, origin: Triple = (0, 0, 0)) -> None:
        self._volume = volume
        self._axis = axis
        self._cache = cache
        self._origin = to_network(origin, axis)
        self._tile = to_network(_tile_shape(volume.chunks, volume.shape), axis)
        self._name = object()

    @property
    def shape(self) -> Triple:
        """Sides of the whole volume in network coordinates."""
        return to_network(self._volume.shape, self._axis)

    @property
    def tile(self) -> Triple:
        """Tile shape in network coordinates."""
        return self._tile

    @property
    def channels(self) -> int:
        """Number of channels, 1 without a channel axis."""
        return self._volume.channels or 1

    @property
    def voxel_bytes(self) -> int:
        """Bytes of a voxel with all its channels."""
        return self._volume.dtype.itemsize * self.channels

    @property
    def capacity(self) -> int:
        """Bytes of the cache that a choice of patches may count on."""
        return self._cache.capacity

    def read(self, box: Box) -> Array:
        """Return `box` (network coordinates, from `origin` on) as (c, ...); it may be memory of the cache: no writing.

        Raises as the volume's `read` does.
        """
        # Plain numbers: a patch may meet dozens of tiles, and boxes of them would cost more than the voxels.
        spans = [
            _spans(start + origin, stop + origin, tile)
            for start, stop, origin, tile in zip(box.start, box.stop, self._origin, self._tile, strict=True)
        ]
        values: Array | None = None
        for (z, z_in, z_out), (y, y_in, y_out), (x, x_in, x_out) in product(*spans):
            part = self._load((z, y, x))[:, z_in, y_in, x_in]
            if len(spans[0]) == len(spans[1]) == len(spans[2]) == 1:
                return part
            if values is None:
                values = np.empty((part.shape[0], *box.shape), part.dtype)
            values[:, z_out, y_out, x_out] = part
        if values is None:
            raise ValueError(f"box {box} holds no voxel")
        return values

    def locate(self, box: Box) -> Box:
        """Return where `box` lies in the volume (z, y, x), for messages."""
        moved = box.shifted(self._origin)
        return Box(to_volume(moved.start, self._axis), to_volume(moved.stop, self._axis))

    def _load(self, start: Triple) -> Array:
        return self._cache.get((self._name, start), lambda: self._read(start))

    def _read(self, start: Triple) -> Array:
        tile = Box.of(self._tile).shifted(start).intersect(Box.of(self.shape))
        box = Box(to_volume(tile.start, self._axis), to_volume(tile.stop, self._axis))
        return np.ascontiguousarray(np.moveaxis(self._volume.read(box), 1 + AXES.index(self._axis), 1))


def _spans(start: int, stop: int, tile: int) -> list[tuple[int, slice, slice]]:
    """Return, for each tile along an axis, where it begins, the part inside it, and the part of start..stop."""
    firsts = range(start // tile * tile, stop, tile)
    cuts = [(first, max(start, first), min(stop, first + tile)) for first in firsts]
    return [(first, slice(a - first, b - first), slice(a - start, b - start)) for first, a, b in cuts]


def _tile_shape(chunks: Triple, shape: Triple) -> Triple:
    """Double the chunk, shortest side first, until a tile is worth a look-up."""
    sides = [min(c, s) for c, s in zip(chunks, shape, strict=True)]
    while 2 * prod(sides) <= _TILE_VOXELS and any(a < b for a, b in zip(sides, shape, strict=True)):
        i = min((i for i in range(3) if sides[i] < shape[i]), key=lambda i: sides[i])
        sides[i] *= 2
    z, y, x = sides
    return z, y, x
