"""Every patch has one owner in its column, and what owners add and give makes every sum once: against brute force."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import reduce
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volseg.geometry import AxisLattice, BlockGrid, Box, Ownership, PatchLattice, Sweep, Triple

Contribution = tuple[int, Triple, Triple]
"""A view, a patch of it and a voxel."""


@st.composite
def triples(draw: st.DrawFn, low: int, high: int) -> Triple:
    z, y, x = (draw(st.integers(low, high)) for _ in range(3))
    return z, y, x


@st.composite
def ownerships(draw: st.DrawFn) -> Ownership:
    shape = draw(triples(1, 9))
    lattices = []
    for _ in range(draw(st.integers(1, 2))):
        margin = draw(triples(0, 1))
        side = draw(triples(1, 6))
        stride = [draw(st.integers(max(1, (s + 2) // 3), s)) for s in side]
        patch = [s + 2 * m for s, m in zip(side, margin, strict=True)]
        lattices.append(PatchLattice(shape, tuple(patch), tuple(stride), margin))  # type: ignore[arg-type]
    start = [draw(st.integers(0, n - 1)) for n in shape]
    stop = [draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True)]
    region = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    grid = BlockGrid(shape, draw(triples(1, 5)), region)
    column = draw(st.sampled_from([(1, 1, 1), grid.counts, draw(triples(1, 3))]))
    return Ownership(grid, tuple(lattices), column)


def column_of(of: Ownership, index: int) -> Triple:
    z, y, x = (at // side for at, side in zip(of.grid.position(index), of.column, strict=True))
    return z, y, x


def column_box(of: Ownership, index: int) -> Box:
    others = [i for i in range(len(of.grid)) if column_of(of, i) == column_of(of, index)]
    return reduce(Box.hull, map(of.wanted, others))


def cells(box: Box) -> set[Triple]:
    z, y, x = (range(a, b) for a, b in zip(box.start, box.stop, strict=True))
    return set(product(z, y, x))


def every(counts: Iterable[int]) -> list[Triple]:
    """All index triples below `counts`."""
    z, y, x = map(range, counts)
    return list(product(z, y, x))


def needed(of: Ownership, index: int) -> Counter[Contribution]:
    """What a block must sum up: every patch at every voxel of it that the patch answers for."""
    wanted = of.wanted(index)
    return Counter(
        (view, patch, voxel)
        for view, lattice in enumerate(of.lattices)
        for patch in every(axis.count for axis in lattice.axes)
        for voxel in cells(lattice.box(patch).intersect(wanted))
    )


def given_by(of: Ownership, index: int, box: Box) -> Counter[Contribution]:
    """What a block's own patches add up to in a box."""
    return Counter(
        (patches.view, patch, voxel)
        for patches in of.own(index)
        for patch in patches
        for voxel in cells(of.lattices[patches.view].box(patch).intersect(box))
    )


@given(ownerships())
def test_every_contribution_is_counted_once(of: Ownership) -> None:
    for index in range(len(of.grid)):
        found = given_by(of, index, of.wanted(index))
        for seam in of.givers(index):
            found += given_by(of, seam.block, seam.box)
        assert found == needed(of, index)


@given(ownerships())
def test_every_patch_has_one_owner_a_column(of: Ownership) -> None:
    owners = Counter(
        (column_of(of, index), patches.view, patch)
        for index in range(len(of.grid))
        for patches in of.own(index)
        for patch in patches
    )
    assert set(owners.values()) == {1}
    expected = {
        (column_of(of, index), view, patch) for index in range(len(of.grid)) for view, patch, _ in needed(of, index)
    }
    assert set(owners) == expected
    assert of.computed == tuple(sum(view == found for _, found, _ in owners) for view in range(len(of.lattices)))


@given(ownerships())
def test_the_owner_holds_the_origin(of: Ownership) -> None:
    """Or, where that lies outside of the column, the first voxel of the answer inside."""
    for index in range(len(of.grid)):
        for patches in of.own(index):
            for patch in patches:
                box = of.lattices[patches.view].box(patch)
                own, column = of.wanted(index), column_box(of, index)
                start = map(max, box.start, column.start)
                assert all(a <= v < b for a, v, b in zip(own.start, start, own.stop, strict=True))


@given(ownerships())
def test_givers_and_receivers_agree_and_have_no_cycles(of: Ownership) -> None:
    pairs = {(i, seam.block): seam.box for i in range(len(of.grid)) for seam in of.receivers(i)}
    assert pairs == {(seam.block, i): seam.box for i in range(len(of.grid)) for seam in of.givers(i)}
    for (giver, taker), box in pairs.items():
        assert box.size > 0
        assert of.seam(giver, taker) == box
        assert of.wanted(taker).contains(box)
        assert of.extent(giver).contains(box)
        assert column_of(of, giver) == column_of(of, taker)
        assert all(a <= b for a, b in zip(of.grid.position(giver), of.grid.position(taker), strict=True))
    if len(of.lattices) == 1:
        # No voxel travels in vain.
        for (giver, _), box in pairs.items():
            assert {voxel for *_, voxel in given_by(of, giver, box)} == cells(box)


@given(ownerships())
def test_a_lost_seam_is_made_of_the_patches_that_touch_it(of: Ownership) -> None:
    for index in range(len(of.grid)):
        wanted = of.wanted(index)
        for seam in of.givers(index):
            again = {(p.view, patch) for p in of.shared(seam.block, index) for patch in p}
            touching = {(view, patch) for view, patch, voxel in given_by(of, seam.block, wanted)}
            assert again == touching


@given(ownerships())
def test_what_is_read_and_summed_suffices(of: Ownership) -> None:
    largest, volume = of.largest(), Box.of(of.grid.shape)
    read = 0
    for index in range(len(of.grid)):
        groups, extent = of.own(index), of.extent(index)
        for group in groups:
            boxes = [of.lattices[group.view].source(patch).intersect(volume) for patch in group]
            assert all(of.source(group).contains(box) for box in boxes)
            corners = [(min(b.start[a] for b in boxes), max(b.stop[a] for b in boxes)) for a in range(3)]
            assert [(a, b) for a, b in zip(of.source(group).start, of.source(group).stop, strict=True)] == corners
        summed = {voxel for *_, voxel in given_by(of, index, of.grid.region)} & cells(column_box(of, index))
        assert summed <= cells(extent)
        reach = of.hull(groups, index)
        assert all(reach.contains(of.source(group)) for group in groups)
        read += reach.size
        for found, most in ((of.wanted(index), largest.wanted), (extent, largest.extent), (reach, largest.read)):
            assert all(a <= b for a, b in zip(found.shape, most, strict=True))
        assert all(
            count <= most
            for view, most in enumerate(of.most_own)
            for count in [sum(group.count for group in groups if group.view == view)]
        )
    if len(of.lattices) == 1:
        assert read == of.read


@given(ownerships())
def test_seams_are_no_wider_than_said(of: Ownership) -> None:
    widest = of.widest()
    for index in range(len(of.grid)):
        here = of.grid.position(index)
        for seam in of.receivers(index):
            z, y, x = (b - a for a, b in zip(here, of.grid.position(seam.block), strict=True))
            assert all(a <= b for a, b in zip(seam.box.shape, widest[z, y, x], strict=True))


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_patches_that_begin_in_a_span(size: int, side: int, data: st.DataObject) -> None:
    line = AxisLattice(size, side, data.draw(st.integers(1, side)))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    expected = [i for i in range(line.count) if start <= line.origin(i) < stop]
    assert list(line.beginning(start, stop)) == expected


# ---------------------------------------------------------------- the order


@st.composite
def sweeps(draw: st.DrawFn) -> Sweep:
    return Sweep(draw(triples(1, 6)), draw(triples(1, 7)), draw(st.integers(0, 2)))


@given(sweeps())
def test_places_and_positions_follow_from_each_other(sweep: Sweep) -> None:
    everything = every(sweep.counts)
    assert sorted(sweep.place(p) for p in everything) == list(range(len(everything)))
    assert all(sweep.position(sweep.place(p)) == p for p in everything)


@given(sweeps())
def test_givers_come_first(sweep: Sweep) -> None:
    everything = every(sweep.counts)
    for a, b in product(everything, everything):
        together = all(p // g == q // g for p, q, g in zip(a, b, sweep.column, strict=True))
        if together and a != b and all(p <= q for p, q in zip(a, b, strict=True)):
            assert sweep.place(a) < sweep.place(b)


@given(sweeps(), st.data())
def test_the_front_bounds_what_lies_across_any_place(sweep: Sweep, data: st.DataObject) -> None:
    steps = triples(0, 2).filter(any)
    sizes = data.draw(st.dictionaries(steps, st.integers(1, 9), max_size=7))
    everything = every(sweep.counts)
    across = [0] * (len(everything) + 1)
    for p in everything:
        for step, size in sizes.items():
            q = (p[0] + step[0], p[1] + step[1], p[2] + step[2])
            if all(a // g == b // g and b < n for a, b, g, n in zip(p, q, sweep.column, sweep.counts, strict=True)):
                for place in range(sweep.place(p) + 1, sweep.place(q) + 1):
                    across[place] += size
    assert max(across) <= sweep.front(sizes)


@pytest.mark.parametrize("along", [0, 1, 2])
def test_the_front_of_a_large_column_is_about_one_layer(along: int) -> None:
    sizes: dict[Triple, int] = {
        (1, 0, 0): 100, (0, 1, 0): 100, (0, 0, 1): 100, (1, 1, 0): 10, (1, 0, 1): 10, (0, 1, 1): 10, (1, 1, 1): 1
    }  # fmt: skip
    front = Sweep((50, 50, 50), (50, 50, 50), along).front(sizes)
    assert 50 * 50 * 100 < front < 1.3 * 50 * 50 * 121
