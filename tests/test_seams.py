"""Every patch once: bits equal to blocks that compute all they need, forwards equal to patches, and what was lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support import Case, done_blocks, labels_of, long, make_bundle, probabilities_of, segment, smooth, store
from volseg import api
from volseg.errors import JobInterrupted
from volseg.execution.driver import Tally
from volseg.geometry import BlockGrid, Box, Ownership, PatchLattice
from volseg.inference.accumulator import Accumulator
from volseg.spec import SegmentSpec

Bits = tuple[NDArray[Any], NDArray[np.uint8]]


def shared(case: Case, output: Path, **options: Any) -> tuple[dict[str, Any], Bits]:
    """Segment with shared patches, serially unless told otherwise."""
    report = segment(case, output, **{"probabilities": True, "seams": "on", **options})
    assert report["status"] == "complete"
    assert report["seams"]["most_bytes"] <= report["seams"]["bound_bytes"]
    return report, (labels_of(output), probabilities_of(output))


def alone(case: Case, output: Path, **options: Any) -> Bits:
    report = segment(case, output, **{"probabilities": True, **options, "seams": "off", "executor": "serial"})
    assert report["seams"]["most_bytes"] == report["seams"]["bound_bytes"] == 0
    return labels_of(output), probabilities_of(output)


def assert_same(a: Bits, b: Bits) -> None:
    for first, second in zip(a, b, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.fixture(scope="module")
def reference(case: Case) -> Bits:
    return alone(case, case.folder / "seams-reference.zarr", overlap=0.5, block="40,45,50")


@pytest.mark.parametrize("block", ["16,16,16", "12,24,36", "40,7,50", "8,45,50", long("5,9,11")])
def test_every_patch_is_computed_once(case: Case, reference: Bits, tmp_path: Path, block: str) -> None:
    report, found = shared(case, tmp_path / "out.zarr", overlap=0.5, block=block)
    assert report["forwards"] == report["patches"]
    assert report["forwards_per_patch"] == 1.0
    assert report["seams"]["most_bytes"] > 0
    assert_same(found, reference)


def test_the_plan_says_so(case: Case, tmp_path: Path) -> None:
    words = {"input": case.image, "output": str(tmp_path / "o"), "model": case.bundle, "executor": "serial"}
    plans = {
        mode: api.run_plan(SegmentSpec.read({**words, "overlap": 0.5, "block": "16,16,16", "seams": mode}))
        for mode in ("on", "off")
    }
    assert plans["on"]["forwards_per_patch"] == 1.0
    assert plans["off"]["forwards_per_patch"] > 1.5
    assert plans["on"]["forwards"] == plans["on"]["patches"] == plans["off"]["patches"]
    assert plans["on"]["seams"]["bound_bytes"] > 0
    assert not plans["off"]["seams"]["shared"]
    assert plans["on"]["job_key"] == plans["off"]["job_key"]


@pytest.mark.parametrize(
    "options",
    [
        {"roi": "7:33,5:41,11:50", "block": "12,16,16"},
        long({"overlap": 0.7, "block": "10,10,20", "roi": ":,0:30,0:30"}),
        {"overlap": 0.25, "blend": "constant", "block": "16,16,16", "batch": 3},
        long({"mirror": True, "block": "16,24,24"}),
    ],
    ids=str,
)
def test_whatever_is_asked_for(case: Case, tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"overlap": 0.5, **options}
    report, found = shared(case, tmp_path / "on.zarr", **options)
    assert report["forwards_per_patch"] == 1.0
    assert_same(found, alone(case, tmp_path / "off.zarr", **options))


@pytest.mark.parametrize("kind", [long("ensemble"), "unpadded", long("many"), "views", long("flat")])
def test_whatever_the_network(flat_case: Case, case: Case, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"overlap": 0.5, "block": "12,16,20"}
    image = case.image
    if kind == "ensemble":
        bundle = make_bundle(tmp_path / "bundle", members=2)
    elif kind == "unpadded":
        image = store(tmp_path / "image.zarr", smooth((10, 18, 20), seed=4))
        bundle = make_bundle(tmp_path / "bundle", patch=(24, 24, 24), padded=False)
        options["block"] = "8,8,8"
    elif kind == "many":
        image = store(tmp_path / "image.zarr", smooth((10, 18, 20), seed=4))
        bundle = make_bundle(tmp_path / "bundle", classes=260, patch=(8, 8, 8))
        options["block"] = "8,8,8"
    else:
        image, bundle = flat_case.image, flat_case.bundle
        options |= {"axis": "z,y,x"} if kind == "views" else {"block": "5,9,7"}
    mine = Case(image, bundle, tmp_path)
    report, found = shared(mine, tmp_path / "on.zarr", **options)
    assert report["forwards_per_patch"] == 1.0
    assert_same(found, alone(mine, tmp_path / "off.zarr", **options))


@pytest.mark.chaos
def test_columns_within_a_small_budget(case: Case, reference: Bits, tmp_path: Path) -> None:
    """Between once and as often as without seams, as the plan says; and the budget holds."""

    def plan(**more: Any) -> dict[str, Any]:
        words = {"input": case.image, "output": str(tmp_path / "plan"), "model": case.bundle, "executor": "serial"}
        return api.run_plan(SegmentSpec.read({**words, **options, "seams": "on", **more}))

    options: dict[str, Any] = {"overlap": 0.5, "block": "10,12,13", "probabilities": True}
    most = plan()["seams"]["bound_bytes"]
    ratios = []
    for share in (1.0, 0.6, 0.3, 0.001):
        budget = share * most / 2**30
        report, found = shared(case, tmp_path / f"{share}", **options, seam_memory=budget)
        planned = plan(seam_memory=budget)
        assert report["seams"]["bound_bytes"] == planned["seams"]["bound_bytes"] <= budget * 2**30
        assert report["forwards_per_patch"] == planned["forwards_per_patch"]
        assert report["forwards"] == planned["forwards"]
        ratios.append(report["forwards_per_patch"])
        assert_same(found, reference)
    assert ratios[0] == 1.0
    assert ratios == sorted(set(ratios))


# ---------------------------------------------------------------- resumed, failed


def part(case: Case, output: Path, blocks: int, **options: Any) -> int:
    """Stop a job after so many blocks."""

    def stop(tally: Tally) -> None:
        if tally.computed >= blocks:
            raise KeyboardInterrupt

    values = {"input": case.image, "output": str(output), "model": case.bundle, "executor": "serial", **options}
    with pytest.raises(JobInterrupted):
        api.run_segment(SegmentSpec.read({"probabilities": True, "seams": "on", **values}), stop)
    return len(done_blocks(output))


def test_a_resumed_job_computes_again_what_touches_lost_seams_and_nothing_else(
    case: Case, reference: Bits, tmp_path: Path
) -> None:
    options = {"overlap": 0.5, "block": "16,16,16"}
    part(case, tmp_path / "out.zarr", 13, **options)
    done = done_blocks(tmp_path / "out.zarr")
    report, found = shared(case, tmp_path / "out.zarr", **options)
    assert report["blocks"]["resumed"] == len(done)
    assert_same(found, reference)
    grid = BlockGrid((40, 45, 50), (16, 16, 16), Box.of((40, 45, 50)))
    owner = Ownership(grid, (PatchLattice(grid.shape, (16,) * 3, (8,) * 3),), grid.counts)
    pending = set(range(len(grid))) - done
    again = sum(
        patches.count
        for index in pending
        for seam in owner.givers(index)
        if seam.block in done
        for patches in owner.shared(seam.block, index)
    )
    assert report["forwards"] == sum(p.count for index in pending for p in owner.own(index)) + again
    assert report["forwards_per_patch"] == round(1 + again / report["patches"], 4)


def test_a_job_goes_on_in_the_other_mode(case: Case, reference: Bits, tmp_path: Path) -> None:
    options = {"overlap": 0.5, "block": "16,16,16"}
    part(case, tmp_path / "on.zarr", 5, **options)
    assert_same(shared(case, tmp_path / "on.zarr", **options, seams="off")[1], reference)
    part(case, tmp_path / "off.zarr", 5, **options, seams="off")
    assert_same(shared(case, tmp_path / "off.zarr", **options)[1], reference)


@pytest.mark.parametrize("voxel", [(3, 3, 3), long((20, 22, 25)), long((39, 44, 49))])
def test_blocks_that_fail_are_those_that_fail_alone(case: Case, tmp_path: Path, voxel: tuple[int, int, int]) -> None:
    """A voxel that is NaN: the blocks whose patches read it, whoever would have computed these patches."""
    data = smooth((40, 45, 50))
    data[voxel] = np.nan
    mine = Case(store(tmp_path / "image.zarr", data, "float32"), case.bundle, tmp_path)
    options = {"overlap": 0.5, "block": "16,16,16", "probabilities": True}
    reports = {mode: segment(mine, tmp_path / mode, seams=mode, **options) for mode in ("on", "off")}
    failed = {mode: {f["block"] for f in report["failed_blocks"]} for mode, report in reports.items()}
    assert failed["on"] == failed["off"] != set()
    assert_same(*[(labels_of(tmp_path / mode), probabilities_of(tmp_path / mode)) for mode in ("on", "off")])


@pytest.mark.chaos
def test_filled_voxels_are_counted_once(case: Case, tmp_path: Path) -> None:
    data = smooth((40, 45, 50))
    places = np.random.default_rng(0).random(data.shape) < 0.01
    data[places] = np.inf
    mine = Case(store(tmp_path / "image.zarr", data, "float32"), case.bundle, tmp_path)
    options: dict[str, Any] = {"overlap": 0.5, "nan": "fill"}
    for block in ("16,16,16", "5,9,11"):
        report, found = shared(mine, tmp_path / block, **options, block=block)
        assert report["nonfinite_filled"] == places.sum()
        assert_same(found, alone(mine, tmp_path / f"off{block}", **options, block="40,45,50"))


def test_absent_chunks_are_counted_once(case: Case, tmp_path: Path) -> None:
    data = smooth((40, 45, 50))
    data[:16, :32] = 0
    mine = Case(store(tmp_path / "image.zarr", data), case.bundle, tmp_path)
    (absent,) = {
        segment(mine, tmp_path / f"{mode}{block}", overlap=0.5, block=block, seams=mode)["absent_chunks"]
        for mode in ("on", "off")
        for block in ("16,16,16", "40,45,50")
    }
    assert absent == 8


# ---------------------------------------------------------------- the accumulator


def test_parts_that_are_merged_make_the_whole() -> None:
    lattice = PatchLattice((20, 22, 24), (12, 12, 12), (6, 6, 6))
    whole = Box.of(lattice.shape)
    right = Box((0, 0, 11), (20, 22, 24))
    device = torch.device("cpu")
    expected, giver, taker = (Accumulator(box, [lattice], "gaussian", 3, device) for box in (whole, whole, right))
    generator = torch.Generator().manual_seed(1)
    for number, index in enumerate(lattice.touching(whole)):
        probability = torch.softmax(torch.randn((3, 12, 12, 12), generator=generator), 0)
        expected.add(index, probability)
        (giver if number % 2 else taker).add(index, probability)
    row = giver.part(right, least=10**5)
    assert len(row) == 10**5
    row.flags.writeable = False
    taker.merge(right, row)
    expected.narrow(right)
    assert torch.equal(taker.labels(0.5), expected.labels(0.5))
    assert torch.equal(taker.probabilities(), expected.probabilities())
    np.testing.assert_array_equal(taker.part(right), expected.part(right))
