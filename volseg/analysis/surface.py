"""How far the surfaces of a class lie apart in two label volumes, in the unit of their voxels.

The surface of a class is the set of voxel faces that part it from other classes, each with its area and, for
distances, its centre; so a voxel of 50 x 4 x 4 nm has faces of two sizes, and every one counts by its area (as surface
elements do in Nikolov et al., arXiv:1809.04430). Distances are exact, to the nearest face of the other volume, by the
k-d tree of SciPy, which takes memory for surfaces and not for voxels: the volumes are streamed. There is no surface at
the border of the region nor beside a voxel without a label, since nobody knows what lies beyond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.analysis.counts import boxes
from volseg.errors import InputError, VolumeError
from volseg.geometry.box import Box, Triple
from volseg.storage import ome
from volseg.storage.volume import Volume

MAX_FACES = 2**24
"""Faces of all classes in both volumes at most: about 60 bytes each, so one GiB."""
PART = 2**20

Sizes = tuple[float, float, float]
Faces = NDArray[np.int64]
"""Numbers of faces: the C-order index of the centre on a grid of half voxels that begins with the region."""


@dataclass(frozen=True)
class SurfaceScore:
    """How well two surfaces agree; lengths in the unit of the voxel size, None where one surface is empty.

    `mean` is the distance averaged over the area of both surfaces (average symmetric surface distance), `hausdorff_95`
    the larger of the two directions' 95th percentiles, `dice` the share of both areas that lies within the tolerance of
    the other surface: 0 where one volume has no surface, None where neither has.
    """

    mean: float | None
    hausdorff_95: float | None
    dice: float | None


@dataclass(frozen=True)
class Ruler:
    """Voxel size (z, y, x), its unit (``voxel`` where the volumes state no size), and the tolerance of surface Dice."""

    sizes: Sizes
    unit: str
    tolerance: float


def ruler(prediction: Volume, truth: Volume, tolerance: float | None) -> Ruler:
    """Return the measures of two volumes; the default tolerance is the shortest side of a voxel.

    Raises VolumeError where the volumes state different voxel sizes, InputError where the tolerance is no length.
    """
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise InputError(f"a tolerance of {tolerance} is no length; nothing was scored: give one of at least 0")
    sized = [v for v in (truth, prediction) if v.voxel_size is not None]
    if len(sized) == 2 and not _same_size(truth, prediction):
        raise VolumeError(
            f"{truth.uri} has voxels of {_lengths(truth)}, {prediction.uri} of {_lengths(prediction)}: surface "
            "distances need one size; nothing was scored: import the volume again with the right --voxel-size"
        )
    sizes, unit = (sized[0].voxel_size or (1.0, 1.0, 1.0), sized[0].unit or "unit") if sized else ((1.0,) * 3, "voxel")
    return Ruler(sizes, unit, min(sizes) if tolerance is None else tolerance)


def surface_scores(
    prediction: Volume,
    truth: Volume,
    region: Box,
    ignore: int | None,
    measures: Ruler,
    tick: Callable[[], None],
) -> dict[int, SurfaceScore]:
    """Return the scores of every class above 0 that has a surface in either volume.

    `tick` is called after each box that was read, in the order and number of `counts.boxes`. Raises InputError where
    the surfaces exceed `MAX_FACES`, with the size of a region that would fit.
    """
    found: tuple[dict[int, list[Faces]], dict[int, list[Faces]]] = ({}, {})
    faces = done = 0
    for box in boxes(truth, region):
        wide = Box(box.start, _beyond(box, region))
        labels = [volume.read(wide)[0] for volume in (truth, prediction)]
        counted = None if ignore is None else labels[0] != ignore
        for volume, store in zip(labels, found, strict=True):
            for label, part in _faces(volume, counted, wide, box, region):
                store.setdefault(label, []).append(part)
                faces += part.size
        done += box.size
        if faces > MAX_FACES:
            raise InputError(
                f"the surfaces in region {region} have more than {MAX_FACES} voxel faces, which do not fit in memory; "
                f"no surface distance was measured: choose a region of at most {int(0.9 * done * MAX_FACES / faces)} "
                "voxels with --roi"
            )
        tick()
    scores = {}
    for label in sorted({*found[0], *found[1]}):
        true, predicted = (np.concatenate(store.pop(label, [np.zeros(0, np.int64)])) for store in found)
        scores[label] = _compare(true, predicted, region.shape, measures)
    return scores


def _beyond(box: Box, region: Box) -> Triple:
    """Return the stop of `box` with one more voxel on each axis, as far as the region goes."""
    z, y, x = (min(a + 1, b) for a, b in zip(box.stop, region.stop, strict=True))
    return z, y, x


def _faces(
    labels: NDArray[Any], counted: NDArray[np.bool_] | None, wide: Box, box: Box, region: Box
) -> Iterator[tuple[int, Faces]]:
    """Yield the faces of each class above 0 whose voxel before the face lies in `box`; `labels` fill `wide`."""
    sides = [2 * n for n in region.shape]
    for axis in range(3):
        before = [slice(0, n) for n in box.shape]
        before[axis] = slice(0, wide.shape[axis] - 1)
        after = list(before)
        after[axis] = slice(1, wide.shape[axis])
        first, second = labels[tuple(before)], labels[tuple(after)]
        differ = first != second
        if counted is not None:
            differ &= counted[tuple(before)] & counted[tuple(after)]
        places = np.nonzero(differ)
        centres = [
            2 * (place.astype(np.int64) + start - origin) + (axis == a)
            for a, (place, start, origin) in enumerate(zip(places, box.start, region.start, strict=True))
        ]
        numbers = (centres[0] * sides[1] + centres[1]) * sides[2] + centres[2]
        for side in (first[places], second[places]):
            for label in np.unique(side):
                if label > 0:
                    yield int(label), numbers[side == label]


def _compare(true: Faces, predicted: Faces, shape: Triple, measures: Ruler) -> SurfaceScore:
    if not true.size or not predicted.size:
        return SurfaceScore(None, None, 0.0)
    # A face centre between the floats of a tolerance such as 0.3 must not fall out by rounding.
    limit = measures.tolerance * (1 + 1e-9)
    total = area = within = worst = 0.0
    for here, there in ((true, predicted), (predicted, true)):
        distances = _distances(here, there, shape, measures.sizes)
        areas = _areas(here, shape, measures.sizes)
        order = np.argsort(distances)
        summed = np.cumsum(areas[order])
        worst = max(worst, float(distances[order[np.searchsorted(summed, 0.95 * summed[-1])]]))
        total += float(distances @ areas)
        area += float(summed[-1])
        within += float(areas[distances <= limit].sum())
    return SurfaceScore(total / area, worst, within / area)


def _distances(here: Faces, there: Faces, shape: Triple, sizes: Sizes) -> NDArray[np.float64]:
    """Return the distance of every face of `here` to the nearest of `there`."""
    from scipy.spatial import KDTree

    distances = np.zeros(here.size)
    # Where the surfaces coincide, as most of two good ones do, no search is needed.
    apart = np.nonzero(~np.isin(here, there))[0]
    if apart.size:
        # Points of a grid are spread evenly: halving boxes is as good as seeking medians, and twice as fast.
        tree = KDTree(_points(there, shape, sizes), leafsize=32, balanced_tree=False, compact_nodes=False)
        for start in range(0, apart.size, PART):
            part = apart[start : start + PART]
            distances[part] = tree.query(_points(here[part], shape, sizes), workers=-1)[0]
    return distances


def _points(faces: Faces, shape: Triple, sizes: Sizes) -> NDArray[np.float64]:
    points = np.empty((faces.size, 3))
    for start in range(0, faces.size, PART):
        part = slice(start, start + PART)
        for axis, place in enumerate(_places(faces[part], shape)):
            points[part, axis] = place * (sizes[axis] / 2)
    return points


def _areas(faces: Faces, shape: Triple, sizes: Sizes) -> NDArray[np.float64]:
    areas = np.empty(faces.size)
    across = [sizes[1] * sizes[2], sizes[0] * sizes[2], sizes[0] * sizes[1]]
    for start in range(0, faces.size, PART):
        part = slice(start, start + PART)
        z, y, _ = _places(faces[part], shape)
        areas[part] = np.where(z % 2, across[0], np.where(y % 2, across[1], across[2]))
    return areas


def _places(faces: Faces, shape: Triple) -> Sequence[NDArray[np.int64]]:
    """Return the centres (z, y, x) of faces in half voxels: odd along the axis that a face lies across."""
    z, y, x = np.unravel_index(faces, tuple(2 * n for n in shape))
    return z, y, x


def _same_size(one: Volume, other: Volume) -> bool:
    a, b = one.voxel_size, other.voxel_size
    assert a is not None
    assert b is not None
    if (one.unit is None) != (other.unit is None):
        return False
    factor = ome.UNITS[other.unit] / ome.UNITS[one.unit] if one.unit and other.unit else 1.0
    return all(isclose(p, q * factor, rel_tol=1e-3) for p, q in zip(a, b, strict=True))


def _lengths(volume: Volume) -> str:
    return f"{' x '.join(f'{size:g}' for size in volume.voxel_size or ())} {volume.unit or 'of no unit'}"
