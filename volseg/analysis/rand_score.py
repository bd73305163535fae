"""The foreground-restricted Rand score of the ISBI 2012 challenge, for membranes that part cells.

Arganda-Carreras et al., Frontiers in Neuroanatomy 9:142 (2015): a missed membrane pixel matters where it joins two
cells, and only there. In every slice the cells are the 4-connected components of what is no membrane. The predicted
membranes are first thinned to lines by letting the predicted cells grow into them (a watershed), so that their width
does not count. True membrane pixels are left out; a pixel that stays on a predicted line is a cell of its own. With
p_ij the share of pixels in true cell i and predicted cell j,

    split = sum p_ij^2 / sum_i (sum_j p_ij)^2     merge = sum p_ij^2 / sum_j (sum_i p_ij)^2

and the score is their harmonic mean, averaged over the slices as the challenge did. The challenge took the best of
several thresholds of a probability map; one label volume is one threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.errors import InputError
from volseg.geometry.box import Box
from volseg.storage.volume import Volume

MAX_SLICE = 2**25
"""Pixels of a slice at most: labelling and watershed take about 50 bytes a pixel."""
READ_VOXELS = 2**25


@dataclass(frozen=True)
class RandScore:
    """Scores of one slice, or their means, all between 0 and 1, where 1 is perfect.

    `split` falls with cells that the prediction cuts up, `merge` with cells that it joins; `score` is their harmonic
    mean.
    """

    score: float
    split: float
    merge: float


def rand_scores(
    prediction: Volume, truth: Volume, region: Box, membrane: int, ignore: int | None, tick: Callable[[], None]
) -> list[RandScore | None]:
    """Return the score of every slice across z of `region`, None for a slice without a labelled cell.

    `tick` is called after every slice. One slice is in memory at a time, or a few where chunks hold several. Raises
    InputError where a slice is too large.
    """
    check_slice(region)
    z0, y0, x0 = region.start
    z1, y1, x1 = region.stop
    depth = max(1, min(truth.chunks[0], READ_VOXELS // ((y1 - y0) * (x1 - x0))))
    scores: list[RandScore | None] = []
    for low in range(z0, z1, depth):
        box = Box((low, y0, x0), (min(low + depth, z1), y1, x1))
        for true, predicted in zip(truth.read(box)[0], prediction.read(box)[0], strict=True):
            left_out = true == membrane
            if ignore is not None:
                left_out |= true == ignore
            scores.append(slice_score(~left_out, predicted != membrane))
            tick()
    return scores


def check_slice(region: Box) -> None:
    """Raise InputError where a slice of `region` is too large."""
    _, rows, columns = region.shape
    if rows * columns > MAX_SLICE:
        side = int(MAX_SLICE**0.5)
        raise InputError(
            f"slices of {rows} x {columns} pixels are too large for the Rand score, which needs a whole slice in "
            f"memory and takes at most {MAX_SLICE} pixels; nothing was scored: choose a part with --roi, such as "
            f":,0:{side},0:{side}"
        )


def mean_score(scores: list[RandScore | None]) -> RandScore | None:
    """Return the means over the slices that have a score; None where none has."""
    known = [s for s in scores if s is not None]
    if not known:
        return None
    means = np.mean([(s.score, s.split, s.merge) for s in known], axis=0)
    return RandScore(*(float(m) for m in means))


def slice_score(true_cells: NDArray[np.bool_], predicted_cells: NDArray[np.bool_]) -> RandScore | None:
    """Return the score of one slice from two masks (rows, columns), True inside cells; None without a true cell."""
    from scipy import ndimage

    true, _ = ndimage.label(true_cells)
    counted = true > 0
    if not counted.any():
        return None
    predicted = _grow(predicted_cells)[counted].astype(np.int64)
    true = true[counted].astype(np.int64)
    on_line = int((predicted == 0).sum())
    _, joint = np.unique((true * (int(predicted.max()) + 1) + predicted)[predicted > 0], return_counts=True)
    together = _squares(joint) + on_line
    split = together / _squares(np.bincount(true))
    merge = together / (_squares(np.bincount(predicted)[1:]) + on_line)
    return RandScore(2 * split * merge / (split + merge), split, merge)


def _grow(cells: NDArray[np.bool_]) -> NDArray[Any]:
    """Number the 4-connected cells from 1 on and grow them until lines of one pixel, numbered 0, part them."""
    from scipy import ndimage
    from skimage.segmentation import watershed

    markers, number = ndimage.label(cells)
    if number == 0 or cells.all():
        return np.asarray(markers)
    relief = (~cells).astype(np.uint8)
    return np.asarray(watershed(relief, markers, connectivity=1, watershed_line=True))  # type: ignore[no-untyped-call]


def _squares(sizes: NDArray[np.integer]) -> float:
    values = sizes.astype(np.float64)
    return float(values @ values)
