"""What is submitted: the name of a submission, its command line, and which attempt is next.

Names are made of the job's key, the output and the number of the attempt, so that everybody who submits the same spec
wants the same name. Ray gives a name to one of them, and the others attach to that one.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from volseg.cluster.jobs import RayJob
from volseg.errors import InputError
from volseg.execution.driver import SUBMISSION
from volseg.execution.prepare import Cores, prepare, short_name
from volseg.execution.status import LedgerStatus
from volseg.recipes import resolve
from volseg.redaction import holds_credential
from volseg.spec import SegmentSpec, TrainSpec
from volseg.storage import files
from volseg.storage.ledger import ledger_root
from volseg.storage.places import check_apart, check_places
from volseg.training.claim import inputs_of, training_key

_NAME = re.compile(r"(volseg-[0-9a-f]{12}-[0-9a-f]{8})-(\d{3,})")
_PLENTY = 1 << 50
# Who lists the cluster's jobs sees these in clear text.
_SECRET = re.compile(r"secret|token|passw|credential|_key", re.IGNORECASE)
# What the operator of the machines decides: where S3 is, whose configuration holds, where jobs may go.
_OPERATOR = re.compile(r"AWS_ENDPOINT_URL.*|AWS_CONFIG_FILE|AWS_PROFILE|AWS_CA_BUNDLE|VOLSEG_ALLOWED_.*|RAY_AUTH_.*")


@dataclass(frozen=True)
class Task:
    """A spec with absolute places, and the key of its job."""

    spec: SegmentSpec | TrainSpec
    job_key: str

    @property
    def output(self) -> str:
        """Return what the job writes: a label volume, or a bundle."""
        return self.spec.out if isinstance(self.spec, TrainSpec) else self.spec.output

    @property
    def stem(self) -> str:
        """Return what the names of all its submissions begin with."""
        return stem_for(self.job_key, self.output)

    @property
    def metadata(self) -> dict[str, str]:
        """Return what Ray keeps beside a submission."""
        source = self.spec.image[0] if isinstance(self.spec, TrainSpec) else self.spec.input
        return {"volseg_output": self.output, "volseg_job_key": self.job_key, "volseg_input": source}


def stem_for(job_key: str, output: str) -> str:
    """Return what the names of a job's submissions begin with; `output` is absolute."""
    return f"volseg-{short_name(job_key)}-{hashlib.sha256(output.encode()).hexdigest()[:8]}"


def stem_of(name: str) -> str:
    """Return a submission's name without its attempt."""
    return name.rpartition("-")[0]


def name_of(task: Task, attempt: int) -> str:
    """Return the name of a submission."""
    return f"{task.stem}-{attempt:03d}"


def attempt_of(name: str) -> int | None:
    """Return the number of a submission's attempt, None where volseg gave no such name."""
    match = _NAME.fullmatch(name)
    return int(match[2]) if match else None


def newest(jobs: Iterable[RayJob], stem: str) -> RayJob | None:
    """Return the submission of the last attempt whose name begins with `stem`."""
    mine = [job for job in jobs if attempt_of(job.id) is not None and job.id.startswith(f"{stem}-")]
    return max(mine, key=lambda job: attempt_of(job.id) or 0, default=None)


def is_alive(job: RayJob, ledger: LedgerStatus) -> bool:
    """Tell whether a submission still works or will; Ray can say RUNNING long after the driver died.

    Only a driver that has written a heartbeat of its own can be known to be dead.
    """
    return not job.over and not (ledger.submission == job.id and ledger.state not in {"running", "absent"})


def identify(spec: SegmentSpec | TrainSpec) -> Task:
    """Open what goes in and name the job; raises InputError where something is wrong with it.

    What a training's spec leaves open is its recipe's.
    """
    local = isinstance(spec, SegmentSpec) and spec.in_process
    for name, value in (("executor", local), ("address", spec.address)):
        if value:
            raise InputError(
                f"the spec says {name} {getattr(spec, name)}, but a submitted job runs on the workers of the cluster "
                f"it is handed to; nothing was submitted: leave out {name}"
            )
    if isinstance(spec, TrainSpec):
        return _training(resolve(spec.model_dump(exclude_unset=True)))
    # Workers and memory decide nothing about the bits; what the cluster has is seen there.
    job = prepare(spec, Cores(1, 0, "cpu", 1, _PLENTY), "ray")
    # The tile does: it is planned here, or where the job was begun, and named.
    return Task(job.spec.model_copy(update={"tile": job.plan.tile}), job.job_key)


def _training(spec: TrainSpec) -> Task:
    places: dict[str, Any] = {"out": files.absolute(spec.out)}
    if spec.init is not None:
        places["init"] = files.absolute(spec.init)
    for name in ("image", "labels", "mask"):
        if (uris := getattr(spec, name)) is not None:
            places[name] = tuple(map(files.absolute, uris))
    spec = spec.model_copy(update=places)
    check_apart(spec.out, inputs_of(spec))
    check_places([*inputs_of(spec).values()], [spec.out, ledger_root(spec.out)])
    return Task(spec, training_key(spec))


def command_words(spec: SegmentSpec | TrainSpec) -> list[str]:
    """Return the arguments of `volseg` that do what `spec` says."""
    values = spec.model_dump(mode="json")
    if isinstance(spec, TrainSpec):
        # The recipe is looked up once more on the cluster: only what differs from it is said.
        given = {name: values[name] for name in ("image", "labels", "out", "recipe")}
        usual = resolve(given).model_dump(mode="json")
        values = given | {name: value for name, value in values.items() if value != usual[name]}
    else:
        values = spec.model_dump(mode="json", exclude_defaults=True)
    settings = [f"{name}={json.dumps(value)}" for name, value in values.items()]
    command = "train" if isinstance(spec, TrainSpec) else "segment"
    return [command, *[word for setting in settings for word in ("--set", setting)], "--json"]


def entrypoint(task: Task, name: str) -> str:
    """Return the driver's command line for the cluster's shell."""
    # Without exec, the signal that ends a job would meet the shell and the driver.
    return f"exec env {SUBMISSION}={name} python -m volseg {shlex.join(command_words(task.spec))}"


def check_runtime_env(runtime_env: dict[str, Any]) -> None:
    """Raise InputError where a runtime environment holds a credential, what operators decide, or folders from here."""
    for name in runtime_env.get("env_vars", {}):
        if _SECRET.search(name):
            raise InputError(
                f"env_vars of the runtime environment sets {name}, and whoever may list the cluster's jobs could read "
                "it; nothing was submitted: give credentials to the cluster's machines instead"
            )
        if _OPERATOR.fullmatch(name):
            raise InputError(
                f"env_vars of the runtime environment sets {name}, which is for the operator of the cluster to decide; "
                "nothing was submitted: leave it out"
            )
    if any(holds_credential(text) for text in _texts(runtime_env)):
        raise InputError(
            "the runtime environment holds an address with a credential in it, and whoever may list the cluster's jobs "
            "could read it; nothing was submitted: give credentials to the cluster's machines instead"
        )
    for place in (runtime_env.get("working_dir"), *runtime_env.get("py_modules", [])):
        if place and "://" not in str(place):
            raise InputError(
                f"the runtime environment names the folder {place} of this machine, which the cluster does not see; "
                "nothing was submitted: upload it and give its URI, or use `ray job submit --working-dir`"
            )


def _texts(value: object) -> Iterator[str]:
    """Yield all text inside of lists and groups."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
