"""Opening what a training learns from: volumes, regions, where the labels are, intensity statistics; all checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psutil

from volseg.errors import SpecError, VolumeError
from volseg.geometry.box import Box, Triple
from volseg.intensity import Scaling
from volseg.models.config import to_network, to_volume
from volseg.spec import TrainSpec
from volseg.storage.volume import Volume, open_volume
from volseg.training.index import LabelIndex, build_index
from volseg.training.sampler import Region
from volseg.training.view import NetworkView

Note = Callable[[str], None]

_CACHE_BYTES = 1 << 30
_SCALING_SAMPLES = 2_000_000


@dataclass(frozen=True, eq=False)
class Data:
    """The opened volumes with their regions, in network coordinates."""

    image: Volume
    labels: Volume
    train: Region
    index: LabelIndex
    val: Region | None
    names: tuple[str, ...]


def open_data(spec: TrainSpec, say: Note) -> Data:
    """Open and check what `spec` names; `say` takes a line about each class that cannot be learnt.

    Raises VolumeError where image and labels do not fit each other, the classes or the regions, SpecError where the
    regions are malformed or overlap.
    """
    image, labels = open_volume(spec.image), open_volume(spec.labels)
    _check_volumes(spec, image, labels)
    box = Box.parse(spec.train_roi, image.shape)
    val_box = Box.parse(spec.val_roi, image.shape) if spec.val_roi is not None else None
    if val_box is not None and val_box.intersect(box).size:
        raise SpecError(
            f"--train-roi {box} and --val-roi {val_box} share {val_box.intersect(box)}: the score would be of voxels "
            "that were trained on; nothing was trained: choose regions apart from each other"
        )
    axis = spec.axis if spec.dims == 2 else "z"
    capacity = min(_CACHE_BYTES, psutil.virtual_memory().available // 8)
    views = NetworkView(image, axis, capacity), NetworkView(labels, axis, capacity)
    named = spec.classes or labels.class_names
    boxes = [_network_box(spec, b) for b in (box, val_box) if b is not None]
    indices = [
        build_index(views[1], b, len(named) if named else None, spec.ignore, where)
        for b, where in zip(boxes, ("training", "validation"), strict=False)
    ]
    count = max(len(i.totals) for i in indices)
    counts = np.pad(indices[0].counts, ((0, 0), (0, count - len(indices[0].totals))))
    index = LabelIndex(boxes[0], indices[0].tiles, counts)
    names = named or ("background", *(f"class {i}" for i in range(1, count)))
    if len(names) < 2:
        raise SpecError(f"--classes {','.join(names)} names one class, two are the least; nothing was trained")
    scaling = _measure(views[0], boxes[0], spec)
    regions = [Region(*views, b, scaling, spec.ignore) for b in boxes]
    for name, total in zip(names, index.totals, strict=True):
        if total == 0:
            say(f"class {name!r} has no labelled voxel in the training region: it cannot be learnt")
    return Data(image, labels, regions[0], index, regions[1] if len(regions) > 1 else None, names)


def _check_volumes(spec: TrainSpec, image: Volume, labels: Volume) -> None:
    if labels.shape != image.shape:
        raise VolumeError(
            f"labels {spec.labels} have shape {labels.shape}, the image {spec.image} {image.shape}: they must agree "
            "voxel by voxel; nothing was trained: import the labels that belong to this image"
        )
    if (labels.channels or 1) != 1 or labels.dtype.kind not in "iub":
        raise VolumeError(
            f"labels {spec.labels} are {labels.dtype} with {labels.channels or 1} channel(s): classes are whole "
            "numbers in one channel; nothing was trained: import them with --labels"
        )


def _network_box(spec: TrainSpec, box: Box) -> Box:
    if spec.dims == 3:
        return box
    return Box(to_network(box.start, spec.axis), to_network(box.stop, spec.axis))


def volume_shape(spec: TrainSpec, box: Box) -> Triple:
    """Return the sides (z, y, x) of a `box` that is given in network coordinates."""
    return to_volume(box.shape, spec.axis) if spec.dims == 2 else box.shape


def _measure(image: NetworkView, box: Box, spec: TrainSpec) -> Scaling:
    """Take the intensity statistics of a random sample of the training region."""
    tiles = list(box.tiles(image.tile))
    rng = np.random.default_rng(spec.seed)
    if len(tiles) > 256:
        tiles = [tiles[i] for i in np.sort(rng.choice(len(tiles), 256, replace=False))]
    each = max(1, _SCALING_SAMPLES // len(tiles))
    samples = []
    for tile in tiles:
        values = image.read(tile)
        values = values.reshape(len(values), -1)
        samples.append(values if values.shape[1] <= each else values[:, rng.integers(values.shape[1], size=each)])
    try:
        return Scaling.measure(np.concatenate(samples, axis=1))
    except ValueError as error:
        raise VolumeError(
            f"image {spec.image}: {error} in the training region; nothing was trained: choose a region that holds data"
        ) from None
