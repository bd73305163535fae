"""A spec becomes a RayJob: the base manifest with the spec, its entry point, and as many workers as are asked for.

The spec travels in an annotation of the head's pod, which the base shows to the driver as a file. A command line would
go through two shells of KubeRay's, and a ConfigMap would be a second object that lives longer than its job and may
change under a job that is tried again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from volseg.errors import SpecError
from volseg.kube.manifests import Manifest, load_base
from volseg.kube.names import check_image, check_name, check_quantity, is_below
from volseg.kube.secrets import refuse_secret_names, refuse_secrets
from volseg.spec import SegmentSpec, Spec, TrainSpec
from volseg.spec.batch import BatchSpec

Kind = Literal["segment", "train", "batch"]

SPEC_FILE = "/etc/volseg/spec.yaml"
SPEC_ANNOTATION = "volseg/spec"
JOBS_FOLDER = "/opt/volseg/jobs"
_GPU = "nvidia.com/gpu"
_QUEUE = "kueue.x-k8s.io/queue-name"
_ELASTIC = "kueue.x-k8s.io/elastic-job"
_SECRET_FOLDER = "/etc/volseg-s3"
_TAKEN = ("/dev/shm", "/tmp", "/etc", "/opt", "/home", "/usr", "/proc", "/sys", "/var")
# Kubernetes allows 256 KiB for all annotations of an object together.
_MOST_BYTES = 200 << 10


@dataclass(frozen=True)
class Placement:
    """Where and with what a job runs on Kubernetes."""

    image: str
    namespace: str | None = None
    name: str | None = None
    """None: made from the spec, so that the same spec is the same job."""
    gpus: int | None = None
    """Machines with one GPU each at most; 0 for workers on CPUs, None for as many as the spec has workers."""
    queue: str | None = None
    service_account: str | None = None
    s3_secret: str | None = None
    cpus: int | None = None
    """CPUs of a worker's machine, None for the base's."""
    memory: str | None = None
    mounts: Mapping[str, str] = field(default_factory=dict)
    """Folder by persistent volume claim; local places are refused outside of them."""
    environment: Mapping[str, str] = field(default_factory=dict)


def kind_of(values: Mapping[str, Any]) -> Kind:
    """Tell what the options in a spec file are for."""
    if "image" in values or "labels" in values or "out" in values:
        return "train"
    return "batch" if "volumes" in values or any(sign in str(values.get("input", "")) for sign in "*?[") else "segment"


def render_job(spec: SegmentSpec | TrainSpec, placement: Placement) -> Manifest:
    """Return the RayJob of a spec as plain values.

    Raises SpecError for what cannot run on a cluster of the job's own, for places that its pods do not see, and for
    whatever looks like a credential.
    """
    kind = _kind(spec)
    # First of all: what is refused later is repeated in the message.
    refuse_secrets(spec.model_dump(mode="json", exclude_unset=True), "option")
    _check_placement(placement)
    _check_spec(spec, placement)
    gpus, workers = _sizes(spec, placement)
    text = _spec_text(spec, gpus, workers)
    job = load_base()[1]
    name = placement.name or f"volseg-{kind}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    metadata = {"name": name, **({"namespace": placement.namespace} if placement.namespace else {})}
    job["metadata"] = metadata | job["metadata"] | metadata
    job["spec"]["entrypoint"] = f"python {JOBS_FOLDER}/{kind}.py {SPEC_FILE}"
    cluster = job["spec"]["rayClusterSpec"]
    cluster["headGroupSpec"]["template"]["metadata"]["annotations"][SPEC_ANNOTATION] = text
    first = workers[0] if isinstance(spec, TrainSpec) else 1
    _size_group(cluster["workerGroupSpecs"][0], placement, gpus, first, workers[1])
    for pod in (*_pods(job), job["spec"]["submitterPodTemplate"]["spec"]):
        pod["containers"][0]["image"] = placement.image
    for pod in _pods(job):
        _furnish(pod, placement)
    if placement.queue:
        _queue(job, placement.queue)
    return job


def _kind(spec: SegmentSpec | TrainSpec) -> Kind:
    return "train" if isinstance(spec, TrainSpec) else "batch" if isinstance(spec, BatchSpec) else "segment"


def _pods(job: Manifest) -> Iterator[Manifest]:
    """Yield the pods of the head and of the workers."""
    cluster = job["spec"]["rayClusterSpec"]
    yield cluster["headGroupSpec"]["template"]["spec"]
    yield from (group["template"]["spec"] for group in cluster["workerGroupSpecs"])


# ---------------------------------------------------------------- what is asked for


def _check_placement(placement: Placement) -> None:
    check_image(placement.image)
    for option, name, longest in (
        ("--namespace", placement.namespace, 63),
        # KubeRay makes longer names of it, for the cluster and its pods.
        ("--name", placement.name, 47),
        ("--queue", placement.queue, 63),
        ("--service-account", placement.service_account, 253),
        ("--s3-secret", placement.s3_secret, 253),
        *(("--mount", claim, 253) for claim in placement.mounts),
    ):
        check_name(option, name, longest, dots=longest == 253, letter_first=option == "--name")
    check_quantity("--memory", placement.memory)
    for claim, folder in placement.mounts.items():
        if not folder.startswith("/") or folder.rstrip("/") == "" or any(is_below(folder, top) for top in _TAKEN):
            raise SpecError(
                f"--mount {claim}={folder}: the folder must be an absolute one that the image does not use, such as "
                "/data; nothing was rendered"
            )
    for option, value, least in (("--gpus", placement.gpus, 0), ("--cpus", placement.cpus, 1)):
        if value is not None and value < least:
            raise SpecError(f"{option} {value} is below {least}; nothing was rendered: give a larger number")
    _check_environment(placement.environment)


def _check_environment(environment: Mapping[str, str]) -> None:
    set_already = {entry["name"] for pod in _pods(load_base()[1]) for entry in pod["containers"][0]["env"]}
    for name in environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise SpecError(f"--env {name!r} is no name of a variable; nothing was rendered: write --env NAME=VALUE")
        # RAY_AUTH_MODE would open the cluster to everybody.
        if name in set_already or name.startswith("RAY_"):
            raise SpecError(
                f"--env {name} would change what the manifest or KubeRay sets; nothing was rendered: leave it out"
            )
    refuse_secret_names(environment, "--env")
    refuse_secrets(environment, "--env")


def _check_spec(spec: SegmentSpec | TrainSpec, placement: Placement) -> None:
    for name, wrong in (
        ("executor", isinstance(spec, SegmentSpec) and spec.in_process),
        ("address", bool(spec.address)),
    ):
        if wrong:
            raise SpecError(
                f"the spec says {name} {getattr(spec, name)}, but a RayJob runs on the workers of a cluster of its "
                f"own; nothing was rendered: leave out {name}"
            )
    for name, place in _places(spec):
        scheme, mark, path = place.rpartition("://")
        if mark and scheme != "file":
            continue
        if not any(is_below(path, folder) for folder in placement.mounts.values()):
            raise SpecError(
                f"{name} {place} is a local path, which the cluster's pods do not see; nothing was rendered: put it "
                "into an object store (s3://...), or mount a volume that holds it with --mount CLAIM=/FOLDER"
            )


def _places(spec: SegmentSpec | TrainSpec) -> Iterator[tuple[str, str]]:
    """Yield name and URI of everything that a job reads or writes."""
    names = ("image", "labels", "mask", "init", "out") if isinstance(spec, TrainSpec) else ("input", "output", "model")
    for name in names:
        value = getattr(spec, name)
        yield from ((name, place) for place in ([value] if isinstance(value, str) else value or ()) if place)
    for pair in getattr(spec, "volumes", {}).items():
        yield from (("volumes", place) for place in pair)


def _sizes(spec: SegmentSpec | TrainSpec, placement: Placement) -> tuple[int, tuple[int, int]]:
    """Return the number of GPUs, and that of workers at least and at most."""
    asked = (spec.workers, spec.workers) if isinstance(spec.workers, int) else spec.workers
    gpus = placement.gpus
    if gpus is None:
        gpus = 0 if spec.device == "cpu" else asked[1] if asked else 1
    if spec.device == ("cuda" if gpus == 0 else "cpu"):
        raise SpecError(
            f"the spec says device {spec.device}, but --gpus {gpus} was asked for; nothing was rendered: change one"
        )
    if not asked:
        return gpus, (gpus or 1, gpus or 1)
    # A segmentation takes what it gets; a training begins when all are there.
    if isinstance(spec, TrainSpec) and 0 < gpus < asked[0]:
        raise SpecError(
            f"the spec says {asked[0]} workers, which need a GPU each, and --gpus is {gpus}: the training would never "
            f"begin; nothing was rendered: say --gpus {asked[0]}, or fewer workers"
        )
    return gpus, asked


def _spec_text(spec: Spec, gpus: int, workers: tuple[int, int]) -> str:
    """Write the spec as a file; a value in JSON is the same to every reader of YAML."""
    values = spec.model_dump(mode="json", exclude_unset=True)
    # Said, not found out: in the beginning the cluster may have none of the machines that the autoscaler will bring.
    values["device"] = "cuda" if gpus else "cpu"
    values["workers"] = workers[0] if workers[0] == workers[1] else f"{workers[0]}:{workers[1]}"
    text = "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())
    if len(text.encode()) > _MOST_BYTES:
        raise SpecError(
            f"the spec has {len(text.encode()) >> 10} KiB, and Kubernetes keeps 256 KiB of annotations; nothing was "
            "rendered: name the volumes by a pattern, or cut the batch into several"
        )
    return text


# ---------------------------------------------------------------- what is made of it


def _size_group(group: Manifest, placement: Placement, gpus: int, first: int, most: int) -> None:
    """Set how many machines there are and what each has."""
    pod = group["template"]["spec"]
    resources = pod["containers"][0]["resources"]
    cpus = placement.cpus or int(resources["limits"]["cpu"])
    for part in resources.values():
        part["cpu"] = str(cpus)
        part["memory"] = placement.memory or part["memory"]
        if not gpus:
            del part[_GPU]
    if not gpus:
        group["groupName"] = "cpu"
        pod["tolerations"] = [t for t in pod["tolerations"] if t["key"] != _GPU]
        first, most = math.ceil(first / cpus), math.ceil(most / cpus)
    group["replicas"], group["maxReplicas"] = first, gpus or most


def _furnish(pod: Manifest, placement: Placement) -> None:
    """Add to a pod what the placement asks for beyond the base."""
    container = pod["containers"][0]
    if placement.service_account:
        pod["serviceAccountName"] = placement.service_account
    container["env"] += [{"name": name, "value": value} for name, value in placement.environment.items()]
    if placement.s3_secret:
        # The group of the pod may read it, as nobody else.
        secret = {"secretName": placement.s3_secret, "defaultMode": 0o440}
        pod["volumes"].append({"name": "s3-credentials", "secret": secret})
        container["volumeMounts"].append({"name": "s3-credentials", "mountPath": _SECRET_FOLDER, "readOnly": True})
        container["env"].append({"name": "AWS_SHARED_CREDENTIALS_FILE", "value": f"{_SECRET_FOLDER}/credentials"})
    for number, (claim, folder) in enumerate(placement.mounts.items()):
        pod["volumes"].append({"name": f"data-{number}", "persistentVolumeClaim": {"claimName": claim}})
        container["volumeMounts"].append({"name": f"data-{number}", "mountPath": folder})


def _queue(job: Manifest, queue: str) -> None:
    """Let Kueue say when the job begins."""
    job["metadata"]["labels"][_QUEUE] = queue
    # Workers come and go within a job, which Kueue counts only where it is told so.
    job["metadata"]["annotations"] = {_ELASTIC: "true"}
    job["spec"]["suspend"] = True
