"""Tiles of exact mode against brute force: what is kept is never spoilt, and nothing is read in vain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volseg.geometry import AxisTiles, Box, TileLattice


@st.composite
def lines(draw: st.DrawFn) -> AxisTiles:
    step, phase = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.integers(0, 7))
    phase %= step
    margin = draw(st.integers(0, 9)) if draw(st.booleans()) else 0
    least = 2 * margin + 1 + draw(st.integers(0, 10))
    smallest = least + (phase - least) % step
    return AxisTiles(
        draw(st.integers(1, 90)), draw(st.integers(1, 50)), draw(st.integers(0, 20)), draw(st.integers(0, 20)), step,
        phase, smallest, margin,
    )  # fmt: skip


def sound(axis: AxisTiles, begin: int, end: int) -> range:
    """Return the voxels of the volume whose answers a window of the whole input gets right.

    `begin` and `end` are places in the whole input, whose answer at place p is that of voxel p - margin.
    """
    first = 0 if begin == 0 else begin + axis.before
    last = axis.whole - 2 * axis.margin if end == axis.whole else end - 2 * axis.margin - axis.after
    return range(first, last)


@given(lines())
def test_tiles_cover_the_axis_once(axis: AxisTiles) -> None:
    voxels = [v for i in range(axis.count) for v in range(axis.origin(i), axis.end(i))]
    assert voxels == list(range(axis.size))


@given(lines())
def test_windows_are_inputs_of_the_network_that_lie_on_its_pools(axis: AxisTiles) -> None:
    least = max(axis.size + 2 * axis.margin, axis.smallest)
    assert least <= axis.whole < least + axis.step
    for i in range(axis.count):
        first, last = (place + axis.margin for place in axis.window(i))
        assert 0 <= first < last <= axis.whole
        assert first % axis.step == (axis.whole - last) % axis.step == 0
        assert last - first >= axis.smallest
        assert (last - first - axis.phase) % axis.step == 0


@given(lines())
def test_what_is_kept_is_sound_and_a_smaller_window_would_not_do(axis: AxisTiles) -> None:
    for i in range(axis.count):
        first, last = (place + axis.margin for place in axis.window(i))
        tile, right = range(axis.origin(i), axis.end(i)), sound(axis, first, last)
        assert right.start <= tile.start
        assert tile.stop <= right.stop
        kept = axis.kept(i)
        assert (kept.start + first, kept.stop + first) == (tile.start, tile.stop)
        assert 0 <= kept.start < kept.stop <= last - first - 2 * axis.margin
        for begin, end in ((first + axis.step, last), (first, last - axis.step)):
            if end - begin >= axis.smallest:
                smaller = sound(axis, begin, end)
                assert smaller.start > tile.start or smaller.stop < tile.stop


@given(lines(), st.data())
def test_touching_and_reach_equal_brute_force(axis: AxisTiles, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, axis.size - 1))
    stop = data.draw(st.integers(start + 1, axis.size))
    touching = [i for i in range(axis.count) if axis.origin(i) < stop and axis.end(i) > start]
    assert list(axis.touching(start, stop)) == touching
    windows = [axis.window(i) for i in touching]
    inside = [(max(a, 0), min(b, axis.size)) for a, b in windows]
    assert axis.read(touching[0], touching[-1]) == (min(a for a, _ in inside), max(b for _, b in inside))
    assert sum(axis.lengths(start, stop).elements()) == sum(b - a for a, b in windows)
    assert axis.longest == max(b - a for a, b in map(axis.window, range(axis.count)))
    assert list(axis.touching(start, start)) == []
    begin = [i for i in range(axis.count) if start <= axis.origin(i) < stop]
    assert list(axis.beginning(start, stop)) == begin


def test_the_example_of_the_docs() -> None:
    axis = AxisTiles(20, 8, 2, 3, 4, 0, 4)
    assert [axis.window(i) for i in range(axis.count)] == [(0, 12), (4, 20), (12, 20)]
    assert [axis.kept(i) for i in range(axis.count)] == [slice(0, 8), slice(4, 12), slice(4, 8)]


def test_a_lattice_is_the_product_of_its_axes() -> None:
    z, y, x = AxisTiles(5, 1, 0, 0, 1), AxisTiles(20, 8, 2, 3, 4, 0, 4), AxisTiles(3, 8, 2, 2, 4, 0, 4, 0)
    lattice = TileLattice((z, y, x))
    assert (lattice.shape, lattice.stride, lattice.answer, lattice.patch) == (
        (5, 20, 3),
        (1, 8, 8),
        (1, 8, 8),
        (1, 16, 4),
    )
    assert lattice.halo == ((0, 2, 2), (0, 3, 2))
    assert lattice.count == 15
    assert lattice.box((2, 2, 0)) == Box((2, 16, 0), (3, 20, 3))
    # The volume is smaller than what the network takes: one voxel more is read at its high side.
    assert lattice.source((2, 1, 0)) == Box((2, 4, 0), (3, 20, 4))
    assert lattice.read(lattice.ranges(Box((0, 9, 0), (2, 10, 1)))) == Box((0, 4, 0), (2, 20, 3))
    assert lattice.voxels(Box((0, 9, 0), (2, 17, 1))) == 2 * (16 + 8) * 4


@pytest.mark.parametrize("values", [(0, 1, 0, 0, 1), (5, 0, 0, 0, 1), (5, 1, -1, 0, 1), (9, 4, 0, 0, 4, 1, 4)])
def test_impossible_tiles_are_refused(values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="got AxisTiles"):
        AxisTiles(*values)
