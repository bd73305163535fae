"""Predictions beside the image and the truth, a row a slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    Colour,
    Entry,
    blend,
    grey_window,
    legend_lines,
    parse_colour,
    percent,
    png_bytes,
    resize,
    resize_labels,
    text_width,
    to_bytes,
    write,
    write_legend,
)

# No class of the default table is like it.
WRONG: Colour = (232, 36, 60)
_UNTOLD: Colour = (0, 0, 0)
_PANEL_PIXELS = 320
_MAX_VOXEL_PIXELS = 16


@dataclass(frozen=True)
class Sample:
    """One slice as it is drawn: raw `image`, `prediction` and, where known, `truth`, all (rows, columns).

    Classes are numbered from 0; -1 in `truth` means unlabelled. `title` says where the slice lies.
    """

    image: NDArray[Any]
    prediction: NDArray[Any]
    truth: NDArray[Any] | None = None
    title: str = ""


def draw_predictions(
    samples: Sequence[Sample], classes: Sequence[tuple[str, str]], pixel: tuple[float, float] = (1.0, 1.0)
) -> bytes:
    """Return a PNG with a row a sample: image, truth, prediction, errors; without any truth, image and prediction.

    `classes` are name and colour (``#rrggbb``) from 0 on; class 0 stays grey. `pixel` is the length of a voxel along
    rows and columns of the slices. Errors are red, unlabelled voxels dark, and titles state the share of errors among
    the labelled voxels. Grey values are drawn between the 0.5th and the 99.5th percentile of all samples.
    """
    low, high = grey_window([sample.image for sample in samples])
    colours = {i: parse_colour(colour) for i, (_, colour) in enumerate(classes) if i}
    rows = [_panels(sample, (low, high), colours, pixel) for sample in samples]
    columns = max(len(row) for row in rows)
    widths = [max([0, *(max(row[i][0].shape[1], text_width(row[i][1])) for row in rows if i < len(row))])
              for i in range(columns)]  # fmt: skip
    width = sum(widths) + GAP * (columns - 1)
    entries = [Entry(name, colours.get(i)) for i, (name, _) in enumerate(classes[:LEGEND_ENTRIES])]
    legend = legend_lines(entries, width, len(classes) - len(entries))
    height = sum(row[0][0].shape[0] + LINE + GAP for row in rows) + LINE * len(legend)
    picture = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    top = MARGIN
    for row in rows:
        left = MARGIN
        for (panel, title), column in zip(row, widths, strict=False):
            write(pen, (left, top), title, FAINT)
            picture.paste(Image.fromarray(panel), (left, top + LINE))
            left += column + GAP
        top += row[0][0].shape[0] + LINE + GAP
    write_legend(pen, legend, (MARGIN, top))
    return png_bytes(picture)


def _panels(
    sample: Sample, window: tuple[float, float], colours: Mapping[int, Colour], pixel: tuple[float, float]
) -> list[tuple[NDArray[np.uint8], str]]:
    """Return the panels (rows, columns, 3) of one row with their titles."""
    size = _size(sample.image.shape, pixel)
    grey = resize(to_bytes(sample.image, *window), size)
    prediction = resize_labels(sample.prediction, size)
    panels = [(blend(grey, np.zeros(size), {}), sample.title or "image")]
    if sample.truth is None:
        return [*panels, (blend(grey, prediction, colours), "prediction")]
    truth = resize_labels(sample.truth, size)
    told = sample.truth >= 0
    wrong = float((sample.prediction != sample.truth)[told].mean()) if told.any() else 0.0
    # 1 is an error, -1 what nobody labelled.
    errors = np.where(truth < 0, -1, (prediction != truth).astype(int))
    return [
        *panels,
        (blend(grey, truth, {**colours, -1: _UNTOLD}), "truth"),
        (blend(grey, prediction, colours), "prediction"),
        (blend(grey, errors, {1: WRONG, -1: _UNTOLD}, 0.7), f"errors: {percent(wrong)}"),
    ]


def _size(shape: tuple[int, ...], pixel: tuple[float, float]) -> tuple[int, int]:
    """Return rows and columns of a panel: square pixels in the volume's units, whole pixels a voxel where it grows."""
    lengths = shape[0] * pixel[0], shape[1] * pixel[1]
    zoom = _PANEL_PIXELS / max(lengths) * min(pixel)
    per_unit = (min(int(zoom), _MAX_VOXEL_PIXELS) if zoom >= 1 else zoom) / min(pixel)
    return max(1, round(lengths[0] * per_unit)), max(1, round(lengths[1] * per_unit))
