"""Zarr metadata documents, read as plain JSON and checked before any array is opened.

Zarr v2 keeps `.zarray`, `.zgroup` and `.zattrs` beside each other, v3 one `zarr.json` a node. Consolidated metadata is
never used: it is not part of the v3 specification and goes stale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np

from volseg.errors import StorageDeniedError, VolumeError
from volseg.storage import files, ome

MAX_CHUNK_BYTES = 2 * 1024**3
MAX_SIDE = 2**31 - 1
MAX_VOXELS = 2**53


@dataclass(frozen=True)
class Node:
    """One array or group: its metadata document, its attributes, and the SHA-256 of both as stored."""

    uri: str
    kind: Literal["array", "group"]
    zarr_format: Literal[2, 3]
    metadata: dict[str, Any] = field(repr=False)
    attributes: dict[str, Any] = field(repr=False)
    digest: str


def read_node(uri: str) -> Node | None:
    """Return the Zarr node at `uri`, None where there is none; raises VolumeError when its metadata is damaged."""
    document = _read(files.join(uri, "zarr.json"))
    if document is not None:
        metadata = _parse(document, uri, "zarr.json")
        kind = metadata.get("node_type")
        if kind not in {"array", "group"} or metadata.get("zarr_format") != 3:
            raise VolumeError(
                f"{uri}/zarr.json is no Zarr v3 metadata (node_type {kind!r}); nothing was read: restore it"
            )
        return Node(
            uri,
            "array" if kind == "array" else "group",
            3,
            metadata,
            _attributes(metadata.get("attributes")),
            _digest(document),
        )
    kinds: tuple[tuple[str, Literal["array", "group"]], ...] = ((".zarray", "array"), (".zgroup", "group"))
    for name, kind_v2 in kinds:
        document = _read(files.join(uri, name))
        if document is not None:
            extra = _read(files.join(uri, ".zattrs")) or b"{}"
            attributes = _parse(extra, uri, ".zattrs")
            return Node(uri, kind_v2, 2, _parse(document, uri, name), attributes, _digest(document, extra))
    return None


def find_array(uri: str) -> tuple[Node, dict[str, Any], ome.Multiscale | None]:
    """Return the array that `uri` means, the attributes that describe it, and its OME entry.

    `uri` is an array, an OME-Zarr group (its first dataset) or a group with a single array. Raises VolumeError.
    """
    node = read_node(uri)
    if node is None:
        if not files.exists(uri):
            raise VolumeError(f"there is nothing at {uri}; nothing was done: check the path")
        raise VolumeError(
            f"{uri} is not a Zarr array or group (no zarr.json, .zarray or .zgroup in it); nothing was done: "
            "name a Zarr, or convert it with 'volseg import'"
        )
    if node.kind == "array":
        return _with_parent(node)
    scale = ome.read_multiscale(node.attributes)
    if scale is not None:
        array = read_node(files.join(uri, scale.path))
        if array is None or array.kind != "array":
            raise VolumeError(
                f"{uri} names {scale.path!r} as its full-resolution array, but there is none; nothing was read: "
                "restore it"
            )
        return array, node.attributes, scale
    children = [child for name in files.list_names(uri) if (child := read_node(files.join(uri, name))) is not None]
    arrays = [child for child in children if child.kind == "array"]
    if len(arrays) == 1:
        return arrays[0], node.attributes | arrays[0].attributes, None
    names = ", ".join(child.uri.rsplit("/", 1)[-1] for child in (arrays or children)) or "nothing"
    problem = f"{len(arrays)} arrays to choose from" if arrays else "no array of its own"
    raise VolumeError(
        f"{uri} is a group with {problem} and no OME metadata; nothing was read: name one inside: {names}"
    )


def check_limits(node: Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape and the shape of a stored chunk; raises VolumeError where either is absurd.

    Checked before the array is opened, because a hostile or damaged document makes a reader allocate what it says.
    """
    shape = _sides(node.metadata.get("shape"))
    if node.zarr_format == 3:
        grid = node.metadata.get("chunk_grid") or {}
        if not isinstance(grid, dict) or grid.get("name") != "regular":
            name = grid.get("name") if isinstance(grid, dict) else grid
            raise VolumeError(f"{node.uri} has chunk grid {name!r}, only regular ones can be read: convert it")
        stored = _sides((grid.get("configuration") or {}).get("chunk_shape"))
    else:
        stored = _sides(node.metadata.get("chunks"))
    if shape is None or stored is None or len(shape) != len(stored):
        raise VolumeError(f"{node.uri} has no valid shape or chunk shape in its metadata; nothing was read: restore it")
    if max(shape, default=0) > MAX_SIDE or prod(shape) > MAX_VOXELS or min(shape, default=1) < 1:
        raise VolumeError(
            f"{node.uri} has shape {shape}: sides must be 1 to {MAX_SIDE} and at most 2^53 voxels in all; "
            "nothing was read: the metadata is damaged"
        )
    return shape, stored


def check_dtype(uri: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the native form of a numeric dtype (bool, integers, floats up to 64 bit); raises VolumeError."""
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise VolumeError(f"{uri} has dtype {dtype}: only bool, integers and floats can be a volume; convert it first")
    return dtype.newbyteorder("=")


def check_chunk_bytes(uri: str, chunk: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raise VolumeError where one decoded chunk is larger than a worker should ever allocate."""
    size = prod(chunk) * dtype.itemsize
    if size > MAX_CHUNK_BYTES:
        raise VolumeError(
            f"{uri} has chunks of {chunk}, {size / 1024**3:.1f} GiB decoded, at most 2 GiB can be read; "
            "nothing was read: rechunk it, 64 to 256 voxels a side work well"
        )


def resolve_axes(node: Node, shape: tuple[int, ...], scale: ome.Multiscale | None) -> tuple[str, ...]:
    """Return one name an axis: z, y, x once each, at most one c, others only where their size is 1.

    From the OME axes, else from the array's dimension names, else by rank: (z, y, x) or (c, z, y, x).
    """
    names = scale.axes if scale is not None else ()
    if len(names) != len(shape):
        given = node.metadata.get("dimension_names") or node.attributes.get("_ARRAY_DIMENSIONS") or []
        names = tuple(_axis_name(name) for name in given) if isinstance(given, list) else ()
    if len(names) != len(shape) or not {"z", "y", "x"} <= set(names):
        if scale is not None and len(names) == len(shape):
            raise VolumeError(f"{node.uri} has axes ({', '.join(names)}): a volume needs z, y and x; nothing was read")
        if len(shape) not in {3, 4}:
            raise VolumeError(
                f"{node.uri} has {len(shape)} axes, shape {shape}: a volume has 3 (z, y, x) or 4 (c, z, y, x); "
                "nothing was read: choose one slice or channel set, or name its axes in OME metadata"
            )
        names = ("c", "z", "y", "x")[4 - len(shape) :]
    extra = [f"{n} of size {s}" for n, s in zip(names, shape, strict=True) if n not in {"c", "z", "y", "x"} and s != 1]
    if extra or len(set(names)) != len(names):
        raise VolumeError(
            f"{node.uri} has axes ({', '.join(names)}) with {', '.join(extra) or 'one name twice'}: only c, z, y and x "
            "may be longer than 1; nothing was read: choose one position and save it as a volume of its own"
        )
    return names


def codec_names(metadata: Mapping[str, Any]) -> list[str]:
    """Return the names of the codecs of an array's metadata document; those inside shards in their order."""
    if metadata.get("zarr_format") == 2:
        steps = [*(metadata.get("filters") or []), metadata.get("compressor")]
        return [str(step.get("id")) for step in steps if isinstance(step, Mapping)]
    names = []
    for codec in metadata.get("codecs") or []:
        names.append(str(codec.get("name")))
        if codec.get("name") == "sharding_indexed":
            names += codec_names({"codecs": codec["configuration"].get("codecs")})
    return names


def _with_parent(node: Node) -> tuple[Node, dict[str, Any], ome.Multiscale | None]:
    """Describe an array that was named directly by the OME group around it, where there is one."""
    parent_uri, _, name = node.uri.rpartition("/")
    parent = read_node(parent_uri) if parent_uri.strip("/") and not parent_uri.endswith(":/") else None
    if parent is not None and parent.kind == "group":
        scale = ome.read_multiscale(parent.attributes)
        if scale is not None and scale.path == name:
            return node, parent.attributes, scale
    return node, node.attributes, None


def _axis_name(name: object) -> str:
    text = str(name).lower()
    return "c" if text == "channel" else text


def _sides(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return None
    return tuple(value) if all(v >= 0 for v in value) else None


def _read(uri: str) -> bytes | None:
    try:
        return files.read_bytes(uri)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise VolumeError(f"no permission to read {uri}; nothing was done: grant it") from None
    except StorageDeniedError as error:
        raise VolumeError(str(error)) from error


def _parse(document: bytes, uri: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(document)
    except ValueError as error:
        raise VolumeError(f"{uri}/{name} is damaged ({error}); nothing was read: restore it") from None
    if not isinstance(value, dict):
        raise VolumeError(f"{uri}/{name} is damaged (no JSON object); nothing was read: restore it")
    return value


def _attributes(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _digest(*documents: bytes) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "little") + document)
    return digest.hexdigest()
