"""Slices or boxes of a volume, and what describes each of them, gathered in one pass over its voxels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from volseg.analysis.counts import box_count, boxes
from volseg.errors import InputError
from volseg.geometry.box import Box, Triple
from volseg.storage.volume import Volume

MAX_CANDIDATES = 2**16
"""Each takes about two kilobytes."""
BINS = 64
"""Of the histogram of entropies; grey values take `GREY_BINS`."""
GREY_BINS = 16
UNCERTAIN = 0.1
"""Share of a candidate's voxels, the most uncertain, whose mean entropy counts: sure background must not hide them."""
PIECE = 2**20
"""Voxels that are described at once; about 60 bytes each."""
SAMPLED = 32
"""Boxes that the range of grey values is taken from."""


@dataclass(frozen=True)
class Candidates:
    """Equal boxes that lie side by side in a region, `grid` (z, y, x) of shape `shape`, in C order.

    Where the region is no whole number of them, the rest is left out on both sides alike.
    """

    region: Box
    shape: Triple
    grid: Triple
    parts: Triple
    """Into how many parts each is cut along z, y, x, to tell where in it something lies."""

    @classmethod
    def cut(cls, region: Box, box: Triple | None, axis: int) -> Candidates:
        """Cut `region` into boxes of shape `box`, or into slices across `axis` where it is None; raises InputError."""
        shape = list(box or region.shape)
        if box is None:
            shape[axis] = 1
        if any(not 1 <= side <= whole for side, whole in zip(shape, region.shape, strict=True)):
            raise InputError(
                f"boxes of {'x'.join(map(str, shape))} do not fit into region {region}; nothing was suggested: choose "
                "smaller ones"
            )
        grid = [whole // side for side, whole in zip(shape, region.shape, strict=True)]
        if np.prod(grid, dtype=np.int64) > MAX_CANDIDATES:
            raise InputError(
                f"region {region} has {'x'.join(map(str, grid))} boxes to choose from, at most {MAX_CANDIDATES} can be "
                "compared; nothing was suggested: choose larger boxes or a smaller region"
            )
        start = [a + (n - s * g) // 2 for a, n, s, g in zip(region.start, region.shape, shape, grid, strict=True)]
        stop = [a + s * g for a, s, g in zip(start, shape, grid, strict=True)]
        # A slice is cut into 4 x 4 parts, a box into 3 x 3 x 3, where its sides allow it.
        most = 4 if box is None else 3
        parts = [min(most, side) for side in shape]
        return cls(
            Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])),
            (shape[0], shape[1], shape[2]),
            (grid[0], grid[1], grid[2]),
            (parts[0], parts[1], parts[2]),
        )

    @property
    def count(self) -> int:
        """Number of candidates."""
        return int(np.prod(self.grid))

    @property
    def part_count(self) -> int:
        """Number of parts of a candidate."""
        return int(np.prod(self.parts))

    @cached_property
    def part_sizes(self) -> NDArray[np.float64]:
        """Voxels of each part of a candidate."""
        z, y, x = (
            np.bincount(np.arange(side) * parts // side) for side, parts in zip(self.shape, self.parts, strict=True)
        )
        return np.asarray(np.einsum("i,j,k->ijk", z, y, x).reshape(-1), np.float64)

    @cached_property
    def centres(self) -> NDArray[np.float64]:
        """Centres of all candidates in voxels, (count, 3)."""
        places = np.stack(np.unravel_index(np.arange(self.count), self.grid), axis=1)
        return np.asarray((places + 0.5) * self.shape + self.region.start)

    def box(self, number: int) -> Box:
        """Return the box of one candidate."""
        places = np.unravel_index(number, self.grid)
        z, y, x = (int(p) * s + a for p, s, a in zip(places, self.shape, self.region.start, strict=True))
        return Box((z, y, x), (z + self.shape[0], y + self.shape[1], x + self.shape[2]))

    def meeting(self, box: Box) -> NDArray[np.int64]:
        """Return the numbers of the candidates that have a voxel in `box`."""
        common = box.intersect(self.region)
        if common.size == 0:
            return np.zeros(0, np.int64)
        spans = [
            np.arange((a - o) // s, -(-(b - o) // s))
            for a, b, o, s in zip(common.start, common.stop, self.region.start, self.shape, strict=True)
        ]
        return np.ravel_multi_index(np.meshgrid(*spans, indexing="ij"), self.grid).reshape(-1).astype(np.int64)

    def numbers(self, box: Box) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return which candidate, and which part of all parts of all candidates, each voxel of `box` belongs to."""
        owner = np.zeros((1, 1, 1), np.int64)
        inner = np.zeros((1, 1, 1), np.int64)
        for axis in range(3):
            place = np.arange(box.start[axis], box.stop[axis]) - self.region.start[axis]
            along = [1, 1, 1]
            along[axis] = -1
            cell, within = np.divmod(place, self.shape[axis])
            owner = owner * self.grid[axis] + cell.reshape(along)
            inner = inner * self.parts[axis] + (within * self.parts[axis] // self.shape[axis]).reshape(along)
        part = owner * self.part_count + inner
        return np.broadcast_to(owner, box.shape).reshape(-1), np.broadcast_to(part, box.shape).reshape(-1)


@dataclass(frozen=True)
class Described:
    """What is known of each candidate (first axis).

    `uncertainty` is between 0 and 1; `classes` and `greys` are shares that sum to 1; `places` is the mean uncertainty
    of its parts.
    """

    uncertainty: NDArray[np.float64]
    classes: NDArray[np.float64]
    greys: NDArray[np.float64]
    places: NDArray[np.float64]


def describe(
    probabilities: Volume, image: Volume, candidates: Candidates, progress: Callable[[int, int], None] | None = None
) -> Described:
    """Read both volumes once, box by box, and describe every candidate; `progress` gets boxes done and their number."""
    classes = probabilities.channels or 1
    table = _entropy_table(classes)
    low, high = _grey_range(image, candidates.region)
    number, parts = candidates.count, candidates.part_count
    entropies, shares = np.zeros((number, BINS)), np.zeros((number, classes))
    greys, places = np.zeros((number, GREY_BINS)), np.zeros((number * parts, 1))
    total = box_count(probabilities, candidates.region)
    for done, box in enumerate(boxes(probabilities, candidates.region), start=1):
        chances, grey = probabilities.read(box), image.read(box)[0]
        depth = max(1, PIECE // (box.shape[1] * box.shape[2]))
        for start in range(0, box.shape[0], depth):
            layer = slice(start, start + depth)
            values = chances[:, layer].reshape(classes, -1)
            owner, part = candidates.numbers(_layer(box, start, depth))
            entropy = np.zeros(owner.size, np.float32)
            for channel in values:
                entropy += table[channel]
            np.minimum(entropy, 1, out=entropy)
            scaled = (grey[layer].reshape(-1).astype(np.float32) - low) / (high - low) * GREY_BINS
            scaled = np.clip(np.nan_to_num(scaled, nan=0.0), 0, GREY_BINS - 1)
            _tally(entropies, owner, np.minimum(entropy * BINS, BINS - 1).astype(np.int64))
            _tally(shares, owner, values.argmax(axis=0))
            _tally(greys, owner, scaled.astype(np.int64))
            _tally(places, part, np.zeros(1, np.int64), entropy)
        if progress is not None:
            progress(done, total)
    voxels = float(np.prod(candidates.shape))
    means = places.reshape(number, parts) / candidates.part_sizes
    return Described(_upper_mean(entropies), shares / voxels, greys / voxels, means)


def _layer(box: Box, start: int, depth: int) -> Box:
    z, y, x = box.start
    return Box((z + start, y, x), (min(z + start + depth, box.stop[0]), *box.stop[1:]))


def _tally(
    table: NDArray[np.float64],
    owner: NDArray[np.int64],
    column: NDArray[np.int64],
    weights: NDArray[np.float32] | None = None,
) -> None:
    """Add one, or the weight, to ``table[owner, column]`` for every voxel."""
    # Only the rows that a box meets: the table may be much larger than the box.
    first, last = int(owner.min()), int(owner.max()) + 1
    columns = table.shape[1]
    counts = np.bincount((owner - first) * columns + column, weights, minlength=(last - first) * columns)
    table[first:last] += counts.reshape(-1, columns)


def _entropy_table(classes: int) -> NDArray[np.float32]:
    """Return what a probability, as uint8, adds to the entropy, in units of its maximum."""
    share = np.arange(256) / 255
    terms = np.zeros(256)
    terms[1:] = -share[1:] * np.log(share[1:]) / np.log(classes)
    return terms.astype(np.float32)


def _upper_mean(entropies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of the most uncertain tenth from histograms (candidates, bins)."""
    wanted = UNCERTAIN * entropies.sum(axis=1, keepdims=True)
    above = np.cumsum(entropies[:, ::-1], axis=1)
    taken = np.diff(np.minimum(above, wanted), axis=1, prepend=0)
    # The lowest bin is mostly exact certainty.
    centres = (np.arange(BINS) + 0.5) / BINS
    centres[0] = 0
    mean: NDArray[np.float64] = (taken @ centres[::-1]) / wanted[:, 0]
    return mean


def _grey_range(image: Volume, region: Box) -> tuple[float, float]:
    """Return where the grey values of some boxes of the region lie, but for one per cent."""
    step = max(1, box_count(image, region) // SAMPLED)
    values = []
    for box in islice(boxes(image, region), 0, None, step):
        grey = image.read(box)[0].reshape(-1)
        some = grey[:: max(1, grey.size // 2**16)].astype(np.float64)
        values.append(some[np.isfinite(some)])
    found = np.concatenate(values)
    if not found.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(found, (0.5, 99.5)))
    return (low, high) if high > low else (low - 0.5, low + 0.5)
