"""A picture of a segmentation: three orthogonal planes, grey beside grey with class colours, true to the voxel size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.analysis.canvas import Legend, Panel, draw
from volseg.analysis.evaluate import open_labels
from volseg.errors import InputError, VolumeError
from volseg.geometry.box import AXES, Box, Triple
from volseg.pictures.parts import blend, grey_window, png_bytes, resize, resize_labels, to_bytes
from volseg.storage import files, ome
from volseg.storage.volume import Volume, open_volume

PICTURE_PIXELS = 900
MAX_VOXEL_PIXELS = 16
MIN_SIDE_PIXELS = 48
TILE = 1024
UNLABELLED = 255


@dataclass(frozen=True)
class Scale:
    """How many pixels the volume's sides get, (z, y, x), and by how much axes are stretched beyond the voxel size."""

    pixels: Triple
    stretched: dict[int, float]


def overlay(image_uri: str, labels_uri: str, out_png: str, *, position: Triple | None = None) -> dict[str, Any]:
    """Write a PNG with the planes through `position` (z, y, x; default: the centre) and return what it shows.

    Left the grey planes xy, xz and yz, right the same with class colours; grey values between the 0.5th and the 99.5th
    percentile of the planes; pixels are square in the volume's own units. Only the three planes are read. Raises
    VolumeError where the volumes do not fit each other, InputError where `position` lies outside.
    """
    image, labels = open_volume(image_uri), open_labels(labels_uri)
    if image.shape != labels.shape:
        raise VolumeError(
            f"{image_uri} has shape {image.shape}, {labels_uri} has {labels.shape}: they must be equal; nothing was "
            "drawn: name the labels of this very volume"
        )
    z, y, x = position or (image.shape[0] // 2, image.shape[1] // 2, image.shape[2] // 2)
    if not Box.of(image.shape).contains(Box((z, y, x), (z + 1, y + 1, x + 1))):
        raise InputError(
            f"position {z},{y},{x} is outside the volume of shape {image.shape}; nothing was drawn: choose one inside"
        )
    scale = plan_scale(image.shape, image.voxel_size or labels.voxel_size)
    normals = [axis for axis in range(3) if axis == 0 or min(image.shape[0], image.shape[3 - axis]) > 1]
    greys = {axis: _plane(image, axis, (z, y, x), scale) for axis in normals}
    classes = {axis: _plane(labels, axis, (z, y, x), scale) for axis in normals}
    low, high = grey_window(list(greys.values()))
    legend = _legend(labels, list(classes.values()))
    colours = {entry.label: entry.colour for entry in legend}
    panels = {}
    for axis in normals:
        grey = resize(to_bytes(greys[axis], low, high), _size(axis, scale))
        mask = resize_labels(classes[axis], _size(axis, scale))
        panels[axis] = Panel(grey=grey, coloured=blend(grey, mask, colours), title=_title(axis, (z, y, x), scale))
    voxel_size, unit = (image.voxel_size, image.unit) if image.voxel_size else (labels.voxel_size, labels.unit)
    pixel = voxel_size[2] * image.shape[2] / scale.pixels[2] if voxel_size else None
    files.write_bytes(out_png, png_bytes(draw(panels, legend, pixel, unit)))
    return {
        "picture": files.absolute(out_png),
        "position": [z, y, x],
        "window": [low, high],
        "classes": [{"id": e.label, "name": e.name, "fraction_of_planes": e.fraction} for e in legend],
    }


def plan_scale(shape: Triple, voxel_size: tuple[float, float, float] | None) -> Scale:
    """Choose how many pixels each side of the volume gets.

    One pixel stands for the same length on every axis, and where voxels are larger than pixels the finest are whole
    pixels. A side that would be thinner than 48 pixels is stretched to stay visible, and the title says by how much.
    """
    sizes = voxel_size or (1.0, 1.0, 1.0)
    depth, height, width = (n * v for n, v in zip(shape, sizes, strict=True))
    per_unit = PICTURE_PIXELS / max(width + depth, height + depth)
    finest = min(v for n, v in zip(shape, sizes, strict=True) if n > 1) if max(shape) > 1 else min(sizes)
    zoom = per_unit * finest
    per_unit = min(int(zoom) if zoom >= 1 else zoom, MAX_VOXEL_PIXELS) / finest
    pixels, stretched = [], {}
    for axis, length in enumerate((depth, height, width)):
        true = max(1, round(length * per_unit))
        pixels.append(max(true, MIN_SIDE_PIXELS) if shape[axis] > 1 else true)
        if pixels[-1] > 1.05 * true:
            stretched[axis] = pixels[-1] / true
    return Scale((pixels[0], pixels[1], pixels[2]), stretched)


def _plane(volume: Volume, normal: int, position: Triple, scale: Scale) -> NDArray[Any]:
    """Return one plane, thinned out to about the pixels that are drawn; first channel only.

    Rows and columns are the two other axes, except that the plane across x is (y, z): it hangs beside the xy plane.
    """
    steps = [max(1, n // (2 * p)) for n, p in zip(volume.shape, scale.pixels, strict=True)]
    start, stop = [0, 0, 0], list(volume.shape)
    start[normal], stop[normal], steps[normal] = position[normal], position[normal] + 1, 1
    tile = [max(step, TILE // step * step) for step in steps]
    counts = [-(-(b - a) // s) for a, b, s in zip(start, stop, steps, strict=True)]
    plane = np.empty(counts, volume.dtype)
    region = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    # Cells of a grid at the origin start on a multiple of the step, because the tile is one.
    for box in region.tiles((tile[0], tile[1], tile[2])):
        part = volume.read(box)[0, :: steps[0], :: steps[1], :: steps[2]]
        corner = [(a - b) // s for a, b, s in zip(box.start, region.start, steps, strict=True)]
        plane[tuple(slice(c, c + n) for c, n in zip(corner, part.shape, strict=True))] = part
    flat = plane.squeeze(normal)
    return flat.T if normal == 2 else flat


def _legend(labels: Volume, planes: list[NDArray[Any]]) -> list[Legend]:
    """List the classes that the planes hold or that have a name: label, name, colour, share of the planes' voxels."""
    values, counts = np.unique(np.concatenate([p.reshape(-1) for p in planes]), return_counts=True)
    shares = {int(v): int(c) / int(counts.sum()) for v, c in zip(values, counts, strict=True)}
    names = dict(enumerate(labels.class_names or ()))
    defaults = ome.default_colours(min(max(*shares, *names, 1), 65535) + 1)
    entries = []
    for label in sorted({*shares, *names}):
        unlabelled = label == UNLABELLED and label not in names
        colour = labels.colours.get(label) or ((150, 150, 150, 255) if unlabelled else defaults[label % len(defaults)])
        name = "unlabelled" if unlabelled else names.get(label, "background" if label == 0 else f"class {label}")
        visible = label != 0 and colour[3] > 0
        entries.append(Legend(label, name, colour[:3] if visible else None, shares.get(label, 0.0)))
    return entries


def _size(normal: int, scale: Scale) -> tuple[int, int]:
    z, y, x = scale.pixels
    return {0: (y, x), 1: (z, x), 2: (y, z)}[normal]


def _title(normal: int, position: Triple, scale: Scale) -> str:
    name = {0: "xy", 1: "xz", 2: "zy"}[normal]
    shown = [axis for axis in scale.stretched if axis != normal]
    notes = "".join(f" ({AXES[axis]} x{scale.stretched[axis]:.1f})" for axis in shown)
    return f"{name} at {AXES[normal]} = {position[normal]}{notes}"
