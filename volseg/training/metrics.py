"""Scores over a region, gathered patch by patch: integer counts only, so that memory does not grow with the region.

A class that is neither in the truth nor predicted has no Dice and is left out of the mean. The F1 score of voxels is
their Dice by another name.
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

    `sizes` are the labelled voxels of each class, `accuracy` is the share of all of them that is right.
    """

    dice: tuple[float | None, ...]
    sizes: tuple[int, ...]
    threshold: float | None = None
    accuracy: float | None = None

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
        """Return the Dice of every class, and the accuracy."""
        true, predicted = self.confusion.sum(1), self.confusion.sum(0)
        overlap = np.diag(self.confusion)
        return Scores(
            tuple(dice_of(float(o), float(p), float(t)) for o, p, t in zip(overlap, predicted, true, strict=True)),
            tuple(true.tolist()),
            accuracy=_share(int(overlap.sum()), int(true.sum())),
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
        right = int(below[0]) + int(above[1, best])
        return Scores((zero, one), (int(totals[0]), int(totals[1])), best / BINS, _share(right, int(totals.sum())))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


_BIASES = np.linspace(-3, 3, 61)
_ROUNDS = 5
# Of what a bias gains on the voxels that it was not tuned on, less is taken for chance.
_GAIN = 0.003
# Runs of neighbouring voxels that are tuned on and tried on in turn.
_RUNS = 20
# So many probabilities bound the seconds that tuning takes.
_MOST_VALUES = 4_000_000


def tune_class_bias(truth: NDArray[np.int64], probabilities: NDArray[np.float32]) -> tuple[float, ...]:
    """Return what to add to the logits of each class for the best merit of `Scores`; all 0 where nothing helps.

    `truth` (n,) and `probabilities` (n, classes) are of labelled voxels, those of one place next to each other. The
    bias of a class is found by coordinate ascent: class after class gets that of a grid from -3 to 3 which is best
    while the others stay. To tell a gain from chance, biases are tuned on every other run of voxels and tried on the
    rest, and the other way round: they are kept if both ways gain and the mean gain is above 0.003. Class 0 has bias 0.
    """
    thin = slice(None, None, -(-probabilities.size // _MOST_VALUES) or 1)
    truth = truth[thin]
    logits = np.log(np.maximum(probabilities[thin].T, np.float32(1e-30)), order="C")
    classes = len(logits)
    half = np.arange(truth.size) * _RUNS // max(truth.size, 1) % 2 == 0
    gains = []
    for tuned, tried in ((half, ~half), (~half, half)):
        bias = _ascend(logits[:, tuned], truth[tuned])
        gains.append(_merit(logits[:, tried], truth[tried], bias) - _merit(logits[:, tried], truth[tried]))
    if min(gains) <= 0 or sum(gains) / 2 <= _GAIN:
        return (0.0,) * classes
    bias = _ascend(logits, truth)
    return tuple(round(float(b), 6) for b in bias - bias[0])


def _merit(logits: NDArray[np.float32], truth: NDArray[np.int64], bias: NDArray[np.float32] | None = None) -> float:
    counts = ClassCounts(len(logits))
    counts.add(truth, (logits if bias is None else logits + bias[:, None]).argmax(0))
    return counts.scores().merit


def _ascend(logits: NDArray[np.float32], truth: NDArray[np.int64]) -> NDArray[np.float32]:
    classes = len(logits)
    bias = np.zeros(classes, np.float32)
    sizes = np.bincount(truth, minlength=classes)
    best = _merit(logits, truth)
    for _ in range(_ROUNDS):
        before = best
        for cls in np.flatnonzero(sizes):
            merits = _merits(logits, truth, bias, int(cls), sizes).tolist()
            # Of equal ones, the smallest change.
            choice = max(range(len(_BIASES)), key=lambda i: (round(merits[i], 6), -abs(_BIASES[i])))
            if merits[choice] > best + 1e-4:
                bias[cls], best = _BIASES[choice], merits[choice]
        if best == before:
            break
    return bias


def _merits(
    logits: NDArray[np.float32],
    truth: NDArray[np.int64],
    bias: NDArray[np.float32],
    cls: int,
    sizes: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return the merit of every bias of class `cls`: one histogram of where it starts to win tells them all."""
    top, rival = np.full(truth.size, -np.inf, np.float32), np.zeros(truth.size, np.int64)
    for other in range(len(logits)):
        if other != cls:
            values = logits[other] + bias[other]
            rival[values > top] = other
            np.maximum(top, values, out=top)
    steps = len(_BIASES)
    wins = np.searchsorted(_BIASES.astype(np.float32), top - logits[cls], side="right")
    kind = np.where(truth == cls, 2, truth == rival)
    shape = (len(logits), 3, steps + 1)
    counts = np.bincount((rival * 3 + kind) * (steps + 1) + wins, minlength=int(np.prod(shape))).reshape(shape)
    taken = counts.cumsum(axis=2)[:, :, :-1]
    left = counts.sum(axis=2, keepdims=True) - taken
    predicted, overlap = left.sum(axis=1), left[:, 1]
    predicted[cls], overlap[cls] = taken.sum(axis=(0, 1)), taken[:, 2].sum(axis=0)
    dice = 2 * overlap / np.maximum(predicted + sizes[:, None], 1)
    weights = np.sqrt(sizes[1:])
    merits: NDArray[np.float64] = weights @ dice[1:] / max(float(weights.sum()), 1e-12)
    return merits
