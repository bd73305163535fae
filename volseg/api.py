"""The Python interface: the same jobs as the command line, with the same options as keywords."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from volseg.analysis.evaluate import evaluate
from volseg.analysis.overlay import overlay
from volseg.errors import JobPartial
from volseg.execution.driver import Note, Reporter
from volseg.execution.events import Executor
from volseg.execution.prepare import Cores, Prepared, executor_of, local_cores, prepare
from volseg.execution.segment import run_job
from volseg.execution.serial import LocalWorker, SerialExecutor
from volseg.execution.verify import verify
from volseg.geometry import Triple
from volseg.spec import SegmentSpec, TrainSpec
from volseg.storage.importer import import_volume

__all__ = ["evaluate", "import_volume", "overlay", "plan", "run_plan", "run_segment", "segment", "train", "verify"]


def segment(input: str, output: str, *, model: str, **options: Any) -> dict[str, Any]:  # noqa: A002 - the option's name
    """Segment the volume at `input` into an OME-Zarr label volume at `output` and return the report.

    `options` are the fields of `volseg.spec.SegmentSpec`, such as ``workers=2, overlap=0.25``. The report's ``status``
    is ``complete``. Raises JobPartial (with the report as `report`) where blocks had to be set aside, InputError where
    what was asked for is wrong, JobError where the job cannot go on; the same call resumes.
    """
    report = run_segment(SegmentSpec.read({"input": input, "output": output, "model": model, **options}))
    if report["status"] != "complete":
        raise JobPartial(partial_message(report), report)
    return report


def train(image: str, labels: str, out: str, **options: Any) -> dict[str, Any]:
    """Train a network on labelled regions, write its bundle to `out` and return the result.

    `options` are the fields of `volseg.spec.TrainSpec`, such as ``dims=2, train_roi="0:14,:,:"``. The same call resumes
    an interrupted training. Raises InputError where something is wrong with the data or the options.
    """
    from volseg.training.train import train as run_training

    return run_training(TrainSpec.read({"image": image, "labels": labels, "out": out, **options})).as_dict()


def partial_message(report: dict[str, Any]) -> str:
    """Say in one line which blocks a job set aside, why, and what to do."""
    failed = report["failed_blocks"]
    return (
        f"{len(failed)} of {report['blocks']['total']} blocks were set aside, the first is block {failed[0]['block']} "
        f"at {failed[0]['box']}: {failed[0]['error']}; the output stays incomplete: mend the cause and run it again"
    )


def plan(input: str, output: str, *, model: str, **options: Any) -> dict[str, Any]:  # noqa: A002 - the option's name
    """Return what `segment` with the same arguments would cost; raises InputError where it would be refused."""
    return run_plan(SegmentSpec.read({"input": input, "output": output, "model": model, **options}))


def run_plan(spec: SegmentSpec) -> dict[str, Any]:
    """Return what a segmentation would cost, as plain values; raises InputError where it would be refused."""
    with _composer(spec) as composer:
        job = composer.prepare()
        return {**job.plan.summary(), "executor": composer.executor, "job_key": job.job_key}


def run_segment(spec: SegmentSpec, report: Reporter | None = None, note: Note | None = None) -> dict[str, Any]:
    """Run a segmentation; `report` is called with the tally twice a second, `note` with lines worth reading.

    Unlike `segment`, it returns the report of a partial job, too.
    """
    with _composer(spec) as composer:
        job = composer.prepare()
        return run_job(
            job, composer.prepare, composer.make_executor, report or (lambda _: None), note or (lambda _: None)
        )


class _Composer:
    """Brings the parts of a job together: which cores, which executor."""

    def __init__(self, spec: SegmentSpec, cores: Cores) -> None:
        self._spec, self._cores = spec, cores
        self.executor = executor_of(spec, cores)

    def prepare(self, block: Triple | None = None) -> Prepared:
        """Check the spec and plan."""
        return prepare(self._spec, self._cores, self.executor, block)

    def make_executor(self, job: Prepared) -> Executor:
        """Return the executor of a planned job."""
        if self.executor == "ray":
            from volseg.cluster.executor import RayExecutor

            return RayExecutor(job.spec, job.plan, job.bundle_digest)

        def make_worker() -> LocalWorker:
            from volseg.inference.worker import Worker

            return Worker(job.spec, job.plan, job.bundle_digest)

        return SerialExecutor(make_worker)


@contextmanager
def _composer(spec: SegmentSpec) -> Iterator[_Composer]:
    # A job that was submitted to a cluster finds the address in its environment.
    address = spec.address or (os.environ.get("RAY_ADDRESS") if spec.executor != "serial" else None)
    if address is None:
        yield _Composer(spec, local_cores(spec))
        return
    spec = spec.model_copy(update={"address": address})
    executor_of(spec, Cores(1, 0, "cpu", 1, 0))
    from volseg.cluster.session import RaySession

    with RaySession(address, spec.workers) as session:
        yield _Composer(spec, session.cores(spec))
