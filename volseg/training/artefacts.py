"""Two artefacts of tomography as random patterns: rings around the axis of rotation, and drift along it.

Rings come from elements of the detector that answer differently (Münch et al. 2009), drift from a beam or a
camera that changes while the scan goes on. Both are drawn after all changes of shape: a network meets them in volumes
that stand as they were recorded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from volseg.geometry.box import Triple

Pattern = NDArray[np.float32]

# Steps of the rings' profile a voxel.
_FINE = 2
_WIDEST_RING = 4
# Distance of the centre from the middle of the patch, in sides: well inside, or so far away that rings look straight.
_NEAREST, _FARTHEST = 0.1, 10.0
_PARTIAL = 0.5


def draw_rings(patch: Triple, axis: int, rng: np.random.Generator) -> Pattern:
    """Return rings around `axis` over a `patch` (both in network coordinates), -1 to 1, of the patch's sides.

    The centre lies anywhere, also far outside the patch; half of the patterns end at a certain angle, and all change
    along `axis` every few voxels. The voxels across the axis are taken as square. A slice that holds the axis, as those
    of a 2D network along y or x do, cuts the rings into stripes.
    """
    b, c = (i for i in range(3) if i != axis)
    away, angle = _NEAREST * (_FARTHEST / _NEAREST) ** rng.random(), rng.uniform(0, 2 * np.pi)
    sine, cosine = np.float32(np.sin(angle)), np.float32(np.cos(angle))
    distance = away * max(patch[b], patch[c])
    rows = (_FINE * (np.arange(patch[b]) - (patch[b] - 1) / 2 + distance * sine)).astype(np.float32)[:, None]
    columns = (_FINE * (np.arange(patch[c]) - (patch[c] - 1) / 2 + distance * cosine)).astype(np.float32)
    radius = np.sqrt(rows * rows + columns * columns)
    bins = (radius - radius.min()).astype(np.intp)
    pattern = _profile(patch[axis], int(bins.max()) + 1, rng).take(bins, axis=1, mode="clip")
    if rng.random() < _PARTIAL:
        # The sine of the angle between a voxel and the middle of the patch, seen from the centre.
        pattern *= _one_side((rows * cosine - columns * sine) / np.maximum(radius, 1.0), rng)
    return np.moveaxis(pattern, 0, axis)


def _profile(slices: int, bins: int, rng: np.random.Generator) -> Pattern:
    """Return heights of the rings (slices, bins): few or many of them, -1 to 1."""
    width = _FINE * int(rng.integers(1, _WIDEST_RING + 1))
    length = (2.0 * slices) ** rng.random()
    groups = ((np.arange(slices) / length) + rng.random()).astype(np.intp)
    noise = rng.standard_normal((int(groups[-1]) + 1, bins + width), np.float32)
    noise[rng.random(noise.shape, np.float32) > 30.0 ** (rng.random() - 1)] = 0
    sums = noise.cumsum(axis=1)
    heights: Pattern = sums[:, width:] - sums[:, :-width]
    heights /= max(float(np.abs(heights).max()), 1e-6)
    return heights[groups, :]


def _one_side(values: Pattern, rng: np.random.Generator) -> Pattern:
    """Return 1 where `values` are above a random limit within their range, 0 below, with a soft edge."""
    low, high = float(values.min()), float(values.max())
    limit, edge = low + (high - low) * rng.uniform(0.2, 0.8), max(0.05 * (high - low), 1e-6)
    side: Pattern = (values - np.float32(limit)) * np.float32(rng.choice((-1, 1)) / edge)
    return side.clip(0, 1, out=side)


def draw_drift(size: int, rng: np.random.Generator) -> Pattern:
    """Return a smooth random walk of `size` steps around 0 that reaches 1 or -1; a single slice gets any value."""
    if size == 1:
        return rng.uniform(-1, 1, 1).astype(np.float32)
    smooth = max(1, size // 8)
    steps = np.convolve(rng.standard_normal(size + smooth - 1), np.ones(smooth), "valid")
    walk = steps.cumsum()
    walk -= walk.mean()
    return (walk / max(float(np.abs(walk).max()), 1e-6)).astype(np.float32)
