"""Every patch once, while workers, drivers and machines are killed: the bits stay, and nobody takes the blame."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import (
    LONGEST,
    Case,
    actors,
    done_blocks,
    labels_of,
    probabilities_of,
    process,
    receipts_of,
    segment_words,
    wait_until,
)
from tests.test_ray import UNFORGIVING, raylet_of, working
from tests.test_seams import Bits, alone, assert_same, shared
from volseg import api
from volseg.execution.driver import Tally
from volseg.spec import SegmentSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]

BLOCKS = 75
OPTIONS: dict[str, Any] = {"overlap": 0.5, "block": "8,16,10", "probabilities": True}
WORDS = ("--overlap", 0.5, "--block", "8,16,10", "--probabilities", "--seams", "on", "--attempts", 1)


@pytest.fixture(scope="module")
def case(slow_case: Case) -> Case:
    return slow_case


@pytest.fixture(scope="module")
def reference(case: Case) -> Bits:
    return alone(case, case.folder / "seams-chaos-reference.zarr", **{**OPTIONS, "block": "40,45,50"})


@pytest.mark.usefixtures("one_ray")
def test_workers_killed(case: Case, reference: Bits, tmp_path: Path) -> None:
    """What a dead process made lies in its machine's object store and is not lost with it."""
    victims = set[int]()

    def kill(tally: Tally) -> None:
        if tally.computed > 10 * len(victims) and tally.workers == 2 and len(victims) < 4:
            worker = actors(os.getpid())[0]
            victims.add(worker.pid)
            worker.kill()

    values = {"input": case.image, "output": str(tmp_path / "out.zarr"), "model": case.bundle, **OPTIONS}
    values |= {"executor": "ray", "workers": 2, "attempts": 1, "seams": "on"}
    report = api.run_segment(SegmentSpec.read(values), kill)
    assert report["blocks"] == {"total": BLOCKS, "computed": BLOCKS, "resumed": 0, "failed": 0}
    # Where workers are slow to start, the one that is left does the rest.
    assert report["workers"]["lost"] == len(victims) >= 1
    assert report["seams"]["lost"] == 0
    assert report["seams"]["most_bytes"] <= report["seams"]["bound_bytes"]
    assert_same((labels_of(tmp_path / "out.zarr"), probabilities_of(tmp_path / "out.zarr")), reference)


def test_driver_killed(case: Case, reference: Bits, tmp_path: Path) -> None:
    """All seams go with Ray; the next driver computes again what touches them."""
    output = tmp_path / "out.zarr"
    words = segment_words(case, output, *WORDS, "--executor", "ray", "--workers", 2)
    with process(*words) as job:
        wait_until(lambda: receipts_of(output), job)
        os.kill(job.pid, signal.SIGKILL)
        job.wait(LONGEST)
    done = len(done_blocks(output))
    assert 0 < done < BLOCKS
    report, found = shared(case, output, **OPTIONS, executor="ray", workers=2)
    assert report["blocks"]["resumed"] == done
    assert 1.0 < report["forwards_per_patch"] < 2.0
    assert_same(found, reference)


def test_lost_machine(case: Case, reference: Bits, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    output = tmp_path / "out.zarr"
    cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=256 << 20) for _ in range(2)]
        words = [
            str(w) for w in segment_words(case, output, *WORDS, "--workers", 2, "--address", cluster.address, "--json")
        ]
        with subprocess.Popen(
            [sys.executable, "-c", UNFORGIVING, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as job:
            try:
                wait_until(lambda: len(working(cluster)) == 2, job)
                # Far enough that something of both machines waits for blocks to come.
                wait_until(lambda: len(done_blocks(output)) >= 15, job)
                victim = next(p for p in working(cluster))
                node = next(n for n in nodes if victim in actors(raylet_of(n)))
                cluster.remove_node(node, allow_graceful=False)
                out, err = job.communicate(timeout=LONGEST)
            finally:
                job.kill()
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]
    assert job.returncode == 0, err
    report = json.loads(out)
    assert report["blocks"]["failed"] == 0
    assert report["workers"]["lost"] == 1
    assert report["seams"]["lost"] > 0
    assert report["forwards"] > report["patches"]
    assert_same((labels_of(output), probabilities_of(output)), reference)
