"""A picture of training patches as the network sees them: each beside itself with its labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, sqrt

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from volseg.pictures.parts import (
    BACKGROUND,
    FAINT,
    GAP,
    LINE,
    MARGIN,
    TEXT,
    Colour,
    blend,
    grey_window,
    png_bytes,
    resize,
    to_bytes,
    write,
)
from volseg.training.region import IGNORED

_SMALLEST_SIDE = 160
# Labels of the picture alone: what lies around the labels, hatches over unlabelled voxels, the frame of the answer.
_AROUND, _HATCH, _FRAME = -2, -3, -4


def preview(pairs: Sequence[tuple[Tensor, Tensor]], colours: Mapping[int, Colour | None]) -> bytes:
    """Draw patches in a grid and return a PNG: the first as it was read, the others changed.

    A pair is an image (c, z, y, x) and labels (z, y, x) in network coordinates, of which the central slice is drawn;
    three channels are red, green and blue, of any other number the first is drawn. Labels may be smaller than the image
    on every side, as those of an unpadded network; a frame shows their border. A class without a colour stays grey,
    unlabelled voxels are hatched. All patches share one range of grey values, so that changes of contrast
    and brightness show.
    """
    low, high = grey_window([_plane(image) for image, _ in pairs])
    tiles = []
    for image, labels in pairs:
        plain = to_bytes(_plane(image), low, high)
        tiles.append(_beside(plain, _labelled(plain, labels[labels.shape[0] // 2].numpy(), colours)))
    height, width = tiles[0].shape[:2]
    columns = max(1, round(sqrt(len(tiles) * (height + LINE) / width)))
    rows = ceil(len(tiles) / columns)
    size = (columns * (width + MARGIN) + MARGIN, rows * (height + LINE + MARGIN) + MARGIN)
    picture = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for number, tile in enumerate(tiles):
        x = MARGIN + number % columns * (width + MARGIN)
        y = MARGIN + number // columns * (height + LINE + MARGIN)
        write(pen, (x, y), f"changed, sample {number}" if number else "unchanged", TEXT)
        picture.paste(Image.fromarray(tile), (x, y + LINE))
    return png_bytes(picture)


def _plane(image: Tensor) -> NDArray[np.float32]:
    """Return the central slice as (rows, columns, 3)."""
    values: NDArray[np.float32] = image[:, image.shape[1] // 2].numpy()
    channels = (0, 1, 2) if len(values) == 3 else (0, 0, 0)
    return np.stack([values[i] for i in channels], axis=-1)


def _labelled(
    plain: NDArray[np.uint8], labels: NDArray[np.int64], colours: Mapping[int, Colour | None]
) -> NDArray[np.uint8]:
    """Return `plain` (rows, columns, 3) under the colours of `labels`, which lie in its middle."""
    rows, columns = np.indices(labels.shape)
    shown = np.where((labels == IGNORED) & ((rows + columns) % 8 == 0), _HATCH, labels)
    mask: NDArray[np.int64] = np.full(plain.shape[:2], _AROUND, np.int64)
    top, left = (mask.shape[0] - labels.shape[0]) // 2, (mask.shape[1] - labels.shape[1]) // 2
    inside = mask[top : top + labels.shape[0], left : left + labels.shape[1]]
    if labels.shape != mask.shape:
        inside[...] = _FRAME
        inside[1:-1, 1:-1] = shown[1:-1, 1:-1]
    else:
        inside[...] = shown
    tints = {**colours, _HATCH: FAINT, _FRAME: TEXT}
    return np.stack([blend(plain[..., i], mask, tints)[..., i] for i in range(3)], axis=-1)


def _beside(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Put two planes beside each other, small ones enlarged by a whole factor."""
    factor = max(1, ceil(_SMALLEST_SIDE / max(left.shape[:2])))
    rows, columns = left.shape[0] * factor, left.shape[1] * factor
    gap = np.full((rows, GAP, 3), BACKGROUND, np.uint8)
    return np.concatenate([resize(left, (rows, columns)), gap, resize(right, (rows, columns))], axis=1)
