"""Blend weights that are a partition of unity by construction, and the fixed point they are summed in.

The patch lattice is a product of three axes, so it is enough to normalise the weights along each axis in 1D: at every
voxel the weights of the patches that cover it sum to one, and no weight volume and no final division exists. Weighted
probabilities are rounded to integers (2^30 stands for 1) before they are added, so the order of additions cannot
matter: that is what makes the labels independent of blocks, workers and retries.

The sum over all classes stays within 3 parts in 10^7 of 2^30 for usual overlaps (each patch that meets in a voxel adds
half a step of rounding at most) and cannot overflow int32, because the weights sum to one: a mean over several lattices
(2.5D) is a factor of the weight, and what is averaged over one patch (mirrors, the members of an ensemble) is averaged
before it is weighted.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from volseg.geometry.lattice import Line

ONE = 1 << 30
"""Fixed-point one."""

Window = Literal["gaussian", "constant", "exact"]

# The Gaussian's width follows nnU-Net (Isensee et al. 2021): an eighth of the patch. The floor keeps the sums that the
# weights are divided by far from zero where only far corners of patches cover a voxel.
_SIGMA = 1 / 8
_FLOOR = 1e-3


def axis_weights(axis: Line, i: int, window: Window) -> NDArray[np.float64]:
    """Return the weights (side,) of what patch `i` answers along one axis: at each voxel those of all patches sum to 1.

    Beyond the volume's end (a volume smaller than the answer) the weights continue, and are never used.
    """
    origin = axis.origin(i)
    offsets = tuple(axis.origin(j) - origin for j in axis.neighbours(i))
    return _normalised(axis.side, offsets, window)


@lru_cache(maxsize=4096)
def _normalised(side: int, offsets: tuple[int, ...], window: Window) -> NDArray[np.float64]:
    profile = _profile(side, window)
    total = np.zeros(side)
    for offset in offsets:
        source = profile[max(0, -offset) : side - max(0, offset)]
        target = max(0, offset)
        total[target : target + len(source)] += source
    weights: NDArray[np.float64] = profile / total
    weights.flags.writeable = False
    return weights


def _profile(side: int, window: Window) -> NDArray[np.float64]:
    if window != "gaussian":
        return np.ones(side)
    distance = np.arange(side) - (side - 1) / 2
    gaussian: NDArray[np.float64] = np.exp(-0.5 * (distance / (side * _SIGMA)) ** 2)
    return np.maximum(gaussian, _FLOOR)
