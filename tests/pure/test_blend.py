"""Blend weights: a partition of unity on every axis, and integer sums that cannot depend on order nor overflow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from volseg.blend import ONE, Window, axis_weights
from volseg.geometry import AxisLattice, Box, PatchLattice, Triple, stride_for

windows: st.SearchStrategy[Window] = st.sampled_from(("gaussian", "constant"))


@st.composite
def axes(draw: st.DrawFn) -> AxisLattice:
    side, margin = draw(st.integers(1, 48)), draw(st.sampled_from((0, 0, 3, 20)))
    return AxisLattice(draw(st.integers(1, 130)), side + 2 * margin, draw(st.integers(1, side)), margin)


def coverage(axis: AxisLattice, window: Window) -> NDArray[np.float64]:
    total = np.zeros(axis.size + axis.side)
    for i in range(axis.count):
        origin = axis.origin(i)
        total[origin : origin + axis.side] += axis_weights(axis, i, window)
    return total[: axis.size]


@given(axes(), windows)
def test_the_weights_of_an_axis_sum_to_one(axis: AxisLattice, window: Window) -> None:
    np.testing.assert_allclose(coverage(axis, window), 1.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 100, 192, 257])
def test_the_weights_of_usual_patches_sum_to_one(size: int, overlap: float, window: Window) -> None:
    (stride, _, _) = stride_for((64, 64, 64), overlap)
    axis = AxisLattice(size, 64, stride)
    np.testing.assert_allclose(coverage(axis, window), 1.0, rtol=0, atol=1e-12)


@given(axes(), windows)
def test_weights_lie_between_nothing_and_one(axis: AxisLattice, window: Window) -> None:
    for i in range(axis.count):
        weights = axis_weights(axis, i, window)
        assert weights.shape == (axis.side,)
        # The least weight that three axes can give stays far above the resolution of the fixed point.
        assert weights.min() > 0
        assert weights.max() <= 1


def test_a_gaussian_prefers_a_patch_s_middle_and_a_constant_does_not() -> None:
    axis = AxisLattice(96, 64, 32)
    gaussian, constant = axis_weights(axis, 0, "gaussian"), axis_weights(axis, 0, "constant")
    assert gaussian[32:].tolist() == sorted(gaussian[32:], reverse=True)
    assert gaussian[33] > 0.95
    assert gaussian[63] < 0.05
    assert gaussian[47] + gaussian[48] == pytest.approx(1.0)
    np.testing.assert_array_equal(gaussian[:32], 1.0)
    np.testing.assert_array_equal(constant[32:], 0.5)


def test_weights_depend_on_neighbours_only() -> None:
    """Far from both ends every patch has the same weights, so that they can be kept and never grow with the volume."""
    axis = AxisLattice(10**9, 64, 48)
    assert axis_weights(axis, 5, "gaussian") is axis_weights(axis, 10**6, "gaussian")


def test_weights_that_are_shared_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        axis_weights(AxisLattice(96, 64, 32), 0, "gaussian")[0] = 2


def summed(lattice: PatchLattice, window: Window, seed: int) -> NDArray[np.int32]:
    """Sum the fixed-point weights of all patches in a random order, as the accumulator does: float32, then rounded."""
    total = np.zeros(lattice.shape, np.int32)
    everything = Box.of(lattice.shape)
    indices = list(lattice.touching(everything))
    for place in np.random.default_rng(seed).permutation(len(indices)):
        index = indices[place]
        box = lattice.box(index)
        inside = box.intersect(everything)
        z, y, x = (
            axis_weights(axis, i, window)[: inside.shape[n]].astype(np.float32)
            for n, (axis, i) in enumerate(zip(lattice.axes, index, strict=True))
        )
        weight = ((z * np.float32(ONE))[:, None] * y)[:, :, None] * x
        total[inside.slices] += np.round(weight).astype(np.int32)
    return total


@pytest.mark.parametrize("window", ["gaussian", "constant"])
@pytest.mark.parametrize(
    ("shape", "patch", "overlap"),
    [
        ((40, 37, 50), (16, 16, 16), 0.5),
        ((40, 37, 50), (16, 16, 16), 0.25),
        ((23, 29, 31), (12, 20, 7), 0.5),
        ((1, 90, 70), (1, 32, 32), 0.75),
        ((5, 40, 3), (8, 16, 8), 0.5),
    ],
)
def test_fixed_point_sums_are_one_in_any_order(shape: Triple, patch: Triple, overlap: float, window: Window) -> None:
    lattice = PatchLattice(shape, patch, stride_for(patch, overlap))
    first = summed(lattice, window, seed=1)
    np.testing.assert_array_equal(first, summed(lattice, window, seed=2))
    off = np.abs(first.astype(np.int64) - ONE).max()
    assert off <= 3e-7 * ONE


@given(st.integers(1, 14), st.integers(1, 7), st.data(), windows)
def test_fixed_point_sums_never_overflow(size: int, patch: int, data: st.DataObject, window: Window) -> None:
    """However many patches meet in a voxel, each adds half a step of rounding at most."""
    stride = data.draw(st.integers(1, patch))
    lattice = PatchLattice((size,) * 3, (patch,) * 3, (stride,) * 3)
    exact = summed(lattice, window, seed=0).astype(np.int64)
    meeting = (-(-patch // stride) + 1) ** 3
    assert np.abs(exact - ONE).max() <= meeting / 2 + 3e-7 * ONE
    assert exact.max() < np.iinfo(np.int32).max
