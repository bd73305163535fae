"""Volumes: the one module through which voxels are read and written.

Arrays are read as (c, z, y, x) and addressed by boxes (z, y, x), whatever their axes, their Zarr version and where they
lie. What is read is checked: a damaged chunk is an error that names it, and so is an absent one where the array
declares that all were written. What is written is whole shards, one writer each, put in place atomically.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.errors import CorruptChunkError, VolumeError
from volseg.geometry.box import Box, Triple
from volseg.storage import arrays, files, nodes, ome
from volseg.storage.arrays import configure

__all__ = ["ArrayWriter", "Layout", "Volume", "configure", "create_array", "open_volume", "set_status"]

Json = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Volume:
    """A readable volume.

    `uri` is what was named, `array_uri` the array behind it. `shape`, `chunks` and `shards` are (z, y, x); `channels`
    is None without a channel axis; `voxel_size` is (z, y, x) in `unit`. `all_written` says that the array declares
    every chunk to have been written, so that an absent one is an error; elsewhere it is fill value. `attributes` are
    those of the group, or of a bare array; `status` is what volseg wrote there.
    """

    uri: str
    array_uri: str
    shape: Triple
    channels: int | None
    dtype: np.dtype[Any]
    chunks: Triple
    shards: Triple | None
    voxel_size: tuple[float, float, float] | None
    unit: str | None
    class_names: tuple[str, ...] | None
    colours: Mapping[int, ome.Rgba]
    is_labels: bool
    all_written: bool
    status: str | None
    zarr_format: int
    attributes: Json = field(repr=False)
    digest: str = field(repr=False)
    _stored: arrays.StoredArray = field(repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_volume, (self.uri,)

    @property
    def storage_tile(self) -> Triple:
        """Shape (z, y, x) of what one stored object holds: a shard, else a chunk."""
        return self.shards or self.chunks

    @property
    def codecs(self) -> list[str]:
        """Names of the codecs, outermost last, those inside a shard in order."""
        return nodes.codec_names(self._stored.array.metadata.to_dict())

    def read(self, box: Box) -> NDArray[Any]:
        """Return the voxels of `box` as a C-contiguous array (c, z, y, x) of the stored dtype; c = 1 without channels.

        Raises CorruptChunkError, which names the stored object, where one is truncated, damaged or wrongly absent;
        StorageDeniedError without permission; ValueError where the box leaves the volume.
        """
        if not Box.of(self.shape).contains(box):
            raise ValueError(f"box {box} is not inside the volume {Box.of(self.shape)} of {self.uri}")
        return self._stored.read(box, self.dtype)

    def absent_chunks(self, box: Box, counted_in: Box | None = None, region: Box | None = None) -> int:
        """Count the stored objects (chunks or shards) that meet `box` and do not exist: 0 where their lack is an error.

        With `counted_in`, only those whose first voxel inside `region` (default: the volume) lies in it: callers whose
        boxes overlap but whose `counted_in` tile the region count every object once.
        """
        if self.all_written:
            # The voxels could not have been read.
            return 0
        inside = (region or Box.of(self.shape)).start
        keys = []
        for key, origin in self._stored.objects(box):
            z, y, x = (max(a, b) for a, b in zip(origin, inside, strict=True))
            if counted_in is None or counted_in.contains(Box((z, y, x), (z + 1, y + 1, x + 1))):
                keys.append(key)
        return self._stored.sizes(keys).count(None)

    def object_sizes(self, box: Box) -> dict[str, int | None]:
        """Return the size in bytes of every stored object that meets `box`, None for an absent one.

        Keys are relative to `array_uri`.
        """
        keys = [key for key, _ in self._stored.objects(box)]
        return dict(zip(keys, self._stored.sizes(keys), strict=True))

    def identity(self) -> Json:
        """Return what determines the content: its digest where the array carries one, else URI and metadata digest."""
        content = _marks(self.attributes).get("content")
        if self.status == "complete" and isinstance(content, str):
            return {"content": content}
        return {"uri": self.array_uri, "metadata": self.digest}


def open_volume(uri: str) -> Volume:
    """Open a Zarr array, an OME-Zarr group (its full resolution) or a group with one array, v2 or v3.

    Raises VolumeError where there is none, or where it is no volume: wrong rank, no numbers, absurd sizes.
    """
    uri = files.absolute(uri)
    node, attributes, scale = nodes.find_array(uri)
    shape, stored_shape = nodes.check_limits(node)
    axes = nodes.resolve_axes(node, shape, scale)
    marks = _marks(attributes)
    status = marks.get("status")
    all_written = bool(marks.get("all_chunks_written")) and status != "incomplete"
    stored = arrays.open_array(node.uri, node.zarr_format, axes, whole=all_written)
    dtype = nodes.check_dtype(node.uri, np.dtype(stored.array.dtype))
    chunk = tuple(stored.array.chunks)
    nodes.check_chunk_bytes(node.uri, chunk, dtype)
    names, colours, is_labels = ome.read_labels(attributes)
    return Volume(
        uri=uri,
        array_uri=node.uri,
        shape=_zyx(axes, shape),
        channels=dict(zip(axes, shape, strict=True)).get("c"),
        dtype=dtype,
        chunks=_zyx(axes, chunk),
        shards=_zyx(axes, stored_shape) if stored.array.shards is not None else None,
        voxel_size=scale.voxel_size if scale else None,
        unit=scale.unit if scale else None,
        class_names=names,
        colours=colours,
        is_labels=is_labels,
        all_written=all_written,
        status=status if isinstance(status, str) else None,
        zarr_format=node.zarr_format,
        attributes=attributes,
        digest=node.digest,
        _stored=stored,
    )


@dataclass(frozen=True)
class Layout:
    """How an array is stored: shape, chunks and shards (z, y, x), and the length of the channel axis, None without one.

    A shard is a whole number of chunks and holds every channel; chunks hold one channel each. Raises VolumeError.
    """

    shape: Triple
    chunks: Triple
    shards: Triple | None
    dtype: np.dtype[Any]
    channels: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", nodes.check_dtype("the new array", np.dtype(self.dtype)))
        if min(*self.shape, *self.chunks, *(self.shards or (1,)), 1 if self.channels is None else self.channels) < 1:
            raise VolumeError(
                f"shape {_by(self.shape)}, chunks {_by(self.chunks)}, shards {_by(self.shards or self.chunks)} and "
                f"{self.channels} channels: every side must be at least 1; nothing was written"
            )
        if self.shards is not None and any(s % c for s, c in zip(self.shards, self.chunks, strict=True)):
            raise VolumeError(
                f"shards {_by(self.shards)} are no multiple of chunks {_by(self.chunks)} on every axis; nothing was "
                "written: choose shards that hold whole chunks"
            )
        nodes.check_chunk_bytes("the new array", self.chunks, self.dtype)

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names in storage order."""
        return ("z", "y", "x") if self.channels is None else ("c", "z", "y", "x")


class ArrayWriter:
    """Writes whole shards of one Zarr v3 array; several writers may share an array, never a shard."""

    def __init__(self, array_uri: str) -> None:
        """Open an array that `create_array` made; raises VolumeError."""
        self.volume = open_volume(array_uri)

    def read(self, box: Box) -> NDArray[Any]:
        """Return what is stored in `box` as (c, z, y, x); raises as `Volume.read` does."""
        return self.volume.read(box)

    def object_sizes(self, box: Box) -> dict[str, int | None]:
        """Return the size in bytes of every stored object that meets `box`, None for an absent one."""
        return self.volume.object_sizes(box)

    def write(self, box: Box, data: NDArray[Any]) -> dict[str, int]:
        """Write `data`, (z, y, x) or (c, z, y, x) of the array's dtype, into `box`, and return the objects' sizes.

        Each shard is encoded apart and put in place as a whole, without reading what lay there. Raises ValueError
        where the box is no whole number of shards, StorageFullError and StorageDeniedError from the storage.
        """
        self._check(box, data)
        values = data if data.ndim == 4 else data[np.newaxis]
        sizes: dict[str, int] = {}
        for tile in box.tiles(self.volume.storage_tile):
            part = values[(slice(None), *tile.relative_to(box.start).slices)]
            for key, encoded in self.volume._stored.encode(tile, part).items():
                sizes[key] = self._put(key, encoded)
        return sizes

    def _check(self, box: Box, data: NDArray[Any]) -> None:
        volume = self.volume
        tile = volume.storage_tile
        aligned = Box.of(volume.shape).contains(box) and all(
            a % t == 0 and (b % t == 0 or b == n)
            for a, b, t, n in zip(box.start, box.stop, tile, volume.shape, strict=True)
        )
        if not aligned:
            raise ValueError(
                f"box {box} is no whole number of shards {_by(tile)} of {volume.array_uri}, shape {_by(volume.shape)}: "
                "another writer of the same shard would overwrite these voxels, or have its own overwritten; write "
                "boxes whose sides are multiples of the shard, clipped at the volume's end"
            )
        expected = (volume.channels or 1, *box.shape)
        if data.shape != expected and (volume.channels is not None or data.shape != box.shape):
            raise ValueError(f"data of shape {data.shape} do not fill box {box}: expected {expected}")
        if data.dtype != volume.dtype:
            raise ValueError(f"data are {data.dtype}, {volume.array_uri} stores {volume.dtype}: convert them first")

    def _put(self, key: str, encoded: bytes) -> int:
        uri = files.join(self.volume.array_uri, key)
        files.write_bytes(uri, encoded)
        stored = files.size(uri)
        if stored != len(encoded):
            raise CorruptChunkError(
                f"{uri} has {stored} bytes after {len(encoded)} were written: the storage lost some; the block can be "
                "tried again"
            )
        return stored


def create_array(uri: str, layout: Layout, attributes: Mapping[str, Any], path: str = "0") -> ArrayWriter:
    """Create an OME-Zarr group at `uri` with `attributes` and in it, at `path`, an empty array; return its writer.

    `ome.group_attributes` makes the attributes. Whatever lay at `uri` must have been removed before. Raises
    StorageFullError and StorageDeniedError.
    """
    uri = files.absolute(uri)
    document = arrays.array_document(layout.shape, layout.chunks, layout.shards, layout.dtype, layout.channels)
    # The group comes last: what it says of the array is true from the moment that it can be read.
    files.write_bytes(files.join(uri, path, "zarr.json"), document)
    files.write_bytes(files.join(uri, "zarr.json"), _group_document(attributes))
    return ArrayWriter(files.join(uri, path))


def set_status(group_uri: str, attributes: Mapping[str, Any]) -> None:
    """Merge `attributes` into those of a v3 group, in one atomic write; objects are merged one level deep.

    ``set_status(uri, {"volseg": {"status": "complete"}})`` keeps whatever else ``volseg`` and the group say.
    """
    group_uri = files.absolute(group_uri)
    node = nodes.read_node(group_uri)
    if node is None or node.kind != "group" or node.zarr_format != 3:
        raise VolumeError(f"{group_uri} is no Zarr v3 group, so its status cannot be set: the output is damaged")
    merged = dict(node.attributes)
    for name, value in attributes.items():
        old = merged.get(name)
        merged[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value
    files.write_bytes(files.join(group_uri, "zarr.json"), _group_document(merged))


def _group_document(attributes: Mapping[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}, indent=2).encode()


def _marks(attributes: Mapping[str, Any]) -> Json:
    marks = attributes.get("volseg")
    return marks if isinstance(marks, dict) else {}


def _zyx(axes: Sequence[str], values: Sequence[int]) -> Triple:
    by_name = dict(zip(axes, values, strict=True))
    return by_name["z"], by_name["y"], by_name["x"]


def _by(sides: Sequence[int]) -> str:
    return "x".join(str(side) for side in sides)
