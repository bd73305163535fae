"""What `volseg info` tells about a volume, finished or not."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from volseg.errors import BlockError
from volseg.geometry.box import Box
from volseg.storage import files, ome
from volseg.storage.volume import Volume, open_volume

SAMPLE_SIDE = 1024


def describe(uri: str) -> dict[str, Any]:
    """Return shape, storage, physical size, classes and status of a volume; raises VolumeError.

    ``sample`` holds the range of values in the middle (at most 1024 x 1024 voxels) of the middle slice; where a chunk
    of it is damaged it holds the error instead.
    """
    volume = open_volume(uri)
    attributes = volume.attributes
    described = ome.read_multiscale(attributes)
    marks = attributes.get("volseg")
    raw = prod(volume.shape) * (volume.channels or 1) * volume.dtype.itemsize
    stored = stored_bytes(volume.array_uri)
    info: dict[str, Any] = {
        "uri": volume.uri,
        "array": volume.array_uri,
        "shape": list(volume.shape),
        "channels": volume.channels,
        "dtype": str(volume.dtype),
        "chunks": list(volume.chunks),
        "shards": list(volume.shards) if volume.shards else None,
        "codecs": volume.codecs,
        "zarr_format": volume.zarr_format,
        "ome_version": _ome_version(volume) if described else None,
        "voxel_size": list(volume.voxel_size) if volume.voxel_size else None,
        "unit": volume.unit,
        "size": [n * v for n, v in zip(volume.shape, volume.voxel_size, strict=True)] if volume.voxel_size else None,
        "bytes_raw": raw,
        "bytes_stored": stored,
        "labels": volume.is_labels,
        "classes": list(volume.class_names) if volume.class_names else None,
        "sample": _sample(volume),
        "status": volume.status,
        "volseg": marks if isinstance(marks, dict) else None,
    }
    return info


def stored_bytes(uri: str) -> int:
    """Return how many bytes all files below `uri` take."""
    return sum(files.sizes_below(uri).values())


def _sample(volume: Volume) -> dict[str, Any]:
    z, y, x = volume.shape
    height, width = min(y, SAMPLE_SIDE), min(x, SAMPLE_SIDE)
    corner = (z // 2, (y - height) // 2, (x - width) // 2)
    box = Box(corner, (corner[0] + 1, corner[1] + height, corner[2] + width))
    try:
        values = volume.read(box)
    except BlockError as error:
        return {"box": str(box), "error": str(error)}
    finite = values[np.isfinite(values)]
    return {
        "box": str(box),
        "min": finite.min().item() if finite.size else None,
        "max": finite.max().item() if finite.size else None,
        "mean": round(float(finite.mean(dtype=np.float64)), 4) if finite.size else None,
        "not_finite": int(values.size - finite.size),
    }


def _ome_version(volume: Volume) -> str | None:
    described = ome.ome_of(volume.attributes)
    version = described.get("version") or described["multiscales"][0].get("version")
    return str(version) if version is not None else None
