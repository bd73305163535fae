"""How far a job is, read from the ledger beside its output or bundle: no cluster is asked, none has to live."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from volseg.errors import BundleError, VolumeError
from volseg.execution.output import marks_of
from volseg.geometry import BlockGrid, Box
from volseg.models.manifest import read_description
from volseg.storage import files
from volseg.storage.ledger import STALE_SECONDS, Ledger, ledger_root

TRAINING = "training"
"""Name of the ledger beside a bundle: one for all trainings that write it, because they share its place."""

RESULT = "result.json"
"""In a training's ledger: the report of the last one that came to its end."""

LedgerState = Literal["absent", "running", "stopped", "failed", "partial", "complete"]
Json = dict[str, Any]


@dataclass(frozen=True)
class LedgerStatus:
    """What the ledger says of one job.

    `state`: absent (never begun), running (its driver lives), stopped (begun, nobody drives it, the same job goes on),
    failed or partial (how the last attempt ended), complete. What is counted are blocks, or steps of a training
    (`unit`). Times are in seconds.
    """

    output: str
    job_key: str
    state: LedgerState
    attempt: int = 0
    total: int = 0
    done: int = 0
    failed: int = 0
    workers: int = 0
    rate: float | None = None
    """Blocks, or steps, a second of this attempt."""
    voxel_rate: float | None = None
    seconds_left: float | None = None
    ended: bool = False
    """The last driver left in order, and was not killed."""
    heartbeat_age: float | None = None
    driver: str = ""
    """Process and machine of the last driver."""
    elsewhere: bool = False
    """The last driver ran on another machine: only its heartbeat tells whether it lives."""
    submission: str = ""
    """Submission that the heartbeat or the report is from."""
    error: str = ""
    unit: Literal["blocks", "steps"] = "blocks"
    loss: float | None = None
    """Running mean of a training's loss."""
    best_dice: float | None = None
    """Best mean foreground Dice of a training's validations so far."""
    report: Json | None = None

    @property
    def stale(self) -> bool:
        """Tell whether what is said of a running job is older than its driver should be silent."""
        return self.state == "running" and (self.heartbeat_age or 0.0) > STALE_SECONDS

    def as_dict(self) -> Json:
        """Return plain values; the report stands apart."""
        return {name: value for name, value in asdict(self).items() if name != "report"}


def read_status(output: str, job_key: str | None = None, now: float | None = None) -> LedgerStatus:
    """Return the status of the job `job_key` on `output`; without a key, of the job that the output belongs to.

    `now` is the time in seconds that ages count from. Raises VolumeError where no job was ever begun there, or, without
    a key, where several left ledgers and the output does not say which of them wrote it.
    """
    output = files.absolute(output)
    now = time.time() if now is None else now
    key = job_key or _key_of(output)
    if key == TRAINING:
        return _of_training(output, None, now)
    ledger = Ledger(output, key)
    header = ledger.header()
    if header is None:
        return _of_training(output, key, now)
    # Asked for first: what a driver that is gone left is read after it has written all of it.
    alive = ledger.driver() is not None
    marks = marks_of(output)
    mine = marks is not None and marks["job_key"] == key
    facts, beat = _facts(ledger, now)
    facts |= {"output": output, "job_key": key}
    attempt, report, total = facts["attempt"], facts["report"], _blocks(header)
    if mine and marks is not None and marks.get("status") == "complete":
        return LedgerStatus(**facts, state="complete", total=total, done=total)
    if alive:
        return LedgerStatus(**facts, state="running", total=total, **_pace(beat, attempt, total))
    # Nobody adds to the receipts any more, and only they tell what is done.
    facts |= {"total": total, "done": sum(1 for _ in ledger.receipts())}
    if report is not None and report.get("status") in {"failed", "partial"}:
        failed = report.get("blocks", {}).get("failed", 0)
        return LedgerStatus(**facts, state=report["status"], failed=failed, error=report.get("error", ""))
    return LedgerStatus(**facts, state="stopped")


def finished_training(out: str, job_key: str) -> Json | None:
    """Return the report of the training `job_key` where its bundle is at `out`, None where it is not."""
    report = _read(Ledger(out, TRAINING), RESULT)
    if report is None or report.get("job_key") != job_key:
        return None
    try:
        return report if read_description(out).digest == report.get("digest") else None
    except BundleError:
        # Removed, moved or damaged since: then it is no result.
        return None


def _of_training(out: str, job_key: str | None, now: float) -> LedgerStatus:
    """Return the status of the training `job_key` for the bundle at `out`; without a key, of the last one."""
    ledger = Ledger(out, TRAINING)
    if not files.list_names(files.join(ledger.path, "attempts")):
        return LedgerStatus(out, job_key or "", "absent")
    alive = ledger.driver() is not None
    facts, beat = _facts(ledger, now)
    attempt, report = facts["attempt"], facts["report"] or {}
    last = next((str(d["job_key"]) for d in (report, beat) if d.get("attempt") == attempt and "job_key" in d), "")
    key = job_key or last
    facts |= {"output": out, "job_key": key, "unit": "steps"}
    if (result := finished_training(out, key)) is not None:
        done = {"total": result["steps"], "done": result["steps"], "best_dice": result["mean_foreground_dice"]}
        return LedgerStatus(**{**facts, **done, "report": result}, state="complete")
    if key != last:
        return LedgerStatus(out, key, "absent", unit="steps")
    if beat.get("attempt") == attempt:
        facts |= {name: beat.get(name) for name in ("total", "loss", "best_dice")}
    facts |= _pace({"computed": 0, "resumed": 0, "failed": 0, **beat}, attempt, beat.get("total", 0))
    if alive:
        return LedgerStatus(**facts, state="running")
    facts |= {"seconds_left": None}
    if report.get("status") == "failed":
        return LedgerStatus(**facts, state="failed", error=report.get("error", ""))
    return LedgerStatus(**facts, state="stopped")


def _facts(ledger: Ledger, now: float) -> tuple[Json, Json]:
    """Return what every ledger tells of its last attempt, and the heartbeat."""
    beat = _read(ledger, "heartbeat.json") or {}
    attempts = [int(name[:5]) for name in files.list_names(files.join(ledger.path, "attempts")) if name[:5].isdigit()]
    attempt = max(attempts, default=0)
    last = _read(ledger, "attempts", f"{attempt:05d}.json") or {}
    report = ledger.report()
    report = report if report and report.get("attempt", attempt) == attempt else None
    return {
        "attempt": attempt,
        "driver": f"process {last['pid']} on {last['host']}" if last else "",
        "elsewhere": bool(last) and last["host"] != platform.node(),
        "ended": files.exists(files.join(ledger.path, "ended", f"{attempt:05d}.json")),
        "heartbeat_age": max(0.0, now - beat["time"]) if beat else None,
        "submission": _submission(attempt, beat, report or {}),
        "report": report,
    }, beat


def _submission(attempt: int, *documents: Mapping[str, Any]) -> str:
    """Return the submission that the last attempt worked for, as far as it told."""
    told = [str(document.get("submission", "")) for document in documents if document.get("attempt") == attempt]
    return next(filter(None, told), "")


def _key_of(output: str) -> str:
    marks = marks_of(output)
    return str(marks["job_key"]) if marks else _only_ledger(output)


def _only_ledger(output: str) -> str:
    keys = [name for name in files.list_names(ledger_root(output)) if not name.startswith(".")]
    if len(keys) != 1:
        found = f"{len(keys)} jobs left ledgers beside it" if keys else "there is no ledger beside it"
        raise VolumeError(f"{output} is no output that volseg writes ({found}): check the path of the output")
    return keys[0]


def _blocks(header: Mapping[str, Any]) -> int:
    (z, y, x), (a, b, c) = header["shape"], header["block"]
    return len(BlockGrid((z, y, x), (a, b, c), Box.parse(header["region"], (z, y, x))))


def _pace(beat: Mapping[str, Any], attempt: int, total: int) -> Json:
    """Return counts, speed and time left from a heartbeat; nothing from one of an earlier attempt."""
    if beat.get("attempt") != attempt:
        return {}
    done, failed, seconds = beat["computed"] + beat["resumed"], beat["failed"], beat.get("seconds", 0.0)
    pace: Json = {"done": done, "failed": failed, "workers": beat.get("workers", 0)}
    if beat["computed"] and seconds:
        rate = beat["computed"] / seconds
        left = beat.get("left", max(0, total - done - failed) / rate)
        pace |= {"rate": rate, "voxel_rate": beat.get("voxels", 0) / seconds, "seconds_left": left}
    return pace


def _read(ledger: Ledger, *names: str) -> Json | None:
    try:
        content = json.loads(files.read_bytes(files.join(ledger.path, *names)))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
