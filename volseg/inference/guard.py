"""The guard of reduced precision: labels of real patches, computed both ways, must agree but for close calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from volseg.geometry import Box
from volseg.inference.predictor import Predictor
from volseg.planning import Plan
from volseg.storage.volume import Volume

MOST_DIFFERENT = 0.001
"""Share of labels that may differ."""
NEAR = 0.1
"""A label may only differ where the two likeliest classes, or class 1 and the threshold, are closer than this."""
PATCHES = 4
_LOOKED_AT = 12


@dataclass(frozen=True)
class Verdict:
    """What a comparison with fp32 found."""

    voxels: int
    different: int
    widest: float
    """Largest distance from the decision boundary, in probability of fp32, at which a label differs."""

    @property
    def passed(self) -> bool:
        """Tell whether the reduced precision may be used."""
        return self.different <= MOST_DIFFERENT * self.voxels and self.widest < NEAR

    def __str__(self) -> str:
        """Say what was found in one line."""
        share = 100 * self.different / max(1, self.voxels)
        return (
            f"{share:.3f} % of {self.voxels} labels differ from fp32's (at most {100 * MOST_DIFFERENT:g} %), the "
            f"farthest {self.widest:.3f} from a decision boundary (below {NEAR:g})"
        )


def sample_patches(volume: Volume, plan: Plan, low: Sequence[float]) -> list[list[Tensor]]:
    """Return for each view up to `PATCHES` patches (c, z, y, x), float32, in raw units: those with most contrast.

    They are taken evenly from those that meet the region, and do not depend on who asks. NaN and Inf become `low`.
    """
    return [_of_view(volume, plan, number, low) for number in range(len(plan.views))]


def _of_view(volume: Volume, plan: Plan, number: int, low: Sequence[float]) -> list[Tensor]:
    lattice = plan.views[number].lattice
    spans = [axis.touching(a, b) for axis, a, b in
             zip(lattice.axes, plan.region.start, plan.region.stop, strict=True)]  # fmt: skip
    z, y, x = (len(span) for span in spans)
    count = z * y * x
    found = []
    for place in sorted({round(i * (count - 1) / (_LOOKED_AT - 1)) for i in range(_LOOKED_AT)}):
        index = (spans[0][place // (y * x)], spans[1][place // x % y], spans[2][place % x])
        found.append(_read(volume, lattice.source(index), low))
    found.sort(key=lambda patch: -float(patch.std()))
    return [torch.from_numpy(patch) for patch in found[:PATCHES]]


def _read(volume: Volume, patch: Box, low: Sequence[float]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    inside = patch.intersect(Box.of(volume.shape))
    voxels = volume.read(inside).astype(np.float32)
    for channel, value in zip(voxels, low, strict=True):
        channel[~np.isfinite(channel)] = value
    around = [(a - p, q - b) for p, a, b, q in zip(patch.start, inside.start, inside.stop, patch.stop, strict=True)]
    return np.pad(voxels, [(0, 0), *around], mode="edge")


def answers(predictor: Predictor, plan: Plan, patches: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the probabilities (sums, z, y, x) of the patches of all views, on the CPU."""
    return [
        probability.cpu()
        for view, raw in zip(plan.views, patches, strict=True)
        # Tiles are read by windows of several shapes, and a batch holds one.
        for _, alike in groupby(raw, key=lambda patch: patch.shape)
        for probability in predictor.run([patch.to(predictor.device) for patch in alike], view.axis)
    ]


def compare(full: Sequence[Tensor], reduced: Sequence[Tensor], threshold: float) -> Verdict:
    """Compare probabilities (sums, z, y, x) of the same patches; `threshold` decides between two classes."""
    voxels = different = 0
    widest = 0.0
    for exact, other in zip(full, reduced, strict=True):
        if len(exact) == 1:
            margin = (exact[0] - threshold).abs()
            wrong = (exact[0] > threshold) != (other[0] > threshold)
        else:
            best = exact.topk(2, dim=0).values
            margin = best[0] - best[1]
            wrong = exact.argmax(dim=0) != other.argmax(dim=0)
        voxels += wrong.numel()
        different += int(wrong.sum())
        if bool(wrong.any()):
            widest = max(widest, float(margin[wrong].max()))
    return Verdict(voxels, different, widest)
