"""What can be imported, as slices along z: multi-page TIFF, a folder of TIFF or PNG slices, .npy."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from volseg.errors import InputError
from volseg.geometry.box import Triple
from volseg.storage import files, nodes, tiff

PNG = (".png",)
MAPPED_SLICES = 8


@dataclass(frozen=True)
class Source:
    """A stack of slices: `read(start, stop)` returns (c, z, y, x) of a native dtype, c = 1 where `channels` is None."""

    shape: Triple
    channels: int | None
    dtype: np.dtype[Any]
    read: Callable[[int, int], NDArray[Any]]


@contextmanager
def open_source(source: str) -> Iterator[Source]:
    """Open what is to be imported; raises InputError."""
    if not files.is_local(source):
        raise InputError(f"{source} is not on this machine; nothing was done: copy it here to import it")
    path = files.local_path(source)
    if not path.exists():
        raise InputError(f"there is nothing at {path}; nothing was done: check the path")
    try:
        if path.is_dir():
            yield _folder(path)
        elif path.suffix.lower() in tiff.SUFFIXES:
            with tiff.open_stack(path) as stack:
                yield _from_slices(stack.count, (stack.channels, *stack.plane), stack.dtype, stack.read)
        elif path.suffix.lower() == ".npy":
            yield _npy(path)
        elif path.suffix.lower() in PNG:
            shape, dtype = _png_header(path)
            yield _from_slices(1, _channels(shape), dtype, lambda _: _read_png(path))
        else:
            raise InputError(
                f"{path} has suffix {path.suffix!r}: only .tif, .tiff, .npy and folders of TIFF or PNG slices can be "
                "imported; nothing was done: convert it"
            )
    except PermissionError as error:
        raise InputError(f"no permission to read {error.filename or path}; nothing was written: grant it") from None


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key that puts slice2 before slice10."""
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def _folder(path: Path) -> Source:
    if nodes.read_node(str(path)) is not None:
        raise InputError(f"{path} is a Zarr already; nothing was done: use it as it is")
    names = sorted((p.name for p in path.iterdir() if p.is_file() and not p.name.startswith(".")), key=natural_key)
    slices = [path / name for name in names if Path(name).suffix.lower() in (*tiff.SUFFIXES, *PNG)]
    if not slices:
        raise InputError(f"{path} holds no TIFF or PNG slices ({len(names)} files); nothing was done: check the folder")
    kinds = {p.suffix.lower() in PNG: p.name for p in slices}
    if len(kinds) > 1:
        raise InputError(
            f"{path} holds both {kinds[False]} and {kinds[True]}: slices of one volume are of one kind; nothing was "
            "done: move the others away"
        )
    header, read = (_png_header, _read_png) if True in kinds else (tiff.page_header, tiff.read_page)
    shape, dtype = header(slices[0])
    for other in slices[1:]:
        _compare(slices[0], (shape, dtype), other, header(other))

    def read_slice(k: int) -> NDArray[Any]:
        values = read(slices[k])
        _compare(slices[0], (shape, dtype), slices[k], (values.shape, values.dtype))
        return values

    return _from_slices(len(slices), _channels(shape), dtype, read_slice)


def _compare(
    first: Path,
    expected: tuple[tuple[int, ...], np.dtype[Any]],
    other: Path,
    found: tuple[tuple[int, ...], np.dtype[Any]],
) -> None:
    if expected != found:
        raise InputError(
            f"{other.name} is {_text(*found)}, {first.name} is {_text(*expected)}: the slices of a volume are alike; "
            "nothing was written: remove or resize it"
        )


def _text(shape: Sequence[int], dtype: np.dtype[Any]) -> str:
    colours = f" with {shape[0]} channels" if shape[0] > 1 else ""
    return f"{shape[1]}x{shape[2]} {dtype}{colours}"


def _channels(shape: tuple[int, ...]) -> tuple[int | None, int, int]:
    return (shape[0] if shape[0] > 1 else None), shape[1], shape[2]


def _from_slices(
    count: int,
    plane: tuple[int | None, int, int],
    dtype: np.dtype[Any],
    read_slice: Callable[[int], NDArray[Any]],
) -> Source:
    channels, height, width = plane
    native = dtype.newbyteorder("=")

    def read(start: int, stop: int) -> NDArray[Any]:
        slab = np.empty((channels or 1, stop - start, height, width), native)
        for k in range(start, stop):
            slab[:, k - start] = read_slice(k)
        return slab

    return Source((count, height, width), channels, native, read)


def _npy(path: Path) -> Source:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as an array ({' '.join(str(error).split())[:160]}): it is truncated, damaged or "
            "holds objects; nothing was written: save it again with numpy.save"
        ) from error
    if array.ndim not in {2, 3, 4}:
        raise InputError(
            f"{path} has {array.ndim} axes, shape {array.shape}: a volume has 3 (z, y, x) or 4 (c, z, y, x); nothing "
            "was written: choose a part of it"
        )
    planar = array.ndim == 2
    z, y, x = (1, *array.shape) if planar else array.shape[-3:]
    dtype = array.dtype.newbyteorder("=")
    channels = array.shape[0] if array.ndim == 4 else None
    slices_in_order = array.flags.c_contiguous
    del array

    def read(start: int, stop: int) -> NDArray[Any]:
        slab = np.empty((channels or 1, stop - start, y, x), dtype)
        step = MAPPED_SLICES if slices_in_order else stop - start
        for k in range(start, stop, step):
            # Mapped anew each time, so that pages of the file do not pile up in memory.
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            end = min(k + step, stop)
            slab[:, k - start : end - start] = mapped[None] if planar else mapped[..., k:end, :, :]
        return slab

    return Source((z, y, x), channels, dtype, read)


def _png_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return (c, y, x) and the dtype from a PNG's header; transparency does not count as a channel."""
    with path.open("rb") as file:
        head = file.read(26)
    if len(head) < 26 or head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
        raise InputError(f"{path} is no PNG; nothing was written: restore it, or move it away")
    width, height, depth, kind = struct.unpack(">IIBB", head[16:26])
    dtype = np.dtype(bool if depth == 1 and kind == 0 else "uint16" if depth == 16 else "uint8")
    return (3 if kind in {2, 6} else 1, height, width), dtype


def _read_png(path: Path) -> NDArray[Any]:
    """Return a PNG as (c, y, x). Palette images keep their indices, which are what label images mean."""
    (channels, height, width), dtype = _png_header(path)
    with path.open("rb") as file:
        depth, kind = file.read(26)[24:26]
    try:
        if kind == 3 or depth < 8:
            # Only Pillow hands out palette indices and single bits as they are.
            with Image.open(path) as image:
                values = np.asarray(image)
        else:
            values = imagecodecs.png_decode(path.read_bytes())
    except (imagecodecs.PngError, UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({' '.join(str(error).split())[:160]}): it is truncated or damaged; nothing was "
            "written: restore it"
        ) from error
    planes = values.reshape(height, width, -1).transpose(2, 0, 1)[:channels]
    return planes.astype(dtype, copy=False)
