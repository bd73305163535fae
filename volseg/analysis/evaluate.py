"""Compare a label volume with the truth: scores from one confusion matrix, and on request surfaces and cells.

Dice (which is F1), IoU, precision and recall as in Taha and Hanbury, BMC Medical Imaging 15:29 (2015), from one
confusion matrix over all voxels, so that the result does not depend on how the volumes are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from volseg.analysis import intervals
from volseg.analysis.counts import MAX_CLASSES, Slabs, box_count, count
from volseg.analysis.rand_score import RandScore, check_slice, mean_score, rand_scores
from volseg.analysis.surface import SurfaceScore, ruler, surface_scores
from volseg.errors import InputError, VolumeError
from volseg.geometry.box import AXES, Box
from volseg.storage.volume import Volume, open_volume

Json = dict[str, Any]


def evaluate(
    prediction_uri: str,
    truth_uri: str,
    *,
    roi: str | None = None,
    ignore: int | None = 255,
    slab_axis: Literal["z", "y", "x"] | None = None,
    surface: bool | float = False,
    rand_class: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Json:
    """Score a label volume against the truth and return the scores a class.

    Only voxels inside `roi` (z, y, x ranges such as ``0:14,:,:``) whose truth is not `ignore` count. ``classes`` has an
    entry for each class that has a name or a voxel; a class in neither volume has null scores and is left out of
    ``mean_foreground_dice``, which leaves out class 0, too. ``f1`` is ``dice`` under its other name,
    ``balanced_accuracy`` the mean recall of the classes that the truth holds. ``confusion[i][j]`` counts the voxels of
    true class ``classes[i]`` that were predicted as ``classes[j]``. `progress` is called with the steps done and their
    number.

    The region is cut across `slab_axis` (default: its longest axis) into ten slabs; ``slab_dice`` is the Dice in each,
    ``dice_interval`` a 95 % interval by a jackknife over them (`volseg.analysis.intervals`), null where fewer than
    three slabs hold the class.

    `surface` adds the surface distances of each class above 0 in the unit of the voxel size
    (`volseg.analysis.surface`); a number is the tolerance of the surface Dice, True takes the shortest side of a voxel.
    `rand_class`, the class of the membranes, adds ``rand``: the Rand score of ISBI 2012 over the slices across z
    (`volseg.analysis.rand_score`). Both need scipy, the latter scikit-image, too. Memory does not grow with the region,
    except by the faces of the surfaces and by one slice for `rand_class`, both of which are limited.

    Raises VolumeError where the volumes are no label volumes of one shape or the prediction is unfinished, InputError
    where nothing in the region is labelled, an option is wrong or a limit is exceeded, CorruptChunkError where a stored
    chunk is damaged.
    """
    measured = surface is not False
    prediction, truth, region = _open(prediction_uri, truth_uri, roi)
    measures = ruler(prediction, truth, None if surface is True else float(surface)) if measured else None
    _check_options(region, slab_axis, measured, rand_class)
    slabs = Slabs.cut(region, None if slab_axis is None else AXES.index(slab_axis), intervals.MOST_SLABS)
    steps = box_count(truth, region) * (1 + measured) + (region.shape[0] if rand_class is not None else 0)
    tick = _Ticks(steps, progress)
    counts = count(prediction, truth, region, ignore, slabs, tick)
    if not counts.confusion.any():
        raise InputError(
            f"no voxel of {truth_uri} in region {region} is labelled (all {counts.ignored} are {ignore}); nothing was "
            "scored: choose a region with labels"
        )
    surfaces = surface_scores(prediction, truth, region, ignore, measures, tick) if measures else None
    names = [volume.class_names or () for volume in (truth, prediction)]
    result: Json = {"prediction": prediction.uri, "truth": truth.uri, "region": str(region)}
    result |= _scores(counts.confusion, names, counts.slabs, surfaces)
    result |= {"ignored": counts.ignored, "absent_chunks": counts.absent}
    result["slabs"] = {"axis": AXES[slabs.axis], "edges": list(slabs.edges), "level": intervals.LEVEL}
    if measures is not None:
        result["surface"] = {"voxel_size": measures.sizes, "unit": measures.unit, "tolerance": measures.tolerance}
    if rand_class is not None:
        result["rand"] = _rand(rand_class, rand_scores(prediction, truth, region, rand_class, ignore, tick))
    return result


def score(confusion: NDArray[np.int64], label: int) -> Json:
    """Return the scores of one class from a confusion matrix (truth, prediction); null where they are undefined."""
    both = int(confusion[label, label])
    true, predicted = int(confusion[label].sum()), int(confusion[:, label].sum())
    some = true + predicted > 0
    dice = 2 * both / (true + predicted) if some else None
    return {
        "dice": dice,
        "f1": dice,
        "iou": both / (true + predicted - both) if some else None,
        "precision": both / predicted if predicted else None,
        "recall": both / true if true else None,
        "truth_voxels": true,
        "predicted_voxels": predicted,
    }


def open_labels(uri: str) -> Volume:
    """Open a label volume: integers, no channels; raises VolumeError."""
    volume = open_volume(uri)
    if volume.dtype.kind not in "bui" or volume.channels is not None:
        held = f"{volume.dtype}" if volume.channels is None else f"{volume.channels} channels"
        raise VolumeError(f"{uri} holds {held}, labels are one integer a voxel; nothing was done: name a label volume")
    return volume


def _open(prediction_uri: str, truth_uri: str, roi: str | None) -> tuple[Volume, Volume, Box]:
    """Open both volumes and read the region; raises VolumeError where they cannot be compared."""
    prediction, truth = open_labels(prediction_uri), open_labels(truth_uri)
    if prediction.shape != truth.shape:
        raise VolumeError(
            f"{prediction_uri} has shape {prediction.shape}, {truth_uri} has {truth.shape}: they must be equal; "
            "nothing was scored: name the truth of this very volume"
        )
    region = Box.parse(roi or ":,:,:", truth.shape)
    _check_covered(prediction, region)
    return prediction, truth, region


class _Ticks:
    """Counts the steps of all passes for one progress report."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _scores(
    confusion: NDArray[np.int64],
    names: Sequence[Sequence[str]],
    slabs: NDArray[np.int64],
    surfaces: dict[int, SurfaceScore] | None,
) -> Json:
    known = max(len(confusion), *(len(n) for n in names))
    table = np.zeros((known, known), np.int64)
    table[: len(confusion), : len(confusion)] = confusion
    present = table.sum(axis=0) + table.sum(axis=1) > 0
    ids = [i for i in range(known) if i == 0 or present[i] or any(i < len(n) for n in names)]
    foreground = [i for i in ids if i > 0 and present[i]]
    each, mean = intervals.dice_intervals(slabs, ids, foreground)
    classes = []
    for i in ids:
        entry: Json = {"id": i, "name": _name(i, names), **score(table, i)}
        entry |= {"dice_interval": each[i], "slab_dice": intervals.slab_dice(slabs, i)}
        if surfaces is not None:
            entry["surface"] = asdict(surfaces.get(i, SurfaceScore(None, None, None)))
        classes.append(entry)
    dice = [c["dice"] for c in classes if c["id"] in foreground]
    recalls = [c["recall"] for c in classes if c["recall"] is not None]
    return {
        "classes": classes,
        "mean_foreground_dice": float(np.mean(dice)) if dice else None,
        "mean_foreground_dice_interval": mean,
        "accuracy": float(np.trace(table) / table.sum()),
        "balanced_accuracy": float(np.mean(recalls)),
        "voxels": int(table.sum()),
        "confusion": table[np.ix_(ids, ids)].tolist(),
    }


def _rand(rand_class: int, slices: list[RandScore | None]) -> Json:
    mean = mean_score(slices)
    means = asdict(mean) if mean else dict.fromkeys(("score", "split", "merge"))
    return {"class": rand_class, **means, "slices": [s.score if s else None for s in slices]}


def _check_options(region: Box, slab_axis: str | None, surface: bool, rand_class: int | None) -> None:
    """Refuse wrong options, and measures whose packages are not installed, before anything is read."""
    if slab_axis is not None and slab_axis not in AXES:
        raise InputError(f"slab axis {slab_axis!r} is none of z, y, x; nothing was scored: choose one of them")
    if rand_class is not None:
        if not 0 <= rand_class < MAX_CLASSES:
            raise InputError(
                f"the class {rand_class} of the membranes is not in 0 to {MAX_CLASSES - 1}; nothing was scored: give "
                "the label of the membranes"
            )
        check_slice(region)
    wanted = {"scipy": surface or rand_class is not None, "skimage": rand_class is not None}
    for package, needed in wanted.items():
        if needed and find_spec(package) is None:
            raise InputError(
                f"{'surface distances need' if surface else 'the Rand score needs'} the package {package}, which is "
                "not installed; nothing was scored: pip install 'volseg[metrics]'"
            )


def _check_covered(prediction: Volume, region: Box) -> None:
    """Refuse a prediction that is unfinished or was made for another region: what it lacks would count as class 0."""
    if prediction.status == "incomplete":
        raise VolumeError(
            f"{prediction.uri} is incomplete: what is missing would count as class 0; nothing was scored: run the "
            "command that writes it again until it is complete"
        )
    marks = prediction.attributes.get("volseg")
    text = marks.get("region") if isinstance(marks, dict) else None
    if isinstance(text, str):
        covered = Box.parse(text, prediction.shape)
        if not covered.contains(region):
            raise VolumeError(
                f"{prediction.uri} covers region {covered} only, not all of {region}; nothing was scored: add "
                f"--roi {covered} or a part of it"
            )


def _name(label: int, names: Sequence[Sequence[str]]) -> str:
    given = next((n[label] for n in names if label < len(n)), None)
    return given or ("background" if label == 0 else f"class {label}")
