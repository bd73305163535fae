"""The main job: take the ledger, compute what has no receipt, check everything, say complete."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from volseg.errors import InputError, JobInterrupted, VolsegError
from volseg.execution import lines
from volseg.execution.driver import SUBMISSION, Driver, Hooks, Reporter, Tally
from volseg.execution.events import Executor
from volseg.execution.front import Front, InOrder, Work
from volseg.execution.output import begin, clear_for, create_output, finish, inspected, reopen, wait_for_driver
from volseg.execution.prepare import Prepared
from volseg.geometry import BlockSet
from volseg.journal import Note, tagged
from volseg.planning import Plan
from volseg.storage.ledger import Ledger

Replan = Callable[[tuple[int, int, int]], Prepared]


def run_job(
    job: Prepared, replan: Replan, make_executor: Callable[[Prepared], Executor], report: Reporter, note: Note
) -> dict[str, Any]:
    """Bring the output of `job` to completion and return the report.

    `replan` makes the plan anew with the block grid of an earlier run of the same job. `report` is called with the
    tally, `note` with every line, also those that only machines care for. Where another process drives the job, this
    one waits and takes over only what is left. Raises JobError, InputError, JobInterrupted; what has a receipt is kept
    in every case.
    """
    started = time.monotonic()
    note = tagged(note, job=job.name, output=job.spec.output)
    clear_for(job, note)
    ledger = Ledger(job.spec.output, job.job_key)
    header = ledger.header() or begin(job, ledger, time.time())
    z, y, x = header["block"]
    if (z, y, x) != job.plan.block:
        note(f"this job was begun with blocks of {z},{y},{x}; they are kept")
        job = replan((z, y, x))
    job = job.with_storage(header["chunks"], header["shards"])
    while not ledger.take():
        wait_for_driver(ledger, note)
    whose: dict[str, Any] = {"attempt": ledger.attempt, "submission": os.environ.get(SUBMISSION, "")}
    note = tagged(note, **whose)
    try:
        result = _drive(job, ledger, make_executor, report, note, started)
        ledger.end({**result, **whose})
        note(lines.ended(result))
        return result
    except JobInterrupted as error:
        ledger.end(None)
        note(lines.stopped(error))
        raise
    except VolsegError as error:
        ledger.end({
            "status": "failed", "error": str(error), "type": type(error).__name__, "exit_code": error.exit_code,
            **whose,
        })  # fmt: skip
        note(lines.stopped(error))
        raise
    except BaseException as error:
        ledger.end(None)
        note(lines.stopped(error))
        raise


def _drive(
    job: Prepared, ledger: Ledger, make_executor: Callable[[Prepared], Executor], report: Reporter, note: Note,
    started: float,
) -> dict[str, Any]:  # fmt: skip
    create_output(job)
    grid = job.plan.grid
    before = Tally(len(grid))
    done, lost = BlockSet(), 0
    for receipt, sound in inspected(job.spec.output, ledger.receipts()):
        if sound:
            done.add(receipt.index)
            before.take(receipt)
        else:
            lost += 1
    if lost:
        note(f"{lost} block(s) have a receipt but their objects are gone or changed; they are computed again")
    tally = Tally(len(grid), resumed=len(done), job=job.name, attempt=ledger.attempt)
    note(lines.started(job, tally))
    if len(done) < len(grid):
        reopen(job)
        once = cache(note)
        hooks = Hooks(
            size=lambda index: grid.box(index).intersect(job.plan.region).size,
            report=report,
            note=note,
            check_fingerprint=lambda found, otherwise: _check_fingerprint(job, ledger, found, otherwise, once),
            trace=note,
        )
        driver = Driver(make_executor(job), ledger, tally, hooks, attempts=job.spec.attempts)
        try:
            driver.run(_work(job, done))
        except KeyboardInterrupt:
            raise JobInterrupted(
                f"interrupted: {tally.done} of {tally.total} blocks are done and kept; run the same command again to "
                "go on"
            ) from None
    if not tally.failed:
        finish(job, ledger.receipts())
    return _report(job, tally, before, time.monotonic() - started, ledger.recorded_numerics())


def _work(job: Prepared, done: BlockSet) -> Work:
    """Return what is left to be done."""
    if job.plan.seams.shared:
        return Front(job.plan, done)
    return InOrder(done.missing(len(job.plan.grid)))


def _check_fingerprint(job: Prepared, ledger: Ledger, found: dict[str, str], otherwise: str, note: Note) -> None:
    if "guard" in found:
        note(f"precision {job.spec.precision}: {found['guard']}")
    numerics = {**found, "batch": str(job.plan.batch)}
    first = ledger.numerics(numerics)
    if first == numerics or job.spec.allow_device == found["name"]:
        return
    names = sorted(name for name in {*first, *numerics} - {"name"} if first.get(name) != numerics.get(name))
    difference = ", ".join(f"{name} {first.get(name)} then, {numerics.get(name)} now" for name in names)
    raise InputError(
        f"this job was begun on another device ({difference}), whose last bits may differ; {otherwise}: go on "
        f"with the same device, start anew with another output, or allow this one with --allow-device {found['name']}"
    )


def _report(job: Prepared, tally: Tally, before: Tally, wall: float, numerics: dict[str, Any] | None) -> dict[str, Any]:
    plan, stats = job.plan, tally.stats
    counts = [int(stats.get(f"class_{c}", 0) + before.stats.get(f"class_{c}", 0)) for c in range(plan.classes)]
    voxels = sum(counts)
    return {
        "status": "partial" if tally.failed else "complete",
        "output": job.spec.output,
        "job_key": job.job_key,
        "blocks": tally.as_dict(),
        "failed_blocks": [
            {"block": index, "box": str(plan.grid.box(index)), "error": message}
            for index, message in sorted(tally.failed.items())
        ],
        "forwards": int(stats.get("forwards", 0)),
        "patches": plan.patches,
        "forwards_per_patch": _per_patch(plan, tally, before),
        "seams": {
            "bound_bytes": plan.seams.bound,
            "most_bytes": tally.seam_bytes,
            "lost": tally.seams_lost,
        },
        "second_copies": tally.second_copies,
        "seconds": {
            "wall": round(wall, 3),
            "start": round((tally.ready or tally.started) - tally.started, 3),
            "work": round((tally.ended or tally.started) - (tally.ready or tally.started), 3),
            "stop": round(tally.stop_seconds, 3),
            **{
                name: round(stats.get(f"{name}_seconds", 0.0), 3)
                for name in ("read", "compute", "forward", "write", "waiting")
            },
        },
        "bytes": {"read": int(stats.get("read_bytes", 0)), "written": int(stats.get("written_bytes", 0))},
        "waiting": _waiting(stats),
        "numerics": numerics,
        "workers": {"used": tally.most_workers, "lost": tally.workers_lost},
        "retried": tally.retried,
        "voxels": tally.voxels,
        "classes": [
            {"id": c.id, "name": c.name, "voxels": n, "fraction": round(n / voxels, 6) if voxels else None}
            for c, n in zip(job.manifest.classes, counts, strict=True)
        ],
        "absent_chunks": int(stats.get("absent_chunks", 0) + before.stats.get("absent_chunks", 0)),
        "nonfinite_filled": int(stats.get("nonfinite", 0) + before.stats.get("nonfinite", 0)),
        "memory": {"predicted": plan.memory.total, "peak": tally.peak_memory},
    }


def _waiting(stats: Mapping[str, float]) -> float | None:
    """Return the share of a worker's time in which it had a block and waited for input or output."""
    waited, computed = stats.get("waiting_seconds", 0.0), stats.get("compute_seconds", 0.0)
    return round(waited / (waited + computed), 4) if computed else None


def _per_patch(plan: Plan, tally: Tally, before: Tally) -> float | None:
    """Return how often each patch was computed, in all attempts whose receipts count; None where blocks are missing."""
    if tally.failed:
        return None
    forwards = tally.stats.get("forwards", 0) + before.stats.get("forwards", 0)
    return round(forwards / (plan.patches * plan.forwards_a_patch), 4)
