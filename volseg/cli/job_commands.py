"""The commands around a cluster: submit, follow, cancel jobs there, and segment many volumes in one."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volseg.cli import show
from volseg.cli.commands import Result, facts_of
from volseg.cli.log import current
from volseg.cli.options import Parser, add_spec_options, load_yaml, read_spec
from volseg.cli.progress import ProgressLine, clock, quantity
from volseg.errors import InputError, JobError, SpecError, VolsegError
from volseg.journal import Line, parse, silent
from volseg.recipes import resolve
from volseg.spec import SegmentSpec, TrainSpec
from volseg.spec.batch import BatchSpec

if TYPE_CHECKING:
    from volseg.client import Client, JobStatus
    from volseg.client.client import AnyJob
    from volseg.execution.driver import Tally

_EXIT_CODES = {"complete": 0, "partial": 3, "failed": 4, "stopped": 130}
_CANCEL_SECONDS = 60.0
_ADDRESS = "cluster's Jobs API [default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265]"


def run_submit(arguments: argparse.Namespace) -> Result:
    """`volseg submit`."""
    # The address is the cluster's, not a part of what is submitted.
    cluster = arguments.__dict__.pop("address", None)
    spec = _read_job(arguments)
    environment = load_yaml(arguments.runtime_env) if arguments.runtime_env else None
    with _client(cluster, insecure=arguments.insecure) as client:
        options: dict[str, Any] = {"driver_cpus": arguments.driver_cpus, "runtime_env": environment}
        job: AnyJob = client.submit(spec, **options)
        if job.id:
            _remember(job, cluster)
        status = job.status()
    verb = "attached to" if job.attached else "submitted"
    text = f"{verb} {job.id or 'a job that is done'}: {_words(status)}"
    return {"attached": job.attached, "job_key": job.job_key, **status.as_dict()}, text, 0


def _read_job(arguments: argparse.Namespace) -> SegmentSpec | TrainSpec:
    """Return the spec of a segmentation, or of a training where the file or --set says what a training needs."""
    given = set(load_yaml(arguments.spec)) if arguments.spec else set()
    given |= {text.partition("=")[0].strip().partition(".")[0] for text in arguments.assignments}
    if not given & {"image", "labels", "out"}:
        return read_spec(arguments, SegmentSpec)
    foreign = [name for name in SegmentSpec.model_fields if name in arguments and name not in TrainSpec.model_fields]
    if foreign:
        raise SpecError(
            f"{arguments.spec or '--set'} describes a training, which has no option --{foreign[0].replace('_', '-')}; "
            "nothing was submitted: leave it out, or say --set OPTION=VALUE"
        )
    return read_spec(arguments, TrainSpec, resolve)


def run_jobs(arguments: argparse.Namespace) -> Result:
    """`volseg jobs`."""
    with _client(arguments.address) as client:
        found = [_row(job) for job in client.jobs()]
    documents, lines = [document for document, _ in found], [line for _, line in found]
    return {"jobs": documents}, "\n".join(lines) or "no jobs of volseg", 0


def _row(job: AnyJob) -> tuple[dict[str, Any], str]:
    try:
        status = job.status()
    except VolsegError as error:
        # One output that cannot be read from here must not hide the other jobs.
        return {"id": job.id, "output": job.output, "error": str(error)}, f"{job.id}  unknown ({error})  {job.output}"
    return status.as_dict(), f"{status.id}  {_words(status)}  {status.output}"


def run_status(arguments: argparse.Namespace) -> Result:
    """`volseg status`."""
    with _client(_address(arguments)) as client:
        status = _job(client, arguments.job).status()
    return status.as_dict(), _table(status), 0


def run_logs(arguments: argparse.Namespace) -> Result:
    """`volseg logs`."""
    with _client(_address(arguments)) as client:
        job = _job(client, arguments.job)
        if not arguments.follow:
            text = job.logs()
            return {"id": job.id, "logs": text}, "\n".join(map(_shown, text.rstrip("\n").split("\n"))), 0
        # What comes is the result here; with --json, the document is.
        stream = sys.stderr if arguments.json else sys.__stdout__ or sys.stderr
        for line in _whole_lines(job.follow()):
            stream.write(f"{_shown(line)}\n")
            stream.flush()
        status = job.status()
    return status.as_dict(), _words(status), 0


def _whole_lines(pieces: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    if rest:
        yield rest


def _shown(text: str) -> str:
    """Return a line of a log as `--log` asks for it: an event in words, or as it is."""
    event = None if current().json else parse(text)
    return text if event is None else f"{event[0]}  {event[1].as_text()}"


def run_cancel(arguments: argparse.Namespace) -> Result:
    """`volseg cancel`."""
    with _client(_address(arguments)) as client:
        job = _job(client, arguments.job)
        job.cancel()
        try:
            status = job.wait(timeout=_CANCEL_SECONDS, interval=0.3)
        except TimeoutError:
            raise JobError(f"{job.id} was asked to stop and did not within {_CANCEL_SECONDS:.0f} s") from None
    return status.as_dict(), f"{job.id}: {_words(status)}", 0


def run_wait(arguments: argparse.Namespace) -> Result:
    """`volseg wait`."""
    with _client(_address(arguments)) as client, ProgressLine("job", "blocks") as line:
        try:
            status = _job(client, arguments.job).wait(arguments.timeout, progress=lambda now: _follow(line, now))
        except TimeoutError as error:
            raise InputError(str(error)) from None
    return status.as_dict(), _words(status), _EXIT_CODES[status.state]


def run_result(arguments: argparse.Namespace) -> Result:
    """`volseg result`."""
    from volseg.training.progress import TrainResult

    with _client(_address(arguments)) as client:
        job = _job(client, arguments.job)
        status = job.status()
        if not status.ended:
            raise InputError(f"{arguments.job} is {status.state} and has no result: `volseg wait` waits for it")
        result = job.result()
    if isinstance(result, TrainResult):
        return {"status": "complete", **result.as_dict()}, show.trained(result.as_dict()), 0
    lines = [f"complete: {result.output}", f"{result.blocks.get('total', status.total)} blocks"]
    lines += [f"  {c['id']:3} {c['name']}: {100 * (c['fraction'] or 0):.2f} %" for c in result.classes]
    return result.report or status.as_dict(), "\n".join(lines), 0


def run_batch(arguments: argparse.Namespace) -> Result:
    """`volseg batch`."""
    from volseg.cluster import batch

    spec = read_spec(arguments, BatchSpec)
    with ProgressLine("batch", "blocks") as line:

        def report(place: str, tally: Tally) -> None:
            line.update(tally.done, tally.total, f"volume {place}", volume=place, **facts_of(tally))

        result = batch.run_batch(spec, report, silent, line.note)
    return result, batch.table_of(result), 3 if result["failed"] else 0


def add_job_commands(command: Callable[..., Parser]) -> None:
    """Register the commands; `command` adds one."""
    add = command(
        "submit", run_submit, "hand a segmentation or a training to a Ray cluster",
        "The same spec submitted twice is one job: the second one attaches, and an unfinished job goes on. A file with "
        "image, labels and out is a training's, whose options are given there or with --set.",
    )  # fmt: skip
    add.usage = "volseg submit SPEC.yaml [--address http://head:8265] [options]"
    _add_submit_options(add)
    add = command("jobs", run_jobs, "list the jobs of a cluster")
    add.add_argument("--address", metavar="URL", help=_ADDRESS)
    for name, run, summary in (
        ("status", run_status, "tell how far a job is, also where its cluster is gone"),
        ("logs", run_logs, "print what a job's driver printed"),
        ("cancel", run_cancel, "stop a job; submitted again it goes on"),
        ("wait", run_wait, "wait for a job's end"),
        ("result", run_result, "print what a finished job answered"),
    ):
        add = command(name, run, summary)
        add.add_argument("job", metavar="JOB", help="a submission's name, or the output of a job")
        add.add_argument("--address", metavar="URL", help=_ADDRESS)
        if name == "logs":
            add.add_argument("--follow", action="store_true", help="go on until the job has ended")
        if name == "wait":
            add.add_argument("--timeout", type=float, metavar="S", help="give up after so many seconds")
    add = command(
        "batch", run_batch, "segment many volumes with one model",
        "Workers load the model once; a volume that fails does not stop the others (exit code 3). The same command "
        "resumes.",
    )  # fmt: skip
    add.usage = "volseg batch [SPEC.yaml] --input PATTERN --output FOLDER --model BUNDLE [options]"
    add_spec_options(add, BatchSpec, file_first=True)


def _add_submit_options(add: Parser) -> None:
    add.add_argument("--insecure", action="store_true", help="also to a cluster that lets everybody run code on it")
    add.add_argument(
        "--driver-cpus", type=float, default=0.0, metavar="F", help="CPUs kept for the driver [default: 0, on the head]"
    )
    add.add_argument("--runtime-env", metavar="FILE", help="YAML file with Ray's runtime environment")
    add_spec_options(add, SegmentSpec, file_first=True)


def _client(address: str | None, *, insecure: bool = False) -> Client:
    from volseg.client import Client
    from volseg.cluster.jobs import default_address

    return Client(address or default_address(), insecure=insecure)


def _job(client: Client, name: str) -> AnyJob:
    """Return a job by its submission or output; one that was submitted from here is found without its cluster."""
    known = _remembered(name)
    return client.job(name) if known is None else client.known_job(name, known["output"], known["job_key"])


def _address(arguments: argparse.Namespace) -> str | None:
    address: str | None = arguments.address or (_remembered(arguments.job) or {}).get("address")
    return address


def _remember(job: AnyJob, address: str | None) -> None:
    """Note where a submission lies, so that it is found by its name when the cluster is gone."""
    note = {"output": job.output, "job_key": job.job_key, "address": address}
    folder = _notes()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{job.id}.json").write_text(json.dumps(note), encoding="utf-8")
    except OSError as error:
        text = f"{folder} cannot be written ({error.strerror}): later name the output, not the job"
        current().write(Line(text, level="warning"))


def _remembered(name: str) -> dict[str, Any] | None:
    if "/" in name:
        return None
    try:
        content = json.loads((_notes() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _notes() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "volseg" / "submissions"


def _words(status: JobStatus) -> str:
    from volseg.client.state import in_words

    return in_words(status)


def _follow(line: ProgressLine, status: JobStatus) -> None:
    line.update(status.done, max(status.total, 1), status.state, unit=status.unit)


def _table(status: JobStatus) -> str:
    values: dict[str, Any] = {
        "job": status.id or "(no submission known)",
        "output": status.output,
        "state": status.state,
        status.unit: f"{status.done} of {status.total} done",
    }
    if status.unit == "blocks":
        values["blocks"] += f", {status.failed} set aside"
    if status.rate is not None:
        values["speed"] = f"{status.rate:.3g} {status.unit}/s"
        values["speed"] += f", {quantity(status.voxel_rate, 'voxel/s')}" if status.voxel_rate else ""
    if status.loss is not None:
        values["loss"] = f"{status.loss:.3f}"
    if status.best_dice is not None:
        values["best Dice"] = f"{status.best_dice:.3f}"
    if status.seconds_left is not None:
        values["left"] = clock(status.seconds_left)
    if status.heartbeat_age is not None:
        values["heartbeat"] = f"{clock(status.heartbeat_age)} ago"
    values |= {"driver": status.driver or "-"}
    values |= {"workers": status.workers} if status.unit == "blocks" else {}
    values |= {"stale": status.stale} if status.stale else {}
    values |= {"note": status.note} if status.note else {}
    return show.table(values)
