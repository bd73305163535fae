"""Scores over a region, gathered patch by patch: integer counts only, so that memory does not grow with the region.

A class that is neither in the truth nor predicted has no Dice and is left out of the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

BINS = 256
"""Steps of probability at which a threshold can lie."""

_THRESHOLDS = range(int(0.2 * BINS), int(0.8 * BINS) + 1)


@dataclass(frozen=True, slots=True)
class Scores:
    """Dice of each class, background first, None where undefined; and the threshold, for one sigmoid channel.

    `sizes` are the labelled voxels of each class.
    """

    dice: tuple[float | None, ...]
    sizes: tuple[int, ...]
    threshold: float | None = None

    @property
    def mean_foreground(self) -> float | None:
        """Mean Dice of the classes above 0, None where none is defined."""
        known = [d for d in self.dice[1:] if d is not None]
        return sum(known) / len(known) if known else None

    @property
    def merit(self) -> float:
        """What weights are chosen by: the mean over the classes above 0, weighted by the root of their size.

        The Dice of a class with a handful of voxels is mostly chance and would decide a plain mean.
        """
        pairs = [(d or 0.0, math.sqrt(n)) for d, n in zip(self.dice[1:], self.sizes[1:], strict=True)]
        total = sum(weight for _, weight in pairs)
        return sum(dice * weight for dice, weight in pairs) / total if total else 0.0


def dice_of(overlap: float, predicted: float, true: float) -> float | None:
    """Return 2 overlap / (predicted + true), None where both are empty."""
    total = predicted + true
    return 2 * overlap / total if total else None


@dataclass
class ClassCounts:
    """Voxels by (true, predicted) class for a softmax network."""

    classes: int
    confusion: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.confusion = np.zeros((self.classes, self.classes), np.int64)

    def add(self, truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> None:
        """Count labelled voxels; both arrays (n,)."""
        pairs = np.bincount(truth * self.classes + predicted, minlength=self.classes**2)
        self.confusion += pairs.reshape(self.classes, self.classes)

    def scores(self) -> Scores:
        """Return the Dice of every class."""
        true, predicted = self.confusion.sum(1), self.confusion.sum(0)
        overlap = np.diag(self.confusion)
        return Scores(
            tuple(dice_of(float(o), float(p), float(t)) for o, p, t in zip(overlap, predicted, true, strict=True)),
            tuple(true.tolist()),
        )


@dataclass
class ProbabilityCounts:
    """Voxels by true class (2) and probability of class 1 (BINS): Dice at every threshold at once."""

    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, BINS), np.int64))

    def add(self, truth: NDArray[np.int64], probability: NDArray[np.float32]) -> None:
        """Count labelled voxels; both arrays (n,)."""
        bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
        self.histogram += np.bincount(truth * BINS + bins, minlength=2 * BINS).reshape(2, BINS)

    def scores(self, threshold: float | None = None) -> Scores:
        """Return the Dice of both classes at `threshold`, or at the one that is best for class 1.

        Of several best ones, the nearest to 0.5; between 0.2 and 0.8, because beyond a network is not to be trusted.
        """
        # above[c, i]: voxels of true class c that class 1 wins if the threshold is the lower edge of bin i.
        above = self.histogram[:, ::-1].cumsum(1)[:, ::-1]
        totals = self.histogram.sum(1)

        def class_one(i: int) -> float:
            return dice_of(float(above[1, i]), float(above[:, i].sum()), float(totals[1])) or 0.0

        best = round(threshold * BINS) if threshold is not None else None
        if best is None:
            best = max(_THRESHOLDS, key=lambda i: (class_one(i), -abs(i - BINS // 2)))
        below = totals - above[:, best]
        one = dice_of(float(above[1, best]), float(above[:, best].sum()), float(totals[1]))
        zero = dice_of(float(below[0]), float(below.sum()), float(totals[0]))
        return Scores((zero, one), (int(totals[0]), int(totals[1])), best / BINS)
