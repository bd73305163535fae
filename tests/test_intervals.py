"""Intervals: they hold the truth about as often as they say, and say nothing where slabs are too few."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from volseg.analysis.counts import Slabs
from volseg.analysis.intervals import dice_intervals, slab_dice, t_quantile
from volseg.geometry import Box


def counts(both: list[int], true: list[int], predicted: list[int]) -> NDArray[np.int64]:
    """Return the counts of a background that fills every slab to 1000 voxels, and one class."""
    found = np.zeros((len(both), 2, 3), np.int64)
    found[:, 1] = np.array([both, true, predicted]).T
    found[:, 0, 1:] = 1000 - found[:, 1, 1:]
    return found


@pytest.mark.parametrize("freedom", [2, 3, 4, 6, 9, 30])
def test_t_quantiles(freedom: int) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=5e-3)


@pytest.mark.parametrize("slabs", [3, 10])
def test_covers_the_true_dice(slabs: int) -> None:
    """About 95 % of 1000 regions of independent slabs have the Dice of endless slabs in their interval."""
    generator = np.random.default_rng(5)
    runs = 1000

    def draw(number: int) -> tuple[NDArray[np.int64], ...]:
        true = generator.poisson(200, number) + 50
        both = generator.binomial(true, generator.beta(16, 4, number))
        return both, true, both + generator.poisson(20, number)

    both, true, predicted = draw(1_000_000)
    endless = 2 * both.sum() / (true.sum() + predicted.sum())
    held = 0
    for _ in range(runs):
        interval = dice_intervals(counts(*(v.tolist() for v in draw(slabs))), [1], [1])[0][1]
        assert interval is not None
        held += interval[0] <= endless <= interval[1]
    # Three standard errors of the share are 0.02; percentiles of a bootstrap reach 0.74 with 3 slabs and 0.89 with 10.
    assert 0.92 <= held / runs <= 0.975


def test_by_hand_on_the_arcsine_scale() -> None:
    """Dice without one slab each: 0.8 +- 0.1, so by t with two degrees of freedom, which is 4.303."""
    found = dice_intervals(counts([60, 80, 100], [100] * 3, [100] * 3), [1], [1])
    angles = np.arcsin(np.sqrt([0.9, 0.8, 0.7]))
    error = np.sqrt(2 / 3 * ((angles - angles.mean()) ** 2).sum())
    low, high = np.arcsin(np.sqrt(0.8)) - 4.3027 * error, np.arcsin(np.sqrt(0.8)) + 4.3027 * error
    assert high > np.pi / 2
    assert found[0][1] == pytest.approx((np.sin(low) ** 2, 1.0), abs=1e-4)
    assert found[1] == found[0][1]


def test_the_mean_is_taken_over_the_classes_of_the_same_slabs() -> None:
    """Two classes that make up for each other in every slab: each is uncertain, their mean is not."""
    both = np.array([[60, 80], [70, 70], [80, 60], [65, 75]])
    some = np.zeros((4, 3, 3), np.int64)
    some[:, 1:, 0], some[:, 1:, 1:] = both, 100
    each, mean = dice_intervals(some, [1, 2], [1, 2])
    assert each[1] is not None
    assert each[1][1] - each[1][0] > 0.1
    assert mean == pytest.approx((0.7, 0.7))


def test_slabs_of_one_score_have_no_spread() -> None:
    assert dice_intervals(counts([80] * 5, [100] * 5, [100] * 5), [1], [1])[0][1] == pytest.approx((0.8, 0.8))


def test_too_few_slabs_give_none() -> None:
    assert dice_intervals(counts([80, 90], [100] * 2, [100] * 2), [1], [1]) == ({1: None}, None)
    rare = counts([80, 90, 0, 0, 0], [100, 100, 0, 0, 0], [100, 100, 0, 0, 0])
    each, mean = dice_intervals(rare, [0, 1], [1])
    assert (each[1], mean) == (None, None)
    assert each[0] is not None
    assert slab_dice(rare, 1) == [0.8, 0.9, None, None, None]
    unlabelled = counts([80] * 5, [100] * 5, [100] * 5)
    unlabelled[2:] = 0
    assert dice_intervals(unlabelled, [1], [1]) == ({1: None}, None)


def test_slabs_cut_the_longest_axis_evenly() -> None:
    region = Box((0, 5, 3), (4, 30, 26))
    slabs = Slabs.cut(region, None, 10)
    assert (slabs.axis, slabs.count) == (1, 10)
    assert slabs.edges[0] == 5
    assert slabs.edges[-1] == 30
    assert {b - a for a, b in zip(slabs.edges, slabs.edges[1:], strict=False)} == {2, 3}
    assert Slabs.cut(region, 0, 10).edges == (0, 1, 2, 3, 4)
    covered = np.zeros((4, 25, 23), int)
    for box in region.tiles((3, 4, 50)):
        for number, index in slabs.parts(box):
            covered[box.relative_to(region.start).slices][index] += number + 1
    expected = np.searchsorted(slabs.edges, np.arange(5, 30), side="right")
    assert (covered == expected[None, :, None]).all()
