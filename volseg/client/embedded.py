"""Jobs in processes of this machine, behind the same calls as a cluster's Jobs API."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from volseg.cluster.jobs import RayJob, Submission

_STOP_SECONDS = 15.0
_MOST_CHARACTERS = 20_000


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    log: Path
    metadata: dict[str, str]
    started: float = field(default_factory=time.time)
    stopped: bool = False


class EmbeddedJobs:
    """Runs each job as a child of this process; those that still run when this one leaves are stopped."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="volseg-jobs-")
        self._children: dict[str, _Child] = {}

    def refuse_unprotected(self, *, insecure: bool) -> None:
        """Nobody else can reach a child of this process."""

    def submit(self, submission: Submission) -> bool:
        """Start a job; False where one of this name was started before."""
        if submission.id in self._children:
            return False
        log = Path(self._folder.name) / f"{submission.id}.log"
        words = shlex.split(submission.entrypoint.removeprefix("exec "))
        words[words.index("python")] = sys.executable
        # Without the cluster's address in its environment, the job stays on this machine.
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with log.open("wb") as file:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
            )
        self._children[submission.id] = _Child(process, log, submission.metadata)
        return True

    def info(self, job: str) -> RayJob | None:
        """Return what is known of a job, None where this process started none of this name."""
        child = self._children.get(job)
        if child is None:
            return None
        code = child.process.poll()
        status = "RUNNING" if code is None else "STOPPED" if child.stopped else "FAILED" if code else "SUCCEEDED"
        message = self.logs(job)[-_MOST_CHARACTERS:] if code else ""
        return RayJob(job, status, message, child.started, None, code, child.metadata)

    def jobs(self) -> list[RayJob]:
        """Return all jobs that this process started."""
        return [job for name in self._children if (job := self.info(name)) is not None]

    def logs(self, job: str) -> str:
        """Return what a job has printed so far; nothing once the client is closed."""
        child = self._children.get(job)
        return child.log.read_text(errors="replace") if child is not None and child.log.exists() else ""

    def stop(self, job: str) -> None:
        """Ask a job to stop; one that has ended does not mind."""
        child = self._children.get(job)
        if child is not None and child.process.poll() is None:
            child.stopped = True
            child.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Stop what still runs, and wait for it."""
        for name in self._children:
            self.stop(name)
        for child in self._children.values():
            try:
                child.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()
        self._folder.cleanup()
