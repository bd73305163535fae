"""The patch lattice against brute force, for every size, patch and stride that a small axis can have."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volseg.geometry import AxisLattice, Box, PatchLattice, Triple, stride_for


@st.composite
def axis_lattices(draw: st.DrawFn, most: int = 40) -> AxisLattice:
    side, margin = draw(st.integers(1, 12)), draw(st.sampled_from((0, 0, 1, 2, 5)))
    return AxisLattice(draw(st.integers(1, most)), side + 2 * margin, draw(st.integers(1, side)), margin)


def covered(axis: AxisLattice, i: int) -> set[int]:
    return set(range(axis.origin(i), min(axis.origin(i) + axis.side, axis.size)))


@given(axis_lattices())
def test_every_voxel_is_covered_and_every_patch_is_needed(axis: AxisLattice) -> None:
    origins = [axis.origin(i) for i in range(axis.count)]
    assert origins[0] == 0
    assert all(0 < b - a <= axis.stride for a, b in pairwise(origins))
    assert set().union(*(covered(axis, i) for i in range(axis.count))) == set(range(axis.size))
    if axis.size >= axis.side:
        assert origins[-1] + axis.side == axis.size
    else:
        assert origins == [0]
    # All but the last lie on the stride: the lattice is anchored to the volume.
    assert origins[:-1] == [i * axis.stride for i in range(axis.count - 1)]


@given(axis_lattices(), st.data())
def test_touching_equals_brute_force(axis: AxisLattice, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, axis.size - 1))
    stop = data.draw(st.integers(start, axis.size))
    wanted = set(range(start, stop))
    assert list(axis.touching(start, stop)) == [i for i in range(axis.count) if covered(axis, i) & wanted]


@given(axis_lattices())
def test_neighbours_equal_brute_force(axis: AxisLattice) -> None:
    for i in range(axis.count):
        expected = [j for j in range(axis.count) if covered(axis, i) & covered(axis, j)]
        assert list(axis.neighbours(i)) == expected


def test_the_example_of_the_docstring() -> None:
    axis = AxisLattice(10, 4, 3)
    assert [axis.origin(i) for i in range(axis.count)] == [0, 3, 6]
    # 11 voxels: the last patch is shifted back by two.
    axis = AxisLattice(11, 4, 3)
    assert [axis.origin(i) for i in range(axis.count)] == [0, 3, 6, 7]


@pytest.mark.parametrize(
    "values", [(0, 4, 2), (8, 0, 0), (8, 4, 0), (8, 4, 5), (8, 4, 3, 1), (8, 4, 1, 2), (8, 4, 4, -1)]
)
def test_an_impossible_lattice_is_refused(values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="stride <= side"):
        AxisLattice(*values)


@st.composite
def lattices_with_box(draw: st.DrawFn) -> tuple[PatchLattice, Box]:
    axes = [draw(axis_lattices(most=9)) for _ in range(3)]
    shape, patch, stride, margin = zip(*((a.size, a.patch, a.stride, a.margin) for a in axes), strict=True)
    spans = []
    for axis in axes:
        start = draw(st.integers(0, axis.size - 1))
        spans.append((start, draw(st.integers(start + 1, axis.size))))
    (z0, z1), (y0, y1), (x0, x1) = spans
    return PatchLattice(shape, patch, stride, margin), Box((z0, y0, x0), (z1, y1, x1))


@given(lattices_with_box())
def test_a_lattice_is_the_product_of_its_axes(case: tuple[PatchLattice, Box]) -> None:
    lattice, box = case
    counts = [axis.count for axis in lattice.axes]
    everything: list[Triple] = [(i, j, k) for i, j, k in product(*map(range, counts))]
    assert lattice.count == len(everything)
    touching = list(lattice.touching(box))
    assert touching == [i for i in everything if lattice.box(i).intersect(box).size]
    assert lattice.count_touching(box) == len(touching)
    assert list(lattice.touching(Box.of(lattice.shape))) == everything


@given(lattices_with_box())
def test_reach_is_exactly_what_the_patches_read(case: tuple[PatchLattice, Box]) -> None:
    lattice, box = case
    volume = Box.of(lattice.shape)
    reach = lattice.read(lattice.ranges(box))
    read = [lattice.source(i).intersect(volume) for i in lattice.touching(box)]
    assert all(reach.contains(part) for part in read)
    for axis in range(3):
        assert reach.start[axis] == min(part.start[axis] for part in read)
        assert reach.stop[axis] == max(part.stop[axis] for part in read)
    assert volume.contains(reach)
    assert reach.contains(box)


def test_an_empty_box_needs_nothing() -> None:
    lattice = PatchLattice((9, 9, 9), (4, 4, 4), (2, 2, 2))
    empty = Box((3, 3, 3), (3, 5, 5))
    assert list(lattice.touching(empty)) == []
    assert lattice.count_touching(empty) == 0


def test_a_volume_smaller_than_the_patch_has_one_patch_that_sticks_out() -> None:
    lattice = PatchLattice((1, 5, 9), (1, 8, 8), (1, 4, 4))
    assert lattice.count == 2
    assert lattice.box((0, 0, 0)) == Box((0, 0, 0), (1, 8, 8))
    assert lattice.box((0, 0, 1)) == Box((0, 0, 1), (1, 8, 9))
    assert lattice.read(lattice.ranges(Box((0, 0, 8), (1, 5, 9)))) == Box((0, 0, 1), (1, 5, 9))


@given(lattices_with_box())
def test_a_patch_reads_its_answer_and_the_margin_around_it(case: tuple[PatchLattice, Box]) -> None:
    lattice, box = case
    for index in lattice.touching(box):
        answer, source = lattice.box(index), lattice.source(index)
        assert (answer.shape, source.shape) == (lattice.answer, lattice.patch)
        margins = [
            (b - a, d - c) for a, b, c, d in zip(source.start, answer.start, answer.stop, source.stop, strict=True)
        ]
        assert margins == [(m, m) for m in lattice.margin]


def test_an_unpadded_network_s_lattice_is_that_of_its_answers() -> None:
    """The example of the docstring: the same answers, read with a margin of 1."""
    axis, plain = AxisLattice(10, 6, 3, 1), AxisLattice(10, 4, 3)
    assert [axis.origin(i) for i in range(axis.count)] == [plain.origin(i) for i in range(plain.count)]
    lattice = PatchLattice((10, 10, 10), (6, 6, 6), (3, 3, 3), (1, 1, 1))
    assert lattice.source((0, 1, 2)) == Box((-1, 2, 5), (5, 8, 11))
    assert axis.read(0, 1) == (0, 8)
    assert axis.read(1, 1) == (2, 8)
    # A volume smaller than the answer: one patch, replicated on both sides.
    small = PatchLattice((2, 9, 9), (6, 6, 6), (3, 3, 3), (1, 1, 1))
    assert small.box((0, 0, 0)) == Box((0, 0, 0), (4, 4, 4))
    assert small.read(small.ranges(Box.of(small.shape))) == Box.of(small.shape)


@given(st.tuples(*[st.integers(1, 300)] * 3), st.floats(0, 1, exclude_max=True))
def test_a_stride_is_the_rest_of_the_patch_beside_the_overlap(patch: Triple, overlap: float) -> None:
    for side, stride in zip(patch, stride_for(patch, overlap), strict=True):
        assert 1 <= stride <= side
        assert stride == 1 or abs(side * (1 - overlap) - stride) <= 0.5


@pytest.mark.parametrize(
    ("overlap", "stride"), [(0.0, (1, 64, 96)), (0.25, (1, 48, 72)), (0.5, (1, 32, 48)), (0.999, (1, 1, 1))]
)
def test_strides_of_usual_overlaps(overlap: float, stride: Triple) -> None:
    assert stride_for((1, 64, 96), overlap) == stride
