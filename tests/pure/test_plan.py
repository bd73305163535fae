"""The plan: its counts against brute force, and every refusal with a remedy that works."""

import re
from itertools import product
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volseg.errors import PlanError, SpecError
from volseg.geometry import BlockGrid, Box, PatchLattice, Triple
from volseg.planning import ModelFacts, Resources, SeamRoom, ViewFacts, VolumeFacts, make_plan
from volseg.planning.memory import GIB
from volseg.spec import SegmentSpec

BASELINE = 300 << 20


def spec(**options: Any) -> SegmentSpec:
    """Blocks share nothing, unless told otherwise."""
    return SegmentSpec.read({"input": "image.zarr", "output": "out.zarr", "model": "unet", "seams": "off", **options})


def view(**facts: Any) -> ViewFacts:
    """A padded network, unless told otherwise."""
    pooling = facts.get("pooling", (8, 8, 8))
    values: dict[str, Any] = {
        "axis": "z",
        "patch": (64, 64, 64),
        "pooling": pooling,
        "phase": (0, 0, 0),
        "smallest": pooling,
        "margin": (0, 0, 0),
        "activation_bytes": lambda patch, batch: 400 * prod(patch) * batch,
        "flops": lambda patch: 1000.0 * prod(patch),
    }
    return ViewFacts(**{**values, **facts})


def model(*views: ViewFacts, **facts: Any) -> ModelFacts:
    values: dict[str, Any] = {
        "dims": 3,
        "in_channels": 1,
        "classes": 3,
        "threshold": 0.5,
        "parameter_bytes": 1 << 20,
    }
    return ModelFacts(**{**values, "views": views or (view(),), **facts})


FREE = model(view(pooling=(1, 1, 1)))
"""Takes patches of any sides."""

UNPADDED = view(patch=(60, 60, 60), phase=(4, 4, 4), smallest=(44, 44, 44), margin=(20, 20, 20))
"""Takes 44, 52, 60, ... and answers for 4, 12, 20, ..."""


def flat(axis: str, **facts: Any) -> ViewFacts:
    """A 2D network of patches 64 x 48 along an axis."""
    place = "zyx".index(axis)
    patch, pooling = [64, 48], [8, 8]
    patch.insert(place, 1)
    pooling.insert(place, 1)
    return view(axis=axis, patch=tuple(patch), pooling=tuple(pooling), **facts)


THREE = model(flat("z"), flat("y"), flat("x"), dims=2)


def resources(memory: float = 8, workers: int = 2, device: str = "cpu", seam_memory: int = GIB) -> Resources:
    return Resources(workers, int(memory * GIB), device, BASELINE, SeamRoom(seam_memory))


def volume(*shape: int, channels: int = 1, itemsize: int = 2) -> VolumeFacts:
    z, y, x = shape * 3 if len(shape) == 1 else shape
    return VolumeFacts((z, y, x), channels, itemsize)


def refusal(*arguments: Any, **keywords: Any) -> str:
    with pytest.raises((PlanError, SpecError)) as caught:
        make_plan(*arguments, **keywords)
    return str(caught.value)


# ---------------------------------------------------------------- counts


def test_the_example_of_the_contract() -> None:
    plan = make_plan(spec(), volume(192), model(), resources())
    assert (plan.block, plan.shards, plan.chunks) == ((96, 96, 96), (96, 96, 96), (48, 48, 48))
    summary = plan.summary()
    assert (summary["blocks"], summary["forwards"], summary["patches"]) == (8, 216, 125)
    assert summary["forwards_per_patch"] == 1.728
    assert summary["forwards_per_voxel"] == 8.0
    assert summary["flops"] == 216 * 1000 * 64**3
    # Every block reads 128 voxels a side, two bytes each, and writes one byte a voxel.
    assert summary["bytes_read"] == 8 * 128**3 * 2
    assert summary["bytes_written"] == 192**3
    assert summary["memory_per_worker"]["total"] == plan.memory.total
    assert (summary["workers"], summary["batch"], summary["device"]) == (2, 1, "cpu")


def test_what_is_written_counts_probabilities_and_wide_labels() -> None:
    assert make_plan(spec(probabilities=True), volume(64), model(), resources()).summary()["bytes_written"] == 4 * 64**3
    wide = make_plan(spec(block=32), volume(64), model(classes=300), resources())
    assert wide.summary()["bytes_written"] == 2 * 64**3


@st.composite
def jobs(draw: st.DrawFn) -> tuple[SegmentSpec, VolumeFacts]:
    shape = [draw(st.integers(1, 12)) for _ in range(3)]
    patch = [draw(st.integers(1, 6)) for _ in range(3)]
    block = [draw(st.integers(1, 14)) for _ in range(3)]
    spans = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        spans.append(f"{start}:{draw(st.integers(start + 1, size))}")
    overlap = draw(st.floats(0, 0.9))
    return spec(patch=patch, overlap=overlap, block=block, roi=",".join(spans)), volume(*shape)


# An unpadded network, and one along three axes.
MODELS = [
    FREE,
    model(view(pooling=(1, 1, 1), margin=(1, 0, 2)), members=2),
    model(*(view(axis=axis, pooling=(1, 1, 1)) for axis in "zyx"), dims=2, mirrors=4),
]


@pytest.mark.parametrize("facts", MODELS, ids=["padded", "unpadded", "views"])
@given(jobs())
def test_forwards_patches_and_bytes_equal_brute_force(facts: ModelFacts, job: tuple[SegmentSpec, VolumeFacts]) -> None:
    asked, data = job
    margin = facts.views[0].margin
    grown = tuple(side + 2 * m for side, m in zip(asked.patch or (), margin, strict=True))
    plan = make_plan(asked.model_copy(update={"patch": grown}), data, facts, resources())
    grid = [plan.grid.box(index).intersect(plan.region) for index in range(len(plan.grid))]
    owner = plan.ownership
    computed, patches = [], 0
    for lattice in plan.lattices:
        a, b, c = (range(axis.count) for axis in lattice.axes)
        everything = [lattice.box(i) for i in product(a, b, c)]
        computed.append(sum(box.intersect(wanted).size > 0 for box in everything for wanted in grid))
        patches += sum(box.intersect(plan.region).size > 0 for box in everything)
    assert plan.patches == patches
    assert plan.computed == tuple(computed)
    assert plan.forwards == sum(computed) * facts.members * facts.mirrors
    volume_box, read = Box.of(data.shape), 0
    for index, wanted in enumerate(grid):
        sources = [of.source(i).intersect(volume_box) for of in plan.lattices for i in of.touching(wanted)]
        low = [min(box.start[axis] for box in sources) for axis in range(3)]
        high = [max(box.stop[axis] for box in sources) for axis in range(3)]
        reach = owner.hull(owner.own(index), index)
        assert reach == Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))
        read += reach.size
    assert plan.summary()["bytes_read"] == read * data.itemsize


@pytest.mark.parametrize("facts", MODELS, ids=["padded", "unpadded", "views"])
@given(jobs())
def test_the_memory_is_that_of_the_largest_block(facts: ModelFacts, job: tuple[SegmentSpec, VolumeFacts]) -> None:
    asked, data = job
    grown = tuple(side + 2 * m for side, m in zip(asked.patch or (), facts.views[0].margin, strict=True))
    plan = make_plan(asked.model_copy(update={"patch": grown}), data, facts, resources())
    owner, blocks = plan.ownership, range(len(plan.grid))
    reaches = [owner.hull(owner.own(i), i).shape for i in blocks]
    largest = prod(max(reach[axis] for reach in reaches) for axis in range(3))
    assert plan.memory.input == 2 * largest * data.itemsize
    wanted = [owner.wanted(i).shape for i in blocks]
    largest = prod(max(sides[axis] for sides in wanted) for axis in range(3))
    assert plan.memory.accumulator == 4 * plan.sums * largest
    assert plan.memory.seams == 0


def test_the_memory_does_not_depend_on_the_volume() -> None:
    """Eight times the volume, eight thousand times the volume: blocks inside one are like blocks inside another."""
    small, large, huge = (make_plan(spec(block=96), volume(side), model(), resources()) for side in (384, 768, 7680))
    assert small.memory == large.memory == huge.memory


def test_a_billion_blocks_are_planned_without_looking_at_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Any:
        raise AssertionError("a plan of 10^9 blocks must not walk over blocks or patches")

    for kind, name in ((BlockGrid, "box"), (PatchLattice, "box"), (PatchLattice, "touching"), (PatchLattice, "read")):
        monkeypatch.setattr(kind, name, never)
    plan = make_plan(spec(block=64), volume(64_000), model(), resources())
    summary = plan.summary()
    assert summary["blocks"] == 10**9
    assert summary["patches"] == 1999**3
    # 3 patches an axis touch an inner block, 2 the first and the last.
    assert summary["forwards"] == (998 * 3 + 2 + 2) ** 3
    assert summary["bytes_read"] == (998 * 128 + 96 + 96) ** 3 * 2


def test_a_billion_voxels_a_side_choose_a_block() -> None:
    plan = make_plan(spec(overlap=0.25), volume(4096, 4096, 4096), model(), resources(memory=2))
    assert plan.memory.total <= 2 * GIB
    assert plan.forwards < 2 * plan.patches


# ---------------------------------------------------------------- what is averaged


def test_an_ensemble_with_mirrors_by_hand() -> None:
    """The example of the contract with 3 members and 8 mirror images: 24 forwards for each of its patches."""
    plain = make_plan(spec(block=96), volume(192), model(), resources()).summary()
    many = make_plan(spec(block=96), volume(192), model(members=3, mirrors=8), resources()).summary()
    assert (many["members"], many["mirrors"]) == (3, 8)
    assert many["patches"] == plain["patches"] == 125
    assert many["forwards"] == 24 * 216
    assert many["forwards_counted"] == "patches computed x members x mirrored copies"
    assert many["forwards_per_patch"] == 1.728
    assert many["forwards_per_voxel"] == 24 * plain["forwards_per_voxel"]
    assert many["flops"] == 24 * plain["flops"]
    assert many["memory_per_worker"]["network"] == 3 * plain["memory_per_worker"]["network"]
    assert many["bytes_read"] == plain["bytes_read"]


def test_an_unpadded_network_by_hand() -> None:
    """Patches of 60 answer for 20 voxels, every 10: nine patches an axis cover 100 voxels."""
    plan = make_plan(spec(block=50), volume(100), model(UNPADDED), resources())
    (only,) = plan.summary()["views"]
    assert only == {
        "axis": "z", "patch": (60,) * 3, "answer": (20,) * 3, "stride": (10,) * 3, "patches": 9**3, "computed": 10**3,
    }  # fmt: skip
    # Five answers an axis begin before 50, and 60 voxels and the margin of 20 are read for them.
    assert plan.forwards == 10**3
    assert plan.ownership.hull(plan.ownership.own(0), 0) == Box((0, 0, 0), (80, 80, 80))
    assert plan.memory.input == 2 * 80**3 * 2
    assert plan.summary()["flops"] == 10**3 * 1000 * 60**3
    assert plan.summary()["forwards_per_voxel"] == round(10**3 * 60**3 / 100**3, 4)


def test_three_axes_by_hand() -> None:
    """Slices of 64 x 48 in a volume of 64 x 96 x 48: along each axis its own lattice, every slice once."""
    plan = make_plan(spec(block=(64, 96, 48)), volume(64, 96, 48), THREE, resources())
    assert [v["patch"] for v in plan.summary()["views"]] == [(1, 64, 48), (64, 1, 48), (64, 48, 1)]
    assert [v["stride"] for v in plan.summary()["views"]] == [(1, 32, 24), (32, 1, 24), (32, 24, 1)]
    assert plan.computed == (64 * 2, 96, 48 * 3)
    assert plan.forwards == plan.patches == 64 * 2 + 96 + 48 * 3
    assert plan.summary()["flops"] == plan.forwards * 1000 * 64 * 48
    assert plan.summary()["forwards_per_voxel"] == round(plan.forwards * 64 * 48 / (64 * 96 * 48), 4)


def test_each_axis_s_patch_shrinks_to_the_volume() -> None:
    plan = make_plan(spec(), volume(20, 300, 30), THREE, resources())
    assert [v.patch for v in plan.views] == [(1, 64, 32), (24, 1, 32), (24, 48, 1)]


def test_an_unpadded_patch_shrinks_to_what_the_volume_needs() -> None:
    """4 voxels and a margin of 20 on both sides are 44; 5 need the next allowed side."""
    plan = make_plan(spec(), volume(4, 5, 300), model(UNPADDED), resources())
    assert plan.views[0].patch == (44, 52, 60)
    assert plan.views[0].lattice.answer == (4, 12, 20)
    assert plan.patches == 29


@pytest.mark.parametrize("asked", [(1, 32, 40), (32, 1, 40), (32, 40, 1)])
def test_a_flat_patch_turns_with_the_axes(asked: Triple) -> None:
    plan = make_plan(spec(patch=asked), volume(64), THREE, resources())
    assert [v.patch for v in plan.views] == [(1, 32, 40), (32, 1, 40), (32, 40, 1)]


def test_a_deep_patch_is_made_flat_along_each_axis() -> None:
    plan = make_plan(spec(patch=(16, 32, 40)), volume(64), THREE, resources())
    assert [v.patch for v in plan.views] == [(1, 32, 40), (16, 1, 40), (16, 32, 1)]


# ---------------------------------------------------------------- choices


def test_a_bundle_s_patch_shrinks_to_the_volume_but_stays_a_multiple_of_the_pooling() -> None:
    assert make_plan(spec(), volume(1, 37, 300), model(), resources()).views[0].patch == (8, 40, 64)
    assert make_plan(spec(patch=(64, 64, 64)), volume(1, 37, 300), model(), resources()).views[0].patch == (64, 64, 64)


def test_the_overlap_decides_the_stride() -> None:
    assert make_plan(spec(overlap=0.25), volume(100), model(), resources()).views[0].lattice.stride == (48, 48, 48)


def test_batches_are_one_on_cpus_and_four_on_gpus() -> None:
    assert make_plan(spec(), volume(64), model(), resources()).batch == 1
    assert make_plan(spec(), volume(64), model(), resources(device="cuda")).batch == 4
    assert make_plan(spec(batch=3), volume(64), model(), resources()).batch == 3


def test_no_more_workers_than_blocks() -> None:
    assert make_plan(spec(block=64), volume(100), model(), resources(workers=99)).workers == 8


def test_the_threshold_is_the_model_s_unless_given() -> None:
    two = model(classes=2, threshold=0.3)
    assert make_plan(spec(), volume(64), two, resources()).threshold == 0.3
    assert make_plan(spec(threshold=0.7), volume(64), two, resources()).threshold == 0.7
    assert make_plan(spec(), volume(64), two, resources()).sums == 1
    assert make_plan(spec(), volume(64), model(), resources()).sums == 3


def test_a_resumed_job_keeps_its_blocks() -> None:
    """Even where this run would have chosen or been given others, or could not afford them."""
    begun: Triple = (64, 96, 128)
    for asked, memory in ((spec(), 8.0), (spec(block=32), 8.0), (spec(), 0.4)):
        plan = make_plan(asked, volume(192), model(), resources(memory), block=begun)
        assert plan.block == plan.shards == begun


def test_a_resumed_job_respects_a_memory_limit_that_the_user_sets() -> None:
    with pytest.raises(PlanError, match=r"this job was begun with it and keeps it: go on with --memory 0\.46"):
        make_plan(spec(memory=0.4), volume(192), model(), resources(0.4), block=(64, 96, 128))


def test_given_shards_and_chunks_are_kept() -> None:
    plan = make_plan(spec(shards=64, chunks=32, overlap=0.25), volume(500), model(), resources())
    assert (plan.shards, plan.chunks) == ((64, 64, 64), (32, 32, 32))
    assert all(side % 64 == 0 for side in plan.block)
    plan = make_plan(spec(chunks=(20, 30, 40)), volume(500), model(), resources())
    assert plan.chunks == (20, 30, 40)
    assert all(side % chunk == 0 for side, chunk in zip(plan.block, plan.chunks, strict=True))


# ---------------------------------------------------------------- refusals


def test_another_number_of_channels_is_refused() -> None:
    message = refusal(spec(), volume(64, channels=3), model(), resources())
    assert "the input has 3 channel(s), the model was trained on 1; nothing was done" in message


def test_a_threshold_needs_two_classes() -> None:
    message = refusal(spec(threshold=0.4), volume(64), model(), resources())
    assert "threshold 0.4 was given, but the model has 3 classes" in message


@pytest.mark.parametrize(("side", "choices"), [(60, "56 or 64"), (65, "64 or 72"), (3, "8")])
def test_a_patch_that_is_no_multiple_of_the_pooling_is_refused(side: int, choices: str) -> None:
    message = refusal(spec(patch=(64, side, 64)), volume(64), model(), resources())
    assert f"patch side {side} on axis y is no multiple of the network's pooling factor 8" in message
    assert message.endswith(f"use {choices}")
    for choice in map(int, choices.split(" or ")):
        assert make_plan(spec(patch=(64, choice, 64)), volume(64), model(), resources()).views[0].patch == (
            64,
            choice,
            64,
        )


@pytest.mark.parametrize(("axis", "pooling", "right"), [("z", (1, 8, 8), (1, 64, 32)), ("x", (8, 8, 1), (64, 32, 1))])
def test_a_2d_network_takes_single_slices(axis: str, pooling: Triple, right: Triple) -> None:
    facts = model(view(axis=axis, pooling=pooling), dims=2)
    for wrong in ((64, 64, 64), (64, 64, 8) if axis == "z" else (8, 64, 64)):
        message = refusal(spec(patch=wrong), volume(64), facts, resources())
        assert (
            f"patch {list(wrong)} is 64 deep on axis {axis}, but a 2D network takes single slices along it" in message
        )
    assert make_plan(spec(patch=right), volume(64), facts, resources()).views[0].patch == right


@pytest.mark.parametrize(("side", "choices"), [(64, "60 or 68"), (45, "44 or 52"), (40, "44"), (1, "44")])
def test_a_patch_that_an_unpadded_network_cannot_take_is_refused(side: int, choices: str) -> None:
    message = refusal(spec(patch=(60, side, 60)), volume(64), model(UNPADDED), resources())
    assert f"patch side {side} on axis y is none that this unpadded network takes (44, 52, 60, ...:" in message
    assert message.endswith(f"use {choices}")
    for choice in map(int, choices.split(" or ")):
        plan = make_plan(spec(patch=(60, choice, 60)), volume(64), model(UNPADDED), resources())
        assert plan.views[0].patch == (60, choice, 60)


def test_a_patch_that_does_not_fit_after_turning_is_refused() -> None:
    message = refusal(spec(patch=(1, 32, 44)), volume(64), THREE, resources())
    assert "patch side 44 on axis x is no multiple of the network's pooling factor 8" in message


def test_a_region_outside_the_volume_is_refused() -> None:
    assert "0:65 on axis z is not inside 0:64" in refusal(spec(roi="0:65,:,:"), volume(64), model(), resources())


def test_a_block_that_is_no_multiple_of_the_shard_is_refused() -> None:
    asked = {"block": (96, 64, 64), "shards": 64, "chunks": 32}
    message = refusal(spec(**asked), volume(192), model(), resources())
    assert "block side 96 on axis z is no multiple of shard side 64; two workers would write one shard" in message
    assert message.endswith("use a block of 128")
    assert make_plan(spec(**{**asked, "block": (128, 64, 64)}), volume(192), model(), resources()).block[0] == 128


def test_a_shard_that_is_no_multiple_of_the_chunk_is_refused() -> None:
    message = refusal(spec(block=96, chunks=(48, 48, 36)), volume(192), model(), resources())
    assert "shard side 96 on axis x is no multiple of chunk side 36" in message


@pytest.mark.parametrize(
    ("patch", "overlap"), [((64, 64, 64), 0.5), ((97, 97, 97), 0.0), ((1, 150, 131), 0.25), ((8, 72, 72), 0.8)]
)
@pytest.mark.parametrize("given", [{}, {"shards": 100}, {"chunks": (3, 16, 16)}])
def test_a_memory_limit_too_small_for_one_block_says_what_would_do(
    patch: Triple, overlap: float, given: dict[str, Any]
) -> None:
    asked, facts = spec(patch=patch, overlap=overlap, **given), model(view(pooling=(1, 1, 1)), classes=20)
    message = refusal(asked, volume(260), facts, resources(memory=0.25))
    assert f"memory limit 0.25 GiB is too small for one block with patch {list(patch)}" in message
    enough = re.search(r"at least (\S+) GiB a worker is needed", message)
    assert enough
    limit = float(enough[1])
    assert make_plan(asked, volume(260), facts, resources(memory=limit)).memory.total <= limit * GIB


def test_a_given_block_beyond_the_memory_limit_says_what_would_fit() -> None:
    message = refusal(spec(block=640), volume(1280), model(), resources(memory=2))
    assert "block [640, 640, 640] needs " in message
    assert "the limit is 2.00 GiB; nothing was done" in message
    fits = re.search(r"--block (\d+,\d+,\d+) would fit", message)
    memory = re.search(r"--memory (\S+)$", message)
    assert fits
    assert memory
    assert make_plan(spec(block=fits[1]), volume(1280), model(), resources(memory=2)).memory.total <= 2 * GIB
    assert make_plan(spec(block=640), volume(1280), model(), resources(memory=float(memory[1]))).block == (640,) * 3


def test_a_given_block_where_none_would_fit() -> None:
    message = refusal(spec(block=64), volume(128), model(), resources(memory=0.3))
    assert "use a smaller --patch and --block, or --memory" in message
