"""Grey planes, class colours, text and legends: the parts of every picture. Needs numpy and Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

BACKGROUND, TEXT, FAINT, CHIP_EDGE = (17, 19, 24), (236, 239, 244), (148, 156, 170), (90, 98, 112)
MARGIN, GAP, LINE = 24, 10, 22
FONT_SIZE = 15
ALPHA = 0.5
LEGEND_ENTRIES = 24
_CHIP = 46


@dataclass(frozen=True)
class Entry:
    """One entry of a legend: its text and the colour of its chip; a class without colour has an empty chip."""

    text: str
    colour: Colour | None = None
    chip: bool = True


def grey_window(planes: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """Return the 0.5th and the 99.5th percentile of the finite values of `planes`, always apart."""
    values = np.concatenate([p[np.isfinite(p)] for p in planes]) if planes else np.zeros(0)
    if not values.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values.astype(np.float64), (0.5, 99.5)))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def to_bytes(plane: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Return `plane` as greys from 0 at `low` to 255 at `high`; NaN is black."""
    values = np.nan_to_num(plane.astype(np.float64), nan=low, posinf=high, neginf=low)
    return (255 * np.clip((values - low) / (high - low), 0, 1)).round().astype(np.uint8)


def blend(
    grey: NDArray[np.uint8], mask: NDArray[Any], colours: Mapping[int, Colour | None], alpha: float = ALPHA
) -> NDArray[np.uint8]:
    """Return `grey` (rows, columns) as (rows, columns, 3), tinted where `mask` has a label with a colour."""
    result = np.repeat(grey[..., None], 3, axis=2).astype(np.float32)
    for label in np.unique(mask):
        colour = colours.get(int(label))
        if colour is not None:
            where = mask == label
            result[where] = (1 - alpha) * result[where] + alpha * np.array(colour, np.float32)
    return result.round().astype(np.uint8)


def resize(plane: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the plane with `size` (rows, columns): voxels as blocks where it grows, their mean where it shrinks."""
    shrinks = size[0] < plane.shape[0] or size[1] < plane.shape[1]
    method = Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((size[1], size[0]), method))


def resize_labels(plane: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Return the plane with `size` (rows, columns), each pixel with the label of the voxel at its centre."""
    rows, columns = ((np.arange(n) * 2 + 1) * m // (2 * n) for n, m in zip(size, plane.shape, strict=True))
    resized: NDArray[Any] = plane[np.ix_(rows, columns)]
    return resized


def parse_colour(text: str) -> Colour:
    """Return the three bytes of ``#rrggbb``."""
    red, green, blue = bytes.fromhex(text.removeprefix("#"))
    return red, green, blue


def percent(fraction: float) -> str:
    """Write a share in per cent, with one decimal."""
    return "0 %" if fraction == 0 else "< 0.1 %" if fraction < 0.001 else f"{100 * fraction:.1f} %"


def legend_lines(entries: Sequence[Entry], width: int, left_out: int = 0) -> list[list[Entry]]:
    """Break a legend into lines of at most `width` pixels; `left_out` entries are only counted."""
    shown = [*entries, *([Entry(f"and {left_out} more", chip=False)] if left_out else [])]
    lines: list[list[Entry]] = [[]]
    room = width
    for entry in shown:
        need = text_width(entry.text) + _CHIP
        if need > room and lines[-1]:
            lines.append([])
            room = width
        lines[-1].append(entry)
        room -= need
    return lines


def write_legend(pen: ImageDraw.ImageDraw, lines: Sequence[Sequence[Entry]], corner: tuple[int, int]) -> None:
    """Write the lines of a legend from `corner` (column, row) on."""
    left, top = corner
    for number, line in enumerate(lines):
        x, y = left, top + number * LINE
        for entry in line:
            if entry.chip:
                pen.rectangle((x, y + 3, x + 14, y + 17), fill=entry.colour or BACKGROUND, outline=CHIP_EDGE)
            write(pen, (x + 22, y), entry.text, TEXT)
            x += text_width(entry.text) + _CHIP


def write(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: Colour) -> None:
    """Write `text` with its upper left corner at (column, row)."""
    pen.text(at, text, fill=colour, font=ImageFont.load_default(FONT_SIZE))


def text_width(text: str) -> int:
    """Return the width of `text` in pixels."""
    return round(ImageFont.load_default(FONT_SIZE).getlength(text))


def png_bytes(picture: Image.Image) -> bytes:
    """Return the picture as the content of a PNG file."""
    content = BytesIO()
    picture.save(content, format="PNG", optimize=True)
    return content.getvalue()
