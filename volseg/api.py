"""The Python interface: the same jobs as the command line, with the same options as keywords."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volseg.analysis.card import SliceChoice, describe_model, predictions_picture
from volseg.analysis.evaluate import evaluate, open_labels
from volseg.analysis.overlay import overlay
from volseg.analysis.suggest import labelled_slices
from volseg.analysis.suggest import suggest as choose
from volseg.errors import JobPartial
from volseg.execution.driver import Reporter
from volseg.execution.events import Executor
from volseg.execution.executors import executor_of
from volseg.execution.limits import check_allowed
from volseg.execution.local import local_executor
from volseg.execution.prepare import Cores, Prepared, local_cores, prepare
from volseg.execution.segment import run_job
from volseg.execution.training import run_training
from volseg.execution.trial import measure, refuse_cluster
from volseg.execution.verify import verify
from volseg.execution.webhook import telling
from volseg.geometry import Box, Triple
from volseg.journal import Note, Trace, silent, teller
from volseg.models.manifest import read_manifest
from volseg.models.network import Axis
from volseg.recipes import resolve
from volseg.spec import BenchSpec, SegmentSpec, TrainSpec
from volseg.storage import files
from volseg.storage.importer import import_volume
from volseg.storage.volume import open_volume

if TYPE_CHECKING:
    from volseg.training.progress import ProgressCallback, TrainProgress, TrainResult

__all__ = [
    "bench",
    "describe_model",
    "draw_predictions",
    "evaluate",
    "import_volume",
    "overlay",
    "plan",
    "preview",
    "run_bench",
    "run_plan",
    "run_segment",
    "run_train",
    "segment",
    "suggest",
    "train",
    "tune",
    "verify",
]


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


def train(image: str | Sequence[str], labels: str | Sequence[str], out: str, **options: Any) -> dict[str, Any]:
    """Train a network on labelled regions, write its bundle to `out` and return the result.

    `options` are the fields of `volseg.spec.TrainSpec`, such as ``dims=2, train_roi="0:14,:,:"``; what is left out is
    the recipe's. The same call resumes an interrupted training. Raises InputError where something is wrong with
    the data or the options.
    """
    return run_train(resolve({"image": image, "labels": labels, "out": out, **options}))


def suggest(
    image: str,
    *,
    model: str,
    n: int = 3,
    labels: str | None = None,
    box: Triple | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return the `n` slices (for a 2D bundle) or boxes (3D) of `image` that are most worth labelling next.

    The image is segmented with probabilities into a temporary folder; `options` are those of `segment`, `labels` the
    volume of what is labelled already, `box` the sides (z, y, x) of suggested boxes (default: the bundle's patch).
    ``suggestions`` of the answer are described in `volseg.analysis.suggest`. Raises what `segment` raises, and
    InputError where fewer than `n` slices or boxes are left.
    """
    manifest = read_manifest(model)
    with tempfile.TemporaryDirectory(prefix="volseg-suggest-") as folder:
        output = str(Path(folder) / "soft.zarr")
        segment(image, output, model=model, **{**options, "probabilities": True})
        probabilities, volume = open_volume(f"{output}/probabilities"), open_volume(image)
        axis = _one_axis(options.get("axis"), manifest.axis)
        taken = labelled_slices(open_labels(labels), axis) if labels is not None else []
        if manifest.config.dims == 3:
            box = box or manifest.patch
        region = Box.parse(options["roi"], volume.shape) if options.get("roi") else None
        found = choose(probabilities, volume, n=n, axis=axis, box=box, region=region, labelled=taken, progress=progress)
    return {"image": image, "model": model, "suggestions": found}


def _one_axis(given: Sequence[Axis] | None, usual: Axis) -> Axis:
    return given[0] if given else usual


def draw_predictions(model: str, image: str, out: str, *, labels: str | None = None, **choice: Any) -> dict[str, Any]:
    """Draw what a bundle answers on slices of `image`, beside the truth of `labels`, as the PNG `out`.

    `choice` are the fields of `volseg.analysis.card.SliceChoice`, such as ``roi="14:17,:,:", count=2``.
    """
    return predictions_picture(model, image, labels, out, run_segment, SliceChoice(**choice))


def run_train(
    spec: TrainSpec,
    progress: Callable[[TrainProgress], None] | None = None,
    note: Note | None = None,
    trace: Trace = silent,
) -> dict[str, Any]:
    """Train as `spec` says, in this process or, where it names workers or a cluster, on Ray; return the report.

    `progress` is called about twice a second, `note` with lines worth reading, `trace` with everything that happens,
    these lines included. A training that is finished already answers at once, and one that another process drives is
    waited for.
    """
    named = {
        "image": spec.image,
        "labels": spec.labels,
        "mask": spec.mask or (),
        "init": (spec.init,) if spec.init else (),
    }
    for name, places in named.items():
        for place in places:
            check_allowed({name: place}, {"out": spec.out, "checkpoints": f"{files.absolute(spec.out)}.training"})
    say = teller(note or silent, trace)

    def train_there(spec: TrainSpec, progress: ProgressCallback, note: Note) -> TrainResult:
        if spec.workers is not None or _cluster(spec.address):
            from volseg.cluster.ray_train import train_on_ray

            return train_on_ray(spec, progress, note)
        from volseg.training.train import train as train_here

        return train_here(spec, progress, note)

    def run() -> dict[str, Any]:
        return run_training(spec, train_there, progress or silent, say)

    return telling(spec.webhook, {"kind": "training", "output": files.absolute(spec.out)}, say, run)


def preview(spec: TrainSpec, out: str) -> dict[str, Any]:
    """Draw some training patches, changed as a training by `spec` would change them, as the PNG `out`."""
    from volseg.training.samples import draw_preview

    files.write_bytes(out, draw_preview(spec))
    return {"picture": files.absolute(out)}


def partial_message(report: dict[str, Any]) -> str:
    """Say in one line which blocks a job set aside, why, and what to do."""
    failed = report["failed_blocks"]
    return (
        f"{len(failed)} of {report['blocks']['total']} blocks were set aside, the first is block {failed[0]['block']} "
        f"at {failed[0]['box']}: {failed[0]['error']}; the output stays incomplete: mend the cause and run it again"
    )


def tune(input: str, *, model: str, note: Note | None = None, **options: Any) -> dict[str, Any]:  # noqa: A002
    """Measure on this machine the ways to run `model` on patches of `input`, and keep the best beside the bundle.

    `options` are those of `segment`; the choice holds for the same patch, batch and precision on the same kind of
    device. `note` takes a line before each candidate.
    """
    with tempfile.TemporaryDirectory(prefix="volseg-tune-") as folder:
        output = str(Path(folder) / "nothing.zarr")
        values = {**options, "input": input, "model": model, "output": output, "executor": "serial"}
        with _composer(SegmentSpec.read(values)) as composer:
            job = composer.prepare()
    from volseg.inference.tune import tune as measure

    return measure(job.spec, job.plan, job.bundle_digest, job.volume, note or (lambda _: None))


def plan(input: str, output: str, *, model: str, **options: Any) -> dict[str, Any]:  # noqa: A002 - the option's name
    """Return what `segment` with the same arguments would cost; raises InputError where it would be refused."""
    return run_plan(SegmentSpec.read({"input": input, "output": output, "model": model, **options}))


def bench(model: str | None = None, **options: Any) -> dict[str, Any]:
    """Measure this machine with a bundle, or a default network, and return what a volume would take.

    `options` are the fields of `volseg.spec.BenchSpec`, such as ``shape=(2000, 2000, 2000), workers=64``. Takes about a
    minute. Raises InputError where the bundle, the patch or the memory limit cannot be used.
    """
    return run_bench(BenchSpec.read({"model": model, **options}))


def run_bench(spec: BenchSpec, report: Reporter | None = None, note: Note | None = None) -> dict[str, Any]:
    """Measure as `spec` says; `report` is called with the tally of what is segmented, `note` with lines."""
    refuse_cluster(os.environ.get("RAY_ADDRESS"))
    asked = SegmentSpec.read({
        "input": "-", "output": "-", "model": spec.model or "-", "device": spec.device, "workers": spec.workers,
    })  # fmt: skip
    return measure(spec, local_cores(asked), lambda trial: run_segment(trial, report), note or (lambda _: None))


def run_plan(spec: SegmentSpec) -> dict[str, Any]:
    """Return what a segmentation would cost, as plain values; raises InputError where it would be refused."""
    with _composer(spec) as composer:
        job = composer.prepare()
        costs = {"compared": job.comparison()}
        return {**job.plan.summary(), **costs, "executor": composer.executor, "job_key": job.job_key}


def run_segment(
    spec: SegmentSpec, report: Reporter | None = None, note: Note | None = None, trace: Trace = silent
) -> dict[str, Any]:
    """Run a segmentation; `report` is called with the tally twice a second, `note` with lines worth reading.

    `trace` is called with everything that happens, these lines included. Unlike `segment`, it returns the report of a
    partial job, too.
    """
    say = teller(note or silent, trace)

    def run() -> dict[str, Any]:
        with _composer(spec) as composer, composer.metered(report or silent) as told:
            job = composer.prepare()
            return run_job(job, composer.prepare, composer.make_executor, told, say)

    return telling(spec.webhook, {"kind": "segmentation", "output": files.absolute(spec.output)}, say, run)


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

            return RayExecutor(job.spec, job.plan, job.bundle_digest, name=job.name)

        return local_executor(job)

    @contextmanager
    def metered(self, report: Reporter) -> Iterator[Reporter]:
        """Lend what also tells Ray's metrics, where the job runs on Ray."""
        if self.executor != "ray":
            yield report
            return
        from volseg.cluster.metrics import metered

        with metered(report, self._cores.device) as told:
            yield told


def _cluster(address: str | None) -> str | None:
    # A job that was submitted to a cluster finds the address in its environment.
    return address or os.environ.get("RAY_ADDRESS")


@contextmanager
def _composer(spec: SegmentSpec) -> Iterator[_Composer]:
    address = spec.address if spec.in_process else _cluster(spec.address)
    if address is None:
        cores = local_cores(spec)
        if "ray" in sys.modules and executor_of(spec, cores) == "ray":
            from volseg.cluster.session import store_here

            # A program that uses Ray already has decided how much there is.
            cores = replace(cores, store=store_here() or cores.store)
        yield _Composer(spec, cores)
        return
    spec = spec.model_copy(update={"address": address})
    executor_of(spec, Cores(1, 0, "cpu", 1, 0))
    from volseg.cluster.session import RaySession

    with RaySession(address, spec.workers) as session:
        yield _Composer(spec, session.cores(spec))
