"""A part of a volume that is trained or validated on: what is read of it, and what is never seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.errors import VolumeError
from volseg.geometry.box import Box
from volseg.intensity import Scaling
from volseg.training.view import NetworkView

IGNORED = -1
"""Label of voxels that no loss and no metric counts, inside the training code."""


@dataclass(frozen=True, eq=False)
class Region:
    """Image and labels inside a box, all in network coordinates; what lies beyond the box is never read.

    `weight` is the share of the patches that come from here; regions of one volume have the same number `volume` and
    the same `name`, which messages use.
    """

    image: NetworkView
    labels: NetworkView
    box: Box
    scaling: Scaling
    ignore: int
    weight: float = 1.0
    name: str = "the image"
    volume: int = 0

    def read_image(self, box: Box) -> NDArray[np.float32]:
        """Return `box` (c, ...) scaled, the region's border continued outwards. Raises VolumeError on NaN or Inf."""
        inside = box.intersect(self.box)
        raw = self.image.read(inside)
        if raw.dtype.kind == "f" and not _finite(raw):
            raise VolumeError(
                f"the image {self.name} holds NaN or Inf in {self.image.locate(inside)}; a network cannot learn from "
                "them: replace them or choose another region"
            )
        values = self.scaling.apply(raw)
        return values if inside == box else np.pad(values, [(0, 0), *_missing(box, inside)], mode="edge")

    def read_labels(self, box: Box) -> NDArray[np.int64]:
        """Return the labels of `box`; IGNORED where unlabelled or beyond the region."""
        inside = box.intersect(self.box)
        raw = self.labels.read(inside)[0]
        values = raw.astype(np.int64)
        values[raw == self.ignore] = IGNORED
        return values if inside == box else np.pad(values, _missing(box, inside), constant_values=IGNORED)

    def find(self, tile: Box, cls: int, rng: np.random.Generator) -> tuple[int, int, int]:
        """Return a random voxel of class `cls` in `tile`, which must hold one."""
        labels = self.labels.read(tile)[0]
        # A few guesses are cheaper than to look at every voxel, and find each one of the class just as likely.
        guesses = np.unravel_index(rng.integers(labels.size, size=_GUESSES), labels.shape)
        hits = np.flatnonzero(labels[guesses] == cls)
        if len(hits):
            z, y, x = (int(axis[hits[0]]) for axis in guesses)
        else:
            found = np.nonzero(labels == cls)
            chosen = int(rng.integers(len(found[0])))
            z, y, x = (int(axis[chosen]) for axis in found)
        return z + tile.start[0], y + tile.start[1], x + tile.start[2]


_GUESSES = 48


def _finite(values: NDArray[Any]) -> bool:
    # The sum is finite where all are, unless they are huge: only then each is looked at.
    with np.errstate(all="ignore"):
        return bool(np.isfinite(values.sum(dtype=np.float32))) or bool(np.isfinite(values).all())


def _missing(box: Box, inside: Box) -> list[tuple[int, int]]:
    return [(i - a, b - j) for a, b, i, j in zip(box.start, box.stop, inside.start, inside.stop, strict=True)]
