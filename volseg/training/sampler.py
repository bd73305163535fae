"""Training patches: where they lie, what is read, how they are changed.

Every patch has a random stream of its own, so that a resumed training goes on with the patches it would have had, on
whatever number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volseg.geometry.box import Box, Triple
from volseg.training.augment import Augmentation, Geometry, change_intensity, draw_geometry, stretch, take
from volseg.training.data import Data
from volseg.training.index import RegionIndex
from volseg.training.region import IGNORED, Region

# How often a tile that was read from storage is used before another takes its place, on average.
_USES = 16
# Tiles that a slot needs in memory: one of image and labels each, and those beside it.
_NEIGHBOURS = 12


class Sampler:
    """Draws patches of `patch` sides with labels of `answer` sides in their centre (network coordinates).

    A volume is drawn by its weight, then in half of all cases a rarer class and one of its voxels, else any voxel: of
    the foreground classes, each is drawn in proportion to the root of its size, small ones often, none only.
    """

    def __init__(self, data: Data, patch: Triple, answer: Triple, augmentation: Augmentation | None, seed: int) -> None:
        if any(p < a or (p - a) % 2 for p, a in zip(patch, answer, strict=True)):
            raise ValueError(f"an answer of {answer} does not lie in the centre of a patch of {patch}")
        if augmentation is not None:
            # A turn exchanges the sides of the answer, too.
            square = tuple(pair for pair in augmentation.quarter_turns if answer[pair[0]] == answer[pair[1]])
            augmentation = replace(augmentation, quarter_turns=square)
        self.patch = patch
        self.answer = answer
        self.channels = data.train[0].image.channels
        z, y, x = ((p - a) // 2 for p, a in zip(patch, answer, strict=True))
        self._margin = (z, y, x)
        self._augmentation = augmentation
        self._seed = seed
        volumes = sorted({region.volume for region in data.train})
        pairs = list(zip(data.train, data.index.parts, strict=True))
        self._pools = [_Pool([pair for pair in pairs if pair[0].volume == v]) for v in volumes]
        self._chances = _cumulated([pool.weight for pool in self._pools])
        self._slots = slots_for(data.train)

    def draw(self, step: int, number: int, size: int = 4) -> tuple[Tensor, Tensor]:
        """Return patch `number` of the `size` patches of `step`: image (c, ...) float32 and labels (...) int64.

        Raises VolumeError on NaN or Inf in the image, and as the volumes' `read` does.
        """
        rng = np.random.default_rng([self._seed, step, number])
        region, tile, cls = self._pick(step, size, rng)
        start = self._place(region, region.find(tile, cls, rng), rng)
        if self._augmentation is None:
            return self._crop(region, start)
        geometry = draw_geometry(self._augmentation, self.patch, rng)
        image, labels = self._warp(region, start, geometry)
        image = change_intensity(geometry.finish(image), self._augmentation, rng)
        return image, geometry.finish(labels[None])[0]

    def empty(self, size: int) -> tuple[Tensor, Tensor]:
        """Return tensors for `size` patches, images (b, c, ...) float32 and labels (b, ...) int64, not filled."""
        return torch.empty((size, self.channels, *self.patch)), torch.empty((size, *self.answer), dtype=torch.int64)

    def batch(self, step: int, size: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Return the patches of `step` that are worker `rank`'s: images (b, c, ...) and labels (b, ...).

        Of the `size` patches of all `world` workers, each has those whose number is `rank` modulo `world`.
        """
        numbers = range(rank, size, world)
        images, labels = self.empty(len(numbers))
        for i, number in enumerate(numbers):
            images[i], labels[i] = self.draw(step, number, size)
        return images, labels

    def names(self, step: int, size: int, rank: int = 0, world: int = 1) -> tuple[str, ...]:
        """Return the names of the volumes that the patches of a batch come from, each once."""
        picks = (
            self._pick(step, size, np.random.default_rng([self._seed, step, number]))[0].name
            for number in range(rank, size, world)
        )
        return tuple(dict.fromkeys(picks))

    def _pick(self, step: int, size: int, rng: np.random.Generator) -> tuple[Region, Box, int]:
        stream = self._slot(step, size, rng)
        pool = self._pools[_at(self._chances, stream)]
        return pool.pick(stream)

    def _slot(self, step: int, size: int, rng: np.random.Generator) -> np.random.Generator:
        """Return the stream that picks volume, class and tile; where not all tiles fit the cache, one of a few.

        Each of the slots keeps its pick for some steps; they change one after the other, and the picks have the same
        distribution as free ones.
        """
        if self._slots is None:
            return rng
        slot = int(rng.integers(self._slots))
        generation = (step * size + slot * _USES) // (_USES * self._slots)
        return np.random.default_rng([self._seed, slot, generation, 1])

    def _place(self, region: Region, voxel: Triple, rng: np.random.Generator) -> Triple:
        """Return where an answer begins that holds `voxel`, inside the region as far as that is large enough."""
        origin = []
        for v, side, low, high in zip(voxel, self.answer, region.box.start, region.box.stop, strict=True):
            start = v - int(rng.integers(side // 4, side - side // 4) if side > 1 else 0)
            origin.append(min(max(start, low), max(high - side, low)))
        z, y, x = origin
        return z, y, x

    def _crop(self, region: Region, start: Triple) -> tuple[Tensor, Tensor]:
        inner = Box.of(self.answer).shifted(start)
        z, y, x = (-m for m in self._margin)
        outer = Box.of(self.patch).shifted(start).shifted((z, y, x))
        return torch.from_numpy(region.read_image(outer)), torch.from_numpy(region.read_labels(inner))

    def _warp(self, region: Region, start: Triple, geometry: Geometry) -> tuple[Tensor, Tensor]:
        if geometry.points is None:
            return self._crop(region, start)
        # In 64 bits: far from the origin of a large volume, 32 would round to hundredths of a voxel.
        places = geometry.points + np.array([a + (n - 1) / 2 for a, n in zip(start, self.answer, strict=True)])
        flat = places.reshape(-1, 3)
        low, high = [], []
        for i, (least, most) in enumerate(zip(flat.min(axis=0), flat.max(axis=0), strict=True)):
            # At least one voxel of the region must be in the box that is read.
            first, end = region.box.start[i], region.box.stop[i]
            low.append(min(max(int(np.floor(least)), first), end - 1))
            high.append(max(min(int(np.ceil(most)) + 1, end), low[i] + 1))
        box = Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))
        points = (places - np.array(low)).astype(np.float32)
        image = take(region.read_image(box), points, self.patch)
        inner = tuple(slice(m, m + side) for m, side in zip(self._margin, self.answer, strict=True))
        along = [stretch(points[..., i : i + 1], self.patch)[..., 0][inner].numpy() for i in range(3)]
        return image, torch.from_numpy(_look_up(region.labels.read(box)[0], along, region.ignore))


class _Pool:
    """The training regions of one volume: what a patch is drawn from."""

    def __init__(self, parts: Sequence[tuple[Region, RegionIndex]]) -> None:
        self.weight = sum(region.weight for region, _ in parts)
        self._tiles = [(region, tile) for region, index in parts for tile in index.tiles]
        counts = np.concatenate([index.counts for _, index in parts])
        totals = counts.sum(axis=0).astype(np.float64)
        foreground = np.sqrt(totals)
        foreground[0] = 0
        self._by_size = _cumulated(totals)
        self._by_class = _cumulated(foreground) if foreground.any() else self._by_size
        self._until = np.ascontiguousarray(counts.cumsum(axis=0).T)

    def pick(self, rng: np.random.Generator) -> tuple[Region, Box, int]:
        """Return a tile, its region, and a class that it holds."""
        cls = _at(self._by_class if rng.random() < 0.5 else self._by_size, rng)
        until = self._until[cls]
        region, tile = self._tiles[int(np.searchsorted(until, rng.integers(until[-1]), side="right"))]
        return region, tile, cls


def slots_for(regions: Sequence[Region]) -> int | None:
    """Return the number of tiles that can be worked on at a time with their neighbours in memory; None where all fit.

    It depends on the data alone, so that every worker draws the same patches.
    """
    capacity = regions[0].image.capacity
    if sum(r.box.size * (r.image.voxel_bytes + r.labels.voxel_bytes) for r in regions) <= capacity:
        return None
    tile = max(int(np.prod(view.tile)) * view.voxel_bytes for r in regions for view in (r.image, r.labels))
    return max(4, capacity // (2 * _NEIGHBOURS * tile))


def _cumulated(weights: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    until = np.cumsum(weights)
    shares: NDArray[np.float64] = until / until[-1]
    return shares


def _at(chances: NDArray[np.float64], rng: np.random.Generator) -> int:
    return int(np.searchsorted(chances, rng.random(), side="right"))


def _look_up(labels: NDArray[Any], points: Sequence[NDArray[np.float32]], ignore: int) -> NDArray[np.int64]:
    """Return the label nearest to each place, IGNORED where unlabelled or outside; `points` has its z, y and x."""
    inside = np.ones(points[0].shape, bool)
    place = np.zeros(points[0].shape, np.int32)
    for along, side in zip(points, labels.shape, strict=True):
        nearest = np.rint(along).astype(np.int32)
        # Below zero is far above as an unsigned number.
        inside &= nearest.view(np.uint32) < side
        place *= side
        place += nearest
    values = np.ascontiguousarray(labels).reshape(-1).take(place, mode="clip")
    inside &= values != ignore
    found: NDArray[np.int64] = np.where(inside, values.astype(np.int64), IGNORED)
    return found
