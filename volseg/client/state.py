"""One answer out of two: what the ledger beside the output says of a job, and what Ray says, and which is stale."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from volseg.cluster.jobs import RayJob
from volseg.execution.status import LedgerStatus
from volseg.journal import parse
from volseg.storage.ledger import STALE_SECONDS

JobState = Literal["pending", "starting", "running", "silent", "stopped", "failed", "partial", "complete"]
ENDED: frozenset[JobState] = frozenset({"stopped", "failed", "partial", "complete"})
START_SECONDS = 600.0
LOST_SECONDS = 600.0
_CANCELLED = "it was cancelled; submitted again it goes on"


@dataclass(frozen=True)
class JobStatus:
    """How far a job is.

    `state`: pending (Ray has not started its driver), starting (the driver has not begun to compute), running, silent
    (Ray says that it runs, but its heartbeat is old), stopped (unfinished, nobody drives it: submitted again it goes
    on), failed, partial (blocks were set aside), complete. `total` and `done` count blocks, or steps of a training
    (`unit`), which may end before the last one. `stale` names the source that is out of date, `note` says why in words.
    Times are in seconds.
    """

    id: str
    output: str
    state: JobState
    total: int = 0
    done: int = 0
    failed: int = 0
    workers: int = 0
    rate: float | None = None
    """Blocks, or steps, a second."""
    voxel_rate: float | None = None
    seconds_left: float | None = None
    heartbeat_age: float | None = None
    driver: str = ""
    stale: Literal["", "ray", "ledger"] = ""
    note: str = ""
    unit: Literal["blocks", "steps"] = "blocks"
    loss: float | None = None
    """Running mean of a training's loss."""
    best_dice: float | None = None
    """Best mean foreground Dice of a training's validations so far."""

    @property
    def ended(self) -> bool:
        """Tell whether nothing more will happen by itself."""
        return self.state in ENDED

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def judge(
    name: str, ledger: LedgerStatus, ray: RayJob | None, unreachable: str = "", now: float | None = None
) -> JobStatus:
    """Bring both sources together; a job is running only where its driver is known to live.

    `unreachable` says why Ray could not be asked; `ray` is None where it knows no such job.
    """
    now = time.time() if now is None else now
    state, stale, note = _judge(name, ledger, ray, unreachable, now)
    return JobStatus(
        name, ledger.output, state, ledger.total, ledger.done, ledger.failed, ledger.workers, ledger.rate,
        ledger.voxel_rate, ledger.seconds_left if state == "running" else None, ledger.heartbeat_age, ledger.driver,
        stale, note, ledger.unit, ledger.loss, ledger.best_dice,
    )  # fmt: skip


_Verdict = tuple[JobState, Literal["", "ray", "ledger"], str]


def _judge(name: str, ledger: LedgerStatus, ray: RayJob | None, unreachable: str, now: float) -> _Verdict:
    if ledger.state == "complete":
        return "complete", "", ""
    if unreachable or ray is None:
        why = unreachable or "Ray knows no such job (its head was started anew, or another cluster ran it)"
        return _by_ledger(ledger, f"{why}; this is what the ledger says")
    mine = ledger.submission == name
    if ray.over:
        return _after(ledger, ray, mine=mine)
    if ray.status == "PENDING":
        return "pending", "", ray.message
    if ledger.state == "running":
        return _running(ledger)
    if ledger.state in {"failed", "partial"} and mine:
        return _by_ledger(ledger, "")
    if mine:
        return _dead_or_silent(ledger)
    if ray.started is not None and now - ray.started > START_SECONDS:
        return "stopped", "ray", f"Ray says {ray.status} since {_ago(now - ray.started)}, but it never began to compute"
    return "starting", "", "the driver connects, reads metadata and plans"


def _running(ledger: LedgerStatus) -> _Verdict:
    if not ledger.stale:
        return "running", "", ""
    return "silent", "ledger", f"its process lives, but its last heartbeat is {_ago(ledger.heartbeat_age)} old"


def _by_ledger(ledger: LedgerStatus, note: str) -> _Verdict:
    """Return what the ledger alone says; where it knows nothing, the job is not there any more."""
    if ledger.state == "running":
        state, _, words = _running(ledger)
        return state, "ray" if note else "", words or note
    if ledger.state in {"failed", "partial"}:
        return ("failed" if ledger.state == "failed" else "partial"), "ray" if note else "", ledger.error or note
    if ledger.state == "absent":
        return "stopped", "ray", f"{note}: the job was never begun"
    return "stopped", "ray" if note else "", note


def _after(ledger: LedgerStatus, ray: RayJob, *, mine: bool) -> _Verdict:
    """Return the state of a job that has ended, as Ray says."""
    if ledger.state == "running" and not mine:
        return "running", "ray", f"{ledger.driver} drives the same job outside of this submission"
    if ledger.state in {"failed", "partial"} and mine:
        return _by_ledger(ledger, "")
    stale: Literal["", "ledger"] = "ledger" if ledger.state == "running" else ""
    if ray.status == "SUCCEEDED":
        return "stopped", "ray", "Ray says SUCCEEDED, but the output is not complete: it was changed since"
    if ray.status == "STOPPED" or ray.exit_code == 130:
        return "stopped", stale, _CANCELLED
    return "failed", stale, _reason(ray.message)


def _dead_or_silent(ledger: LedgerStatus) -> _Verdict:
    age = ledger.heartbeat_age
    if ledger.ended:
        return "stopped", "", _CANCELLED
    if ledger.elsewhere and STALE_SECONDS <= (age or 0.0) < LOST_SECONDS:
        return "silent", "ray", f"Ray says RUNNING, but the last heartbeat is {_ago(age)} old"
    return "stopped", "ray", f"Ray says RUNNING, but the driver is dead; its last heartbeat is {_ago(age)} old"


def _ago(seconds: float | None) -> str:
    return "many s" if seconds is None else f"{seconds:.0f} s"


def _reason(message: str) -> str:
    """Return what failed in one line; Ray appends the last of the log, whose last line says it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = [words for line in lines if (words := _told(line))]
    return (told or lines or ["no reason was given"])[-1][:500]


def _told(line: str) -> str:
    """Return what a line of a log says of the end, as text or as an event."""
    if line.startswith("volseg: "):
        return line.removeprefix("volseg: ")
    event = parse(line)
    return str(event[1]) if event is not None and event[1].event == "failed" else ""


def in_words(status: JobStatus) -> str:
    """Write a status in one line."""
    parts = [f"{status.state}, {status.done} of {status.total} {status.unit}" if status.total else status.state]
    if status.failed:
        parts.append(f"{status.failed} set aside")
    if status.state == "running" and status.unit == "blocks":
        parts.append(f"{status.workers} worker(s)")
    if status.loss is not None and status.state == "running":
        parts.append(f"loss {status.loss:.3f}")
    if status.best_dice is not None:
        parts.append(f"best Dice {status.best_dice:.3f}")
    if status.seconds_left is not None:
        parts.append(f"about {status.seconds_left:.0f} s left")
    return ", ".join(parts) + (f" ({status.note})" if status.note else "")
