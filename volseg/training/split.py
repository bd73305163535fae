"""Dividing labelled slices: a random share for the training, or slabs for a cross-validation. Plain arithmetic."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from volseg.errors import SpecError
from volseg.geometry.box import Box

Counts = NDArray[np.int64]
Place = tuple[int, int]
"""Number of a volume and number of a slice in it."""


def draw_slices(counts: Sequence[Counts], share: float, seed: int) -> tuple[set[Place], set[Place]]:
    """Return the slices that train and those that validate, of all that hold a label.

    `counts` has the labelled voxels of each slice, one array a volume. At least one slice is on either side. Raises
    SpecError where fewer than two hold a label.
    """
    places = labelled(counts)
    if len(places) < 2:
        raise SpecError(
            f"--split {share:g}: {len(places)} slice holds labels, two are the least: one to train on, one to "
            "validate; nothing was trained: label another slice, or leave --split out"
        )
    train = min(max(round(share * len(places)), 1), len(places) - 1)
    order = np.random.default_rng([seed, 2]).permutation(len(places))
    return {places[i] for i in order[:train]}, {places[i] for i in order[train:]}


def cut_slabs(counts: Sequence[Counts], folds: int) -> list[list[Place]]:
    """Return `folds` lists of ranges, one range a volume: slabs of about as many labelled voxels each.

    Slabs follow each other over the volumes in their order, each with at least one labelled slice, and cut unlabelled
    stretches in the middle; together they cover every slice once. Raises SpecError where fewer slices hold a label.
    """
    places = labelled(counts)
    if len(places) < folds:
        raise SpecError(
            f"--folds {folds}: only {len(places)} slice(s) along the axis that is cut hold labels, and every slab "
            f"needs one; nothing was trained: say --folds {len(places)} or fewer, or label more slices"
            if len(places) > 1
            else f"--folds {folds}: a single slice holds labels, which cannot be divided; nothing was trained: leave "
            "--folds out"
        )
    ends = np.cumsum([counts[volume][i] for volume, i in places])
    firsts = [0]
    for fold in range(1, folds):
        nearest = int(np.abs(ends - ends[-1] * fold / folds).argmin()) + 1
        firsts.append(min(max(nearest, firsts[-1] + 1), len(places) - folds + fold))
    cuts = [_between(places[i - 1], places[i]) for i in firsts[1:]]
    borders = [(0, 0), *cuts, (len(counts), 0)]
    return [[_range(a, b, volume, len(rows)) for volume, rows in enumerate(counts)] for a, b in pairwise(borders)]


def labelled(counts: Sequence[Counts]) -> list[Place]:
    """Return all slices with a labelled voxel in order."""
    return [(volume, int(i)) for volume, rows in enumerate(counts) for i in np.flatnonzero(rows)]


def _between(before: Place, after: Place) -> Place:
    if before[0] != after[0]:
        return after[0], 0
    return after[0], (before[1] + after[1] + 1) // 2


def _range(start: Place, stop: Place, volume: int, slices: int) -> Place:
    """Return the slices of `volume` from one border to the next; an empty range where there are none."""
    low = 0 if volume > start[0] else start[1] if volume == start[0] else slices
    high = slices if volume < stop[0] else stop[1] if volume == stop[0] else 0
    return low, max(low, high)


def take_slices(boxes: Sequence[Box], axis: int, slices: Collection[int]) -> list[Box]:
    """Return the part of `boxes` in some slices along `axis`: as few boxes as possible, neighbours in one."""
    taken = []
    for box in boxes:
        inside = {i for i in slices if box.start[axis] <= i < box.stop[axis]}
        starts = sorted(i for i in inside if i - 1 not in inside)
        stops = sorted(i + 1 for i in inside if i + 1 not in inside)
        taken += [_clip(box, axis, start, stop) for start, stop in zip(starts, stops, strict=True)]
    return taken


def take_range(boxes: Sequence[Box], axis: int, start: int, stop: int, *, inside: bool = True) -> list[Box]:
    """Return the part of `boxes` from slice `start` to `stop` along `axis`, or what lies outside it."""
    spans = [(start, stop)] if inside else [(0, start), (stop, max((box.stop[axis] for box in boxes), default=stop))]
    cut = [_clip(box, axis, low, high) for box in boxes for low, high in spans if low < high]
    return [box for box in cut if box.size]


def _clip(box: Box, axis: int, start: int, stop: int) -> Box:
    low, high = list(box.start), list(box.stop)
    low[axis] = min(max(box.start[axis], start), box.stop[axis])
    high[axis] = max(low[axis], min(box.stop[axis], stop))
    return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))
