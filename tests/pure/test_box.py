"""Boxes: set operations equal those on sets of voxels, and regions are read as Python reads slices."""

from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from volseg.errors import SpecError
from volseg.geometry import Box, Triple

SHAPE = (20, 33, 17)
sides = st.integers(0, 5)
points = st.tuples(sides, sides, sides)


def box_from(a: Triple, b: Triple) -> Box:
    z, y, x = (sorted(pair) for pair in zip(a, b, strict=True))
    return Box((z[0], y[0], x[0]), (z[1], y[1], x[1]))


boxes = st.builds(box_from, points, points)


def voxels(box: Box) -> set[Triple]:
    return {(z, y, x) for z, y, x in product(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True)))}


def test_measures() -> None:
    box = Box((1, 2, 3), (4, 6, 8))
    assert (box.shape, box.size) == ((3, 4, 5), 60)
    assert box.slices == (slice(1, 4), slice(2, 6), slice(3, 8))
    assert Box.of(SHAPE) == Box((0, 0, 0), SHAPE)
    assert str(box) == "1:4,2:6,3:8"


def test_an_inverted_box_is_refused() -> None:
    with pytest.raises(ValueError, match="inverted"):
        Box((0, 5, 0), (4, 4, 4))
    assert Box((3, 3, 3), (3, 4, 4)).size == 0


@given(boxes, boxes)
def test_a_hull_is_the_smallest_box_that_holds_both(a: Box, b: Box) -> None:
    hull = a.hull(b)
    assert hull == b.hull(a)
    for axis in range(3):
        assert hull.start[axis] in {a.start[axis], b.start[axis]}
        assert hull.stop[axis] in {a.stop[axis], b.stop[axis]}
    assert voxels(a) | voxels(b) <= voxels(hull)


@given(boxes, boxes)
def test_intersection_and_containment_are_those_of_sets(a: Box, b: Box) -> None:
    assert voxels(a.intersect(b)) == voxels(a) & voxels(b)
    assert a.intersect(b).size == b.intersect(a).size
    if b.size:
        assert a.contains(b) == (voxels(b) <= voxels(a))


@given(boxes, points)
def test_moving_there_and_back(box: Box, offset: Triple) -> None:
    z, y, x = offset
    assert voxels(box.shifted(offset)) == {(a + z, b + y, c + x) for a, b, c in voxels(box)}
    assert box.shifted(offset).relative_to(offset) == box


@given(boxes, st.tuples(*[st.integers(1, 4)] * 3))
def test_tiles_cut_a_box_along_the_anchored_grid(box: Box, tile: Triple) -> None:
    tiles = list(box.tiles(tile))
    assert sum(t.size for t in tiles) == box.size
    assert set().union(*map(voxels, tiles)) == voxels(box)
    for part in tiles:
        assert part.size > 0
        assert all(a // side == (b - 1) // side for a, b, side in zip(part.start, part.stop, tile, strict=True))
    assert [t.start for t in tiles] == sorted(t.start for t in tiles)


@st.composite
def regions(draw: st.DrawFn) -> tuple[str, list[tuple[int, int]]]:
    """A region's text and what Python's own slices make of it."""
    parts, expected = [], []
    for size in SHAPE:
        a = draw(st.none() | st.integers(-size, size))
        b = draw(st.none() | st.integers(-size, size))
        inside = range(size)[slice(a, b)]
        assume(len(inside) > 0)
        parts.append(f"{'' if a is None else a}:{'' if b is None else b}")
        expected.append((inside.start, inside.stop))
    return ",".join(parts), expected


@given(regions())
def test_regions_are_read_as_python_slices(case: tuple[str, list[tuple[int, int]]]) -> None:
    text, expected = case
    box = Box.parse(text, SHAPE)
    assert list(zip(box.start, box.stop, strict=True)) == expected
    assert Box.parse(str(box), SHAPE) == box


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":,:,:", Box.of(SHAPE)),
        ("[0:14, :, 3:]", Box((0, 0, 3), (14, 33, 17))),
        ("5,:,:", Box((5, 0, 0), (6, 33, 17))),
        ("-1,:,-2", Box((19, 0, 15), (20, 33, 16))),
    ],
)
def test_other_ways_to_write_a_region(text: str, expected: Box) -> None:
    assert Box.parse(text, SHAPE) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0:14,:", "has 2 ranges, needs one each for z, y, x"),
        ("", "has 1 ranges"),
        ("0:14,,:", "the range on axis y is missing"),
        ("0:14,a:b,:", "'a:b' is no range on axis y"),
        ("0:14:2,:,:", "'0:14:2' is no range on axis z"),
        ("0:21,:,:", "0:21 on axis z is not inside 0:20"),
        ("5:5,:,:", "5:5 on axis z is not inside 0:20"),
        (":,9:3,:", "9:3 on axis y is not inside 0:33"),
        (":,:,-18:", "-18: on axis x is not inside 0:17"),
        (":,:,17", "17 on axis x is not inside 0:17"),
        (":,:,-18", "-18 on axis x is not inside 0:17"),
    ],
)
def test_a_wrong_region_is_refused_with_its_axis(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        Box.parse(text, SHAPE)
    assert says in str(caught.value)
    assert repr(text) in str(caught.value)
