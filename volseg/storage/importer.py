"""Imports image stacks as OME-Zarr 0.5, slab by slab: memory depends on a slice's size, never on their number."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from volseg.errors import InputError, OutputExistsError, VolsegError
from volseg.geometry.box import Box, Triple
from volseg.storage import files, nodes, ome
from volseg.storage.describe import describe, stored_bytes
from volseg.storage.layout import choose_layout
from volseg.storage.places import check_places
from volseg.storage.sources import Source, open_source
from volseg.storage.volume import ArrayWriter, Layout, create_array, set_status

__all__ = ["ImportOptions", "describe", "import_volume"]

MAX_LISTED_VALUES = 1024
UNLABELLED = 255


class ImportOptions(TypedDict, total=False):
    """Options of `import_volume`; each may be left out.

    `voxel_size` is (z, y, x) in `unit`, a length unit of OME-Zarr. `chunks` and `shards` are (z, y, x) in voxels.
    `labels` marks a label volume (integers), `class_names` names its labels from 0 on (255, unlabelled, needs no name).
    `overwrite` replaces a Zarr at the destination.
    """

    voxel_size: Sequence[float] | None
    unit: str | None
    chunks: Triple | None
    shards: Triple | None
    labels: bool
    class_names: Sequence[str] | None
    overwrite: bool


def import_volume(
    source: str,
    destination: str,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Unpack[ImportOptions],
) -> dict[str, Any]:
    """Import a multi-page TIFF, a folder of TIFF or PNG slices, or a .npy file, and return what was written.

    The destination appears only when it is whole (local) or says ``incomplete`` until it is (elsewhere). It carries a
    digest of its voxels. `progress` is called with the slices done and their number. Raises InputError for everything
    that is wrong with the source or the options, StorageFullError and StorageDeniedError from the destination.
    """
    voxel_size, unit = ome.check_voxel_size(options.get("voxel_size"), options.get("unit"))
    destination = files.absolute(destination)
    labels = options.get("labels", False)
    started = time.perf_counter()
    check_places(writes=[destination])
    _check_free(destination, options.get("overwrite", False))
    with open_source(source) as stack:
        layout = _layout(stack, options, source)
        attributes = ome.group_attributes(
            layout.axes,
            voxel_size=voxel_size,
            unit=unit,
            name=Path(source).stem,
            label=ome.label_attributes(options.get("class_names")) if labels else None,
            volseg={"status": "incomplete", "all_chunks_written": True, "kind": "labels" if labels else "image"},
        )
        with _put_in_place(destination) as place:
            writer = create_array(place, layout, attributes)
            summary = _copy(stack, writer, source, options, progress)
            set_status(place, {"volseg": {"status": "complete", **summary}})
    return {
        "output": destination,
        "shape": list(layout.shape),
        "channels": layout.channels,
        "dtype": str(layout.dtype),
        "chunks": list(layout.chunks),
        "shards": list(layout.shards or layout.chunks),
        "voxel_size": list(voxel_size) if voxel_size else None,
        "unit": unit,
        "labels": labels,
        "bytes_raw": int(np.prod(layout.shape, dtype=np.int64)) * (layout.channels or 1) * layout.dtype.itemsize,
        "bytes_stored": stored_bytes(destination),
        "seconds": round(time.perf_counter() - started, 3),
        **summary,
    }


def _layout(stack: Source, options: ImportOptions, source: str) -> Layout:
    if options.get("labels") and (stack.dtype.kind not in "bui" or stack.channels is not None):
        held = f"{stack.dtype}" if stack.channels is None else f"{stack.channels} channels"
        raise InputError(
            f"{source} holds {held}, labels are one integer a voxel; nothing was written: convert it, or import it "
            "without --labels"
        )
    dtype = np.dtype("uint8") if options.get("labels") and stack.dtype.kind == "b" else stack.dtype
    nodes.check_dtype(source, dtype)
    itemsize = dtype.itemsize * (stack.channels or 1)
    chunks, shards = choose_layout(stack.shape, itemsize, options.get("chunks"), options.get("shards"))
    return Layout(stack.shape, chunks, shards, dtype, stack.channels)


def _copy(
    stack: Source, writer: ArrayWriter, source: str, options: ImportOptions, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """Copy slab by slab; return the digest of the voxels and, for labels, their values.

    The digest covers shape, dtype and the voxels slice by slice, each (c, y, x), so that it does not depend on how the
    volume is stored.
    """
    volume, labels, class_names = writer.volume, options.get("labels", False), options.get("class_names")
    depth, (_, height, width) = volume.storage_tile[0], stack.shape
    header = f"{stack.channels} {stack.shape} {volume.dtype.newbyteorder('<').str}"
    digest = hashlib.sha256(header.encode())
    values: set[int] = set()
    for start in range(0, stack.shape[0], depth):
        stop = min(start + depth, stack.shape[0])
        slab = stack.read(start, stop).astype(volume.dtype, copy=False)
        if labels:
            values |= _label_values(slab, start, source, class_names)
        for k in range(stop - start):
            digest.update(np.ascontiguousarray(slab[:, k], dtype=volume.dtype.newbyteorder("<")).data)
        writer.write(Box((start, 0, 0), (stop, height, width)), slab)
        del slab  # or two would be held while the next one is read
        if progress is not None:
            progress(stop, stack.shape[0])
    summary: dict[str, Any] = {"content": f"sha256:{digest.hexdigest()}"}
    if labels and len(values) <= MAX_LISTED_VALUES:
        summary["label_values"] = sorted(values)
    return summary


def _label_values(slab: NDArray[Any], start: int, source: str, class_names: Sequence[str] | None) -> set[int]:
    found = np.bincount(slab.reshape(-1)).nonzero()[0] if slab.dtype == np.uint8 else np.unique(slab)
    unnamed = [int(v) for v in found if class_names and v >= len(class_names) and v != UNLABELLED]
    if class_names and unnamed:
        raise InputError(
            f"{source} holds label {unnamed[0]}, but {len(class_names)} class names are given, from label 0 on; "
            "nothing was written: name every class, background first"
        )
    if int(found[0]) < 0:
        z = start + int((slab.min(axis=(0, 2, 3)) < 0).argmax())
        raise InputError(
            f"{source}: slice {z} holds label {int(found[0])}, labels are 0 or more; nothing was written: mark "
            "unlabelled voxels with 255"
        )
    return {int(v) for v in found}


def _check_free(destination: str, overwrite: bool) -> None:
    if not files.exists(destination):
        return
    if not overwrite:
        raise OutputExistsError(f"{destination} exists; nothing was written: add --overwrite to replace it")
    if nodes.read_node(destination) is None:
        raise OutputExistsError(
            f"{destination} exists and is no Zarr, so --overwrite does not remove it; nothing was written: choose "
            "another place"
        )


@contextmanager
def _put_in_place(destination: str) -> Iterator[str]:
    """Yield where to write; a local result is moved to `destination` only when all went well; else it is removed."""
    if not files.is_local(destination):
        files.remove(destination)
        try:
            yield destination
        except BaseException:
            # What made the import fail is what the user must learn; half a volume stays marked as incomplete.
            with suppress(VolsegError, OSError):
                files.remove(destination)
            raise
        return
    path = files.local_path(destination)
    place = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    old = path.with_name(f"{path.name}.old-{uuid.uuid4().hex[:8]}")
    try:
        yield str(place)
        try:
            if path.exists():
                path.rename(old)
            place.rename(path)
        except OSError as error:
            raise files.storage_error(error, destination) or error from error
        files.remove(str(old))
    finally:
        files.remove(str(place))
