"""Blend weights that are a partition of unity by construction, and the fixed point they are summed in.

The patch lattice is a product of three axes, so it is enough to normalise the weights along each axis in 1D: at every
voxel the weights of the patches that cover it sum to one, and no weight volume and no final division exists. Weighted
probabilities are rounded to integers (2^30 stands for 1) before they are added, so the order of additions cannot
matter: that is what makes the labels independent of blocks, workers and retries.

The sum over all classes stays within 3 parts in 10^7 of 2^30 for usual overlaps (each patch that meets in a voxel adds
half a step of rounding at most) and cannot overflow int32, because every factor (also those of later averages, such as
mirroring) is part of the weight and the weights sum to one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from volseg.geometry.lattice import AxisLattice

ONE = 1 << 30
"""Fixed-point one."""

Window = Literal["gaussian", "constant"]

# The Gaussian's width follows nnU-Net (Isensee et al. 2021): sigma = patch / 8. The floor keeps the sums that the
# weights are divided by far from zero where only far corners of patches cover a voxel.
_SIGMA = 1 / 8
_FLOOR = 1e-3


def axis_weights(axis: AxisLattice, i: int, window: Window) -> NDArray[np.float64]:
    """Return the weights (patch,) of patch `i` along one axis: at each voxel the weights of all patches sum to 1.

    Beyond the volume's end (a volume smaller than the patch) the weights continue, and are never used.
    """
    origin = axis.origin(i)
    offsets = tuple(axis.origin(j) - origin for j in axis.neighbours(i))
    return _normalised(axis.patch, offsets, window)


@lru_cache(maxsize=4096)
def _normalised(patch: int, offsets: tuple[int, ...], window: Window) -> NDArray[np.float64]:
    profile = _profile(patch, window)
    total = np.zeros(patch)
    for offset in offsets:
        source = profile[max(0, -offset) : patch - max(0, offset)]
        target = max(0, offset)
        total[target : target + len(source)] += source
    weights: NDArray[np.float64] = profile / total
    weights.flags.writeable = False
    return weights


def _profile(patch: int, window: Window) -> NDArray[np.float64]:
    if window == "constant":
        return np.ones(patch)
    distance = np.arange(patch) - (patch - 1) / 2
    gaussian: NDArray[np.float64] = np.exp(-0.5 * (distance / (patch * _SIGMA)) ** 2)
    return np.maximum(gaussian, _FLOOR)
