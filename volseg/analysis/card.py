"""What a bundle is, in plain values, and a picture of what it answers; needs no torch itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.analysis.evaluate import open_labels
from volseg.errors import InputError, JobPartial, VolumeError
from volseg.geometry.box import AXES, Box
from volseg.models.manifest import MANIFEST_NAME, BundleManifest, read_manifest
from volseg.models.network import to_volume
from volseg.pictures.predictions import Sample, draw_predictions
from volseg.spec import SegmentSpec
from volseg.storage import files
from volseg.storage.volume import Volume, open_volume

Json = dict[str, Any]
Segment = Callable[[SegmentSpec], Json]

UNLABELLED = 255
# Of provenance, what scores are called.
_SCORES = "validation"


def describe_model(uri: str) -> Json:
    """Return what the bundle at `uri` is; every file of weights is checked on the way.

    All triples are (z, y, x) in voxels of the volume, for a 2D network along the bundle's axis: input sides n are
    allowed where n >= `smallest` and (n - `phase`) is a multiple of `pooling`; one answer depends on `receptive_field`
    voxels to each side; answers are smaller than the patch by `margin` at each end. `scores` are those that training
    left in the provenance. Raises BundleError where the bundle is missing, damaged or not allowed.
    """
    manifest = read_manifest(uri)
    config, sides = manifest.config, manifest.sides()
    flat = config.dims == 2
    return {
        "bundle": files.absolute(uri),
        "digest": manifest.digest,
        "architecture": manifest.architecture,
        "arguments": manifest.arguments,
        "dims": config.dims,
        "members": manifest.members,
        "parameters": config.parameter_count,
        "receptive_field": to_volume(config.receptive_field, manifest.axis) if flat else config.receptive_field,
        "patch": manifest.patch,
        "axis": manifest.axis if flat else None,
        "pooling": sides.pooling,
        "phase": sides.phase,
        "smallest": sides.smallest,
        "margin": sides.margin,
        "channels": config.in_channels,
        "classes": [c.model_dump() for c in manifest.classes],
        "activation": manifest.activation,
        "threshold": manifest.threshold,
        "class_bias": manifest.class_bias,
        "scaling": manifest.scaling.model_dump(),
        "voxel_size": manifest.voxel_size,
        "unit": manifest.unit,
        "scores": {name: value for name, value in manifest.provenance.items() if name.startswith(_SCORES)},
        "provenance": manifest.provenance,
        "files": _list_files(uri, manifest),
    }


def _list_files(uri: str, manifest: BundleManifest) -> list[Json]:
    """List all files of the bundle with their sizes; those without a digest only tell something to people."""
    listed = []
    for name in files.list_names(uri):
        info = manifest.files.get(name)
        digest = manifest.digest if name == MANIFEST_NAME else info.sha256 if info else None
        listed.append({"name": name, "size": files.size(files.join(uri, name)), "sha256": digest})
    return listed


@dataclass(frozen=True)
class SliceChoice:
    """Which slices a picture shows: `slices` by number, or `count` of them inside `roi` (z, y, x ranges).

    They are cut across `axis` (default: the bundle's), and `ignore` is the label that means unlabelled.
    """

    slices: tuple[int, ...] | None = None
    count: int = 3
    roi: str | None = None
    axis: str | None = None
    ignore: int = UNLABELLED


def predictions_picture(
    uri: str, image_uri: str, labels_uri: str | None, out_png: str, segment: Segment, choice: SliceChoice | None = None
) -> Json:
    """Draw what the bundle at `uri` answers on slices of an image, beside the truth where it is known, as a PNG.

    `segment` runs one segmentation and returns its report, as `volseg.api.run_segment` does. Without numbers the slices
    are spread over those that hold the most labels, without labels over the whole region. Every sample of the result
    has the share of wrong voxels among the labelled ones. Raises VolumeError where image and labels do not fit each
    other, InputError where a slice lies outside or nothing is labelled, and what `segment` raises.
    """
    choice = choice or SliceChoice()
    manifest, image = read_manifest(uri), open_volume(image_uri)
    labels = open_labels(labels_uri) if labels_uri is not None else None
    if labels is not None and labels.shape != image.shape:
        raise VolumeError(
            f"{image_uri} has shape {image.shape}, {labels_uri} has {labels.shape}: they must be equal; nothing was "
            "drawn: name the labels of this very volume"
        )
    region = Box.parse(choice.roi, image.shape) if choice.roi else Box.of(image.shape)
    axis = AXES.index(choice.axis or manifest.axis)
    boxes = [_slab(region, axis, n, n + 1) for n in _choose(choice, image, labels, region, axis)]
    samples = []
    for box in boxes:
        truth = _plane(labels, box, axis).astype(np.int64) if labels is not None else None
        if truth is not None:
            truth[truth == choice.ignore] = -1
        title = f"{AXES[axis]} = {box.start[axis]}"
        samples.append(Sample(_plane(image, box, axis), _predict(uri, image_uri, box, axis, segment), truth, title))
    sizes = manifest.voxel_size or image.voxel_size or (1.0, 1.0, 1.0)
    rows, columns = (size for i, size in enumerate(sizes) if i != axis)
    classes = [(c.name, c.color) for c in manifest.classes]
    files.write_bytes(out_png, draw_predictions(samples, classes, (rows, columns)))
    slices = [{"slice": box.start[axis], "wrong": wrong_share(s)} for box, s in zip(boxes, samples, strict=True)]
    return {"picture": files.absolute(out_png), "axis": AXES[axis], "slices": slices}


def wrong_share(sample: Sample) -> float | None:
    """Return the share of wrong voxels among the labelled ones, None where none is labelled."""
    if sample.truth is None or not (told := sample.truth >= 0).any():
        return None
    return float((sample.prediction != sample.truth)[told].mean())


def _choose(choice: SliceChoice, image: Volume, labels: Volume | None, region: Box, axis: int) -> Sequence[int]:
    low, high = region.start[axis], region.stop[axis]
    if choice.slices is not None:
        outside = [n for n in choice.slices if not low <= n < high]
        if outside or not choice.slices:
            raise InputError(
                f"slices {','.join(map(str, outside)) or 'none'} of {image.uri} were asked for, {AXES[axis]} runs from "
                f"{low} to {high - 1}; nothing was drawn: choose slices inside"
            )
        return choice.slices
    numbers = np.arange(low, high)
    if labels is not None:
        told = _labelled(labels, region, axis, choice.ignore)
        if not told.any():
            raise InputError(
                f"{labels.uri} has no labelled voxel in {region}; nothing was drawn: choose another region, or leave "
                "the labels out"
            )
        numbers = numbers[told * 2 >= told.max()]
    places = (
        (np.arange(min(choice.count, numbers.size)) * 2 + 1) * numbers.size // (2 * min(choice.count, numbers.size))
    )
    return [int(n) for n in numbers[places]]


def _labelled(labels: Volume, region: Box, axis: int, ignore: int) -> NDArray[np.int64]:
    """Count the labelled voxels of every slice of `region` across `axis`, chunk by chunk."""
    counts = np.zeros(region.shape[axis], np.int64)
    others = tuple(i for i in range(3) if i != axis)
    for box in region.tiles(labels.chunks):
        start = box.start[axis] - region.start[axis]
        counts[start : start + box.shape[axis]] += np.count_nonzero(labels.read(box)[0] != ignore, axis=others)
    return counts


def _predict(uri: str, image_uri: str, box: Box, axis: int, segment: Segment) -> NDArray[Any]:
    """Segment the slice `box` by the same way as any volume and return its classes (rows, columns)."""
    with tempfile.TemporaryDirectory(prefix="volseg-") as folder:
        output = str(Path(folder) / "slice")
        roi = ",".join(f"{a}:{b}" for a, b in zip(box.start, box.stop, strict=True))
        spec = {"input": image_uri, "output": output, "model": uri, "roi": roi, "executor": "serial"}
        report = segment(SegmentSpec.read(spec))
        if report["status"] != "complete":
            raise JobPartial(f"the slice {box} of {image_uri} could not be segmented; nothing was drawn", report)
        return _plane(open_volume(output), box, axis)


def _plane(volume: Volume, box: Box, axis: int) -> NDArray[Any]:
    plane: NDArray[Any] = volume.read(box)[0].squeeze(axis)
    return plane


def _slab(region: Box, axis: int, low: int, high: int) -> Box:
    start, stop = list(region.start), list(region.stop)
    start[axis], stop[axis] = low, high
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
