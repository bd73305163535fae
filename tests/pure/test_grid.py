"""The block grid: blocks tile the region, and a grid of any size is arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volseg.geometry import BlockGrid, Box, Triple


@st.composite
def grids(draw: st.DrawFn) -> BlockGrid:
    shape: list[int] = []
    block: list[int] = []
    spans = []
    for _ in range(3):
        shape.append(draw(st.integers(1, 14)))
        block.append(draw(st.integers(1, 16)))
        start = draw(st.integers(0, shape[-1] - 1))
        spans.append((start, draw(st.integers(start + 1, shape[-1]))))
    (z0, z1), (y0, y1), (x0, x1) = spans
    return BlockGrid((shape[0], shape[1], shape[2]), (block[0], block[1], block[2]), Box((z0, y0, x0), (z1, y1, x1)))


@given(grids())
def test_the_blocks_tile_the_region_once(grid: BlockGrid) -> None:
    blocks = [grid.box(i) for i in range(len(grid))]
    assert len(set(blocks)) == len(blocks)
    inside = [block.intersect(grid.region) for block in blocks]
    assert all(part.size for part in inside), "a block that does not meet the region is no work"
    assert sum(part.size for part in inside) == grid.region.size
    # Cells of one grid are disjoint, so equal sums mean that every voxel is met once.
    for block in blocks:
        for a, b, side, size in zip(block.start, block.stop, grid.block, grid.shape, strict=True):
            assert a % side == 0
            assert b == min(a + side, size)


@given(grids())
def test_blocks_are_numbered_in_c_order(grid: BlockGrid) -> None:
    starts = [grid.box(i).start for i in range(len(grid))]
    assert starts == sorted(starts)
    assert len(grid) == grid.counts[0] * grid.counts[1] * grid.counts[2]


@given(grids())
def test_the_spans_of_an_axis_are_those_of_its_blocks(grid: BlockGrid) -> None:
    boxes = [grid.box(i) for i in range(len(grid))]
    for axis in range(3):
        assert grid.axis_spans(axis) == sorted({(b.start[axis], b.stop[axis]) for b in boxes})


@pytest.mark.parametrize("index", [-1, 8])
def test_there_is_no_block_beyond_the_last(index: int) -> None:
    grid = BlockGrid((8, 8, 8), (4, 4, 4), Box.of((8, 8, 8)))
    with pytest.raises(IndexError, match=r"not in 0\.\.7"):
        grid.box(index)


def test_a_billion_blocks_are_arithmetic() -> None:
    shape: Triple = (64_000, 64_000, 63_999)
    grid = BlockGrid(shape, (64, 64, 64), Box.of(shape))
    assert len(grid) == 10**9
    assert grid.box(0) == Box((0, 0, 0), (64, 64, 64))
    assert grid.box(10**9 - 1) == Box((63_936, 63_936, 63_936), shape)
    assert grid.box(123_456_789) == Box((123 * 64, 456 * 64, 789 * 64), (124 * 64, 457 * 64, 790 * 64))
