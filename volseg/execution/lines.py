"""What happens in a job, as lines: text for people where they should read it, else only plain values for machines.

How a job begins and ends has no text: people are told by the command that runs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from volseg.errors import InputError, JobInterrupted, VolsegError
from volseg.execution.events import BlockDone, WorkerFailed, WorkerLeft, WorkerLost, WorkerReady
from volseg.inference.attempt import Failure
from volseg.journal import Line
from volseg.spec import TrainSpec

if TYPE_CHECKING:
    from volseg.execution.driver import Tally
    from volseg.execution.prepare import Prepared


def started(job: Prepared, tally: Tally) -> Line:
    """Say what will be done, with the figures of the plan."""
    plan = job.plan
    planned = plan.summary()
    facts: dict[str, Any] = {
        "input": job.spec.input, "model": job.spec.model, "bundle": job.bundle_digest, "blocks": tally.total,
        "resumed": tally.resumed, "block_shape": ",".join(map(str, plan.block)), "region": str(plan.region),
        "patches": plan.patches, "forwards": planned["forwards"], "workers": plan.workers, "device": plan.device,
        "batch_size": plan.batch, "memory_per_worker": plan.memory.total, "bytes_read": planned["bytes_read"],
        "bytes_written": planned["bytes_written"],
    }  # fmt: skip
    return Line("", "job started", **facts)


def ended(report: dict[str, Any]) -> Line:
    """Say how a job came to its end, with what it cost."""
    seconds = {f"{name}_seconds": value for name, value in report["seconds"].items()}
    counts = {name: report["blocks"][name] for name in ("total", "computed", "resumed", "failed")}
    facts: dict[str, Any] = {
        "status": report["status"], **counts, "retried": report["retried"], "voxels": report["voxels"],
        "workers_lost": report["workers"]["lost"], "forwards": report["forwards"], **seconds,
        **{f"{name}_bytes": value for name, value in report["bytes"].items()},
    }  # fmt: skip
    return Line("", "job ended", "info" if report["status"] == "complete" else "error", **facts)


def training_started(spec: TrainSpec) -> Line:
    """Say what will be trained."""
    facts: dict[str, Any] = {
        "image": ",".join(spec.image), "labels": ",".join(spec.labels), "recipe": spec.recipe,
        "max_steps": spec.max_steps, "max_minutes": spec.max_minutes,
    }  # fmt: skip
    return Line("", "job started", **facts)


def training_ended(report: dict[str, Any]) -> Line:
    """Say how a training came to its end."""
    facts: dict[str, Any] = {name: value for name, value in report.items() if isinstance(value, str | int | float)}
    return Line("", "job ended", **facts)


def stopped(error: BaseException) -> Line:
    """Say why a job did not come to its end."""
    if isinstance(error, JobInterrupted | KeyboardInterrupt):
        return Line("", "job ended", "warning", status="stopped", error=str(error))
    kind = "failed" if isinstance(error, VolsegError) else "broken"
    return Line("", "job ended", "error", status=kind, error=str(error), type=type(error).__name__)


# ---------------------------------------------------------------- blocks


def block_done(event: BlockDone) -> Line:
    """Say what a block took; there may be millions of these lines."""
    facts: dict[str, Any] = {"block": event.receipt.index, "worker": event.worker, **event.receipt.stats}
    return Line("", "block done", "debug", **facts)


def block_failed(failure: Failure, errors: int, *, said: bool) -> Line:
    """Say that a block failed so often by now and is tried again; without a text where people were told already."""
    text = "" if said else f"block {failure.index} is tried again: {failure.message}"
    return Line(text, "block failed", "warning", block=failure.index, errors=errors, error=failure.message)


def block_retried(index: int, decision: str) -> Line:
    """Say that a block is handed out again."""
    return Line("", "block retried", block=index, decision=decision)


def block_copied(index: int) -> Line:
    """Say that a slow block has a second worker."""
    return Line(f"block {index} takes unusually long; another worker computes it, too", "block copied", block=index)


def block_suspected(index: int, machines: int) -> Line:
    """Say that so many machines went with a block in hand."""
    text = (
        f"{machines} machines were lost with block {index} in hand; it is computed apart from now on, to see whether "
        "it is the cause"
    )
    return Line(text, "block suspected", "warning", block=index, machines=machines)


def block_set_aside(index: int, message: str) -> Line:
    """Say that a block is given up."""
    return Line(f"block {index} is set aside: {message}", "block set aside", "error", block=index, error=message)


def seams_lost(count: int) -> Line:
    """Say that sums for other blocks are gone and are computed again."""
    return Line("", "seams lost", "warning", parcels=count)


# ---------------------------------------------------------------- workers


def worker_ready(event: WorkerReady) -> Line:
    """Say that a worker has loaded the model."""
    return Line("", "worker ready", worker=event.worker, device=event.fingerprint.get("name"))


def worker_left(event: WorkerLeft) -> Line:
    """Say that a worker was let go."""
    text = f"worker {event.worker} finished its blocks and left: {event.cause}" if event.cause else ""
    return Line(text, "worker left", worker=event.worker, cause=event.cause)


def worker_lost(event: WorkerLost) -> Line:
    """Say that a worker is gone."""
    what = f"its {len(event.blocks)} block(s) go to another" if event.blocks else "it had no block in hand"
    return Line(
        f"worker {event.worker} was lost ({event.cause}); {what}", "worker lost", "warning",
        worker=event.worker, loss=event.loss, cause=event.cause, blocks=len(event.blocks),
    )  # fmt: skip


def worker_failed(event: WorkerFailed) -> Line:
    """Say that a worker could not start."""
    text = f"worker {event.worker} could not start: {event.message}"
    return Line(text, "worker failed", "warning", worker=event.worker, error=event.message)


def worker_refused(event: WorkerReady, error: InputError) -> Line:
    """Say that a machine of another kind is left out."""
    text = f"worker {event.worker} takes no part: {error}"
    return Line(text, "worker refused", "warning", worker=event.worker, error=str(error))


def workers_missing(there: int, wanted: int, word: str) -> Line:
    """Say what workers that are not there wait for."""
    text = f"{there} of {wanted} workers are ready; {word}"
    return Line(text, "workers missing", "warning", ready=there, wanted=wanted)
