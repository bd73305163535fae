"""The volumes of a training: opened together and checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.errors import SpecError, VolumeError
from volseg.geometry.box import Box, Triple
from volseg.spec import TrainSpec
from volseg.storage import ome
from volseg.storage.volume import Volume, open_volume
from volseg.training.view import Readable

_SAME_SIZE = 0.01
NO_REGION = "none"
"""Region of a volume that takes no part, such as one that only validates."""


@dataclass(frozen=True, eq=False)
class Source:
    """An image with its labels, whose first voxel is voxel `offset` (z, y, x) of the image.

    `train` and `val` are boxes of the labels in voxels (z, y, x), without a common voxel; `labelled` reads the labels,
    unlabelled where a mask says so.
    """

    name: str
    image: Volume
    labels: Volume
    labelled: Readable
    offset: Triple
    train: tuple[Box, ...]
    val: tuple[Box, ...]


@dataclass(frozen=True, eq=False)
class MaskedLabels:
    """Labels that count only where `mask` is above 0; elsewhere they read as `ignore`."""

    labels: Volume
    mask: Volume
    ignore: int
    channels: int | None = None

    @property
    def shape(self) -> Triple:
        """Sides (z, y, x)."""
        return self.labels.shape

    @property
    def chunks(self) -> Triple:
        """Chunk shape (z, y, x) of the labels."""
        return self.labels.chunks

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the labels, wide enough for `ignore`."""
        return np.promote_types(self.labels.dtype, np.min_scalar_type(self.ignore))

    def read(self, box: Box) -> NDArray[Any]:
        """Return the labels of `box` as (1, z, y, x)."""
        values = self.labels.read(box).astype(self.dtype)
        values[~(self.mask.read(box) > 0)] = self.ignore
        return values


def open_sources(spec: TrainSpec) -> tuple[Source, ...]:
    """Open all volumes of `spec` and check that each fits its labels, and all images each other.

    Raises VolumeError where they do not, SpecError where regions are malformed or overlap.
    """
    masks = spec.mask or (None,) * len(spec.image)
    offsets, trains, vals = (spec.per_volume(name) for name in ("offset", "train_roi", "val_roi"))
    sources = []
    for i, (image_uri, labels_uri) in enumerate(zip(spec.image, spec.labels, strict=True)):
        image, labels = open_volume(image_uri), open_volume(labels_uri)
        _check_labels(labels)
        _check_place(image, labels, offsets[i])
        _check_sizes(image, labels)
        uri = masks[i]
        labelled = labels if uri is None else MaskedLabels(labels, _open_mask(uri, labels), spec.ignore)
        train = parse_regions(trains[i], labels, "--train-roi")
        val = parse_regions(vals[i], labels, "--val-roi") if vals[i] is not None else ()
        sources.append(Source(image_uri, image, labels, labelled, offsets[i] or (0, 0, 0), train, val))
    _check_images([source.image for source in sources])
    _check_apart(sources)
    if spec.split is not None or spec.folds is not None:
        _check_once(sources)
    for option, given, boxes in (
        ("--train-roi", True, [source.train for source in sources]),
        ("--val-roi", spec.val_roi is not None, [source.val for source in sources]),
    ):
        if given and not any(boxes):
            raise SpecError(
                f"{option} is {NO_REGION} for every volume: nothing would be left of it; nothing was trained: name a "
                "region of one volume at least"
            )
    return tuple(sources)


def parse_regions(text: str, labels: Volume, option: str) -> tuple[Box, ...]:
    """Read boxes of `labels` joined by ``+``, or ``none``; raises SpecError, also where two of them overlap."""
    if text.strip() == NO_REGION:
        return ()
    boxes: list[Box] = []
    for part in text.split("+"):
        box = Box.parse(part, labels.shape)
        for other in boxes:
            if box.intersect(other).size:
                raise SpecError(
                    f"{option} {text!r}: the boxes {other} and {box} share {box.intersect(other)}, whose voxels would "
                    "count twice; nothing was trained: choose boxes apart from each other"
                )
        boxes.append(box)
    return tuple(boxes)


def _open_mask(uri: str, labels: Volume) -> Volume:
    mask = open_volume(uri)
    if mask.shape != labels.shape or (mask.channels or 1) != 1:
        raise VolumeError(
            f"mask {uri} has shape {mask.shape} and {mask.channels or 1} channel(s), the labels {labels.uri} "
            f"{labels.shape}: they must agree voxel by voxel, in one channel; nothing was trained: hand in the mask of "
            "these labels"
        )
    return mask


def _check_labels(labels: Volume) -> None:
    if (labels.channels or 1) != 1 or labels.dtype.kind not in "iub":
        raise VolumeError(
            f"labels {labels.uri} are {labels.dtype} with {labels.channels or 1} channel(s): classes are whole "
            "numbers in one channel; nothing was trained: import them with --labels"
        )


def _check_place(image: Volume, labels: Volume, offset: Triple | None) -> None:
    if offset is None:
        if labels.shape != image.shape:
            raise VolumeError(
                f"labels {labels.uri} have shape {labels.shape}, the image {image.uri} {image.shape}: they must agree "
                "voxel by voxel; nothing was trained: import the labels that belong to this image, or say --offset "
                "z,y,x if they are those of a crop that begins there"
            )
    elif not Box.of(image.shape).contains(Box.of(labels.shape).shifted(offset)):
        raise VolumeError(
            f"labels {labels.uri} of shape {labels.shape} with --offset {_by(offset)} reach to "
            f"{Box.of(labels.shape).shifted(offset).stop}, beyond the image {image.uri} of shape {image.shape}; "
            "nothing was trained: correct the offset, or hand in the labels that belong to this image"
        )


def _check_images(images: Sequence[Volume]) -> None:
    first = images[0]
    for image in images[1:]:
        _check_sizes(first, image)
        if (image.channels or 1) != (first.channels or 1):
            raise VolumeError(
                f"image {first.uri} has {first.channels or 1} channel(s), image {image.uri} {image.channels or 1}: one "
                "network takes one number of channels; nothing was trained: hand in images of one kind"
            )


def _check_sizes(one: Volume, other: Volume) -> None:
    """Refuse voxel sizes that differ by more than a hundredth; a volume that states none, or no unit, fits all."""
    if one.voxel_size is None or other.voxel_size is None:
        return
    if one.unit != other.unit and (one.unit is None or other.unit is None):
        return
    sizes = zip(_metres(one.voxel_size, one.unit), _metres(other.voxel_size, other.unit), strict=True)
    if any(abs(a - b) > _SAME_SIZE * max(a, b) for a, b in sizes):
        raise VolumeError(
            f"{one.uri} has voxels of {_size(one)}, {other.uri} of {_size(other)}: they may differ by 1 % at most, or "
            "the network would see every structure in several sizes; nothing was trained: correct the voxel size "
            "where it is wrong, or resample one of them"
        )


def _metres(size: tuple[float, float, float], unit: str | None) -> list[float]:
    return [side * ome.UNITS.get(unit or "", 1.0) for side in size]


def _check_apart(sources: Sequence[Source]) -> None:
    """Refuse voxels that train and validate, also where an image is listed more than once."""
    for a in sources:
        for b in (s for s in sources if s.image.array_uri == a.image.array_uri):
            for box, other in product(a.train, b.val):
                shared = box.shifted(a.offset).intersect(other.shifted(b.offset))
                if shared.size:
                    common = shared.shifted(_minus(a.offset))
                    raise SpecError(
                        f"--train-roi {box} and --val-roi {other} share {common} of {a.name}: the score would be of "
                        "voxels that were trained on; nothing was trained: choose regions apart from each other"
                    )


def _check_once(sources: Sequence[Source]) -> None:
    """Refuse an image that is listed twice with common voxels: a part of it would train, the same part validate."""
    for a, b in combinations(sources, 2):
        for box, other in product(a.train, b.train):
            if a.image.array_uri == b.image.array_uri and box.shifted(a.offset).intersect(other.shifted(b.offset)).size:
                raise SpecError(
                    f"{a.name} is listed twice, and --train-roi {box} and {other} share voxels, which --split or "
                    "--folds could put on both sides; nothing was trained: give --val-roi instead, or regions that lie "
                    "apart"
                )


def _minus(offset: Triple) -> Triple:
    z, y, x = offset
    return -z, -y, -x


def _by(triple: Triple) -> str:
    return ",".join(str(side) for side in triple)


def _size(volume: Volume) -> str:
    sizes = " x ".join(f"{size:g}" for size in volume.voxel_size or ())
    return f"{sizes} {volume.unit}" if volume.unit else sizes
