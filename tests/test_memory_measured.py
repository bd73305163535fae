"""The memory that a plan predicts is what a worker takes at its peak, whatever the size of the volume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import Case, long, make_bundle, run_json, segment, segment_words, smooth, store
from volseg.planning.memory import BASELINE_LOCAL

# So that what a block costs weighs as much as what Python and torch occupy before the first one.
SIDE = 96
BLOCK = f"{SIDE},{SIDE},{SIDE}"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("memory") / "bundle", classes=12, widths=(8, 16), patch=(48, 48, 48))


def volume(path: Path, side: int, bundle: str) -> Case:
    return Case(store(path / f"{side}.zarr", smooth((side, side, side)), "float32", chunks=(32, 64, 64)), bundle, path)


def measured(report: dict[str, Any]) -> tuple[int, int]:
    """Return predicted and measured bytes, after a check that they agree."""
    memory = report["memory"]
    assert memory["peak"] == pytest.approx(memory["predicted"], rel=0.25)
    return memory["predicted"], memory["peak"]


@pytest.mark.chaos
@pytest.mark.slow
def test_serial_worker(bundle: str, tmp_path: Path) -> None:
    words = ("--executor", "serial", "--overlap", 0, "--block", BLOCK, "--probabilities")
    found = [
        measured(run_json(*segment_words(volume(tmp_path, side, bundle), tmp_path / f"out{side}.zarr", *words)))
        for side in (SIDE, 2 * SIDE)
    ]
    # Eight blocks instead of one change nothing.
    (predicted, _), (again, _) = found
    assert again == predicted
    # What a block costs must weigh: the rest is Python, torch and zarr.
    assert predicted > 1.3 * BASELINE_LOCAL


@pytest.mark.chaos
@pytest.mark.slow
def test_an_ensemble_along_three_axes(tmp_path: Path) -> None:
    """Views take turns, and so do members: neither multiplies activations or accumulators."""
    bundle = make_bundle(tmp_path / "bundle", dims=2, classes=12, widths=(8, 16), patch=(1, SIDE, SIDE), members=2)
    words = ("--executor", "serial", "--overlap", 0, "--block", BLOCK, "--probabilities", "--axis", "z,y,x")
    report = run_json(*segment_words(volume(tmp_path, SIDE, bundle), tmp_path / "out.zarr", *words))
    predicted, _ = measured(report)
    assert report["forwards"] == 2 * 3 * SIDE
    assert predicted > 1.3 * BASELINE_LOCAL


@pytest.mark.slow
def test_tiles_of_several_shapes(bundle: str, tmp_path: Path) -> None:
    """The windows of inner tiles are the largest, and others before them leave nothing behind."""
    words = ("--executor", "serial", "--blend", "exact", "--tile", 48, "--block", "144,144,144")
    report = run_json(*segment_words(volume(tmp_path, 144, bundle), tmp_path / "out.zarr", *words))
    predicted, _ = measured(report)
    assert report["forwards"] == report["patches"] == 27
    assert predicted > 1.3 * BASELINE_LOCAL


@pytest.mark.chaos
@pytest.mark.slow
def test_serial_worker_with_shared_patches(bundle: str, tmp_path: Path) -> None:
    """Seams wait in the same process: a layer of them, and not more for a longer volume."""
    words = ("--executor", "serial", "--overlap", 0.5, "--block", "48,96,96", "--seams", "on", "--patch", "48,48,48")
    found = []
    for depth in (144, 288):
        image = store(tmp_path / f"{depth}.zarr", smooth((depth, SIDE, SIDE)), "float32", chunks=(32, 64, 64))
        case = Case(image, bundle, tmp_path)
        report = run_json(*segment_words(case, tmp_path / f"out{depth}.zarr", *words))
        assert report["forwards_per_patch"] == 1.0
        assert 0 < report["seams"]["most_bytes"] <= report["seams"]["bound_bytes"]
        found.append(measured(report))
    assert found[0][0] == found[1][0]
    assert found[0][0] > 1.3 * BASELINE_LOCAL


@pytest.mark.slow
@pytest.mark.parametrize("seams", ["on", long("off")])
def test_threads(bundle: str, tmp_path: Path, seams: str) -> None:
    """Python, torch and the network count once, and what waits between blocks too; all else for every worker."""
    image = store(tmp_path / "long.zarr", smooth((480, SIDE, SIDE)), "float32", chunks=(32, 64, 64))
    words = ("--executor", "threads", "--workers", 3, "--overlap", 0.5, "--block", "48,96,96", "--seams", seams)
    report = run_json(*segment_words(Case(image, bundle, tmp_path), tmp_path / "out.zarr", *words))
    assert report["workers"]["used"] == 3
    predicted, _ = measured(report)
    assert predicted > 1.3 * BASELINE_LOCAL / 3


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_ray_workers_with_shared_patches(bundle: str, tmp_path: Path) -> None:
    """What a worker reads of the object store and writes there counts, what others do there does not."""
    image = store(tmp_path / "long.zarr", smooth((288, SIDE, SIDE)), "float32", chunks=(32, 64, 64))
    options: dict[str, Any] = {"overlap": 0.5, "block": "48,96,96", "seams": "on", "seam_memory": 0.12}
    case = Case(image, bundle, tmp_path)
    report = segment(case, tmp_path / "out.zarr", executor="ray", workers=2, **options)
    assert report["forwards_per_patch"] == 1.0
    measured(report)


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_ray_workers(bundle: str, tmp_path: Path) -> None:
    case = volume(tmp_path, 2 * SIDE, bundle)
    options: dict[str, Any] = {"overlap": 0, "block": BLOCK, "probabilities": True}
    report = segment(case, tmp_path / "out.zarr", executor="ray", workers=2, **options)
    measured(report)
    assert report["blocks"]["computed"] == 8
