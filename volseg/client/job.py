"""One job as its submitter sees it: status, progress, result, logs, cancel."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Generic, Protocol, TypeVar, cast

from volseg import errors
from volseg.client.state import JobStatus, in_words, judge
from volseg.cluster.jobs import ENDED, ClusterError, RayJob, Submission
from volseg.errors import InputError, JobError, JobInterrupted, JobPartial, VolsegError
from volseg.execution.status import LedgerStatus, read_status
from volseg.training.progress import TrainResult

_BY_EXIT_CODE: dict[int, type[VolsegError]] = {2: InputError, 4: JobError, 130: JobInterrupted}
FOLLOW_SECONDS = 1.0
_LINE_SECONDS = 10.0
Progress = Callable[[JobStatus], None]


class Jobs(Protocol):
    """Where jobs run: a cluster, or this machine."""

    def refuse_unprotected(self, *, insecure: bool) -> None:
        """Raise InputError where others could change the job, unless `insecure`."""
        ...

    def submit(self, submission: Submission) -> bool:
        """Hand in a job; False where one of this name is there already."""
        ...

    def info(self, job: str) -> RayJob | None:
        """Return what is known of a job."""
        ...

    def jobs(self) -> list[RayJob]:
        """Return all jobs."""
        ...

    def logs(self, job: str) -> str:
        """Return what a job has printed so far."""
        ...

    def stop(self, job: str) -> None:
        """Ask a job to stop."""
        ...

    def close(self) -> None:
        """Leave."""
        ...


@dataclass(frozen=True)
class JobResult:
    """What a complete segmentation answers."""

    output: str
    job_key: str
    blocks: dict[str, int]
    """Counts: total, computed, resumed, failed."""
    classes: tuple[dict[str, Any], ...]
    """id, name, voxels and fraction of every class."""
    report: dict[str, Any]
    """All of the report, as `volseg segment --json` prints it."""

    @property
    def fractions(self) -> dict[str, float]:
        """Share of each class by name."""
        return {entry["name"]: entry["fraction"] or 0.0 for entry in self.classes}


ResultT_co = TypeVar("ResultT_co", bound=JobResult | TrainResult, covariant=True)


class Job(Generic[ResultT_co]):
    """A submitted segmentation or training, or the job of an output; every call asks anew.

    `output` is the label volume or the bundle. `id` is empty where no submission of the job is known; `attached` tells
    that somebody else's submission was joined.
    """

    def __init__(self, jobs: Jobs, name: str, output: str, job_key: str | None, *, attached: bool = False) -> None:
        self._jobs = jobs
        self.id, self.output, self.job_key, self.attached = name, output, job_key, attached

    def status(self) -> JobStatus:
        """Return how far the job is, from the ledger and from the cluster; works where the cluster is gone."""
        ray, unreachable = None, ""
        if self.id:
            try:
                ray = self._jobs.info(self.id)
            except ClusterError as error:
                unreachable = str(error)
        else:
            unreachable = "no submission of this job is known"
        # Read last: what Ray calls ended has written all it will.
        return judge(self.id, self._ledger(), ray, unreachable)

    def watch(self, interval: float = 1.0, timeout: float | None = None) -> Iterator[JobStatus]:
        """Yield the status every `interval` seconds, the last time when the job has ended.

        Raises TimeoutError after `timeout` seconds; the job goes on.
        """
        stop = None if timeout is None else time.monotonic() + timeout
        while True:
            status = self.status()
            yield status
            if status.ended:
                return
            if stop is not None and time.monotonic() + interval > stop:
                raise TimeoutError(f"job {self.id or self.output} is {status.state} after {timeout:g} s; it goes on")
            time.sleep(interval)

    def wait(
        self, timeout: float | None = None, *, progress: bool | Progress = False, interval: float = 1.0
    ) -> JobStatus:
        """Return the status when the job has ended; `progress` prints a line about it on stderr, or is called.

        Raises TimeoutError after `timeout` seconds; the job goes on.
        """
        show = printer() if progress is True else progress
        for status in self.watch(interval, timeout):
            if callable(show):
                show(status)
        return status

    def result(self, timeout: float | None = None) -> ResultT_co:
        """Wait for the job's end and return its result: a JobResult, or the TrainResult of a training.

        Raises JobPartial, whose `failed_blocks` were set aside; the error that stopped the job, by its own class;
        JobInterrupted where it was cancelled or its driver died; TimeoutError.
        """
        status = self.wait(timeout)
        report = self._ledger().report or {}
        if status.state == "complete":
            return cast("ResultT_co", self._result_of(report))
        if status.state == "partial":
            from volseg.api import partial_message

            raise JobPartial(partial_message(report), report)
        if status.state == "failed":
            raise self._failure(status, report)
        raise JobInterrupted(
            f"job {self.id or self.output} stopped with {status.done} of {status.total} {status.unit} done "
            f"({status.note or 'its driver ended'}): submit it again to go on"
        )

    def logs(self) -> str:
        """Return what the job's driver has printed so far."""
        return self._jobs.logs(self._named("has no log"))

    def logs_so_far(self) -> tuple[str, bool]:
        """Return what the job's driver has printed so far, and whether that is all."""
        name = self._named("has no log")
        # Asked first: what has ended prints no more.
        info = self._jobs.info(name)
        return self._jobs.logs(name), info is None or info.status in ENDED

    def follow(self) -> Iterator[str]:
        """Yield what the driver prints as it comes, until the job has ended."""
        seen, over = 0, False
        while not over:
            text, over = self.logs_so_far()
            if len(text) > seen:
                yield text[seen:]
                seen = len(text)
            if not over:
                time.sleep(FOLLOW_SECONDS)

    def cancel(self) -> None:
        """Ask the job to stop; finished blocks and checkpoints are kept, and submitted again the same spec goes on."""
        self._jobs.stop(self._named("cannot be cancelled from here"))

    def _named(self, what: str) -> str:
        if not self.id:
            raise InputError(f"no submission of the job of {self.output} is known, so it {what}: name the submission")
        return self.id

    def _result_of(self, report: dict[str, Any]) -> JobResult | TrainResult:
        if "bundle" in report:
            known = {field.name: report[field.name] for field in fields(TrainResult) if field.name in report}
            return TrainResult(**known)
        return JobResult(
            self.output, report.get("job_key", self.job_key or ""), report.get("blocks", {}),
            tuple(report.get("classes", ())), report,
        )  # fmt: skip

    def _ledger(self) -> LedgerStatus:
        return read_status(self.output, self.job_key)

    def _failure(self, status: JobStatus, report: dict[str, Any]) -> VolsegError:
        kind = getattr(errors, report.get("type", ""), None)
        if isinstance(kind, type) and issubclass(kind, VolsegError) and report.get("error"):
            return kind(report["error"])
        info = self._jobs.info(self.id) if self.id else None
        code = info.exit_code if info is not None and info.exit_code is not None else 4
        return _BY_EXIT_CODE.get(code, JobError)(status.note or "the job failed")


def printer() -> Progress:
    """Return what writes a line on stderr when the state changes, and every ten seconds."""
    last: list[tuple[str, float]] = []

    def show(status: JobStatus) -> None:
        now = time.monotonic()
        if last and last[0][0] == status.state and now - last[0][1] < _LINE_SECONDS:
            return
        last[:] = [(status.state, now)]
        sys.stderr.write(f"{status.id or status.output}: {in_words(status)}\n")
        sys.stderr.flush()

    return show
