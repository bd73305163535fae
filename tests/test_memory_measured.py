"""The memory that a plan predicts is what a worker takes at its peak, whatever the size of the volume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import Case, make_bundle, run_json, segment, segment_words, smooth, store
from volseg.planning.memory import BASELINE_SERIAL

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
    assert predicted > 1.3 * BASELINE_SERIAL


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_ray_workers(bundle: str, tmp_path: Path) -> None:
    case = volume(tmp_path, 2 * SIDE, bundle)
    options: dict[str, Any] = {"overlap": 0, "block": BLOCK, "probabilities": True}
    report = segment(case, tmp_path / "out.zarr", executor="ray", workers=2, **options)
    measured(report)
    assert report["blocks"]["computed"] == 8
