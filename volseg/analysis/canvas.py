"""Draws the planes of a volume into one picture: two triptychs side by side, titles, legend, scale bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from volseg.pictures.parts import (
    BACKGROUND,
    FAINT,
    GAP,
    LEGEND_ENTRIES,
    LINE,
    MARGIN,
    TEXT,
    Entry,
    legend_lines,
    percent,
    text_width,
    write,
    write_legend,
)

# In ASCII, because the font that comes with Pillow has neither micro sign nor ring.
SYMBOLS = {"nanometer": "nm", "micrometer": "um", "millimeter": "mm", "centimeter": "cm", "meter": "m"}


@dataclass(frozen=True)
class Panel:
    """One plane as it is drawn: grey (rows, columns), coloured (rows, columns, 3), both uint8, and its title."""

    grey: NDArray[np.uint8]
    coloured: NDArray[np.uint8]
    title: str


@dataclass(frozen=True)
class Legend:
    """One class: its colour (None is not drawn) and its share of the voxels of the planes."""

    label: int
    name: str
    colour: tuple[int, int, int] | None
    fraction: float


def draw(panels: Mapping[int, Panel], legend: Sequence[Legend], pixel: float | None, unit: str | None) -> Image.Image:
    """Return the picture; `panels` by the axis across them (0: xy, 1: xz below it, 2: yz beside it).

    `pixel` is the length of a pixel in `unit`; without it there is no scale bar.
    """
    rows, columns = panels[0].grey.shape
    first = max([columns, *(text_width(panels[axis].title) for axis in (0, 1) if axis in panels)])
    width = first
    if 2 in panels:
        width += GAP + max(panels[2].grey.shape[1], text_width(panels[2].title))
    below = panels[1].grey.shape[0] + GAP + LINE if 1 in panels else 0
    lines = _legend_lines(legend, 2 * width + MARGIN)
    height = MARGIN + LINE + rows + below + GAP + LINE * (len(lines) + 1) + MARGIN
    picture = Image.new("RGB", (2 * width + 3 * MARGIN, height), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for number, left in enumerate((MARGIN, 2 * MARGIN + width)):
        for axis, panel in panels.items():
            x = left + (first + GAP if axis == 2 else 0)
            y = MARGIN + LINE + (rows + GAP + LINE if axis == 1 else 0)
            plane = panel.coloured if number else panel.grey
            picture.paste(Image.fromarray(np.ascontiguousarray(plane)).convert("RGB"), (x, y))
            write(pen, (x, y - LINE), panel.title, FAINT)
    if pixel is not None:
        _scale_bar(pen, (MARGIN + 12, MARGIN + LINE + rows - 14), columns, pixel, unit)
    corner = (MARGIN, MARGIN + LINE + rows + below + GAP)
    write_legend(pen, lines, corner)
    write(pen, (corner[0], corner[1] + len(lines) * LINE), "shares of the voxels in the planes shown", FAINT)
    return picture


def nice_length(limit: float) -> float:
    """Return the largest 1, 2 or 5 times a power of ten that is at most `limit`."""
    power = 10.0 ** floor(log10(limit))
    return next(step * power for step in (5, 2, 1) if step * power <= limit * (1 + 1e-9))


def _scale_bar(pen: ImageDraw.ImageDraw, at: tuple[int, int], columns: int, pixel: float, unit: str | None) -> None:
    length = nice_length(max(columns * 0.3, 30) * pixel)
    pixels = round(length / pixel)
    left, bottom = at
    text = f"{length:g} {SYMBOLS.get(unit, unit)}" if unit else f"{length:g}"
    box = (left - 6, bottom - 26, left + max(pixels, text_width(text)) + 6, bottom + 8)
    pen.rectangle(box, fill=BACKGROUND)
    pen.rectangle((left, bottom - 2, left + pixels, bottom + 2), fill=TEXT)
    write(pen, (left, bottom - 24), text, TEXT)


def _legend_lines(legend: Sequence[Legend], width: int) -> list[list[Entry]]:
    shown = sorted(sorted(legend, key=lambda e: -e.fraction)[:LEGEND_ENTRIES], key=lambda e: e.label)
    entries = [Entry(f"{e.name}  {percent(e.fraction)}", e.colour) for e in shown]
    return legend_lines(entries, width, len(legend) - len(shown))
