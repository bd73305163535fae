"""Training patches: where they lie, what is read, how they are changed.

Every patch has a random stream of its own, so that a resumed training goes on with the patches it would have had.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volseg.errors import VolumeError
from volseg.geometry.box import Box, Triple
from volseg.intensity import Scaling
from volseg.training.augment import Augmentation, change_intensity, draw_geometry, take
from volseg.training.index import LabelIndex
from volseg.training.view import NetworkView

IGNORED = -1
"""Label of voxels that no loss and no metric counts, inside the training code."""


# How often a tile that was read from storage is used before another takes its place, on average.
_USES = 16
_PATCHES_A_STEP = 4


@dataclass(frozen=True, eq=False)
class Region:
    """Image and labels inside a box, all in network coordinates; what lies beyond the box is never read."""

    image: NetworkView
    labels: NetworkView
    box: Box
    scaling: Scaling
    ignore: int

    @property
    def slots(self) -> int | None:
        """Number of tiles that can be worked on at a time with their neighbours in memory; None where all fit."""
        if min(self.image.fits(self.box), self.labels.fits(self.box)) >= 1.0:
            return None
        return max(4, int(min(self.image.tiles_held, self.labels.tiles_held) / 12))

    def read_image(self, box: Box) -> NDArray[np.float32]:
        """Return `box` (c, ...) scaled, the region's border continued outwards. Raises VolumeError on NaN or Inf."""
        inside = box.intersect(self.box)
        raw = self.image.read(inside)
        if raw.dtype.kind == "f" and not np.isfinite(raw).all():
            raise VolumeError(
                f"the image holds NaN or Inf near slice {inside.start[0]}, row {inside.start[1]}, column "
                f"{inside.start[2]}; a network cannot learn from them: replace them or choose another region"
            )
        return np.pad(self.scaling.apply(raw), [(0, 0), *_missing(box, inside)], mode="edge")

    def read_labels(self, box: Box) -> NDArray[np.int64]:
        """Return the labels of `box`; IGNORED where unlabelled or beyond the region."""
        inside = box.intersect(self.box)
        values = self.labels.read(inside)[0].astype(np.int64)
        values[values == self.ignore] = IGNORED
        return np.pad(values, _missing(box, inside), constant_values=IGNORED)


def _missing(box: Box, inside: Box) -> list[tuple[int, int]]:
    return [(i - a, b - j) for a, b, i, j in zip(box.start, box.stop, inside.start, inside.stop, strict=True)]


class Sampler:
    """Draws patches of `patch` sides (network coordinates), half of them around a voxel of a rarer class.

    Of the foreground classes, each is drawn in proportion to the root of its size: small ones often, none only.
    """

    def __init__(
        self, region: Region, index: LabelIndex, patch: Triple, augmentation: Augmentation | None, seed: int
    ) -> None:
        self._region = region
        self._index = index
        self._patch = patch
        self._augmentation = augmentation
        self._seed = seed
        totals = index.totals.astype(np.float64)
        foreground = np.sqrt(totals)
        foreground[0] = 0
        self._by_size = totals / totals.sum()
        self._by_class = foreground / foreground.sum() if foreground.sum() else self._by_size
        self._until = index.counts.cumsum(axis=0)
        self._slots = region.slots

    def draw(self, step: int, number: int) -> tuple[Tensor, Tensor]:
        """Return patch `number` of `step`: image (c, ...) float32 and labels (...) int64."""
        rng = np.random.default_rng([self._seed, step, number])
        origin = self._place(step, rng)
        if self._augmentation is None:
            return self._crop(origin)
        geometry = draw_geometry(self._augmentation, self._patch, rng)
        image, labels = self._crop(origin) if geometry.grid is None else self._warp(origin, geometry.grid)
        image = change_intensity(geometry.finish(image), self._augmentation, rng)
        return image.contiguous(), geometry.finish(labels[None])[0].contiguous()

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Return the patches of `step`: images (b, c, ...) and labels (b, ...)."""
        pairs = [self.draw(step, number) for number in range(size)]
        return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])

    def _place(self, step: int, rng: np.random.Generator) -> Triple:
        cls, tile = self._pick(self._slot(step, rng))
        labels = self._region.labels.read(tile)[0]
        found = np.flatnonzero(np.ascontiguousarray(labels).reshape(-1) == cls)
        voxel = np.unravel_index(int(found[rng.integers(len(found))]), labels.shape)
        origin = []
        for i in range(3):
            side, low = self._patch[i], self._region.box.start[i]
            last = max(self._region.box.stop[i] - side, low)
            start = int(voxel[i]) + tile.start[i] - int(rng.integers(side // 4, side - side // 4) if side > 1 else 0)
            origin.append(min(max(start, low), last))
        z, y, x = origin
        return z, y, x

    def _slot(self, step: int, rng: np.random.Generator) -> np.random.Generator:
        """Return the stream that picks class and tile; where not all tiles fit the cache, one of a few.

        Each of the slots keeps its pick for some steps; they change one after the other, and the picks have the same
        distribution as free ones.
        """
        if self._slots is None:
            return rng
        slot = int(rng.integers(self._slots))
        period = _USES * self._slots
        generation = (step * _PATCHES_A_STEP + slot * _USES) // period
        return np.random.default_rng([self._seed, slot, generation, 1])

    def _pick(self, rng: np.random.Generator) -> tuple[int, Box]:
        chances = self._by_class if rng.random() < 0.5 else self._by_size
        cls = int(rng.choice(len(chances), p=chances))
        until = self._until[:, cls]
        return cls, self._index.tiles[int(np.searchsorted(until, rng.integers(until[-1]), side="right"))]

    def _crop(self, origin: Triple) -> tuple[Tensor, Tensor]:
        z, y, x = (a + n for a, n in zip(origin, self._patch, strict=True))
        box = Box(origin, (z, y, x))
        return torch.from_numpy(self._region.read_image(box)), torch.from_numpy(self._region.read_labels(box))

    def _warp(self, origin: Triple, grid: Tensor) -> tuple[Tensor, Tensor]:
        centre = torch.tensor([a + (n - 1) / 2 for a, n in zip(origin, self._patch, strict=True)])
        points = grid + centre
        flat = points.reshape(-1, 3)
        low = torch.floor(flat.amin(0)).to(torch.int64).tolist()
        high = (torch.ceil(flat.amax(0)).to(torch.int64) + 1).tolist()
        # At least one voxel of the region must be in the box that is read.
        first, end = self._region.box.start, self._region.box.stop
        start = [min(max(a, s), e - 1) for a, s, e in zip(low, first, end, strict=True)]
        stop = [max(min(b, e), s + 1) for b, e, s in zip(high, end, start, strict=True)]
        box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
        local = points - torch.tensor(box.start, dtype=torch.float32)
        image = take(self._region.read_image(box), local, "bilinear")
        # One up, because 0 is what lies beyond the border.
        labels = take((self._region.read_labels(box) - IGNORED).astype(np.float32)[None], local, "nearest")
        return image, labels[0].round().to(torch.int64) + IGNORED


class Prefetcher:
    """Makes batches ahead in a thread of its own; iterate over it from step `first` on, and close it.

    What goes wrong in the thread is raised where the batch is asked for. `waited`: the seconds spent waiting.
    """

    def __init__(self, sampler: Sampler, size: int, first: int, depth: int = 3) -> None:
        self.waited = 0.0
        self._queue: queue.Queue[tuple[Tensor, Tensor] | Exception] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(sampler, size, first), name="patches", daemon=True)
        self._thread.start()

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the next batch; raises what its making raised."""
        started = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - started
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and wait for its end."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _work(self, sampler: Sampler, size: int, step: int) -> None:
        # The patches need one core; the others belong to the network.
        torch.set_num_threads(1)
        while not self._stop.is_set():
            item: Any
            try:
                item = sampler.batch(step, size)
            except Exception as error:  # noqa: BLE001 - handed to the consumer, who raises it
                item = error
            self._queue.put(item)
            if isinstance(item, Exception):
                return
            step += 1
