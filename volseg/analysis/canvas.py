"""Draws the planes of a volume into one picture: two triptychs side by side, titles, legend, scale bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, TEXT, FAINT, CHIP_EDGE = (17, 19, 24), (236, 239, 244), (148, 156, 170), (90, 98, 112)
MARGIN, GAP, LINE = 24, 10, 22
FONT_SIZE = 15
# In ASCII, because the font that comes with Pillow has neither micro sign nor ring.
SYMBOLS = {"nanometer": "nm", "micrometer": "um", "millimeter": "mm", "centimeter": "cm", "meter": "m"}
MAX_ENTRIES = 24


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
    first = max([columns, *(_text_width(panels[axis].title) for axis in (0, 1) if axis in panels)])
    width = first
    if 2 in panels:
        width += GAP + max(panels[2].grey.shape[1], _text_width(panels[2].title))
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
            _write(pen, (x, y - LINE), panel.title, FAINT)
    if pixel is not None:
        _scale_bar(pen, (MARGIN + 12, MARGIN + LINE + rows - 14), columns, pixel, unit)
    _write_legend(pen, lines, (MARGIN, MARGIN + LINE + rows + below + GAP))
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
    box = (left - 6, bottom - 26, left + max(pixels, _text_width(text)) + 6, bottom + 8)
    pen.rectangle(box, fill=BACKGROUND)
    pen.rectangle((left, bottom - 2, left + pixels, bottom + 2), fill=TEXT)
    _write(pen, (left, bottom - 24), text, TEXT)


def _legend_lines(legend: Sequence[Legend], width: int) -> list[list[tuple[Legend | None, str]]]:
    """Break the legend into lines of at most `width` pixels."""
    shown = sorted(legend, key=lambda e: -e.fraction)[:MAX_ENTRIES]
    entries: list[tuple[Legend | None, str]] = [
        (e, f"{e.name}  {_percent(e.fraction)}") for e in sorted(shown, key=lambda e: e.label)
    ]
    if len(legend) > len(shown):
        entries.append((None, f"and {len(legend) - len(shown)} more"))
    lines: list[list[tuple[Legend | None, str]]] = [[]]
    room = width
    for entry, text in entries:
        need = _text_width(text) + 46
        if need > room and lines[-1]:
            lines.append([])
            room = width
        lines[-1].append((entry, text))
        room -= need
    return lines


def _write_legend(
    pen: ImageDraw.ImageDraw, lines: list[list[tuple[Legend | None, str]]], corner: tuple[int, int]
) -> None:
    left, top = corner
    for number, line in enumerate(lines):
        x, y = left, top + number * LINE
        for entry, text in line:
            if entry is not None:
                pen.rectangle((x, y + 3, x + 14, y + 17), fill=entry.colour or BACKGROUND, outline=CHIP_EDGE)
            _write(pen, (x + 22, y), text, TEXT)
            x += _text_width(text) + 46
    _write(pen, (left, top + len(lines) * LINE), "shares of the voxels in the planes shown", FAINT)


def _percent(fraction: float) -> str:
    return "0 %" if fraction == 0 else "< 0.1 %" if fraction < 0.001 else f"{100 * fraction:.1f} %"


def _write(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: tuple[int, int, int]) -> None:
    pen.text(at, text, fill=colour, font=ImageFont.load_default(FONT_SIZE))


def _text_width(text: str) -> int:
    return round(ImageFont.load_default(FONT_SIZE).getlength(text))
