"""How grey values of one class vary over a volume: the measure of how much a training may change them.

In computed tomography a grey value is a physical quantity, and tissues a few hundredths of the overall spread apart
would drown in changes that suit an electron micrograph or a scan with a bright centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volseg.training.index import LabelIndex
from volseg.training.region import Region

_TILES = 256
_FEWEST_VOXELS = 100
_FEWEST_TILES = 4


@dataclass(frozen=True, slots=True)
class GreySpread:
    """Spread of the typical foreground class, in units of the image's std: between places, and within one."""

    between: float
    within: float


def measure_greys(regions: Sequence[Region], index: LabelIndex) -> GreySpread | None:
    """Return the spread of the median foreground class (weighted by the root of its size), None where too few are seen.

    `between` is the std of the class mean over the tiles of `index`, which has one part a region; `within` is the mean
    std inside a tile. The first channel stands for all.
    """
    tiles = [(region, tile) for region, part in zip(regions, index.parts, strict=True) for tile in part.tiles]
    chosen = np.unique(np.linspace(0, len(tiles) - 1, min(_TILES, len(tiles))).round().astype(int))
    seen: dict[int, list[tuple[int, float, float]]] = {}
    for region, tile in (tiles[i] for i in chosen):
        image, labels = region.read_image(tile)[0], region.read_labels(tile)
        for cls in np.unique(labels[labels > 0]):
            values = image[labels == cls]
            if values.size >= _FEWEST_VOXELS:
                seen.setdefault(int(cls), []).append((values.size, float(values.mean()), float(values.std())))
    rows = []
    for parts in seen.values():
        if len(parts) >= _FEWEST_TILES:
            sizes, means, stds = (np.array(column, np.float64) for column in zip(*parts, strict=True))
            centre = np.average(means, weights=sizes)
            between = float(np.sqrt(np.average((means - centre) ** 2, weights=sizes)))
            rows.append((float(np.sqrt(sizes.sum())), between, float(np.average(stds, weights=sizes))))
    if not rows:
        return None
    weights = [row[0] for row in rows]
    return GreySpread(_median([row[1] for row in rows], weights), _median([row[2] for row in rows], weights))


def _median(values: list[float], weights: list[float]) -> float:
    order = np.argsort(values)
    reached = np.cumsum(np.array(weights)[order])
    return values[int(order[int(np.searchsorted(reached, reached[-1] / 2))])]
