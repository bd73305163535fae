"""Submission to a real Ray cluster with a token: a head without CPUs and two worker machines on loopback."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ray_cluster import REPO, ClusterProcess, cluster_process
from tests.support import LONGEST, Case, done_blocks, labels_of, segment, status_of, wait_until
from volseg.client import AsyncClient, Client, JobResult
from volseg.cluster.jobs import AccessError, RayJob
from volseg.cluster.submission import attempt_of
from volseg.errors import InputError, JobInterrupted
from volseg.spec import SegmentSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOKEN = "canary-token-5b1f0c9e7d3a4826"
SLOW: dict[str, Any] = {"overlap": 0.6, "block": "8,16,10"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    with cluster_process(tmp_path_factory.mktemp("cluster"), [1, 1], TOKEN) as started:
        yield started


@pytest.fixture
def client(cluster: ClusterProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", cluster.environment["RAY_AUTH_TOKEN_PATH"])
    with Client(cluster.address) as opened:
        yield opened


def spec_of(case: Case, output: Path, **options: Any) -> SegmentSpec:
    return SegmentSpec.read({"input": case.image, "output": str(output), "model": case.bundle, **options})


def volseg(cluster: ClusterProcess, *words: object, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run volseg in a process of its own, as somebody who has the token."""
    options.setdefault("env", cluster.environment)
    line = [sys.executable, "-m", "volseg", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=LONGEST, check=False, **options)
    assert done.returncode == code, done.stderr
    return done


def submissions(client: Client, job_id: str) -> list[RayJob]:
    """Return all attempts of a job that Ray knows."""
    return [job for job in client._jobs.jobs() if job.id.startswith(job_id.rpartition("-")[0])]


def test_from_another_process(cluster: ClusterProcess, client: Client, case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    (tmp_path / "spec.yaml").write_text(
        json.dumps(
            {"input": case.image, "output": str(output), "model": case.bundle, "overlap": 0.25, "roi": "0:30,:,:"}
        )
    )
    words = ("submit", tmp_path / "spec.yaml", "--address", cluster.address, "--json")
    first = json.loads(volseg(cluster, *words).stdout)
    again = json.loads(volseg(cluster, *words).stdout)
    assert not first["attached"]
    assert again["attached"]
    assert again["id"] == first["id"]
    job = first["id"]
    # The address is remembered with the name.
    assert volseg(cluster, "wait", job).stdout.startswith("complete, ")
    document = json.loads(volseg(cluster, "result", job, "--json").stdout)
    assert document["status"] == "complete"
    assert document["submission"] == job
    assert "class 1:" in volseg(cluster, "result", job).stdout
    logs = volseg(cluster, "logs", job).stdout
    assert '"status": "complete"' in logs
    # The cluster and all that it tells know nothing of the token.
    everything = logs + repr(client._jobs.jobs()) + volseg(cluster, "status", job).stdout
    assert TOKEN not in everything
    (raw,) = submissions(client, job)
    assert raw.exit_code == 0
    done = json.loads(volseg(cluster, *words).stdout)
    assert (done["attached"], done["state"]) == (True, "complete")
    assert len(submissions(client, job)) == 1
    whole = tmp_path / "whole.zarr"
    segment(case, whole, overlap=0.25, roi="0:30,:,:")
    np.testing.assert_array_equal(labels_of(output), labels_of(whole))


TOGETHER = """
import sys
from volseg import SegmentSpec
from volseg.client import Client
spec = SegmentSpec.read({"input": sys.argv[2], "output": sys.argv[3], "model": sys.argv[4], "overlap": 0.25})
with Client(sys.argv[1]) as client:
    print("ready", flush=True)
    sys.stdin.readline()
    print(client.submit(spec).id)
"""


@pytest.mark.chaos
def test_eight_at_the_same_moment(cluster: ClusterProcess, client: Client, case: Case, tmp_path: Path) -> None:
    words = [sys.executable, "-c", TOGETHER, cluster.address, case.image, str(tmp_path / "out.zarr"), case.bundle]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    submitters = [subprocess.Popen(words, env=cluster.environment, **pipes) for _ in range(8)]
    try:
        for submitter in submitters:
            assert submitter.stdout is not None
            assert submitter.stdout.readline() == "ready\n"
        for submitter in submitters:
            assert submitter.stdin is not None
            submitter.stdin.write("go\n")
            submitter.stdin.flush()
        names = {submitter.communicate(timeout=LONGEST)[0].strip() for submitter in submitters}
    finally:
        for submitter in submitters:
            submitter.kill()
            submitter.communicate()
    assert len(names) == 1
    (name,) = names
    result = client.job(name).result(LONGEST)
    assert isinstance(result, JobResult)
    assert result.blocks["failed"] == 0
    assert len(submissions(client, name)) == 1
    assert [path.name for path in tmp_path.glob("out.zarr.volseg/*/attempts/*")] == ["00001.json"]


@pytest.mark.chaos
def test_cancel_and_go_on(cluster: ClusterProcess, client: Client, case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    job = client.submit(spec_of(case, output, **SLOW))
    wait_until(lambda: len(done_blocks(output)) > 0)
    assert volseg(cluster, "cancel", job.id, "--address", cluster.address).stdout.startswith(f"{job.id}: stopped, ")
    kept = len(done_blocks(output))
    assert status_of(output) == "incomplete"
    with pytest.raises(JobInterrupted, match=rf"stopped with {kept} of \d+ blocks done .*submit it again to go on"):
        job.result(LONGEST)
    # All of the driver's own words are in the ledger: it left by itself and was not killed.
    assert list(tmp_path.glob("out.zarr.volseg/*/ended/00001.json"))
    second = client.submit(spec_of(case, output, **SLOW))
    assert attempt_of(second.id) == 2
    result = second.result(LONGEST)
    assert result.blocks["resumed"] == kept
    assert result.blocks["computed"] == result.blocks["total"] - kept


@pytest.mark.chaos
def test_cancel_with_a_long_block_in_hand(cluster: ClusterProcess, client: Client, case: Case, tmp_path: Path) -> None:
    """The driver ends before the block does, and before Ray would kill it; the next one computes the whole block."""
    output = tmp_path / "out.zarr"
    spec = spec_of(case, output, overlap=0.9, block="48,48,56", roi="0:20,0:24,:")
    job = client.submit(spec)
    wait_until(lambda: job.status().workers)
    assert volseg(cluster, "cancel", job.id, "--address", cluster.address).stdout.startswith(f"{job.id}: stopped, ")
    assert (job.status().state, done_blocks(output)) == ("stopped", set())
    # The driver's last word: it left by itself.
    assert list(tmp_path.glob("out.zarr.volseg/*/ended/00001.json"))
    result = client.submit(spec).result(LONGEST)
    assert result.blocks == {"total": 1, "computed": 1, "resumed": 0, "failed": 0}


@pytest.mark.chaos
def test_worker_and_driver_killed(cluster: ClusterProcess, client: Client, case: Case, tmp_path: Path) -> None:
    """A machine comes, one goes, the driver is killed: submitted again, the job ends with the bits of a quiet run."""
    output = tmp_path / "out.zarr"
    spec = spec_of(case, output, **SLOW)
    job = client.submit(spec)
    wait_until(lambda: job.status().done)
    status = job.status()
    assert (status.state, status.stale) == ("running", "")
    assert 0 < status.done < status.total
    assert status.workers
    assert status.rate
    assert status.seconds_left
    cluster.ask("add", '{"num_cpus":1}')
    cluster.ask("kill", 0)
    before = len(done_blocks(output))
    wait_until(lambda: len(done_blocks(output)) > before)
    (attempt,) = tmp_path.glob("out.zarr.volseg/*/attempts/*")
    os.kill(json.loads(attempt.read_text())["pid"], signal.SIGKILL)
    wait_until(lambda: job.status().ended)
    assert job.status().state in {"stopped", "failed"}
    second = client.submit(spec)
    assert attempt_of(second.id) == 2
    assert not second.attached
    assert second.result(LONGEST).blocks["resumed"] >= before
    whole = tmp_path / "whole.zarr"
    segment(case, whole, overlap=0.6)
    np.testing.assert_array_equal(labels_of(output), labels_of(whole))


@pytest.mark.chaos
def test_async(cluster: ClusterProcess, client: Client, case: Case, tmp_path: Path) -> None:
    async def run() -> list[str]:
        async with AsyncClient(cluster.address) as opened:
            first, second = await asyncio.gather(
                *(opened.submit(spec_of(case, tmp_path / f"{n}.zarr", overlap=0.25, workers=1)) for n in range(2))
            )
            results = await asyncio.gather(first.result(LONGEST), second.result(LONGEST))
            return [result.output for result in results]

    assert asyncio.run(run()) == [str(tmp_path / "0.zarr"), str(tmp_path / "1.zarr")]
    np.testing.assert_array_equal(labels_of(tmp_path / "0.zarr"), labels_of(tmp_path / "1.zarr"))


def test_no_entry_without_the_token(cluster: ClusterProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with Client(cluster.address) as nobody, pytest.raises(AccessError, match="wants a token; nothing was done"):
        nobody.jobs()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another-token-0123456789abcdef")
    with Client(cluster.address) as other, pytest.raises(AccessError, match="refused the token") as raised:
        other.jobs()
    assert "another-token" not in str(raised.value)


def test_error_of_the_driver_comes_back(client: Client, case: Case, tmp_path: Path) -> None:
    """What only the cluster knows, here that it has no GPU, is the answer of the job."""
    job = client.submit(spec_of(case, tmp_path / "out.zarr", device="cuda"))
    with pytest.raises(InputError, match="device cuda was asked for, but the Ray cluster has no GPU"):
        job.result(LONGEST)
    assert job.status().state == "failed"


def test_path_that_other_machines_do_not_see(cluster: ClusterProcess, case: Case, tmp_path: Path) -> None:
    """/proc/self/cwd is another folder for every process, as a local disk is for every machine."""
    words = ("--model", case.bundle, "--address", cluster.gcs)
    here = "/proc/self/cwd/image.zarr"
    done = volseg(cluster, "segment", here, tmp_path / "out.zarr", *words, code=2, cwd=case.folder)
    assert f"input {here} is a local path, and the cluster's machine" in done.stderr
    assert "nothing was done: put it on a file system that all machines share" in done.stderr
    done = volseg(cluster, "segment", case.image, "/proc/self/cwd/out.zarr", *words, code=2, cwd=tmp_path)
    assert "output /proc/self/cwd/out.zarr is a local path, and the cluster's machine" in done.stderr
    assert not list(tmp_path.iterdir())


def test_ray_job_submit(cluster: ClusterProcess, case: Case, tmp_path: Path) -> None:
    """The README's command, with the entry points as they stand in the repository."""
    output = tmp_path / "out.zarr"
    folder = tmp_path / "work"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs" / "segment.py").write_bytes((REPO / "jobs" / "segment.py").read_bytes())
    (folder / "spec.yaml").write_text(
        json.dumps({"input": case.image, "output": str(output), "model": case.bundle, "overlap": 0.25})
    )
    ray = Path(sys.executable).parent / "ray"
    words = [ray, "job", "submit", "--address", cluster.address, "--working-dir", ".", "--"]
    done = subprocess.run(
        [*map(str, words), "python", "jobs/segment.py", "spec.yaml", "--workers", "2"], cwd=folder,
        env=cluster.environment, capture_output=True, text=True, timeout=LONGEST, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"complete: {output}" in done.stdout
    assert status_of(output) == "complete"
