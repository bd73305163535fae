"""Slices of TIFF files: multi-page, ImageJ hyperstacks, BigTIFF, any compression; damage is an error, never a gap."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from volseg.errors import InputError

SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")


@dataclass(frozen=True)
class TiffStack:
    """Slices of one TIFF: `read(k)` returns slice k as (c, y, x); `channels` is None for a single grey channel."""

    count: int
    plane: tuple[int, int]
    channels: int | None
    dtype: np.dtype[Any]
    read: Callable[[int], NDArray[Any]]


@contextmanager
def open_stack(path: Path) -> Iterator[TiffStack]:
    """Open a TIFF and check, from its headers alone, that all of its pages are there and alike; raises InputError."""
    pages = _count_pages(path)
    try:
        file = tifffile.TiffFile(path)
    except (tifffile.TiffFileError, ValueError, struct.error) as error:
        raise _damaged(path, "its header", error) from error
    with file:
        yield _described_stack(path, file) if _is_described(file) else _plain_stack(path, file, pages)


def read_page(path: Path) -> NDArray[Any]:
    """Return the only page of a TIFF as (c, y, x); raises InputError."""
    with open_stack(path) as stack:
        if stack.count != 1:
            raise InputError(
                f"{path} has {stack.count} pages, but in a folder of slices each file holds one; nothing was written: "
                "import that file by itself, or move it away"
            )
        return stack.read(0)


def page_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of a TIFF's first page without decoding it; raises InputError."""
    with open_stack(path) as stack:
        return (stack.channels or 1, *stack.plane), stack.dtype


def _is_described(file: tifffile.TiffFile) -> bool:
    """Tell whether axes are written in the file, by ImageJ, OME or tifffile itself.

    Where tifffile wrote slice after slice each has a description of its own; together they are a plain stack.
    """
    return bool(file.is_imagej or file.is_ome or (file.is_shaped and len(file.series) == 1))


def _described_stack(path: Path, file: tifffile.TiffFile) -> TiffStack:
    series = file.series[0]
    axes, shape = series.axes, series.shape
    if len(file.series) > 1:
        raise InputError(
            f"{path} holds {len(file.series)} images, the first two of shapes {shape} and {file.series[1].shape}; "
            "nothing was written: save one volume a file"
        )
    kept = [(a, s) for a, s in zip(axes, shape, strict=True) if s > 1 or a in "YX"]
    inner = [a for a, _ in kept if a in "CS"]
    outer = [a for a, _ in kept if a not in "CSYX"]
    if not outer and inner == ["C"]:
        # ImageJ and tifffile call the slices of a plain stack channels when nobody named them.
        inner, outer = [], ["C"]
    if len(outer) > 1 or len(inner) > 1 or {"Y", "X"} - set(axes):
        raise InputError(
            f"{path} has axes {axes} of sizes {shape}, a volume has one axis of slices and at most one of channels; "
            "nothing was written: save one volume a file"
        )
    if series.dataoffset is not None:
        return _mapped_stack(path, file, dict(kept), outer, inner)
    if any(page is None for page in series.pages):
        raise InputError(f"{path} is one of several files of a series; nothing was written: save it as one file")
    samples = dict(kept).get("C", 1) if inner == ["C"] else 1
    count = dict(kept).get(outer[0], 1) if outer else 1
    first = _page(path, series.pages[0])
    channels, plane = _channels(first)
    if samples > 1 and axes.index("C") < axes.index(outer[0] if outer else "Y"):
        order = [[c * count + k for c in range(samples)] for k in range(count)]
    else:
        order = [[k * samples + c for c in range(samples)] for k in range(count)]
    if len(series.pages) < count * samples:
        raise InputError(
            f"{path} says {count} slices of {samples} channels but has {len(series.pages)} pages: it is truncated; "
            "nothing was written: restore it"
        )

    def read(k: int) -> NDArray[Any]:
        parts = [_decode(path, series.pages[i], i) for i in order[k]]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    return TiffStack(count, plane, samples if samples > 1 else channels, _native(first), read)


def _mapped_stack(
    path: Path, file: tifffile.TiffFile, sizes: dict[str, int], outer: list[str], inner: list[str]
) -> TiffStack:
    """Read a series whose voxels lie in one piece, be it behind a single page as in large ImageJ files."""
    series = file.series[0]
    shape, kept = tuple(sizes.values()), list(sizes)
    dtype = np.dtype(series.dtype).newbyteorder(file.byteorder)
    offset = int(series.dataoffset or 0)
    missing = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize - path.stat().st_size
    if missing > 0:
        raise InputError(f"{path} is truncated: {missing} bytes of it are missing; nothing was written: restore it")
    order = [kept.index(a) for a in (*outer, *inner, "Y", "X")]

    def read(k: int) -> NDArray[Any]:
        # Mapped anew for each slice, so that pages of the file do not pile up in memory.
        volume = np.memmap(path, dtype, "r", offset, shape).transpose(order)
        part = volume[k] if outer else volume
        return _first_colours(np.array(part, dtype.newbyteorder("=")).reshape(-1, *part.shape[-2:]), "S" in inner)

    channels = sizes[inner[0]] if inner else None
    if inner == ["S"]:
        channels = _colours(channels or 1)
    count = sizes[outer[0]] if outer else 1
    return TiffStack(count, (sizes["Y"], sizes["X"]), channels, dtype.newbyteorder("="), read)


def _plain_stack(path: Path, file: tifffile.TiffFile, count: int) -> TiffStack:
    first = _page(path, file.pages.first)
    channels, plane = _channels(first)
    full = []
    for i in range(count):
        page = _page(path, file.pages[i])
        if page.is_reduced or page.is_mask:
            continue
        if (page.shape, page.dtype) != (first.shape, first.dtype):
            raise InputError(
                f"{path}: page {i} is {_describe(page)}, page 0 is {_describe(first)}: the slices of a volume are "
                "alike; nothing was written: remove or resize it"
            )
        full.append(i)

    def read(k: int) -> NDArray[Any]:
        return _decode(path, _page(path, file.pages[full[k]]), full[k])

    return TiffStack(len(full), plane, channels, _native(first), read)


def _page(path: Path, page: Any) -> tifffile.TiffPage:
    found = page.aspage() if isinstance(page, tifffile.TiffFrame) else page
    if not isinstance(found, tifffile.TiffPage) or found.axes not in {"YX", "YXS", "SYX"} or found.dtype is None:
        raise InputError(f"{path} has pages that are no plain images; nothing was written: save it slice by slice")
    return found


def _native(page: tifffile.TiffPage) -> np.dtype[Any]:
    return np.dtype(page.dtype).newbyteorder("=")


def _channels(page: tifffile.TiffPage) -> tuple[int | None, tuple[int, int]]:
    sizes = dict(zip(page.axes, page.shape, strict=True))
    channels = _colours(sizes["S"]) if "S" in sizes else None
    return channels, (sizes["Y"], sizes["X"])


def _decode(path: Path, page: Any, index: int) -> NDArray[Any]:
    full = _page(path, page)
    try:
        values = full.asarray()
    except MemoryError:
        raise
    except Exception as error:  # whatever the codec of the page raises
        raise _damaged(path, f"page {index}", error) from error
    if full.axes == "YXS":
        values = values.transpose(2, 0, 1)
    planes = values.reshape(-1, *values.shape[-2:]).astype(_native(full), copy=False)
    return _first_colours(planes, "S" in full.axes)


def _colours(samples: int) -> int | None:
    """Return how many channels are kept of `samples`: transparency (2 or 4) is dropped."""
    kept = samples - 1 if samples in {2, 4} else samples
    return kept if kept > 1 else None


def _first_colours(values: NDArray[Any], samples: bool) -> NDArray[Any]:
    return values[: _colours(len(values)) or 1] if samples else values


def _describe(page: tifffile.TiffPage) -> str:
    return f"{'x'.join(str(s) for s in page.shape)} {page.dtype}"


def _damaged(path: Path, what: str, error: Exception) -> InputError:
    text = " ".join(str(error).split())[:160]
    return InputError(
        f"{path}: {what} cannot be read ({text or type(error).__name__}): it is truncated, damaged or no TIFF; nothing "
        "was written: restore it"
    )


def _count_pages(path: Path) -> int:
    """Follow the chain of page headers and return its length; raises InputError where it breaks off.

    tifffile logs a broken chain and goes on with fewer pages, which would import a truncated stack as a whole one.
    """
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        version = struct.unpack(f"{order}H", head[2:4])[0] if order and len(head) >= 8 else 0
        if version not in {42, 43}:
            raise InputError(f"{path} is no TIFF; nothing was written: check the file")
        width, entries, entry_size, pointer = (2, "H", 12, "I") if version == 42 else (8, "Q", 20, "Q")
        size = struct.calcsize(pointer)
        at = 4 if version == 42 else 8
        offset, count, seen = struct.unpack(f"{order}{pointer}", head[at : at + size])[0], 0, set()
        while offset:
            file.seek(offset)
            raw = file.read(width)
            length = struct.unpack(f"{order}{entries}", raw)[0] if len(raw) == width else 0
            file.seek(offset + width + length * entry_size)
            raw = file.read(size)
            if not length or len(raw) < size or offset in seen:
                raise InputError(
                    f"{path} is truncated or damaged: the header of page {count} should lie at byte {offset} of {end}; "
                    "nothing was written: restore it"
                )
            seen.add(offset)
            offset, count = struct.unpack(f"{order}{pointer}", raw)[0], count + 1
    if not count:
        raise InputError(f"{path} has no pages; nothing was written: check the file")
    return count
