"""The block that is chosen: it fits, it obeys a given shard, and it leaves workers an even load."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volseg.geometry import BlockGrid, Box, PatchLattice, Triple, stride_for
from volseg.planning.blockshape import CHUNK_SIDE, choose_block, chunk_for


def lattice(shape: Triple, patch: Triple, overlap: float) -> PatchLattice:
    return PatchLattice(shape, patch, stride_for(patch, overlap))


def loads(of: PatchLattice, region: Box, block: Triple) -> list[int]:
    grid = BlockGrid(of.shape, block, region)
    return [of.count_touching(grid.box(i).intersect(region)) for i in range(len(grid))]


def busiest(counts: list[int], workers: int) -> int:
    """Forwards of the busiest of `workers` that take one block after another."""
    load = [0] * workers
    for count in counts:
        load[load.index(min(load))] += count
    return max(load)


def always(_: Triple) -> bool:
    return True


@given(st.tuples(*[st.integers(1, 700)] * 3))
def test_a_chunk_divides_its_shard(shard: Triple) -> None:
    for side, chunk in zip(shard, chunk_for(shard), strict=True):
        assert side % chunk == 0
        # No chunk is so small that a shard holds a crowd of them, and only a shard without divisors is one chunk.
        assert chunk == side or CHUNK_SIDE / 4 <= chunk <= CHUNK_SIDE
        if chunk == side > CHUNK_SIDE:
            assert all(side % d for d in range(CHUNK_SIDE // 4, CHUNK_SIDE + 1))


@pytest.mark.parametrize(
    ("shard", "chunk"), [((96, 96, 96), (48, 48, 48)), ((1, 256, 192), (1, 64, 64)), ((67, 64, 5), (67, 64, 5))]
)
def test_chunks_of_usual_shards(shard: Triple, chunk: Triple) -> None:
    assert chunk_for(shard) == chunk


shapes = st.tuples(*[st.integers(1, 200)] * 3)


@given(shapes, st.integers(1, 40), st.floats(0, 0.9), st.integers(1, 5), st.data())
def test_a_chosen_block_fits_and_obeys_the_unit(
    shape: Triple, side: int, overlap: float, workers: int, data: st.DataObject
) -> None:
    of = lattice(shape, (side, side, side), overlap)
    start = [data.draw(st.integers(0, size - 1)) for size in shape]
    stop = [data.draw(st.integers(low + 1, size)) for low, size in zip(start, shape, strict=True)]
    region = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    unit = data.draw(st.none() | st.tuples(*[st.integers(1, 50)] * 3))
    most = data.draw(st.integers(1, 10**6))
    block = choose_block(of, region, workers, lambda b: prod(b) <= most, unit)
    free = choose_block(of, region, workers, always, unit)
    assert free is not None
    assert all(s % u == 0 for s, u in zip(free, unit or (1, 1, 1), strict=True))
    if block is not None:
        assert prod(block) <= most
        assert all(s % u == 0 for s, u in zip(block, unit or (1, 1, 1), strict=True))
        if not unit:
            # Boundaries lie on the stride, or on a multiple of 32 where a stride would leave a shard without chunks.
            assert all(s % t == 0 or s % 32 == 0 for s, t in zip(block, of.stride, strict=True))
    else:
        least = [-(-t // u) * u for t, u in zip(of.stride, unit or (1, 1, 1), strict=True)]
        assert prod(least) > most


def test_nothing_is_chosen_where_nothing_fits() -> None:
    of = lattice((64, 64, 64), (16, 16, 16), 0.5)
    assert choose_block(of, Box.of(of.shape), 1, lambda _: False) is None


def test_a_short_job_is_not_cut() -> None:
    """A few patches are sooner done again than border patches are computed twice."""
    of = lattice((100, 100, 100), (64, 64, 64), 0.5)
    assert loads(of, Box.of(of.shape), choose_block(of, Box.of(of.shape), 1, always) or (1, 1, 1)) == [27]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("shape", "patch", "overlap"),
    [
        ((160, 160, 160), (64, 64, 64), 0.25),
        ((192, 192, 192), (64, 64, 64), 0.5),
        ((512, 400, 300), (64, 64, 64), 0.5),
        ((17, 768, 768), (1, 256, 256), 0.5),
    ],
)
def test_the_busiest_worker_has_less_to_do_than_with_any_cube(
    shape: Triple, patch: Triple, overlap: float, workers: int
) -> None:
    of, region = lattice(shape, patch, overlap), Box.of(shape)
    chosen = choose_block(of, region, workers, always)
    assert chosen is not None
    counts = loads(of, region, chosen)
    long_job = of.count > 32 * workers
    if long_job:
        assert len(counts) >= 4 * workers
    for k in range(1, 9):
        z, y, x = (min(k * t, -(-n // t) * t) for t, n in zip(of.stride, shape, strict=True))
        cube = loads(of, region, (z, y, x))
        if len(cube) >= 4 * workers or not long_job:
            assert busiest(counts, workers) <= 1.1 * busiest(cube, workers)


def test_the_example_of_the_contract() -> None:
    of = lattice((192, 192, 192), (64, 64, 64), 0.5)
    assert choose_block(of, Box.of(of.shape), 2, always) == (96, 96, 96)


def test_the_block_covers_the_region_not_the_volume() -> None:
    of = lattice((512, 512, 512), (32, 32, 32), 0.5)
    region = Box((0, 0, 0), (32, 32, 32))
    block = choose_block(of, region, 1, always)
    assert len(loads(of, region, block or (1, 1, 1))) == 1
