"""The client for pipelines: submit, watch, result; on a cluster, or with no address on this machine."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, overload

from volseg.client.embedded import EmbeddedJobs
from volseg.client.job import Job, JobResult, Jobs
from volseg.client.state import JobStatus
from volseg.cluster.jobs import ClusterError, JobsApi, RayJob, Submission
from volseg.cluster.submission import (
    attempt_of,
    check_runtime_env,
    entrypoint,
    identify,
    is_alive,
    name_of,
    newest,
    stem_for,
    stem_of,
)
from volseg.errors import InputError, VolsegError, VolumeError
from volseg.execution.status import read_status
from volseg.execution.webhook import check_url
from volseg.spec import SegmentSpec, TrainSpec
from volseg.storage import files
from volseg.training.progress import TrainResult

_WATCH_SECONDS = 1.0
OnEnd = Callable[[JobStatus], None]
AnyJob = Job[JobResult | TrainResult]


class Client:
    """Submits segmentations and trainings and tells how they are doing.

    `address` is that of a Ray cluster's Jobs API, such as ``http://head:8265``; None runs jobs in processes of this
    machine, which are stopped when the client is closed. What goes in and what comes out must be in reach of this
    machine, too: what lies there names the job, and the ledger beside the output tells how far it is. `timeout` is that
    of one request in seconds. A token is taken from RAY_AUTH_TOKEN or the file of RAY_AUTH_TOKEN_PATH. A cluster
    without one that is not on this machine is refused unless `insecure`.
    """

    def __init__(self, address: str | None, *, timeout: float = 30.0, insecure: bool = False) -> None:
        self._jobs: Jobs = EmbeddedJobs() if address is None else JobsApi(address, timeout=timeout)
        self._insecure = insecure
        self._closed = threading.Event()
        self._watchers: list[threading.Thread] = []

    def __enter__(self) -> Client:
        """Return the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        self.close()

    def close(self) -> None:
        """Leave: jobs of a cluster go on, those of this machine stop; callbacks that wait are dropped."""
        self._closed.set()
        self._jobs.close()
        for watcher in self._watchers:
            if watcher is not threading.current_thread():
                watcher.join()

    @overload
    def submit(
        self, spec: SegmentSpec, *, on_end: OnEnd | None = None, webhook: str | None = None, driver_cpus: float = 0.0,
        runtime_env: Mapping[str, Any] | None = None,
    ) -> Job[JobResult]: ...  # fmt: skip

    @overload
    def submit(
        self, spec: TrainSpec, *, on_end: OnEnd | None = None, webhook: str | None = None, driver_cpus: float = 0.0,
        runtime_env: Mapping[str, Any] | None = None,
    ) -> Job[TrainResult]: ...  # fmt: skip

    def submit(
        self,
        spec: SegmentSpec | TrainSpec,
        *,
        on_end: OnEnd | None = None,
        webhook: str | None = None,
        driver_cpus: float = 0.0,
        runtime_env: Mapping[str, Any] | None = None,
    ) -> AnyJob:
        """Submit a segmentation or a training, or attach to the same one where it runs or is done already.

        An unfinished job goes on under the next attempt. `on_end` is called with the last status in a thread of its
        own, while the client is open. `webhook` is a URL that the job's driver tells how it ended, whatever became of
        this client (see `volseg.execution.webhook`); whoever attaches adds none. `driver_cpus` are reserved for the
        driver, which computes nothing: with 0 it runs on the cluster's head. `runtime_env` is Ray's, without
        credentials. Raises InputError where the spec, the data or the cluster's protection is not as it must be,
        ClusterError where the cluster does not take the job.
        """
        if webhook is not None:
            spec = spec.model_copy(update={"webhook": webhook})
        if spec.webhook is not None:
            check_url(spec.webhook)
        environment = dict(runtime_env or {})
        check_runtime_env(environment)
        job = self._attach(spec, driver_cpus, environment)
        if on_end is not None:
            self._tell_end(job, on_end)
        return job

    def job(self, name: str) -> AnyJob:
        """Return the job of a submission's name, or of an output.

        Raises InputError where there is none; by its output a job is found where the cluster is gone, too.
        """
        if attempt_of(name) is not None:
            found = self._jobs.info(name)
            if found is None:
                raise InputError(f"Ray knows no job {name}: name the output instead, whose ledger tells about it")
            return self._known(found)
        try:
            ours = self._ours()
        except ClusterError:
            ours = []
        try:
            status = read_status(name)
        except VolumeError:
            # Submitted, and not begun: only the cluster knows.
            mine = [job for job in ours if job.metadata["volseg_output"] == files.absolute(name)]
            if not mine:
                raise
            return self._known(max(mine, key=lambda job: job.started or 0.0))
        found = newest(ours, stem_for(status.job_key, status.output))
        return Job(self._jobs, found.id if found is not None else "", status.output, status.job_key)

    def known_job(self, name: str, output: str, job_key: str) -> AnyJob:
        """Return the job of a submission that is known already; asks nobody."""
        return Job(self._jobs, name, output, job_key)

    def jobs(self) -> list[AnyJob]:
        """Return the last submission of every job that the cluster knows, the newest first."""
        known = sorted(self._ours(), key=lambda job: job.started or 0.0, reverse=True)
        stems = {stem_of(job.id) for job in known}
        last = {job.id for stem in stems if (job := newest(known, stem)) is not None}
        return [self._known(job) for job in known if job.id in last]

    def _attach(self, spec: SegmentSpec | TrainSpec, driver_cpus: float, runtime_env: dict[str, Any]) -> AnyJob:
        task = identify(spec)
        key, output = task.job_key, task.output
        # A training that is to replace its own finished bundle begins anew, or is joined where it has begun.
        anew = isinstance(spec, TrainSpec) and spec.overwrite
        if not anew and read_status(output, key).state == "complete":
            return Job(self._jobs, "", output, key, attached=True)
        self._jobs.refuse_unprotected(insecure=self._insecure)
        last = newest(self._jobs.jobs(), task.stem)
        # Once more: what Ray calls ended by now may be complete.
        ledger = read_status(output, key)
        if last is not None and (is_alive(last, ledger) or (ledger.state == "complete" and not anew)):
            return Job(self._jobs, last.id, output, key, attached=True)
        attempt = 1 if last is None else (attempt_of(last.id) or 0) + 1
        name = name_of(task, attempt)
        # Of all who want this name at the same moment, Ray gives it to one.
        submission = Submission(name, entrypoint(task, name), task.metadata, driver_cpus, runtime_env)
        created = self._jobs.submit(submission)
        return Job(self._jobs, name, output, key, attached=not created)

    def _ours(self) -> list[RayJob]:
        return [job for job in self._jobs.jobs() if attempt_of(job.id) is not None and "volseg_output" in job.metadata]

    def _known(self, job: RayJob) -> AnyJob:
        if "volseg_output" not in job.metadata:
            raise InputError(f"job {job.id} was not submitted by volseg: `ray job status` tells about it")
        return Job(self._jobs, job.id, job.metadata["volseg_output"], job.metadata["volseg_job_key"])

    def _tell_end(self, job: AnyJob, on_end: OnEnd) -> None:
        def watch() -> None:
            try:
                while not (status := job.status()).ended:
                    if self._closed.wait(_WATCH_SECONDS):
                        return
                on_end(status)
            except VolsegError as error:
                # Nobody waits for this thread: said here or nowhere.
                sys.stderr.write(f"volseg: {error}\n")

        watcher = threading.Thread(target=watch, name="volseg-watch", daemon=True)
        self._watchers.append(watcher)
        watcher.start()
