"""Actors on a cluster that says it has GPUs, more of them than CPUs; torch here sees none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support import LONGEST, Case, labels_of, run, run_json, segment_words, status_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, connect=False, head_node_args={"num_cpus": 1, "num_gpus": 2, "include_dashboard": False}
    )
    try:
        yield cluster.address
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def test_each_actor_holds_a_gpu_of_its_own(address: str, case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    words = [sys.executable, "-m", "tests.gpu_job", address, case.image, case.bundle, str(output)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LONGEST, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    # One worker a GPU, two on this machine; the driver holds none.
    assert {name: found["cores"][name] for name in ("device", "gpus", "workers", "slots")} == {
        "device": "cuda", "gpus": 2, "workers": 2, "slots": 2,
    }  # fmt: skip
    assert (found["free"], found["driver"]) == (2.0, [])

    # Three were asked for. Two can work at once, and one that dies makes room for another; a fourth never came.
    notes = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "notes").glob("*.json")}
    assert all(note["device"] == "cuda" and note["visible"] == str(note["gpus"][0]) for note in notes.values())
    dead = notes.pop((tmp_path / "notes" / "died").read_text())
    assert sorted(note["visible"] for note in notes.values()) == ["0", "1"]
    assert dead["visible"] in {"0", "1"}

    report = found["report"]
    assert report["status"] == "complete"
    # At the same moment there were two at most: the first may have died before the second was ready.
    assert report["workers"]["used"] <= 2
    assert (report["workers"]["lost"], report["blocks"]["computed"]) == (1, 12)
    # What the message of the other test advises: the same cluster computes on its CPU, with the same bits.
    whole = tmp_path / "cpu.zarr"
    run_json(*segment_words(case, whole, "--overlap", 0.25, "--address", address, "--device", "cpu"))
    np.testing.assert_array_equal(labels_of(output), labels_of(whole))


def test_gpus_that_torch_cannot_use(address: str, case: Case, tmp_path: Path) -> None:
    """One line that names the machine and what to do, not worker after worker that cannot start."""
    output = tmp_path / "out.zarr"
    done = run(*segment_words(case, output, "--address", address, "--device", "cuda"))
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("volseg: Ray gave the worker on ")
    assert "sees none; nothing was computed" in line
    assert line.endswith("or use --device cpu")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Ray gave the worker on") == 1
    assert status_of(output) == "incomplete"
