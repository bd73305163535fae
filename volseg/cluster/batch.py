"""Many volumes with one model: one after the other on the same workers; one that fails does not stop the others."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Protocol

from volseg.errors import InputError, JobInterrupted, SpecError, VolsegError
from volseg.execution.driver import Reporter
from volseg.execution.events import Executor
from volseg.execution.executors import executor_of
from volseg.execution.limits import check_allowed
from volseg.execution.local import local_executor
from volseg.execution.prepare import Cores, Prepared, local_cores, prepare
from volseg.execution.segment import run_job
from volseg.execution.webhook import telling
from volseg.journal import Line, Note, Trace, silent, tagged, teller
from volseg.spec import SegmentSpec
from volseg.spec.batch import BatchSpec
from volseg.storage import files


@dataclass(frozen=True)
class VolumeOutcome:
    """What became of one volume."""

    input: str
    output: str
    status: str
    """complete, partial or failed."""
    blocks: dict[str, int]
    seconds: float
    error: str = ""


def list_volumes(spec: BatchSpec) -> list[tuple[str, str]]:
    """Return inputs with their outputs, sorted; raises InputError where there are none, or two have one output."""
    if bool(spec.input) == bool(spec.volumes) or bool(spec.output) == bool(spec.volumes):
        raise SpecError(
            "a batch needs either a pattern (--input) and a folder (--output), or a list (volumes) in the spec file; "
            "nothing was done"
        )
    pairs = sorted(spec.volumes.items()) if spec.volumes else _found(spec.input, spec.output)
    pairs = [(files.absolute(volume), files.absolute(output)) for volume, output in pairs]
    if not pairs:
        raise InputError(f"nothing matches {spec.input}; nothing was done: check the pattern, and quote it in a shell")
    taken: dict[str, str] = {}
    for volume, output in pairs:
        if output in taken:
            raise InputError(
                f"{taken[output]} and {volume} would both be written to {output}; nothing was done: give each volume "
                "an output of its own"
            )
        taken[output] = volume
    return pairs


def run_batch(spec: BatchSpec, report: Callable[[str, Any], None], note: Note, trace: Trace = silent) -> dict[str, Any]:
    """Segment all volumes of a batch and return what became of each; its webhook is told of the end of all.

    `report` is called with a volume's place in the batch and its tally, `note` with lines worth reading, `trace` with
    these and with what only machines care for. The answer's ``status`` is complete, or partial where a volume failed
    or had blocks set aside. Raises InputError where the batch itself is wrong, JobInterrupted; the same batch resumes.
    """
    note = teller(note, trace)
    about = {"kind": "batch", "output": files.absolute(spec.output) if spec.output else ""}
    return telling(spec.webhook, about, note, partial(_run_all, spec, report, note))


def _run_all(spec: BatchSpec, report: Callable[[str, Any], None], note: Note) -> dict[str, Any]:
    pairs = list_volumes(spec)
    outcomes: list[VolumeOutcome] = []
    name = f"batch-{hashlib.sha256(repr(pairs).encode()).hexdigest()[:12]}"
    tell = tagged(note, batch=name)
    tell(Line("", "batch started", volumes=len(pairs), model=spec.model))
    with _runner(spec, name) as run:
        for number, (volume, output) in enumerate(pairs, start=1):
            one = SegmentSpec.read({
                **spec.model_dump(exclude={"volumes"}, exclude_unset=True), "input": volume, "output": output
            })  # fmt: skip
            place = f"{number} of {len(pairs)}"
            outcomes.append(_one(run, one, partial(report, place), tagged(tell, volume=place)))
            if error := outcomes[-1].error:
                tell(Line(f"volume {volume}: {error}", "volume failed", "error", input=volume, error=error))
    bad = [outcome for outcome in outcomes if outcome.status != "complete"]
    tell(Line("", "batch ended", "error" if bad else "info", complete=len(outcomes) - len(bad), failed=len(bad)))
    return {
        "status": "partial" if bad else "complete",
        "volumes": [asdict(outcome) for outcome in outcomes],
        "complete": len(outcomes) - len(bad),
        "failed": len(bad),
    }


class _Run(Protocol):
    def __call__(self, spec: SegmentSpec, report: Reporter, note: Note) -> dict[str, Any]:
        """Segment one volume."""
        ...


def _one(run: _Run, spec: SegmentSpec, report: Reporter, note: Note) -> VolumeOutcome:
    started = time.monotonic()
    blocks: dict[str, int] = {}
    try:
        result = run(spec, report, note)
        status, blocks, error = result["status"], result["blocks"], ""
        if status == "partial":
            first = result["failed_blocks"][0]
            error = f"block {first['block']} at {first['box']}: {first['error']}"
    except JobInterrupted:
        raise
    except VolsegError as failure:
        status, error = "failed", str(failure)
    return VolumeOutcome(spec.input, spec.output, status, blocks, round(time.monotonic() - started, 3), error)


@contextmanager
def _runner(spec: BatchSpec, name: str) -> Iterator[_Run]:
    """Give what segments one volume after another, on Ray with actors that stay, or in this process.

    `name` is that of the batch, under which all of its volumes are counted together.
    """
    address = spec.address if spec.in_process else spec.address or os.environ.get("RAY_ADDRESS")
    spec = spec.model_copy(update={"address": address})
    cores = None if address and not spec.in_process else local_cores(spec)
    if cores is not None and (kind := executor_of(spec, cores, many=True)) != "ray":
        make = partial(local_executor, kept=[])
        yield lambda spec, report, note: _segment(spec, cores, kind, make, report, note)
        return
    from volseg.cluster.crew import Crew
    from volseg.cluster.executor import RayExecutor
    from volseg.cluster.metrics import metered
    from volseg.cluster.session import RaySession

    crew = Crew()
    with RaySession(address, spec.workers, cores.store if cores is not None else 0) as session:

        def run(spec: SegmentSpec, report: Reporter, note: Note) -> dict[str, Any]:
            offered = cores or session.cores(spec)

            def executor(job: Prepared) -> Executor:
                return RayExecutor(job.spec, job.plan, job.bundle_digest, crew=crew, name=name)

            with metered(report, offered.device, name) as told:
                return _segment(spec.model_copy(update={"address": address}), offered, "ray", executor, told, note)

        try:
            yield run
        finally:
            crew.dismiss()


def _segment(
    spec: SegmentSpec, cores: Cores, kind: str, executor: Callable[[Prepared], Executor], report: Reporter, note: Note
) -> dict[str, Any]:
    job = prepare(spec, cores, kind)
    return run_job(job, lambda block: prepare(spec, cores, kind, block), executor, report, note)


def _found(pattern: str, folder: str) -> list[tuple[str, str]]:
    """Return what a pattern matches with places in `folder` that differ as the inputs do.

    A wildcard stands within one name: `*` matches no slash.
    """
    scheme, mark, path = files.absolute(pattern).rpartition("://")
    first, *parts = path.split("/")
    wild = next((i for i, part in enumerate(parts) if _is_wild(part)), None)
    if wild is None or _is_wild(first):
        raise SpecError(
            f"pattern {pattern} has no * in a name below its root; nothing was done: `volseg segment` takes one volume"
        )
    top = "/".join([f"{scheme}{mark}{first}", *parts[:wild]])
    # Names are something to read, too.
    check_allowed({"input": top or "/"}, {})
    found = [""]
    for part in parts[wild:]:
        if _is_wild(part):
            found = [
                f"{at}/{name}" for at in found for name in files.list_names(f"{top}{at}" or "/") if _fits(name, part)
            ]
        else:
            found = [f"{at}/{part}" for at in found]
    if not _is_wild(parts[-1]):
        found = [at for at in found if files.exists(f"{top}{at}")]
    return [(f"{top}{at}", files.join(folder, at[1:])) for at in sorted(found)]


def _is_wild(part: str) -> bool:
    return any(sign in part for sign in "*?[")


def _fits(name: str, pattern: str) -> bool:
    """Tell whether a name matches; hidden ones and the ledgers beside outputs do not."""
    return fnmatchcase(name, pattern) and not name.startswith(".") and not name.endswith(".volseg")


def table_of(result: Mapping[str, Any]) -> str:
    """Write what became of each volume, one a line."""
    rows = [("volume", "status", "blocks", "seconds", "error")]
    for volume in result["volumes"]:
        blocks = volume["blocks"]
        done = f"{blocks['computed'] + blocks['resumed']}/{blocks['total']}" if blocks else "-"
        rows.append((volume["input"], volume["status"], done, f"{volume['seconds']:.1f}", volume["error"]))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)), row[4]]).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, f"{result['complete']} complete, {result['failed']} not"])
