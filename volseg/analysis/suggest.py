"""Which slices or boxes are most worth labelling next: where the network is unsure and the image is unlike the rest.

Every candidate gets an uncertainty, the mean entropy of its most uncertain tenth of voxels, and four descriptions: how
its voxels spread over the classes, over the grey values, where in it the uncertainty lies, and where it lies itself.
Candidates are then taken one by one: next is the one with the largest product of uncertainty and distance to the
nearest that is labelled or taken. That is the greedy k-center of core-sets (Sener and Savarese, ICLR 2018) weighted by
uncertainty, in the manner of suggestive annotation (Yang et al., MICCAI 2017: uncertain first, then unlike each other).

Studies disagree on whether such a choice beats slices evenly spaced (arXiv:2412.08081 found that it did not), and a
network can be sure and wrong. `tests/bench/suggest.py` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from volseg.analysis.candidates import Candidates, Described, describe
from volseg.analysis.counts import boxes
from volseg.errors import InputError, VolumeError
from volseg.geometry.box import AXES, Box, Triple
from volseg.storage.volume import Volume


def suggest(
    probabilities: Volume,
    image: Volume,
    *,
    n: int = 3,
    axis: Literal["z", "y", "x"] = "z",
    box: Triple | None = None,
    region: Box | None = None,
    labelled: Sequence[int | Box] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Return the `n` slices across `axis`, or boxes of shape `box` (z, y, x), most worth labelling, the best first.

    `probabilities` is (c, z, y, x) uint8 where 255 stands for 1, as `segment` writes it, `image` what was segmented.
    Candidates lie in `region` (default: everything). Those that meet something `labelled`, slices by their number along
    `axis` or boxes, are left out, and the others are kept unlike them.

    Each suggestion has ``box`` (a region as the command line takes it), ``slice`` and ``axis`` for slices,
    ``uncertainty`` (0: sure, 1: all classes alike), ``diversity`` (distance to the nearest labelled or earlier one, 0
    to 1), ``score`` (their product) and ``why``. Both volumes are read once, in boxes of a few million voxels, and the
    same input gives the same answer. `progress` is called with the boxes done and their number.

    Raises VolumeError where the volumes do not fit each other, InputError where fewer than `n` candidates are left.
    """
    _check(probabilities, image, n)
    candidates = Candidates.cut(region or Box.of(image.shape), box, AXES.index(axis))
    taken = _meets(candidates, labelled, AXES.index(axis))
    free = int((~taken).sum())
    if n > free:
        raise InputError(
            f"{n} suggestions were asked for, but region {region or Box.of(image.shape)} has {free} "
            f"{'boxes' if box else 'slices'} without labels; nothing was suggested: ask for fewer, or widen the region"
        )
    found = describe(probabilities, image, candidates, progress)
    result = []
    for choice in _choose(candidates, found, taken, n):
        place = {} if box else {"axis": axis, "slice": candidates.box(choice.number).start[AXES.index(axis)]}
        result.append({**place, **_entry(candidates, found, choice)})
    return result


def labelled_slices(labels: Volume, axis: Literal["z", "y", "x"] = "z", ignore: int = 255) -> list[int]:
    """Return the numbers of the slices across `axis` that hold a labelled voxel, read box by box."""
    across = AXES.index(axis)
    others = tuple(a for a in range(3) if a != across)
    held = np.zeros(labels.shape[across], bool)
    for box in boxes(labels, Box.of(labels.shape)):
        held[box.start[across] : box.stop[across]] |= (labels.read(box)[0] != ignore).any(axis=others)
    return [int(number) for number in np.nonzero(held)[0]]


@dataclass(frozen=True)
class _Choice:
    number: int
    diversity: float
    parts: dict[str, float]


def _choose(candidates: Candidates, found: Described, labelled: NDArray[np.bool_], n: int) -> list[_Choice]:
    """Take `n` candidates one by one, each the best beside those before."""
    nearest = np.full(candidates.count, np.inf)
    # How unlike the nearest labelled or taken candidate each one is, by description.
    parts = {name: np.zeros(candidates.count) for name in ("grey values", "classes", "uncertain places", "place")}
    reach = _reach(candidates, n + _groups(labelled))

    def take(number: int) -> None:
        apart = _apart(candidates, found, number, reach)
        distance = np.sqrt(np.mean([part**2 for part in apart.values()], axis=0))
        closer = distance < nearest
        nearest[closer] = distance[closer]
        for name, part in apart.items():
            parts[name][closer] = part[closer]

    for number in np.nonzero(labelled)[0]:
        take(int(number))
    chosen: list[_Choice] = []
    open_ = ~labelled
    for _ in range(n):
        diversity = np.minimum(nearest, 1.0)
        # Where the network is sure of everything, what is unlike the rest still comes first.
        score = np.where(open_, (found.uncertainty + 1e-6) * (diversity + 1e-6), -1.0)
        best = int(score.argmax())
        chosen.append(_Choice(best, float(diversity[best]), {name: float(part[best]) for name, part in parts.items()}))
        open_[best] = False
        take(best)
    return chosen


def _apart(candidates: Candidates, found: Described, number: int, reach: float) -> dict[str, NDArray[np.float64]]:
    """Return how unlike candidate `number` all are, each between 0 and 1.

    Hellinger's distance between shares, the root mean square between uncertainties at the same place, and the distance
    in space over `reach`, from which on it counts no more.
    """

    def hellinger(shares: NDArray[np.float64]) -> NDArray[np.float64]:
        roots = np.sqrt(shares)
        apart: NDArray[np.float64] = np.sqrt(((roots - roots[number]) ** 2).sum(axis=1) / 2)
        return apart

    places = found.places
    space = np.linalg.norm(candidates.centres - candidates.centres[number], axis=1)
    return {
        "grey values": hellinger(found.greys),
        "classes": hellinger(found.classes),
        "uncertain places": np.sqrt(((places - places[number]) ** 2).mean(axis=1)),
        "place": np.minimum(space / reach, 1.0),
    }


def _reach(candidates: Candidates, wanted: int) -> float:
    """Return how far apart `wanted` candidates would lie if they were spread evenly, in voxels."""
    sides = [float(n) for n, cells in zip(candidates.region.shape, candidates.grid, strict=True) if cells > 1]
    if not sides:
        return 1.0
    volume = float(np.prod(sides))
    return max(1.0, float((volume / max(wanted, 1)) ** (1 / len(sides))))


def _groups(labelled: NDArray[np.bool_]) -> int:
    """Return how many runs of labelled candidates there are: neighbours count as one."""
    return int((np.diff(labelled.astype(np.int8), prepend=0) == 1).sum())


def _entry(candidates: Candidates, found: Described, choice: _Choice) -> dict[str, Any]:
    uncertainty = float(found.uncertainty[choice.number])
    return {
        "box": str(candidates.box(choice.number)),
        "uncertainty": uncertainty,
        "diversity": choice.diversity,
        "score": uncertainty * choice.diversity,
        "why": _why(uncertainty, float(np.median(found.uncertainty)), choice),
    }


def _why(uncertainty: float, usual: float, choice: _Choice) -> str:
    reasons = [f"uncertainty {uncertainty:.2f} in its least certain tenth, {usual:.2f} is usual"]
    descriptions = {name: value for name, value in choice.parts.items() if name != "place"}
    name = max(descriptions, key=lambda key: descriptions[key])
    if descriptions[name] > 0.1:
        reasons.append(f"unlike what is labelled or suggested before it, most of all by its {name}")
    elif choice.parts["place"] > 0.5:
        reasons.append("far from what is labelled or suggested before it")
    return "; ".join(reasons)


def _meets(candidates: Candidates, labelled: Sequence[int | Box], axis: int) -> NDArray[np.bool_]:
    """Mark the candidates that meet something labelled."""
    marked = np.zeros(candidates.count, bool)
    for item in labelled:
        box = item
        if not isinstance(box, Box):
            start, stop = list(candidates.region.start), list(candidates.region.stop)
            start[axis], stop[axis] = box, box + 1
            box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
        marked[candidates.meeting(box)] = True
    return marked


def _check(probabilities: Volume, image: Volume, n: int) -> None:
    if probabilities.shape != image.shape:
        raise VolumeError(
            f"{image.uri} has shape {image.shape}, {probabilities.uri} has {probabilities.shape}: they must be equal; "
            "nothing was suggested: name the image that was segmented"
        )
    if probabilities.dtype != np.uint8 or (probabilities.channels or 0) < 2:
        raise VolumeError(
            f"{probabilities.uri} holds {probabilities.channels or 'no'} channels of {probabilities.dtype}, "
            "probabilities are one channel of uint8 a class; nothing was suggested: segment with --probabilities"
        )
    if n < 1:
        raise InputError(f"{n} suggestions are none; nothing was suggested: ask for at least 1")
