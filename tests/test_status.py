"""Status from the ledger alone, and what is made of it together with what Ray says."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import Case, segment
from volseg.cli.job_commands import run_status
from volseg.client.state import LOST_SECONDS, START_SECONDS, JobState, in_words, judge
from volseg.cluster.jobs import RayJob
from volseg.errors import JobInterrupted, StorageFullError, VolumeError
from volseg.execution import segment as segment_module
from volseg.execution import status as status_module
from volseg.execution.output import marks_of
from volseg.execution.status import TRAINING, LedgerState, LedgerStatus, read_status
from volseg.storage import ledger as ledger_module
from volseg.storage.ledger import STALE_SECONDS, Ledger

KEY = "0123456789abcdef0123456789abcdef"
NAME = "volseg-0123456789ab-01234567-001"
HEADER = {"job_key": KEY, "shape": [10, 20, 30], "block": [10, 10, 10], "region": "0:10,:,:", "identity": {}}


def begun(output: Path, **beat: Any) -> Ledger:
    """Return the ledger of a job of six blocks that this process drives, with a heartbeat."""
    ledger = Ledger(str(output), KEY)
    ledger.create(HEADER)
    assert ledger.take()
    counts = {"total": 6, "computed": 2, "resumed": 1, "failed": 1, "workers": 2, "seconds": 4.0, "voxels": 2000}
    ledger.tick({**counts, "submission": NAME, **beat}, force=True)
    return ledger


def foreign(output: Path, age: float) -> None:
    """Make the last driver one of another machine, with a heartbeat of that age."""
    (attempt,) = Path(f"{output}.volseg").glob("*/attempts/*.json")
    record = json.loads(attempt.read_text())
    attempt.write_text(json.dumps({**record, "host": "elsewhere", "boot": "other", "time": time.time() - age}))
    beat = attempt.parents[1] / "heartbeat.json"
    beat.write_text(json.dumps({**json.loads(beat.read_text()), "time": time.time() - age}))


def test_running(tmp_path: Path) -> None:
    begun(tmp_path / "out.zarr")
    status = read_status(str(tmp_path / "out.zarr"))
    assert status.state == "running"
    assert (status.total, status.done, status.failed, status.workers) == (6, 3, 1, 2)
    assert status.rate == 0.5
    assert status.voxel_rate == 500.0
    assert status.seconds_left == 4.0
    assert status.submission == NAME
    assert status.driver.startswith("process ")
    assert not status.stale


def test_nothing_computed_yet_gives_no_time(tmp_path: Path) -> None:
    begun(tmp_path / "out.zarr", computed=0, seconds=0.0)
    status = read_status(str(tmp_path / "out.zarr"))
    assert (status.rate, status.seconds_left, status.done) == (None, None, 1)


def test_driver_elsewhere_is_known_by_its_heartbeat(tmp_path: Path) -> None:
    begun(tmp_path / "out.zarr")
    foreign(tmp_path / "out.zarr", STALE_SECONDS / 2)
    status = read_status(str(tmp_path / "out.zarr"))
    assert (status.state, status.elsewhere) == ("running", True)
    foreign(tmp_path / "out.zarr", STALE_SECONDS * 2)
    status = read_status(str(tmp_path / "out.zarr"))
    assert status.state == "stopped"
    assert status.heartbeat_age == pytest.approx(STALE_SECONDS * 2, abs=30)


def test_living_driver_that_is_silent(tmp_path: Path) -> None:
    begun(tmp_path / "out.zarr")
    status = read_status(str(tmp_path / "out.zarr"), now=time.time() + 2 * STALE_SECONDS)
    assert (status.state, status.stale) == ("running", True)
    assert judge(NAME, status, None).state == "silent"


def test_heartbeat_of_an_earlier_attempt_says_nothing(tmp_path: Path) -> None:
    begun(tmp_path / "out.zarr").end(None)
    second = Ledger(str(tmp_path / "out.zarr"), KEY)
    assert second.take()
    status = read_status(str(tmp_path / "out.zarr"))
    assert (status.state, status.attempt, status.done, status.rate) == ("running", 2, 0, None)
    assert status.submission == ""


def test_ended_in_its_own_words(tmp_path: Path) -> None:
    ledger = begun(tmp_path / "out.zarr")
    ledger.end({"status": "failed", "error": "no space", "type": "StorageFullError", "attempt": 1, "submission": NAME})
    status = read_status(str(tmp_path / "out.zarr"))
    assert (status.state, status.error, status.done) == ("failed", "no space", 0)
    again = Ledger(str(tmp_path / "out.zarr"), KEY)
    assert again.take()
    again.end(None)
    # What an earlier attempt died of does not concern the one that was stopped.
    assert read_status(str(tmp_path / "out.zarr")).state == "stopped"


def test_a_job_that_ends_while_it_is_looked_at(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its driver wrote last counts, however early the rest was read."""
    output, asked = tmp_path / "out.zarr", list[str]()
    segment(case, output, overlap=0.25)
    marks = marks_of
    monkeypatch.setattr(Ledger, "driver", lambda ledger: asked.append(ledger.path))
    monkeypatch.setattr(
        status_module,
        "marks_of",
        lambda place: marks(place) if asked else {**(marks(place) or {}), "status": "incomplete"},
    )
    assert read_status(str(output)).state == "complete"


def test_a_training_that_ends_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, asked = str(tmp_path / "bundle"), list[str]()
    ledger = Ledger(bundle, TRAINING)
    ledger.create({"job_key": TRAINING})
    assert ledger.take()
    result = {"steps": 5, "mean_foreground_dice": 0.5}
    monkeypatch.setattr(Ledger, "driver", lambda ledger: asked.append(ledger.path))
    monkeypatch.setattr(status_module, "finished_training", lambda *_: result if asked else None)
    assert read_status(bundle, KEY).state == "complete"


def test_places_without_a_job(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"no output that volseg writes \(there is no ledger beside it"):
        read_status(str(tmp_path / "out.zarr"))
    assert read_status(str(tmp_path / "out.zarr"), KEY).state == "absent"
    for name in "ab":
        (tmp_path / "out.zarr.volseg" / name).mkdir(parents=True)
    with pytest.raises(VolumeError, match="2 jobs left ledgers"):
        read_status(str(tmp_path / "out.zarr"))


def test_of_a_real_job(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.zarr"
    monkeypatch.setenv("VOLSEG_SUBMISSION", NAME)

    def full(*_: object) -> None:
        raise StorageFullError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(segment_module, "finish", full)
        with pytest.raises(StorageFullError):
            segment(case, output, overlap=0.25, block="24,24,24")
    status = read_status(str(output))
    assert (status.state, status.error, status.done, status.total) == ("failed", "no space left", 12, 12)
    assert status.submission == NAME
    assert status.report is not None
    assert status.report["type"] == "StorageFullError"

    def interrupted(*_: object) -> None:
        raise JobInterrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(segment_module, "finish", interrupted)
        with pytest.raises(JobInterrupted):
            segment(case, output, overlap=0.25, block="24,24,24")
    assert read_status(str(output)).state == "stopped"
    report = segment(case, output, overlap=0.25, block="24,24,24")
    status = read_status(str(output))
    assert (status.state, status.done, status.total, status.attempt) == ("complete", 12, 12, 3)
    assert status.report == {**report, "attempt": 3, "submission": NAME}


# ---------------------------------------------------------------- together with Ray


def ledger_of(state: LedgerState, **facts: Any) -> LedgerStatus:
    return LedgerStatus("/out.zarr", KEY, state, **{"total": 6, "done": 3, "submission": NAME, **facts})


def ray_of(status: str, **facts: Any) -> RayJob:
    return RayJob(NAME, status, **facts)


@pytest.mark.parametrize(
    ("ledger", "ray", "state", "stale"),
    [
        (ledger_of("complete"), ray_of("RUNNING"), "complete", ""),
        (ledger_of("absent", submission=""), ray_of("PENDING"), "pending", ""),
        (ledger_of("absent", submission=""), ray_of("RUNNING"), "starting", ""),
        (ledger_of("running"), ray_of("RUNNING"), "running", ""),
        (ledger_of("running", heartbeat_age=99.0), ray_of("RUNNING"), "silent", "ledger"),
        (ledger_of("stopped", ended=True), ray_of("RUNNING"), "stopped", ""),
        # Dead, and Ray does not know it yet.
        (ledger_of("stopped"), ray_of("RUNNING"), "stopped", "ray"),
        (ledger_of("stopped", elsewhere=True, heartbeat_age=99.0), ray_of("RUNNING"), "silent", "ray"),
        (ledger_of("stopped", elsewhere=True, heartbeat_age=LOST_SECONDS), ray_of("RUNNING"), "stopped", "ray"),
        # The driver of an earlier submission is dead, that of this one begins.
        (ledger_of("stopped", submission="another"), ray_of("RUNNING"), "starting", ""),
        (ledger_of("failed", submission="another"), ray_of("RUNNING"), "starting", ""),
        (ledger_of("stopped", submission="another"), ray_of("RUNNING", started=-START_SECONDS), "stopped", "ray"),
        (ledger_of("failed"), ray_of("RUNNING"), "failed", ""),
        (ledger_of("partial"), ray_of("FAILED", exit_code=3), "partial", ""),
        # Dead on another machine, as Ray says before the heartbeat is old.
        (ledger_of("running", elsewhere=True), ray_of("FAILED"), "failed", "ledger"),
        (ledger_of("running", submission="another"), ray_of("FAILED"), "running", "ray"),
        (ledger_of("stopped"), ray_of("STOPPED"), "stopped", ""),
        (ledger_of("stopped"), ray_of("FAILED", exit_code=130), "stopped", ""),
        (ledger_of("absent", submission=""), ray_of("FAILED", exit_code=2), "failed", ""),
        (ledger_of("stopped"), ray_of("SUCCEEDED"), "stopped", "ray"),
        # Ray was started anew and knows nothing.
        (ledger_of("running"), None, "running", "ray"),
        (ledger_of("stopped"), None, "stopped", "ray"),
        (ledger_of("absent", submission=""), None, "stopped", "ray"),
    ],
)
def test_both_sources(ledger: LedgerStatus, ray: RayJob | None, state: JobState, stale: str) -> None:
    status = judge(NAME, ledger, ray, now=1.0)
    assert (status.state, status.stale) == (state, stale)
    assert in_words(status).startswith(state)
    assert status.note or not stale


def test_reason_of_a_failure_is_one_line() -> None:
    message = "Job failed, last logs:\nvolseg: first\n{json}\nvolseg: no GPU\n"
    assert judge(NAME, ledger_of("absent", submission=""), ray_of("FAILED", message=message)).note == "no GPU"


def test_cluster_gone(tmp_path: Path) -> None:
    begun(tmp_path / "out.zarr")
    status = judge(NAME, read_status(str(tmp_path / "out.zarr"), KEY), None, "no Ray cluster answers")
    assert (status.state, status.done, status.stale) == ("running", 3, "ray")
    assert status.note == "no Ray cluster answers; this is what the ledger says"
    foreign(tmp_path / "out.zarr", STALE_SECONDS * 2)
    gone = judge(NAME, read_status(str(tmp_path / "out.zarr"), KEY), None, "no Ray cluster answers")
    assert gone.state == "stopped"
    assert gone.seconds_left is None


def test_command_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`volseg status OUTPUT` and, where the submission was noted, `volseg status JOB`."""
    from argparse import Namespace

    begun(tmp_path / "out.zarr")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    notes = tmp_path / "state" / "volseg" / "submissions"
    notes.mkdir(parents=True)
    note = {"output": str(tmp_path / "out.zarr"), "job_key": KEY, "address": "http://127.0.0.1:1"}
    (notes / f"{NAME}.json").write_text(json.dumps(note))
    for job, address in ((str(tmp_path / "out.zarr"), "http://127.0.0.1:1"), (NAME, None)):
        document, text, code = run_status(Namespace(job=job, address=address))
        assert code == 0
        assert (document["state"], document["done"], document["total"]) == ("running", 3, 6)
        assert "3 of 6 done, 1 set aside" in text
        assert "0.5 blocks/s" in text


def test_killed_driver_is_not_running(tmp_path: Path) -> None:
    """A driver of this machine is looked up, not believed."""
    code = (
        "import sys; from tests.test_status import begun; from pathlib import Path; begun(Path(sys.argv[1])); "
        "import os; os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out.zarr")], check=False)
    status = read_status(str(tmp_path / "out.zarr"))
    assert status.state == "stopped"
    assert judge(NAME, status, ray_of("RUNNING")).state == "stopped"
    assert judge(NAME, replace(status, submission="other"), ray_of("RUNNING")).state == "starting"
    assert ledger_module.HEARTBEAT_SECONDS < STALE_SECONDS
