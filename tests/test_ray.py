"""Ray workers that die, cannot start or lose their machine: what it costs, and that nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from tests.support import (
    LONGEST,
    Case,
    actors,
    labels_of,
    run,
    segment,
    segment_words,
    status_of,
    title,
    wait_until,
)
from volseg import api
from volseg.cluster import executor as executor_module
from volseg.cluster.machines import shortage
from volseg.cluster.session import RaySession
from volseg.cluster.worker import SegmentActor, Started
from volseg.errors import BundleError, InputError, JobError, WorkersLostError
from volseg.execution import policy
from volseg.planning import Plan
from volseg.planning.task import Task
from volseg.spec import SegmentSpec

pytestmark = pytest.mark.ray

OPTIONS: dict[str, Any] = {"overlap": 0.25, "block": "24,24,24", "executor": "ray"}
BLOCKS = 12
POISON = 5


@pytest.fixture(scope="module")
def expected(case: Case) -> Path:
    output = case.folder / "expected.zarr"
    segment(case, output, overlap=0.25)
    return output


def replace_actor(monkeypatch: pytest.MonkeyPatch, actor: type[SegmentActor]) -> None:
    monkeypatch.setattr(executor_module, "RayExecutor", partial(executor_module.RayExecutor, actor=actor))


def ends(output: Path, expected: Path, case: Case, computed: int) -> None:
    """The same job again, with healthy workers, does what is left."""
    report = segment(case, output, **{**OPTIONS, "executor": "serial"})
    assert report["blocks"] == {"total": BLOCKS, "computed": computed, "resumed": BLOCKS - computed, "failed": 0}
    assert status_of(output) == "complete"
    np.testing.assert_array_equal(labels_of(output), labels_of(expected))


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_block_that_kills_its_process(
    case: Case, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is set aside after its crashes; its neighbours in the pipeline, which died with it, are not."""

    # Classes inside functions travel to the workers by value.
    class Poisoned(SegmentActor):
        def attempt(self, task: Task, *inbox: Any) -> Any:
            if task.index == POISON:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().attempt(task, *inbox)

    replace_actor(monkeypatch, Poisoned)
    monkeypatch.setattr(policy, "MAX_CRASHES", 3)
    output = tmp_path / "out.zarr"
    report = segment(case, output, **OPTIONS, workers=2, attempts=1)
    assert report["status"] == "partial"
    assert report["blocks"] == {"total": BLOCKS, "computed": BLOCKS - 1, "resumed": 0, "failed": 1}
    (failed,) = report["failed_blocks"]
    assert failed["block"] == POISON
    assert failed["box"] == "0:24,24:45,48:50"
    assert re.fullmatch(
        r"3 workers died while they held it, the last one: its worker process has died\..*", failed["error"]
    )
    assert report["workers"]["lost"] == 3
    assert status_of(output) == "incomplete"
    ends(output, expected, case, computed=1)


@pytest.mark.usefixtures("one_ray")
def test_bundle_gone_from_the_workers(
    case: Case, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Case(case.image, str(shutil.copytree(case.bundle, tmp_path / "bundle")), tmp_path)

    class Forgetful(executor_module.RayExecutor):
        def start(self) -> None:
            Path(mine.bundle).rename(tmp_path / "elsewhere")
            super().start()

    output = tmp_path / "out.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(executor_module, "RayExecutor", Forgetful)
        with pytest.raises(InputError, match=f"no model bundle at {mine.bundle}"):
            segment(mine, output, **OPTIONS, workers=1)
    assert status_of(output) == "incomplete"
    (tmp_path / "elsewhere").rename(mine.bundle)
    ends(output, expected, mine, computed=BLOCKS)


def test_bundle_changed_under_a_serial_worker(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest that was planned with is the one that computes."""
    from volseg.models.bundle import load_networks, save_bundle

    mine = Case(case.image, str(shutil.copytree(case.bundle, tmp_path / "bundle")), tmp_path)
    from volseg.execution.local import LocalExecutor

    start = LocalExecutor.start

    def other_weights(executor: LocalExecutor) -> None:
        manifest, (network,) = load_networks(mine.bundle)
        for tensor in network.state_dict().values():
            tensor.mul_(0.5) if tensor.is_floating_point() else None
        save_bundle(mine.bundle, [network], manifest, overwrite=True)
        start(executor)

    monkeypatch.setattr(LocalExecutor, "start", other_weights)
    with pytest.raises(BundleError, match="changed while the job ran"):
        segment(mine, tmp_path / "out.zarr")
    assert status_of(tmp_path / "out.zarr") == "incomplete"


@pytest.mark.usefixtures("one_ray")
def test_workers_that_cannot_start(case: Case, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stillborn(SegmentActor):
        def start(self, spec: SegmentSpec, plan: Plan, bundle_digest: str) -> Started:
            os._exit(1)

    output = tmp_path / "out.zarr"
    with monkeypatch.context() as patch:
        replace_actor(patch, Stillborn)
        with pytest.raises(WorkersLostError, match=r"4 workers in a row could not start, .*the same command"):
            segment(case, output, **OPTIONS, workers=1)
    ends(output, expected, case, computed=BLOCKS)


@pytest.mark.usefixtures("one_ray")
def test_error_of_volseg_itself_surfaces(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no rule foresaw ends the job with the error itself, not with Ray's wrapping of it, and not in a loop."""

    class Broken(SegmentActor):
        def start(self, spec: SegmentSpec, plan: Plan, bundle_digest: str) -> Started:
            raise LookupError("a bug")

    replace_actor(monkeypatch, Broken)
    with pytest.raises(LookupError) as raised:
        segment(case, tmp_path / "out.zarr", **OPTIONS, workers=1)
    assert raised.value.args == ("a bug",)
    assert status_of(tmp_path / "out.zarr") == "incomplete"


@pytest.mark.usefixtures("one_ray")
def test_session_that_was_there_stays(case: Case, tmp_path: Path) -> None:
    """A job inside a program that uses Ray leaves that program's Ray and its signal handlers alone."""
    handler = signal.getsignal(signal.SIGTERM)
    before = ray.cluster_resources()  # type: ignore[no-untyped-call]
    segment(case, tmp_path / "out.zarr", **OPTIONS, workers=1)
    assert ray.is_initialized()
    assert ray.cluster_resources() == before  # type: ignore[no-untyped-call]
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.usefixtures("one_ray")
def test_line_about_workers_that_find_no_room(
    case: Case, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else holds three of the four CPUs: one of two workers starts, and a line says what the other lacks."""
    assert "load torch" in shortage("CPU")
    assert "no machine with a GPU" in shortage("GPU")

    class Other:
        def here(self) -> bool:
            return True

    monkeypatch.setattr(policy, "PATIENCE_SECONDS", 0.0)
    actor: Any = ray.remote(Other).options(num_cpus=3).remote()
    assert ray.get(actor.here.remote())
    notes: list[str] = []
    output = tmp_path / "out.zarr"
    values = {"input": case.image, "output": str(output), "model": case.bundle, **OPTIONS, "workers": 2}
    try:
        report = api.run_segment(SegmentSpec.read(values), None, notes.append)
    finally:
        ray.kill(actor)
    assert report["status"] == "complete"
    assert [note for note in notes if note.startswith("1 of 2 workers are ready; 1 to come: all 4 CPUs of the cluster")]
    np.testing.assert_array_equal(labels_of(output), labels_of(expected))


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "refused"),
        ("nowhere.invalid:6379", "not known|resolution"),
        ("gibberish", "Invalid address"),
    ],
)
def test_wrong_address(case: Case, tmp_path: Path, address: str, reason: str) -> None:
    done = run(*segment_words(case, tmp_path / "out.zarr", "--address", address))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.search(reason, line)
    assert line.startswith(f"volseg: no Ray cluster answers at {address!r} (")
    assert line.endswith("nothing was done: check the address, or leave it out to run on this machine")
    assert not list(tmp_path.iterdir())


def test_ray_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**_: object) -> None:
        raise Exception("The current node timed out\nduring startup")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(JobError, match=r"Ray could not be started .*timed out during startup.*--executor serial"):
        RaySession(None, 2).__enter__()


def test_address_from_the_environment(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A submitted job finds its cluster by RAY_ADDRESS; the serial executor does not ask for one."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    done = run(*segment_words(case, tmp_path / "out.zarr"))
    assert done.returncode == 2
    assert "no Ray cluster answers at '127.0.0.1:1'" in done.stderr
    assert segment(case, tmp_path / "out.zarr")["status"] == "complete"


# ---------------------------------------------------------------- a cluster that loses a machine

# With a single crash allowed, a strike against any block would end the job partial.
UNFORGIVING = """
import sys
from volseg.execution import policy
policy.MAX_CRASHES = 1
from volseg.cli.main import main
sys.exit(main())
"""


def raylet_of(node: Any) -> int:
    pid = node.all_processes["raylet"][0].process.pid
    assert isinstance(pid, int)
    return pid


def working(cluster: Any) -> list[psutil.Process]:
    """Return the actors that have a block in hand now."""
    found = [p for node in cluster.worker_nodes for p in actors(raylet_of(node))]
    return [p for p in found if "SegmentActor.attempt" in title(p)]


@pytest.mark.chaos
@pytest.mark.slow
def test_lost_machine_is_no_strike(case: Case, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    output = tmp_path / "out.zarr"
    options = ("--overlap", 0.5, "--block", "8,16,10", "--attempts", 1, "--workers", 2, "--json")
    cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        words = [str(w) for w in segment_words(case, output, *options, "--address", cluster.address)]
        with subprocess.Popen(
            [sys.executable, "-c", UNFORGIVING, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as job:
            try:
                first = wait_until(lambda: working(cluster), job)[0]
                # It waits until the second one works, too, or it might do all the blocks alone.
                first.suspend()
                second = wait_until(lambda: [p for p in working(cluster) if p != first], job)[0]
                node = next(n for n in nodes if second in actors(raylet_of(n)))
                cluster.remove_node(node, allow_graceful=False)
                first.resume()
                out, err = job.communicate(timeout=LONGEST)
            finally:
                job.kill()
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]
    assert job.returncode == 0, err
    report = json.loads(out)
    assert report["status"] == "complete"
    assert report["blocks"]["failed"] == 0
    assert report["workers"]["lost"] == 1
    assert report["retried"] >= 1
    assert "was lost (its machine does not answer any more)" in err
    assert "raylet" not in err
    whole = tmp_path / "whole.zarr"
    segment(case, whole, overlap=0.5)
    np.testing.assert_array_equal(labels_of(output), labels_of(whole))
