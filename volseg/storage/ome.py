"""OME-Zarr metadata by hand: axes, units, voxel size, label classes; written as 0.5, read as 0.4 and 0.5.

Written by hand because the common writers drop units and write label groups that the 0.5 schema rejects.
Specification: https://ngff.openmicroscopy.org/0.5/
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from volseg.errors import InputError, nearest

VERSION = "0.5"
Rgba = tuple[int, int, int, int]

# Length units of the NGFF specification and their length in metres.
UNITS: dict[str, float] = {
    "angstrom": 1e-10, "attometer": 1e-18, "centimeter": 1e-2, "decimeter": 1e-1, "exameter": 1e18,
    "femtometer": 1e-15, "foot": 0.3048, "gigameter": 1e9, "hectometer": 1e2, "inch": 0.0254, "kilometer": 1e3,
    "megameter": 1e6, "meter": 1.0, "micrometer": 1e-6, "mile": 1609.344, "millimeter": 1e-3, "nanometer": 1e-9,
    "parsec": 3.0856775814913673e16, "petameter": 1e15, "picometer": 1e-12, "terameter": 1e12, "yard": 0.9144,
    "yoctometer": 1e-24, "yottameter": 1e24, "zeptometer": 1e-21, "zettameter": 1e21,
}  # fmt: skip
_ALIASES = {"å": "angstrom", "nm": "nanometer", "um": "micrometer", "µm": "micrometer", "μm": "micrometer",
            "micron": "micrometer", "mm": "millimeter", "cm": "centimeter", "m": "meter"}  # fmt: skip

# Okabe and Ito's colour-blind-safe table (black left out, most distant hues first).
_COLOURS = ((230, 159, 0), (86, 180, 233), (213, 94, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66), (0, 114, 178))


@dataclass(frozen=True)
class Multiscale:
    """What a multiscales entry says about its first dataset.

    `path` is the dataset's place in the group; `axes` the axis names, one letter for z, y, x and c; `voxel_size` is
    (z, y, x) in `unit`, None where the metadata says nothing.
    """

    path: str
    axes: tuple[str, ...]
    voxel_size: tuple[float, float, float] | None
    unit: str | None


def check_voxel_size(
    voxel_size: Sequence[float] | None, unit: str | None
) -> tuple[tuple[float, float, float] | None, str | None]:
    """Return the voxel size (z, y, x) and its unit in the words of the specification; raises InputError.

    Symbols such as ``um`` are understood.
    """
    if unit is not None:
        known = _ALIASES.get(unit.lower(), unit.lower())
        if known not in UNITS:
            raise InputError(
                f"unit {unit!r} is no OME-Zarr length unit{nearest(known, UNITS)}; nothing was written: "
                "use angstrom, nanometer, micrometer, millimeter, centimeter or meter"
            )
        unit = known
    if voxel_size is None:
        if unit is not None:
            raise InputError(f"unit {unit!r} without a voxel size; nothing was written: add --voxel-size z,y,x")
        return None, None
    sizes = tuple(float(v) for v in voxel_size)
    if len(sizes) != 3 or not all(math.isfinite(v) and v > 0 for v in sizes):
        raise InputError(
            f"voxel size {','.join(f'{v:g}' for v in sizes)} needs three positive lengths z,y,x; nothing was written: "
            "write it like 0.1,0.022,0.022"
        )
    return (sizes[0], sizes[1], sizes[2]), unit


def group_attributes(
    axes: Sequence[str],
    *,
    voxel_size: Sequence[float] | None,
    unit: str | None,
    name: str,
    label: Mapping[str, Any] | None = None,
    volseg: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the attributes of a group that holds one image at path ``0`` with `axes` among c, z, y, x.

    `label` (from `label_attributes`) makes it a label volume; `volseg` is kept under that name.
    """
    described = image_attributes(axes, voxel_size, unit, name)
    if label is not None:
        described["image-label"] = dict(label)
    return {"ome": described, **({"volseg": dict(volseg)} if volseg is not None else {})}


def image_attributes(
    axes: Sequence[str], voxel_size: Sequence[float] | None, unit: str | None, name: str, path: str = "0"
) -> dict[str, Any]:
    """Return the value of a group's ``ome`` attribute for one array at `path` whose axes are among c, z, y, x."""
    described: list[dict[str, str]] = []
    scale = dict(zip("zyx", voxel_size or (1.0, 1.0, 1.0), strict=True))
    for axis in axes:
        entry = {"name": axis, "type": "channel" if axis == "c" else "space"}
        if axis != "c" and unit is not None:
            entry["unit"] = unit
        described.append(entry)
    dataset = {
        "path": path,
        "coordinateTransformations": [{"type": "scale", "scale": [float(scale.get(axis, 1.0)) for axis in axes]}],
    }
    return {"version": VERSION, "multiscales": [{"name": name, "axes": described, "datasets": [dataset]}]}


def label_attributes(
    class_names: Sequence[str] | None, colours: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    """Return the ``image-label`` entry of a label volume: one colour (RGBA, 0 to 255) and one name a class."""
    entry: dict[str, Any] = {"version": VERSION}
    count = len(class_names or colours or ())
    if count:
        table = [tuple(c) for c in colours] if colours else default_colours(count)
        entry["colors"] = [{"label-value": i, "rgba": [int(v) for v in c]} for i, c in enumerate(table)]
    if class_names:
        entry["properties"] = [{"label-value": i, "name": name} for i, name in enumerate(class_names)]
    return entry


def default_colours(count: int) -> list[Rgba]:
    """Return `count` distinct class colours (RGBA, 0 to 255); class 0 is transparent black."""
    colours: list[Rgba] = [(0, 0, 0, 0)]
    for i in range(count - 1):
        if i < len(_COLOURS):
            red, green, blue = _COLOURS[i]
        else:
            # Steps of the golden angle never come back to a hue that was used.
            hue = (0.11 + (i - len(_COLOURS)) * 0.61803398875) % 1.0
            parts = colorsys.hsv_to_rgb(hue, 0.55 + 0.4 * (i % 2), 0.95 - 0.25 * (i % 3 == 0))
            red, green, blue = (round(255 * v) for v in parts)
        colours.append((red, green, blue, 255))
    return colours[:count]


def read_multiscale(attributes: Mapping[str, Any]) -> Multiscale | None:
    """Return the first image of a group's attributes (OME-Zarr 0.4 or 0.5), None where there is none."""
    entries = ome_of(attributes).get("multiscales")
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
        return None
    entry = entries[0]
    datasets = entry.get("datasets")
    if not isinstance(datasets, list) or not datasets or not isinstance(datasets[0], dict):
        return None
    axes = [a if isinstance(a, dict) else {"name": a} for a in entry.get("axes") or []]
    names = tuple("c" if a.get("type") == "channel" else str(a.get("name", "")).lower() for a in axes)
    units = {name: a.get("unit") for name, a in zip(names, axes, strict=True)}
    scale = [1.0] * len(names)
    for holder in (datasets[0], entry):
        for step in holder.get("coordinateTransformations") or []:
            factors = step.get("scale") if isinstance(step, dict) else None
            if isinstance(factors, list) and len(factors) == len(scale):
                scale = [a * float(b) for a, b in zip(scale, factors, strict=True)]
    voxel_size, unit = _physical(dict(zip(names, scale, strict=True)), units)
    return Multiscale(str(datasets[0].get("path", "0")), names, voxel_size, unit)


def read_labels(attributes: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, dict[int, Rgba], bool]:
    """Return the class names by label value, the colours, and whether the attributes declare a label volume."""
    entry = ome_of(attributes).get("image-label")
    if not isinstance(entry, dict):
        return None, {}, False
    names: dict[int, str] = {}
    for item in entry.get("properties") or []:
        value, name = item.get("label-value"), item.get("name", item.get("class"))
        if isinstance(value, int) and 0 <= value < 65536 and isinstance(name, str):
            names[value] = name
    colours: dict[int, Rgba] = {}
    for item in entry.get("colors") or []:
        value, rgba = item.get("label-value"), item.get("rgba")
        if isinstance(value, int) and isinstance(rgba, list) and len(rgba) == 4:
            red, green, blue, alpha = (min(max(int(v), 0), 255) for v in rgba)
            colours[value] = (red, green, blue, alpha)
    if not names:
        return None, colours, True
    return tuple(names.get(i, "background" if i == 0 else f"class {i}") for i in range(max(names) + 1)), colours, True


def ome_of(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the OME part of a group's attributes: under ``ome`` since 0.5, at the top before."""
    nested = attributes.get("ome")
    return nested if isinstance(nested, dict) else attributes


def _physical(
    scale: Mapping[str, float], units: Mapping[str, Any]
) -> tuple[tuple[float, float, float] | None, str | None]:
    if not all(axis in scale and math.isfinite(scale[axis]) and scale[axis] > 0 for axis in "zyx"):
        return None, None
    given = {units.get(axis) for axis in "zyx"}
    if given == {None}:
        sizes = scale["z"], scale["y"], scale["x"]
        return (None if sizes == (1.0, 1.0, 1.0) else sizes), None
    if not given <= UNITS.keys():
        return None, None
    unit = str(units["x"])
    z, y, x = (scale[axis] * (1.0 if units[axis] == unit else UNITS[units[axis]] / UNITS[unit]) for axis in "zyx")
    return (z, y, x), unit
