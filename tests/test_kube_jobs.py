"""The entry points of the manifests on a real Ray cluster with a token, submitted as KubeRay's submitter does.

Only what this machine has not is another: the image's folders and the buckets are those of this test, and its workers
have no GPU.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from tests.kube_schemas import Manifest
from tests.kustomize import KUBERAY, REPO, build
from tests.ray_cluster import ClusterProcess, cluster_process
from tests.support import LONGEST, Case, labels_of, segment, smooth, status_of, store
from volseg.kube import Placement, render_job
from volseg.kube.render import JOBS_FOLDER, SPEC_ANNOTATION, SPEC_FILE
from volseg.spec.batch import BatchSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    with cluster_process(tmp_path_factory.mktemp("cluster"), [1, 1], "token-of-the-manifests") as started:
        yield started


def job_of(folder: str) -> Manifest:
    (job,) = [manifest for manifest in build(KUBERAY / folder) if manifest["kind"] == "RayJob"]
    return job


def spec_in(job: Manifest) -> dict[str, Any]:
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    found = yaml.safe_load(head["metadata"]["annotations"][SPEC_ANNOTATION])
    assert isinstance(found, dict)
    return found


def submit(cluster: ClusterProcess, job: Manifest, spec: dict[str, Any], folder: Path) -> str:
    """Do what KubeRay's submitter does with a RayJob whose head shows `spec`, and return the job's log."""
    assert spec["device"] == "cuda"
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec | {"device": "cpu"}))
    entrypoint = job["spec"]["entrypoint"].replace(JOBS_FOLDER, str(REPO / "jobs"))
    entrypoint = entrypoint.replace(SPEC_FILE, str(folder / "spec.yaml"))
    line = f"{Path(sys.executable).parent}/ray job submit --address {cluster.address} -- {entrypoint}"
    done = subprocess.run(
        ["bash", "-ce", "--", line],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=2 * LONGEST,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.chaos
def test_rayjob_segment(cluster: ClusterProcess, case: Case, tmp_path: Path) -> None:
    """Eight workers, as the manifest says, on two machines with one core each: the others would wait for machines."""
    job = job_of("rayjob-segment")
    output = tmp_path / "out.zarr"
    spec = spec_in(job)
    assert spec.keys() == {"input", "output", "model", "device", "workers"}
    log = submit(cluster, job, spec | {"input": case.image, "output": str(output), "model": case.bundle}, tmp_path)
    assert f"complete: {output}" in log
    segment(case, tmp_path / "alone.zarr")
    np.testing.assert_array_equal(labels_of(output), labels_of(tmp_path / "alone.zarr"))


@pytest.mark.chaos
def test_rendered_batch(cluster: ClusterProcess, case: Case, tmp_path: Path) -> None:
    for day in (1, 2):
        store(tmp_path / f"scans/2026-{day}/recon.zarr", smooth((24, 16, 16), seed=day))
    values = {"input": "s3://scans/2026-*/recon.zarr", "output": "s3://seg", "model": "s3://models/pores"}
    job = render_job(BatchSpec.read(values), Placement("volseg:0.1.0", gpus=2))
    here = {"input": f"{tmp_path}/scans/2026-*/recon.zarr", "output": str(tmp_path / "seg"), "model": case.bundle}
    assert "2 complete, 0 not" in submit(cluster, job, spec_in(job) | here, tmp_path)
    assert status_of(tmp_path / "seg" / "2026-2" / "recon.zarr") == "complete"


def test_a_container_of_the_cluster_is_well(cluster: ClusterProcess) -> None:
    """The image's check asks the nodes that it sees, here those of this cluster alone, and needs no token."""
    spec = importlib.util.spec_from_file_location("healthcheck", REPO / "deploy" / "healthcheck.py")
    assert spec is not None
    assert spec.loader is not None
    health = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(health)
    family = psutil.Process(cluster._process.pid).children(recursive=True)
    lines = [" ".join(process.cmdline()) for process in family]
    assert sum("/raylet/raylet " in line for line in lines) == 3
    assert len(health.ports(lines)) == 3
    assert health.is_well(lines)


@pytest.mark.chaos
def test_rayjob_train(cluster: ClusterProcess, tmp_path: Path) -> None:
    """Two workers, as the manifest says, on a machine each; only steps enough to have a bundle."""
    job = job_of("rayjob-train")
    image = smooth((128, 32, 32), seed=3)
    store(tmp_path / "image.zarr", image)
    store(tmp_path / "labels.zarr", (image > 128).astype(np.uint8))
    spec = spec_in(job)
    assert spec["workers"] == 2
    here = {
        "image": [str(tmp_path / "image.zarr")],
        "labels": [str(tmp_path / "labels.zarr")],
        "out": str(tmp_path / "b"),
    }
    small = {"dims": 2, "widths": [4, 8], "patch": [1, 16, 16], "batch": 2, "max_steps": 4, "validations": 1}
    submit(cluster, job, spec | here | small, tmp_path)
    assert (tmp_path / "b" / "model.json").exists()
