"""Workers that share one process and its networks: the same bits as one worker's, each block apart, each patch once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support import Case, labels_of, long, make_bundle, probabilities_of, segment, smooth, status_of, store
from volseg import api
from volseg.execution.local import LocalExecutor
from volseg.execution.output import create_output
from volseg.execution.prepare import local_cores, prepare
from volseg.inference.worker import workers_of
from volseg.spec import SegmentSpec

Bits = tuple[NDArray[Any], NDArray[np.uint8]]
EXACT = {"blend": "exact", "tile": "16,16,16"}


def bits(case: Case, output: Path, **options: Any) -> tuple[dict[str, Any], Bits]:
    report = segment(case, output, **{"probabilities": True, **options})
    assert report["status"] == "complete"
    return report, (labels_of(output), probabilities_of(output))


def assert_same(a: Bits, b: Bits) -> None:
    for first, second in zip(a, b, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.fixture(scope="module")
def reference(case: Case) -> Bits:
    return bits(case, case.folder / "threads-reference.zarr", overlap=0.5, block="40,45,50", seams="off")[1]


@pytest.mark.parametrize(("workers", "block"), [(2, "16,16,16"), (3, "8,45,50"), long(5, "5,9,11")])
@pytest.mark.parametrize("seams", ["on", "off"])
def test_bits_do_not_depend_on_workers(
    case: Case, reference: Bits, tmp_path: Path, workers: int, block: str, seams: str
) -> None:
    options = {"executor": "threads", "workers": workers, "block": block, "seams": seams}
    report, found = bits(case, tmp_path / "out.zarr", overlap=0.5, **options)
    assert report["workers"] == {"used": workers, "lost": 0}
    assert_same(found, reference)
    if seams == "on":
        assert report["forwards_per_patch"] == 1.0
        assert 0 < report["seams"]["most_bytes"] <= report["seams"]["bound_bytes"]


@pytest.mark.parametrize(
    ("network", "options"),
    [
        long({"dims": 2, "patch": (1, 16, 16), "members": 2}, {"axis": "z,y,x"}),
        long({"norm": "none", "padded": False, "patch": (20, 20, 20)}, {}),
        ({"patch": (16, 16, 16)}, EXACT),
    ],
    ids=["ensemble along three axes", "unpadded", "exact"],
)
def test_whatever_the_network(tmp_path: Path, network: dict[str, Any], options: dict[str, Any]) -> None:
    bundle = make_bundle(tmp_path / "bundle", classes=3, **network)
    case = Case(store(tmp_path / "image.zarr", smooth((32, 33, 34)), "uint8", chunks=(16, 16, 16)), bundle, tmp_path)
    options = {**options, "block": "16,16,16"}
    alone = bits(case, tmp_path / "alone.zarr", **options)[1]
    assert_same(bits(case, tmp_path / "out.zarr", executor="threads", workers=3, **options)[1], alone)


def test_the_networks_are_there_once(case: Case, tmp_path: Path) -> None:
    """And torch has its threads back once all workers are closed."""
    output = str(tmp_path / "out.zarr")
    spec = SegmentSpec.read({"input": case.image, "output": output, "model": case.bundle, "workers": 3})
    job = prepare(spec, local_cores(spec), "threads")
    create_output(job)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        workers = workers_of(job.spec, job.plan, job.bundle_digest)
        predictors = [worker._processor._predictor for worker in workers]
        assert len({id(predictor) for predictor in predictors}) == 3
        assert len({id(network) for predictor in predictors for network in predictor._networks}) == 1
        executor = LocalExecutor(lambda: workers)
        executor.start()
        executor.stop()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_block_that_fails_is_set_aside_and_the_others_go_on(case: Case, tmp_path: Path) -> None:
    voxels = smooth((32, 32, 32))
    voxels[3, 3, 3] = np.nan
    mine = Case(store(tmp_path / "image.zarr", voxels, "float32", chunks=(16, 16, 16)), case.bundle, tmp_path)
    options = {"block": "16,16,16", "overlap": 0, "patch": "16,16,16", "attempts": 2, "seams": "off"}
    report = segment(mine, tmp_path / "out.zarr", executor="threads", workers=3, **options)
    assert report["blocks"] == {"total": 8, "computed": 7, "resumed": 0, "failed": 1}
    assert [failed["block"] for failed in report["failed_blocks"]] == [0]
    assert status_of(tmp_path / "out.zarr") == "incomplete"


def test_the_plan_says_what_a_worker_takes_of_the_process(case: Case, tmp_path: Path) -> None:
    """One worker's share of what all of them have together, so that as many of these as there are workers fit."""

    def plan(workers: int) -> dict[str, Any]:
        words = {"input": case.image, "output": str(tmp_path / "o"), "model": case.bundle, "block": "8,16,10"}
        return api.run_plan(SegmentSpec.read({**words, "workers": workers, "seams": "off", "executor": "threads"}))

    one, four = plan(1), plan(4)
    assert four["executor"] == "threads"
    shared = ("baseline", "network")
    for name in shared:
        assert four["memory_per_worker"][name] == -(-one["memory_per_worker"][name] // 4)
    for name in set(one["memory_per_worker"]) - {*shared, "allocator", "total"}:
        assert four["memory_per_worker"][name] == one["memory_per_worker"][name]
