"""The block that is chosen: it fits, it obeys a given shard, and it leaves workers an even load."""

from math import prod
from typing import Any, Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volseg.geometry import BlockGrid, Box, Ownership, PatchLattice, Triple, stride_for
from volseg.planning.blockscore import Demand
from volseg.planning.blockshape import CHUNK_SIDE, Choice, choose_block, chunk_for, judge_block, smallest_block
from volseg.planning.makespan import makespan
from volseg.planning.memory import GIB, IN_HAND
from volseg.planning.seams import SeamRoom, Seams


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


Mode = Literal["auto", "on", "off"]


def always(_: Triple, __: Seams) -> bool:
    return True


def demand(views: list[PatchLattice], region: Box, workers: int, mode: Mode = "off", **more: Any) -> Demand:
    """A job whose patches take half a second each."""
    values: dict[str, Any] = {"sums": 1, "patch_seconds": 0.5, "room": SeamRoom(GIB), "hands": 2 * workers, **more}
    return Demand(views, region, workers, mode=mode, **values)


def chosen(views: list[PatchLattice], region: Box, workers: int) -> Triple | None:
    """The block shape where blocks share nothing."""
    found = choose_block(demand(views, region, workers), always)
    return found.block if found else None


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
    mode: Mode = data.draw(st.sampled_from(get_args(Mode)))
    found = choose_block(demand([of], region, workers, mode, unit=unit), lambda b, _: prod(b) <= most)
    block = found.block if found else None
    anything = choose_block(demand([of], region, workers, mode, unit=unit), always)
    assert anything is not None
    free = anything.block
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
    assert choose_block(demand([of], Box.of(of.shape), 1), lambda *_: False) is None


def test_a_short_job_is_not_cut() -> None:
    """A few patches are sooner done again than border patches are computed twice."""
    of = lattice((100, 100, 100), (64, 64, 64), 0.5)
    assert loads(of, Box.of(of.shape), chosen([of], Box.of(of.shape), 1) or (1, 1, 1)) == [27]


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
    block = chosen([of], region, workers)
    assert block is not None
    counts = loads(of, region, block)
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
    assert chosen([of], Box.of(of.shape), 2) == (96, 96, 96)


def test_the_block_covers_the_region_not_the_volume() -> None:
    of = lattice((512, 512, 512), (32, 32, 32), 0.5)
    region = Box((0, 0, 0), (32, 32, 32))
    block = chosen([of], region, 1)
    assert len(loads(of, region, block or (1, 1, 1))) == 1


def test_several_views_share_one_block() -> None:
    """Slices along each axis: patches along an axis cost one another nothing, in the plane they overlap."""
    shape = (128, 160, 192)
    views = [lattice(shape, patch, 0.5) for patch in ((1, 64, 64), (64, 1, 64), (64, 64, 1))]
    region = Box.of(shape)
    assert smallest_block(views) == (32, 32, 32)
    block = chosen(views, region, 2)
    assert block is not None
    # Boundaries lie on the strides of all views.
    assert all(side % 32 == 0 for side in block)

    def worst(candidate: Triple) -> int:
        counts = [loads(of, region, candidate) for of in views]
        return busiest([sum(parts) for parts in zip(*counts, strict=True)], 2)

    assert worst(block) <= 1.1 * min(worst((k * 32, k * 32, k * 32)) for k in range(1, 4))
    assert chosen(views[:1], region, 2) != block


# ---------------------------------------------------------------- blocks that share patches


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize(("side", "overlap"), [(160, 0.25), (256, 0.5), (512, 0.5)])
def test_shared_patches_and_an_even_load_are_sooner_done(side: int, overlap: float, workers: int) -> None:
    of = lattice((side,) * 3, (64,) * 3, overlap)
    region = Box.of(of.shape)
    shared = choose_block(demand([of], region, workers, "auto"), always)
    alone = choose_block(demand([of], region, workers, "off"), always)
    assert shared is not None
    assert alone is not None
    # With one worker and a short job a single block shares nothing and computes nothing twice.
    assert shared.seams.shared or len(BlockGrid(of.shape, shared.block, region)) == 1
    assert shared.score <= alone.score
    assert shared.score[1] < 1.25 * of.count / workers + 1


def test_few_blocks_are_laid_out_for_an_even_load() -> None:
    """27 patches: one worker of two has at least 14, and rows of three patches would leave 15 to one of them."""
    of = lattice((160, 160, 160), (64, 64, 64), 0.25)
    region = Box.of(of.shape)
    rows = judge_block(demand([of], region, 2, "on"), (48, 48, 192), always)
    best = choose_block(demand([of], region, 2, "auto"), always)
    assert best is not None
    assert 14 < best.score[1] < 15 < rows.score[1]
    assert len(BlockGrid(of.shape, best.block, region)) < len(BlockGrid(of.shape, rows.block, region))


def test_a_long_job_has_no_long_blocks() -> None:
    of = lattice((512, 512, 512), (64, 64, 64), 0.5)
    region = Box.of(of.shape)
    found = choose_block(demand([of], region, 2, "auto"), always)
    assert found is not None
    owner = Ownership(BlockGrid(of.shape, found.block, region), (of,), found.seams.column)
    assert 0.5 * max(owner.most_own) <= 30


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(1, 5))
def test_a_schedule_played_through(costs: list[int], workers: int) -> None:
    """Second by second: who has least in hand is given the next block, as many as a worker may have."""
    hands: list[list[int]] = [[] for _ in range(workers)]
    left, now = list(costs), 0
    while left or any(hands):
        while left and min(map(len, hands)) < IN_HAND:
            min(hands, key=len).append(left.pop(0))
        now += 1
        for hand in filter(None, hands):
            hand[0] -= 1
            if not hand[0]:
                hand.pop(0)
    assert makespan(costs, workers) == now


@given(st.lists(st.floats(0, 9), min_size=1, max_size=40), st.integers(1, 5))
def test_no_schedule_ends_before_its_share_or_after_everything(costs: list[float], workers: int) -> None:
    end = makespan(costs, workers)
    assert max(*costs, sum(costs) / workers) <= end * (1 + 1e-9)
    assert end <= sum(costs) * (1 + 1e-9)


def test_a_small_job_computes_again_what_would_cost_more_to_pass_on() -> None:
    """Patches of a tenth of a millisecond, calls of twenty."""
    of = lattice((96, 96, 96), (16, 16, 16), 0.25)
    room = SeamRoom(GIB, floor=100_000)
    quick = demand([of], Box.of(of.shape), 2, "auto", patch_seconds=0.0001, room=room)
    found = choose_block(quick, always)
    assert found is not None
    assert not found.seams.shared
    forced = choose_block(demand([of], Box.of(of.shape), 2, "on", patch_seconds=0.0001, room=room), always)
    assert forced is not None
    assert forced.seams.shared


def test_a_given_block_is_judged_alone() -> None:
    of = lattice((256, 256, 256), (64, 64, 64), 0.5)
    for mode in get_args(Mode):
        found: Choice = judge_block(demand([of], Box.of(of.shape), 2, mode), (128, 128, 128), always)
        assert found.block == (128, 128, 128)
        assert found.seams.shared is (mode != "off")
    assert not judge_block(demand([of], Box.of(of.shape), 2, "on"), (128,) * 3, lambda _, s: not s.shared).seams.shared


def test_blocks_without_overlap_have_nothing_to_share() -> None:
    of = lattice((256, 256, 256), (64, 64, 64), 0.0)
    for mode in get_args(Mode):
        found = choose_block(demand([of], Box.of(of.shape), 2, mode), always)
        assert found is not None
        assert not found.seams.shared
