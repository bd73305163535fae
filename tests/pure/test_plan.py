"""The plan: its counts against brute force, and every refusal with a remedy that works."""

import re
from itertools import product
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volseg.errors import PlanError, SpecError
from volseg.geometry import BlockGrid, PatchLattice, Triple
from volseg.planning import ModelFacts, Resources, VolumeFacts, make_plan
from volseg.planning.memory import GIB
from volseg.spec import SegmentSpec

BASELINE = 300 << 20


def spec(**options: Any) -> SegmentSpec:
    return SegmentSpec.read({"input": "image.zarr", "output": "out.zarr", "model": "unet", **options})


def model(**facts: Any) -> ModelFacts:
    values: dict[str, Any] = {
        "dims": 3,
        "in_channels": 1,
        "classes": 3,
        "pooling": (8, 8, 8),
        "patch": (64, 64, 64),
        "axis": "z",
        "threshold": 0.5,
        "activation_bytes": lambda patch, batch: 400 * prod(patch) * batch,
        "parameter_bytes": 1 << 20,
        "flops": lambda patch: 1000.0 * prod(patch),
    }
    return ModelFacts(**{**values, **facts})


def resources(memory: float = 8, workers: int = 2, device: str = "cpu") -> Resources:
    return Resources(workers, int(memory * GIB), device, BASELINE)


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


@given(jobs())
def test_forwards_patches_and_bytes_equal_brute_force(job: tuple[SegmentSpec, VolumeFacts]) -> None:
    asked, facts = job
    plan = make_plan(asked, facts, model(pooling=(1, 1, 1)), resources())
    lattice = plan.lattice
    a, b, c = (range(axis.count) for axis in lattice.axes)
    everything = [lattice.box(i) for i in product(a, b, c)]
    forwards = read = 0
    for index in range(len(plan.grid)):
        wanted = plan.grid.box(index).intersect(plan.region)
        forwards += sum(box.intersect(wanted).size > 0 for box in everything)
        read += lattice.reach(wanted).size
    assert plan.forwards == forwards
    assert plan.patches == sum(box.intersect(plan.region).size > 0 for box in everything)
    assert plan.summary()["bytes_read"] == read * facts.itemsize


@given(jobs())
def test_the_memory_is_that_of_the_largest_block(job: tuple[SegmentSpec, VolumeFacts]) -> None:
    asked, facts = job
    plan = make_plan(asked, facts, model(pooling=(1, 1, 1)), resources())
    boxes = [plan.grid.box(i) for i in range(len(plan.grid))]
    reach = max(plan.lattice.reach(box.intersect(plan.region)).size for box in boxes)
    assert plan.memory.input == 2 * reach * facts.itemsize
    assert plan.memory.accumulator == 4 * plan.sums * max(box.size for box in boxes)


def test_the_memory_does_not_depend_on_the_volume() -> None:
    """Eight times the volume, eight thousand times the volume: blocks inside one are like blocks inside another."""
    small, large, huge = (make_plan(spec(block=96), volume(side), model(), resources()) for side in (384, 768, 7680))
    assert small.memory == large.memory == huge.memory


def test_a_billion_blocks_are_planned_without_looking_at_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Any:
        raise AssertionError("a plan of 10^9 blocks must not walk over blocks or patches")

    for kind, name in ((BlockGrid, "box"), (PatchLattice, "box"), (PatchLattice, "touching"), (PatchLattice, "reach")):
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


# ---------------------------------------------------------------- choices


def test_a_bundle_s_patch_shrinks_to_the_volume_but_stays_a_multiple_of_the_pooling() -> None:
    assert make_plan(spec(), volume(1, 37, 300), model(), resources()).patch == (8, 40, 64)
    assert make_plan(spec(patch=(64, 64, 64)), volume(1, 37, 300), model(), resources()).patch == (64, 64, 64)


def test_the_overlap_decides_the_stride() -> None:
    assert make_plan(spec(overlap=0.25), volume(100), model(), resources()).stride == (48, 48, 48)


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
    with pytest.raises(PlanError, match=r"this job was begun with it and keeps it: go on with --memory 0\.45"):
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
        assert make_plan(spec(patch=(64, choice, 64)), volume(64), model(), resources()).patch == (64, choice, 64)


@pytest.mark.parametrize(("axis", "pooling", "right"), [("z", (1, 8, 8), (1, 64, 32)), ("x", (8, 8, 1), (64, 32, 1))])
def test_a_2d_network_takes_single_slices(axis: str, pooling: Triple, right: Triple) -> None:
    flat = model(dims=2, axis=axis, pooling=pooling)
    for wrong in ((64, 64, 64), (64, 64, 8) if axis == "z" else (8, 64, 64)):
        message = refusal(spec(patch=wrong), volume(64), flat, resources())
        assert (
            f"patch {list(wrong)} is 64 deep on axis {axis}, but a 2D network takes single slices along it" in message
        )
    assert make_plan(spec(patch=right), volume(64), flat, resources()).patch == right


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
    asked, facts = spec(patch=patch, overlap=overlap, **given), model(pooling=(1, 1, 1), classes=20)
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
