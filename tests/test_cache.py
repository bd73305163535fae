"""Chunks of the input are read once a worker, and what a worker waits for is counted."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support import Case, make_bundle, segment, smooth, store
from volseg.geometry import Box, Triple
from volseg.storage.cache import ChunkCache
from volseg.storage.volume import Volume, open_volume

SHAPE = (20, 33, 40)
CHUNKS = (8, 8, 16)


class Counted:
    """A volume that counts how often every voxel of it is read."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.times = np.zeros(volume.shape, int)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._volume, name)

    def read(self, box: Box) -> NDArray[Any]:
        self.times[box.slices] += 1
        return self._volume.read(box)


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return open_volume(store(tmp_path / "a.zarr", smooth(SHAPE), chunks=CHUNKS, shards=(16, 40, 48)))


def boxes(side: Triple = (10, 11, 14), halo: int = 3) -> list[Box]:
    whole = Box.of(SHAPE)
    found = []
    for tile in whole.tiles(side):
        a, b, c = (n - halo for n in tile.start)
        d, e, f = (n + halo for n in tile.stop)
        found.append(Box((max(a, 0), max(b, 0), max(c, 0)), (d, e, f)).intersect(whole))
    return found


@pytest.mark.parametrize("limit", [0, 5000, 10**6])
def test_boxes_are_what_the_volume_holds(volume: Volume, limit: int) -> None:
    cache = ChunkCache(volume, limit)
    for box in boxes():
        found = cache.read(box)
        np.testing.assert_array_equal(found, volume.read(box))
        found[...] = 0  # the caller's own: what is kept must not change
    with pytest.raises(ValueError, match="not inside the volume"):
        cache.read(Box((0, 0, 0), (21, 1, 1)))


def test_with_room_for_all_every_chunk_is_read_once(volume: Volume) -> None:
    counted = Counted(volume)
    cache = ChunkCache(counted, 10**6)  # type: ignore[arg-type]
    for box in boxes():
        cache.read(box)
    assert counted.times.min() == counted.times.max() == 1


def test_the_halo_of_the_next_block_is_not_read_again_within_the_bounds(volume: Volume) -> None:
    counted = Counted(volume)
    limit = 40 * prod(CHUNKS)
    cache = ChunkCache(counted, limit)  # type: ignore[arg-type]
    cache.read(Box((0, 0, 0), (16, 16, 20)))
    cache.read(Box((0, 0, 12), (16, 16, 40)))
    assert counted.times[:16, :16].max() == 1
    for box in boxes():
        cache.read(box)
    assert sum(part.nbytes for part in cache._kept.values()) == cache._size <= limit


def test_chunks_too_large_to_be_kept_are_not_read_whole(volume: Volume) -> None:
    counted = Counted(volume)
    ChunkCache(counted, 2 * prod(CHUNKS)).read(Box((0, 0, 0), (1, 1, 1)))  # type: ignore[arg-type]
    assert counted.times.sum() == 1


def test_the_report_says_how_much_of_the_time_was_waited(tmp_path: Path) -> None:
    case = Case(store(tmp_path / "a.zarr", smooth((24, 24, 24))), make_bundle(tmp_path / "bundle"), tmp_path)
    report = segment(case, tmp_path / "out.zarr", block="16,16,16")
    seconds = report["seconds"]
    # The first block is never there before it was read.
    assert seconds["waiting"] > 0
    assert report["waiting"] == pytest.approx(seconds["waiting"] / (seconds["waiting"] + seconds["compute"]), rel=0.1)
    again = segment(case, tmp_path / "out.zarr", block="16,16,16")
    assert again["waiting"] is None, "nothing was computed"
