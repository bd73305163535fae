"""Compare a label volume with the truth, box by box: the confusion matrix and what follows from it.

Dice, IoU, precision and recall as in Taha and Hanbury, BMC Medical Imaging 15:29 (2015), from one confusion matrix over
all voxels, so that the result does not depend on how the volumes are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.errors import InputError, VolumeError
from volseg.geometry.box import Box, Triple
from volseg.storage.volume import Volume, open_volume

MAX_CLASSES = 1024
BOX_VOXELS = 2**22
"""About this many voxels are read at once, whole chunks at least; counting takes about 20 bytes a voxel of these."""


def evaluate(
    prediction_uri: str,
    truth_uri: str,
    *,
    roi: str | None = None,
    ignore: int | None = 255,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a label volume against the truth and return the scores a class.

    Only voxels inside `roi` (z, y, x ranges such as ``0:14,:,:``) whose truth is not `ignore` count. ``classes`` has an
    entry for each class that has a name or a voxel; a class in neither volume has null scores and is left out of
    ``mean_foreground_dice``, which leaves out class 0, too. ``confusion[i][j]`` counts the voxels of true class
    ``classes[i]`` that were predicted as ``classes[j]``. `progress` is called with the boxes done and their number.

    Raises VolumeError where the volumes are no label volumes of one shape or the prediction is unfinished, InputError
    where nothing in the region is labelled, CorruptChunkError where a stored chunk is damaged.
    """
    prediction, truth = open_labels(prediction_uri), open_labels(truth_uri)
    if prediction.shape != truth.shape:
        raise VolumeError(
            f"{prediction_uri} has shape {prediction.shape}, {truth_uri} has {truth.shape}: they must be equal; "
            "nothing was scored: name the truth of this very volume"
        )
    region = Box.parse(roi or ":,:,:", truth.shape)
    _check_covered(prediction, region)
    confusion, ignored, absent = _count(prediction, truth, region, ignore, progress)
    if not confusion.any():
        raise InputError(
            f"no voxel of {truth_uri} in region {region} is labelled (all {ignored} are {ignore}); nothing was scored: "
            "choose a region with labels"
        )
    names = [volume.class_names or () for volume in (truth, prediction)]
    known = max(len(confusion), *(len(n) for n in names))
    table = np.zeros((known, known), np.int64)
    table[: len(confusion), : len(confusion)] = confusion
    present = table.sum(axis=0) + table.sum(axis=1) > 0
    ids = [i for i in range(known) if i == 0 or present[i] or any(i < len(n) for n in names)]
    classes = [score(table, i) | {"id": i, "name": _name(i, names)} for i in ids]
    dice = [c["dice"] for c in classes if c["id"] > 0 and c["dice"] is not None]
    return {
        "prediction": prediction.uri,
        "truth": truth.uri,
        "region": str(region),
        "classes": [{"id": c.pop("id"), "name": c.pop("name"), **c} for c in classes],
        "mean_foreground_dice": float(np.mean(dice)) if dice else None,
        "accuracy": float(np.trace(table) / table.sum()),
        "voxels": int(table.sum()),
        "ignored": ignored,
        "absent_chunks": absent,
        "confusion": table[np.ix_(ids, ids)].tolist(),
    }


def score(confusion: NDArray[np.int64], label: int) -> dict[str, Any]:
    """Return the scores of one class from a confusion matrix (truth, prediction); null where they are undefined."""
    both = int(confusion[label, label])
    true, predicted = int(confusion[label].sum()), int(confusion[:, label].sum())
    some = true + predicted > 0
    return {
        "dice": 2 * both / (true + predicted) if some else None,
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


def _count(
    prediction: Volume, truth: Volume, region: Box, ignore: int | None, progress: Callable[[int, int], None] | None
) -> tuple[NDArray[np.int64], int, int]:
    """Return the confusion matrix (truth, prediction), the ignored voxels, and the absent chunks of both volumes."""
    tile = _tile(truth)
    total = int(
        np.prod([-(-b // t) - a // t for a, b, t in zip(region.start, region.stop, tile, strict=True)], dtype=np.int64)
    )
    confusion = np.zeros((1, 1), np.int64)
    ignored = absent = 0
    for done, box in enumerate(region.tiles(tile), start=1):
        true, predicted = (volume.read(box).reshape(-1) for volume in (truth, prediction))
        absent += sum(v.absent_chunks(box, box, region) for v in (truth, prediction) if not v.all_written)
        if ignore is not None:
            counted = true != ignore
            if not counted.all():
                true, predicted = true[counted], predicted[counted]
                ignored += box.size - true.size
        for start in range(0, true.size, BOX_VOXELS):
            part = slice(start, start + BOX_VOXELS)
            confusion = _add(confusion, true[part], predicted[part], (truth.uri, prediction.uri))
        if progress is not None:
            progress(done, total)
    return confusion, ignored, absent


def _add(
    confusion: NDArray[np.int64], true: NDArray[Any], predicted: NDArray[Any], uris: tuple[str, str]
) -> NDArray[np.int64]:
    for labels, uri in zip((true, predicted), uris, strict=True):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= MAX_CLASSES:
            raise VolumeError(
                f"{uri} holds label {low if low < 0 else high}: classes are 0 to {MAX_CLASSES - 1}; nothing was "
                "scored: name a volume of classes, not of numbered objects"
            )
    size = max(int(true.max()), int(predicted.max())) + 1
    counts = np.bincount(true.astype(np.int64) * size + predicted.astype(np.int64), minlength=size * size).reshape(
        size, size
    )
    if size <= len(confusion):
        confusion[:size, :size] += counts
        return confusion
    counts[: len(confusion), : len(confusion)] += confusion
    return counts


def _tile(volume: Volume) -> Triple:
    """Return boxes of whole chunks, as large as fits and at most one stored object."""
    tile = list(volume.chunks)
    for axis in (2, 1, 0):
        room = max(1, BOX_VOXELS // int(np.prod(tile, dtype=np.int64)))
        tile[axis] *= min(room, volume.storage_tile[axis] // volume.chunks[axis])
    z, y, x = tile
    return z, y, x


def _name(label: int, names: Sequence[Sequence[str]]) -> str:
    given = next((n[label] for n in names if label < len(n)), None)
    return given or ("background" if label == 0 else f"class {label}")
