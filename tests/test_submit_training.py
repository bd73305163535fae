"""A training on a real Ray cluster with a token, handed in by other processes; its driver is killed under way."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http_server import Server
from tests.ray_cluster import ClusterProcess, cluster_process
from tests.support import wait_until
from tests.test_submit import TOKEN, volseg
from tests.train_support import spec_for, volumes
from volseg.client import Client, check_signature
from volseg.cluster.submission import attempt_of
from volseg.models.manifest import read_manifest

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

SECRET = "canary-secret-9d2c"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Server]:
    with Server(lambda *_: (204, "")) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, receiver: Server) -> Iterator[ClusterProcess]:
    """A cluster whose operator allows messages to the receiver."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOLSEG_ALLOWED_WEBHOOKS", receiver.address)
        patch.setenv("VOLSEG_WEBHOOK_SECRET", SECRET)
        with cluster_process(tmp_path_factory.mktemp("cluster"), [1, 1], TOKEN) as started:
            # Who submits knows nothing of it.
            for name in ("VOLSEG_ALLOWED_WEBHOOKS", "VOLSEG_WEBHOOK_SECRET"):
                del started.environment[name]
            yield started


def test_driver_killed(
    cluster: ClusterProcess, receiver: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handed in again it goes on from its checkpoint; the end is told to a URL by whichever driver reaches it."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", cluster.environment["RAY_AUTH_TOKEN_PATH"])
    data = volumes(tmp_path)
    spec = spec_for(tmp_path, data, max_steps=300, validations=30, threads=1, workers=2, webhook=receiver.address)
    (tmp_path / "train.yaml").write_text(spec.model_dump_json(exclude_unset=True))
    words = ("submit", tmp_path / "train.yaml", "--address", cluster.address, "--json")
    first = json.loads(volseg(cluster, *words).stdout)
    again = json.loads(volseg(cluster, *words).stdout)
    assert (first["attached"], again["attached"], again["id"]) == (False, True, first["id"])
    wait_until(lambda: list(Path(f"{spec.out}.training/checkpoints").glob("*/manifest.json")))
    with Client(cluster.address) as client:
        job = client.job(first["id"])
        wait_until(lambda: job.status().done)
        status = job.status()
        assert (status.state, status.unit, status.total, status.stale) == ("running", "steps", 300, "")
        (attempt,) = Path(f"{spec.out}.volseg").glob("training/attempts/*")
        os.kill(json.loads(attempt.read_text())["pid"], signal.SIGKILL)
        wait_until(lambda: job.status().ended)
        assert job.status().state in {"stopped", "failed"}
        assert receiver.seen == []
        second = client.submit(spec)
        assert (attempt_of(second.id), second.attached) == (2, False)
        volseg(cluster, "wait", second.id, "--address", cluster.address)
        result = second.result()
        assert 0 < result.resumed_from < 300
        assert result.digest == read_manifest(spec.out).digest
        assert spec.out in volseg(cluster, "result", spec.out, "--address", cluster.address).stdout
        assert json.loads(volseg(cluster, *words).stdout)["state"] == "complete"
        everything = repr(client._jobs.jobs()) + second.logs()
    wait_until(lambda: receiver.seen)
    message = json.loads(receiver.body)
    assert (message["kind"], message["state"], message["job"]) == ("training", "complete", second.id)
    assert check_signature(SECRET.encode(), receiver.headers, receiver.body)
    everything += "".join(p.read_text(errors="replace") for p in Path(f"{spec.out}.volseg").rglob("*.json"))
    assert SECRET not in everything
    assert TOKEN not in everything


def test_path_that_other_machines_do_not_see(cluster: ClusterProcess, tmp_path: Path) -> None:
    """/proc/self/cwd is another folder for every process, as a local disk is for every machine."""
    data = volumes(tmp_path)
    words = ("--labels", data["labels"], "--out", tmp_path / "o", "--dims", 2, "--address", cluster.gcs)
    here = "/proc/self/cwd/image.zarr"
    done = volseg(cluster, "train", "--image", here, *words, code=2, cwd=tmp_path)
    assert f"image {here} is a local path, and the cluster's machine" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.zarr", "labels.zarr"]
