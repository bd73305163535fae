"""A cluster with a token, everything on S3: what its metrics endpoints say, and that no credential is anywhere.

The credentials are those that the jobs work with, so each is a canary: the S3 user's key and secret, the cluster's
token, and what `tests/leaky_job.py` has an error repeat.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from tests import leaky_job
from tests.ray_cluster import REPO, ClusterProcess, cluster_process
from tests.s3_servers import Server
from tests.support import LONGEST, make_bundle, smooth, wait_until
from volseg.cli.main import main
from volseg.cluster.jobs import JobsApi, Submission
from volseg.cluster.metrics import COUNTERS, GAUGES
from volseg.models.bundle import load_networks, save_bundle
from volseg.redaction import HIDDEN
from volseg.storage import files
from volseg.storage.importer import import_volume

pytest_plugins = ("tests.s3_fixtures",)
pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOKEN = "canary-token-7c2e5f9014ab83d6"
OPTIONS = ("block=16,16,16", "chunks=8,8,8", "shards=16,16,16", "overlap=0.25", "workers=1")
# Ray's own default is ten seconds; it forgets a gauge after twice as long.
REPORT_MILLISECONDS = "1000"

Samples = dict[str, dict[frozenset[tuple[str, str]], float]]


@dataclass
class Site:
    """A running cluster, what its jobs read, and all that anybody saw of it."""

    cluster: ClusterProcess
    server: Server
    bucket: str
    session: Path
    ports: list[int]
    api: JobsApi
    seen: dict[str, str] = field(default_factory=dict)

    def __call__(self, name: str) -> str:
        return f"{self.bucket}/{name}"

    def volseg(self, *words: str, code: int = 0) -> str:
        """Run a command, keep what it says, and return its stdout."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            found = main(words)
        self.seen[f"volseg {' '.join(words[:2])} {len(self.seen)}"] = out.getvalue() + err.getvalue()
        assert found == code, err.getvalue()
        return out.getvalue()

    def submit(self, name: str, entrypoint: str) -> None:
        assert self.api.submit(Submission(name, entrypoint, {}))

    def finished(self, name: str) -> str:
        """Wait for the end of a submission and return its log."""
        wait_until(lambda: self._info(name).over)
        self.seen[f"log of {name}"] = log = self.api.logs(name)
        return log

    def _info(self, name: str) -> Any:
        return self.api.info(name)

    def get(self, path: str) -> str:
        """Ask the head, as somebody with the token, and keep the answer."""
        request = urllib.request.Request(self.cluster.address + path, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=LONGEST) as answer:
            text: str = answer.read().decode()
        self.seen[path] = text
        return text

    def scrape(self) -> Samples:
        """Return volseg's samples of all endpoints by name and labels."""
        found: Samples = {}
        for port in self.ports:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LONGEST) as answer:
                text: str = answer.read().decode()
            self.seen[f"metrics of {port}"] = text
            for line in text.splitlines():
                if line.startswith("ray_volseg_"):
                    name, _, rest = line.partition("{")
                    labels, _, value = rest.rpartition("} ")
                    pairs = frozenset(tuple(part.split("=", 1)) for part in labels.replace('"', "").split(","))
                    found.setdefault(name, {})[pairs] = float(value)  # type: ignore[index]
        return found

    def until(self, name: str, value: float, **labels: str) -> None:
        """Wait until the endpoints say so; 0 may also be said by silence."""
        wait_until(lambda: (self.total(name, **labels) or 0) == value)

    def total(self, name: str, **labels: str) -> float | None:
        """Return the sum over all processes of samples with these labels, None where there is none."""
        wanted = set(labels.items())
        values = [v for pairs, v in self.scrape().get(name, {}).items() if wanted <= pairs]
        return sum(values) if values else None


@pytest.fixture(scope="module")
def site(moto: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    # The paths of Ray's sockets must be short.
    temporary = Path(tempfile.mkdtemp(prefix="volseg-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        moto.use(patch)
        patch.setenv("RAY_TMPDIR", str(temporary))
        patch.setenv("RAY_metrics_report_interval_ms", REPORT_MILLISECONDS)
        bucket = f"s3://{moto.new_bucket()}"
        folder = tmp_path_factory.mktemp("watch")
        np.save(folder / "a.npy", smooth((14, 22, 26)).astype(np.uint8))
        import_volume(str(folder / "a.npy"), f"{bucket}/a.zarr", chunks=(8, 8, 8), shards=(16, 16, 16))
        manifest, networks = load_networks(make_bundle(folder / "bundle"))
        save_bundle(f"{bucket}/model", networks, manifest)
        try:
            with cluster_process(folder, [1], TOKEN) as cluster:
                patch.setenv("RAY_AUTH_TOKEN", TOKEN)
                patch.setenv("XDG_STATE_HOME", cluster.environment["XDG_STATE_HOME"])
                (session,) = [path for path in temporary.rglob("session_2*") if path.is_dir() and not path.is_symlink()]
                yield Site(cluster, moto, bucket, session, ports_of(cluster), JobsApi(cluster.address))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def ports_of(cluster: ClusterProcess) -> list[int]:
    """Return the ports of the metrics endpoints, as Ray tells them."""
    code = (
        "import json, sys, ray; ray.init(address=sys.argv[1], log_to_driver=False); "
        "print(json.dumps([node['MetricsExportPort'] for node in ray.nodes()]))"
    )
    words = [sys.executable, "-c", code, cluster.gcs]
    done = subprocess.run(words, env=cluster.environment, capture_output=True, text=True, timeout=LONGEST, check=True)
    ports = json.loads(done.stdout.splitlines()[-1])
    assert len(ports) == 2
    return list(ports)


def spec_file(site: Site, folder: Path, output: str) -> str:
    lines = [f"{name}: {site(place)}" for name, place in (("input", "a.zarr"), ("model", "model"), ("output", output))]
    path = folder / "spec.yaml"
    path.write_text("\n".join(lines + [option.replace("=", ": ") for option in OPTIONS]))
    return str(path)


def test_metrics(site: Site, tmp_path: Path) -> None:
    """A job that is submitted as the README says: its receipts and its metrics agree, and the latter say it ended."""
    words = ["--address", site.cluster.address, "--json"]
    submitted = json.loads(site.volseg("submit", spec_file(site, tmp_path, "out.zarr"), *words))
    job, name = submitted["id"], submitted["job_key"][:12]
    mine = {"volseg_job": name, "device": "cpu"}
    site.until("ray_volseg_job_active", 1, **mine)
    assert site.volseg("wait", job, "--address", site.cluster.address, "--log", "json").startswith("complete, ")
    report = json.loads(site.volseg("result", job, *words))
    blocks = report["blocks"]["total"]
    # What is left is sent when the driver ends, which is a moment after the ledger says so.
    site.until("ray_volseg_blocks_done_total", blocks, **mine)
    assert site.total("ray_volseg_voxels_total", **mine) == report["voxels"]
    assert site.total("ray_volseg_forwards_total", **mine) == report["forwards"]
    assert site.total("ray_volseg_read_bytes_total", **mine) == report["bytes"]["read"]
    assert site.total("ray_volseg_written_bytes_total", **mine) == report["bytes"]["written"]
    for kind in ("forward", "compute", "read", "write"):
        seconds = site.total(f"ray_volseg_{kind}_seconds_total", **mine)
        assert seconds == pytest.approx(report["seconds"][kind], abs=0.01)
    waited = site.total("ray_volseg_input_wait_seconds_total", **mine)
    assert waited == pytest.approx(report["seconds"]["waiting"], abs=0.01)
    assert not site.total("ray_volseg_blocks_failed_total", **mine)
    # The driver left; then Ray forgets what it was.
    site.until("ray_volseg_job_active", 0, **mine)
    log = site.volseg("logs", job, "--address", site.cluster.address, "--log", "json")
    events = [json.loads(line) for line in log.splitlines() if line.startswith('{"time"')]
    assert {"job started", "worker ready", "progress", "job ended"} <= {event["event"] for event in events}
    assert all(event["job"] == name and event["attempt"] == 1 for event in events)
    shown = site.volseg("logs", job, "--address", site.cluster.address)
    assert "job ended: " in shown
    assert '{"time"' not in shown


def test_a_leaky_job(site: Site, tmp_path: Path) -> None:
    """An error that repeats a whole request, on a cluster with a worker that says that it has a GPU."""
    release = tmp_path / "release"
    settings = " ".join(f"--set {option}" for option in (*OPTIONS, "attempts=2"))
    places = f"{site('a.zarr')} {site('leaky.zarr')} --model {site('model')}"
    site.submit("leaky", f"exec python -m tests.leaky_job {release} {places} {settings}")
    for kind, count in leaky_job.GPU_MEMORY.items():
        site.until("ray_volseg_gpu_memory_bytes", count, kind=kind)
    site.until("ray_volseg_job_blocks", 1, state="failed")
    assert site.total("ray_volseg_workers", device="cpu") == 1
    during = set(site.scrape())
    release.touch()
    log = site.finished("leaky")
    assert f"https://{HIDDEN}@s3.example.org/scans/a" in log
    report = json.loads(next(line for line in log.splitlines() if line.startswith('{"status"')))
    assert (report["status"], report["blocks"]["failed"]) == ("partial", 1)
    name = report["job_key"][:12]
    site.until("ray_volseg_blocks_failed_total", 1, volseg_job=name)
    assert site.total("ray_volseg_blocks_retried_total", volseg_job=name) == 1
    traces = files.list_names(f"{site('leaky.zarr')}.volseg/{report['job_key']}/failures")
    assert len(traces) == 2
    # A cluster whose workers all live emits every metric but one; what a driver states goes with it.
    emitted = {*(f"ray_{name}" for name in GAUGES), *(f"ray_{name}_total" for name in COUNTERS)}
    gone = {"ray_volseg_workers_lost_total", "ray_volseg_gpu_memory_bytes"}
    assert emitted - gone <= during | set(site.scrape()) <= emitted


def test_places_with_credentials_go_nowhere(site: Site, tmp_path: Path) -> None:
    """Neither from here nor from a spec that the cluster reads."""
    server = site.server
    for login in (f"{server.key}:{server.secret}", f"{server.key}:{quote(server.secret, safe='')}"):
        bad = f"s3://{login}@{site.bucket.removeprefix('s3://')}/a.zarr"
        words = ["--model", site("model"), "--address", site.cluster.address, "--input", bad]
        site.volseg("submit", *words, "--output", site("no.zarr"), code=2)
        site.volseg("segment", bad, str(tmp_path / "no.zarr"), "--model", site("model"), "--json", code=2)
        site.volseg("info", bad, "--log", "json", code=2)
    spec = Path(spec_file(site, tmp_path, "no.zarr"))
    spec.write_text(spec.read_text().replace(site("a.zarr"), bad))
    site.submit("from-a-file", f"exec python {REPO / 'jobs' / 'segment.py'} {spec}")
    log = site.finished("from-a-file")
    assert f"s3://{HIDDEN}@" in log
    assert "carries a credential; nothing was done" in log
    assert site.api.info("from-a-file").exit_code == 2  # type: ignore[union-attr]
    assert not files.exists(site("no.zarr"))


def test_no_credential_anywhere(site: Site) -> None:
    """After the jobs above: in nothing that was said, kept, logged or told is one of them."""
    assert {"log of leaky", "log of from-a-file"} <= set(site.seen), "run the whole module"
    for path in (*(f"/api/v0/{kind}?detail=1" for kind in ("tasks", "actors", "workers")), "/nodes?view=summary"):
        site.get(path)
    site.get("/api/jobs/")
    assert '"leaky"' in site.seen["/api/jobs/"]
    needles = canaries(site.server)
    places = {**site.seen, **stored(site), **logged(site.session), **environment_of(site)}
    assert len([name for name in places if name.startswith("s3://") and ".volseg/" in name]) > 5
    assert len([name for name in places if "job-driver-" in name]) >= 3
    leaks = {(name, what) for name, text in places.items() for what, needle in needles.items() if needle in text}
    assert not leaks
    assert HIDDEN in places["log of leaky"]


def canaries(server: Server) -> dict[str, str]:
    return {
        "key": server.key, "secret": server.secret, "secret in an address": quote(server.secret, safe=""),
        "token": TOKEN, "session token": leaky_job.SESSION_TOKEN, "signature": leaky_job.SIGNATURE,
    }  # fmt: skip


def stored(site: Site) -> dict[str, str]:
    """Return every object of the bucket: outputs, ledgers, reports, receipts, traces."""
    return {
        site(name): files.read_bytes(site(name)).decode(errors="replace") for name in files.sizes_below(site.bucket)
    }


def logged(session: Path) -> dict[str, str]:
    """Return all files of Ray's session: its own logs, those of drivers and of workers."""
    return {
        str(path): path.read_text(errors="replace")
        for path in session.rglob("*")
        if path.is_file() and path.stat().st_size < 64 << 20
    }


def environment_of(site: Site) -> dict[str, str]:
    """Return what the client keeps on its own machine."""
    state = Path(site.cluster.environment["XDG_STATE_HOME"])
    return {str(path): path.read_text() for path in state.rglob("*.json")}
