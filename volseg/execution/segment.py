"""The main job: take the ledger, compute what has no receipt, check everything, say complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from volseg.errors import InputError, JobInterrupted
from volseg.execution.driver import Driver, Hooks, Note, Reporter, Tally
from volseg.execution.events import Executor
from volseg.execution.output import begin, clear_for, create_output, finish, reopen, unsound, wait_for_driver
from volseg.execution.prepare import Prepared
from volseg.storage.ledger import Ledger, Receipt

Replan = Callable[[tuple[int, int, int]], Prepared]


def run_job(
    job: Prepared, replan: Replan, make_executor: Callable[[Prepared], Executor], report: Reporter, note: Note
) -> dict[str, Any]:
    """Bring the output of `job` to completion and return the report.

    `replan` makes the plan anew with the block grid of an earlier run of the same job. Where another process drives the
    job, this one waits and takes over only what is left. Raises JobError, InputError, JobInterrupted; what has a
    receipt is kept in every case.
    """
    started = time.monotonic()
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
    try:
        result = _drive(job, ledger, make_executor, report, note, started)
        ledger.end(result)
        return result
    except BaseException:
        ledger.end(None)
        raise


def _drive(
    job: Prepared, ledger: Ledger, make_executor: Callable[[Prepared], Executor], report: Reporter, note: Note,
    started: float,
) -> dict[str, Any]:  # fmt: skip
    create_output(job)
    receipts = ledger.receipts()
    if lost := unsound(job.spec.output, receipts):
        note(f"{len(lost)} block(s) have a receipt but their objects are gone or changed; they are computed again")
        receipts = {index: receipt for index, receipt in receipts.items() if index not in lost}
    grid = job.plan.grid
    tally = Tally(len(grid), resumed=len(receipts))
    before = Tally(len(grid))
    for receipt in receipts.values():
        before.take(receipt)
    if len(receipts) < len(grid):
        reopen(job)
        hooks = Hooks(
            size=lambda index: grid.box(index).intersect(job.plan.region).size,
            report=report,
            note=note,
            check_fingerprint=lambda found: _check_fingerprint(job, ledger, found),
        )
        driver = Driver(make_executor(job), ledger, tally, hooks, attempts=job.spec.attempts, workers=job.plan.workers)
        try:
            driver.run(_without(len(grid), receipts))
        except KeyboardInterrupt:
            raise JobInterrupted(
                f"interrupted: {tally.done} of {tally.total} blocks are done and kept; run the same command again to "
                "go on"
            ) from None
    if not tally.failed:
        finish(job, ledger.receipts())
    return _report(job, tally, before, time.monotonic() - started)


def _without(count: int, receipts: dict[int, Receipt]) -> Iterator[int]:
    return (index for index in range(count) if index not in receipts)


def _check_fingerprint(job: Prepared, ledger: Ledger, found: dict[str, str]) -> None:
    numerics = {**found, "batch": str(job.plan.batch)}
    first = ledger.numerics(numerics)
    if first == numerics or job.spec.allow_device == found["name"]:
        return
    names = sorted(name for name in {*first, *numerics} - {"name"} if first.get(name) != numerics.get(name))
    difference = ", ".join(f"{name} {first.get(name)} then, {numerics.get(name)} now" for name in names)
    raise InputError(
        f"this job was begun on another device ({difference}), whose last bits may differ; the job stopped: go on with "
        f"the same device, start anew with another output, or allow this one with --allow-device {found['name']}"
    )


def _report(job: Prepared, tally: Tally, before: Tally, wall: float) -> dict[str, Any]:
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
        "seconds": {
            "wall": round(wall, 3),
            "start": round((tally.ready or tally.started) - tally.started, 3),
            "work": round((tally.ended or tally.started) - (tally.ready or tally.started), 3),
            "stop": round(tally.stop_seconds, 3),
            **{name: round(stats.get(f"{name}_seconds", 0.0), 3) for name in ("read", "compute", "forward", "write")},
        },
        "workers": {"used": plan.workers, "lost": tally.workers_lost},
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
