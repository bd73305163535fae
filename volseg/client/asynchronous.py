"""The same client for asyncio: every call that waits does so in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Generic, overload

from volseg.client.client import AnyJob, Client
from volseg.client.job import FOLLOW_SECONDS, Job, JobResult, Progress, ResultT_co, printer
from volseg.client.state import JobStatus
from volseg.spec import SegmentSpec, TrainSpec
from volseg.training.progress import TrainResult


class AsyncJob(Generic[ResultT_co]):
    """A job; see `volseg.client.job.Job`."""

    def __init__(self, job: Job[ResultT_co]) -> None:
        self._job = job
        self.id, self.output, self.job_key, self.attached = job.id, job.output, job.job_key, job.attached

    async def status(self) -> JobStatus:
        """Return how far the job is."""
        return await asyncio.to_thread(self._job.status)

    async def watch(self, interval: float = 1.0, timeout: float | None = None) -> AsyncIterator[JobStatus]:
        """Yield the status every `interval` seconds, the last time when the job has ended.

        Raises TimeoutError after `timeout` seconds; the job goes on.
        """
        clock = asyncio.get_running_loop().time
        stop = None if timeout is None else clock() + timeout
        while True:
            async with asyncio.timeout_at(stop):
                status = await self.status()
            yield status
            if status.ended:
                return
            async with asyncio.timeout_at(stop):
                await asyncio.sleep(interval)

    async def wait(
        self, timeout: float | None = None, *, progress: bool | Progress = False, interval: float = 1.0
    ) -> JobStatus:
        """Return the status when the job has ended; `progress` prints a line about it on stderr, or is called.

        Raises TimeoutError after `timeout` seconds; the job goes on.
        """
        show = printer() if progress is True else progress
        async for status in self.watch(interval, timeout):
            last = status
            if callable(show):
                show(status)
        return last

    async def result(self, timeout: float | None = None) -> ResultT_co:
        """Wait for the job's end and return its result; raises what `Job.result` raises."""
        await self.wait(timeout)
        return await asyncio.to_thread(self._job.result)

    async def logs(self) -> str:
        """Return what the job's driver has printed so far."""
        return await asyncio.to_thread(self._job.logs)

    async def follow(self) -> AsyncIterator[str]:
        """Yield what the driver prints as it comes, until the job has ended."""
        seen, over = 0, False
        while not over:
            text, over = await asyncio.to_thread(self._job.logs_so_far)
            if len(text) > seen:
                yield text[seen:]
                seen = len(text)
            if not over:
                await asyncio.sleep(FOLLOW_SECONDS)

    async def cancel(self) -> None:
        """Ask the job to stop; the same spec goes on where it is submitted again."""
        await asyncio.to_thread(self._job.cancel)


class AsyncClient:
    """Submits segmentations and trainings from asyncio; the arguments are those of `volseg.client.client.Client`."""

    def __init__(self, address: str | None, *, timeout: float = 30.0, insecure: bool = False) -> None:
        self._client = Client(address, timeout=timeout, insecure=insecure)

    async def __aenter__(self) -> AsyncClient:
        """Return the client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        await self.close()

    async def close(self) -> None:
        """Leave: jobs of a cluster go on, those of this machine stop."""
        await asyncio.to_thread(self._client.close)

    @overload
    async def submit(self, spec: SegmentSpec, **options: Any) -> AsyncJob[JobResult]: ...

    @overload
    async def submit(self, spec: TrainSpec, **options: Any) -> AsyncJob[TrainResult]: ...

    async def submit(self, spec: SegmentSpec | TrainSpec, **options: Any) -> AsyncJob[JobResult | TrainResult]:
        """Submit a job, or attach to the same one; `options` are those of `Client.submit`."""
        submit: Any = self._client.submit
        job: AnyJob = await asyncio.to_thread(submit, spec, **options)
        return AsyncJob(job)

    async def job(self, name: str) -> AsyncJob[JobResult | TrainResult]:
        """Return the job of a submission's name, or of an output."""
        return AsyncJob(await asyncio.to_thread(self._client.job, name))

    async def jobs(self) -> list[AsyncJob[JobResult | TrainResult]]:
        """Return the last submission of every job that the cluster knows, the newest first."""
        return [AsyncJob(job) for job in await asyncio.to_thread(self._client.jobs)]
