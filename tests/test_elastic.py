"""Machines that come, are drained, are told to go: workers follow, no block is lost, and the bits stay the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ray_cluster import ClusterProcess, cluster_process
from tests.support import LONGEST, Case, done_blocks, labels_of, segment, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]

BLOCKS = 12


class Job:
    """A job of `tests.elastic_job` under way."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, output: Path) -> None:
        self.process, self.folder, self.output = process, folder, output

    def begun(self, node: str = "") -> set[int]:
        """Return the blocks that began, on one machine or anywhere."""
        names = (path.name.partition("-") for path in (self.folder / "blocks").iterdir())
        return {int(index) for index, _, where in names if node in {"", where}}

    def wait_for(self, node: str, blocks: int = 1) -> None:
        """Wait until so many blocks began on a machine."""
        wait_until(lambda: len(self.begun(node)) >= blocks, self.process)

    def go(self, what: object = "") -> None:
        """Let blocks go on: one, those on a machine, or all."""
        (self.folder / (f"go-{what}" if what != "" else "go")).touch()

    @property
    def state(self) -> dict[str, Any]:
        """What its executor has."""
        path = self.folder / "state.json"
        return json.loads(path.read_text()) if path.exists() else {"slots": [], "places": {}, "share": None}

    def slots(self, node: str) -> list[dict[str, Any]]:
        """Return the actors on a machine."""
        return [slot for slot in self.state["slots"] if slot["node"] == node]

    @property
    def said(self) -> str:
        """What it said on stderr."""
        return (self.folder / "said").read_text()

    def end(self) -> tuple[dict[str, Any], str]:
        """Let it end and return its report and what it said."""
        self.go()
        out, _ = self.process.communicate(timeout=LONGEST)
        assert self.process.returncode == 0, self.said
        return json.loads(out), self.said


@contextmanager
def job(cluster: ClusterProcess, case: Case, folder: Path, **options: Any) -> Iterator[Job]:
    """Run a job whose blocks wait."""
    (folder / "blocks").mkdir(parents=True)
    output = folder / "out.zarr"
    values = {"input": case.image, "output": str(output), "model": case.bundle, "address": cluster.gcs, **options}
    words = [sys.executable, "-m", "tests.elastic_job", str(folder), json.dumps(values)]
    with (
        (folder / "said").open("w") as said,
        subprocess.Popen(words, env=cluster.environment, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        try:
            yield Job(process, folder, output)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def expected(case: Case) -> Path:
    output = case.folder / "elastic.zarr"
    segment(case, output, overlap=0.25)
    return output


def ends(running: Job, expected: Path, *, retried: int, used: int) -> str:
    """It ends complete, and nothing was set aside though each block had one attempt; returns what it said."""
    report, said = running.end()
    assert report["blocks"] == {"total": BLOCKS, "computed": BLOCKS, "resumed": 0, "failed": 0}
    assert report["retried"] == retried
    assert report["workers"]["used"] == used
    np.testing.assert_array_equal(labels_of(running.output), labels_of(expected))
    return said


def gpu(**more: int) -> str:
    return json.dumps({"num_cpus": 0, "num_gpus": 1, **more}, separators=(",", ":"))


def test_machines_come_and_are_drained(case: Case, expected: Path, tmp_path: Path) -> None:
    """Machines with a GPU each, which are fake here; the head has none, and so has the driver."""
    with cluster_process(tmp_path / "cluster", [], None) as cluster, ExitStack() as stack:
        cluster.ask("add", gpu())
        running = stack.enter_context(job(cluster, case, tmp_path / "job", device="cuda"))
        first = cluster.nodes[0]
        running.wait_for(first, 2)
        # One whose memory is too small for a worker, one whose device is another, and one that fits.
        cluster.ask("add", gpu(memory=100 << 20))
        small = cluster.nodes[1]
        wait_until(lambda: running.state["places"].get(small) == 0, running.process)
        (running.folder / "strange").touch()
        cluster.ask("add", gpu())
        strange = cluster.nodes[2]
        wait_until((running.folder / f"strange-{strange}").exists, running.process)
        cluster.ask("add", gpu())
        second = cluster.nodes[3]
        running.wait_for(second, 2)
        # Time enough: the blocks in hand are finished there, and no other begins.
        cluster.ask("drain", 0, 100)
        wait_until(lambda: running.slots(first)[0]["leaving"], running.process)
        before = running.begun(first)
        running.go(first)
        wait_until(lambda: not running.slots(first), running.process)
        assert running.begun(first) == before
        wait_until(lambda: before <= done_blocks(running.output), running.process)
        # Too little time: they are handed to the next machine, which comes meanwhile.
        begun = running.begun(second)
        cluster.ask("drain", 3, 6)
        wait_until(lambda: not running.slots(second), running.process)
        cluster.ask("add", gpu())
        third = cluster.nodes[4]
        wait_until(lambda: begun <= running.begun(third), running.process)
        said = ends(running, expected, retried=2, used=2)
        assert not running.begun(small) | running.begun(strange)
    assert "finished its blocks and left: its machine is taken away" in said
    assert "was lost (its machine is taken away, too soon); its 2 block(s) go to another" in said
    assert said.count("takes no part: this job was begun on another device") == 1
    assert "the job goes on without that machine: go on with the same device" in said


def test_machines_and_workers_are_told_to_go(case: Case, expected: Path, tmp_path: Path) -> None:
    """SIGTERM to a pod, to Ray's daemon on a machine, and to a worker's process."""
    with (
        cluster_process(tmp_path / "cluster", [1], None) as cluster,
        job(cluster, case, tmp_path / "job") as running,
    ):
        daemon = cluster.nodes[0]
        running.wait_for(daemon, 2)
        cluster.ask("pod", 1, 100)
        pod = cluster.nodes[1]
        running.wait_for(pod, 2)
        cluster.ask("sigterm", 1)
        wait_until(lambda: running.slots(pod)[0]["leaving"], running.process)
        before = running.begun(pod)
        running.go(pod)
        wait_until(lambda: not running.slots(pod), running.process)
        assert running.begun(pod) == before
        # It takes its actors with it at once.
        cluster.ask("add", '{"num_cpus":1}')
        last = cluster.nodes[2]
        running.wait_for(last, 2)
        lost = running.begun(daemon)
        cluster.ask("sigterm", 0)
        wait_until(lambda: not running.slots(daemon), running.process)
        (pid,) = {int(path.read_text()) for path in (running.folder / "blocks").glob(f"*-{last}")}
        os.kill(pid, signal.SIGTERM)
        report, said = running.end()
        assert report["blocks"] == {"total": BLOCKS, "computed": BLOCKS, "resumed": 0, "failed": 0}
        # What the worker had in hand is finished before its process ends, or comes back.
        assert len(lost) <= report["retried"] <= len(lost) + 2
        np.testing.assert_array_equal(labels_of(running.output), labels_of(expected))
    assert "was lost (its machine is taken away); its 2 block(s) go to another" in said


@pytest.mark.parametrize("limits", [(1, 1), (None, None)])
def test_two_jobs_share_a_cluster(
    case: Case, expected: Path, tmp_path: Path, limits: tuple[int | None, int | None]
) -> None:
    """With limits both have theirs from the start; without, the first one gives the second its half."""
    with (
        cluster_process(tmp_path / "cluster", [1, 1], None) as cluster,
        job(cluster, case, tmp_path / "one", workers=limits[0]) as one,
    ):
        wait_until(lambda: len(one.begun()) == (2 if limits[0] else 4), one.process)
        with job(cluster, case, tmp_path / "two", workers=limits[1]) as two:
            if limits[0] is None:
                wait_until(lambda: any(slot["leaving"] for slot in one.state["slots"]), one.process)
                assert one.state["share"] == 1
                wait_until(lambda: "1 other job(s) of volseg work on this cluster" in two.said, two.process)
                (leaving,) = (slot for slot in one.state["slots"] if slot["leaving"])
                for index in leaving["blocks"]:
                    one.go(index)
            wait_until(two.begun, two.process)
            assert {len(one.slots(node)) + len(two.slots(node)) for node in cluster.nodes} == {1}
            said = ends(two, expected, retried=0, used=1)
        # What the second one had is the first one's again.
        if limits[0] is None:
            wait_until(lambda: all(one.slots(node) for node in cluster.nodes), one.process)
        first = ends(one, expected, retried=0, used=1 if limits[0] else 2)
    if limits[0] is None:
        assert "finished its blocks and left: other jobs lack their part of the cluster" in first
    else:
        # A worker that is slow to start may be explained by them; none of them gives way.
        assert "other jobs lack" not in said + first


def test_driver_told_to_end_with_long_blocks_in_hand(case: Case, expected: Path, tmp_path: Path) -> None:
    """It waits for none of them, keeps what is done, and says how to go on."""
    with cluster_process(tmp_path / "cluster", [1], None) as cluster:
        with job(cluster, case, tmp_path / "job") as running:
            running.wait_for(cluster.nodes[0], 2)
            for index in running.begun():
                running.go(index)
            running.wait_for(cluster.nodes[0], 4)
            running.process.send_signal(signal.SIGTERM)
            running.process.communicate(timeout=LONGEST)
        assert running.process.returncode == 130, running.said
        kept = done_blocks(running.output)
        assert len(kept) == 2
        assert list(running.folder.glob("out.zarr.volseg/*/ended/00001.json"))
        report = segment(case, running.output, overlap=0.25)
    assert report["blocks"] == {"total": BLOCKS, "computed": BLOCKS - 2, "resumed": 2, "failed": 0}
    np.testing.assert_array_equal(labels_of(running.output), labels_of(expected))
