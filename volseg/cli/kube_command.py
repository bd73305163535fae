"""`volseg k8s render`: a spec as a RayJob on stdout, for `kubectl apply -f -`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from volseg import __version__
from volseg.cli.commands import Result
from volseg.cli.options import Parser, load_yaml, read_spec
from volseg.errors import SpecError
from volseg.kube import Placement, kind_of, render_job, to_yaml
from volseg.spec import SegmentSpec, TrainSpec
from volseg.spec.batch import BatchSpec

_MODELS: dict[str, type[SegmentSpec] | type[TrainSpec]] = {
    "segment": SegmentSpec,
    "train": TrainSpec,
    "batch": BatchSpec,
}


def run_kube(arguments: argparse.Namespace) -> Result:
    """`volseg k8s render`."""
    kind = arguments.kind or kind_of(load_yaml(arguments.spec))
    # Only file and --set say what is done; the other options are about where.
    asked = argparse.Namespace(spec=arguments.spec, assignments=arguments.assignments)
    spec = read_spec(asked, _MODELS[kind])
    placement = Placement(
        image=arguments.container, namespace=arguments.namespace, name=arguments.name, gpus=arguments.gpus,
        queue=arguments.queue, service_account=arguments.service_account, s3_secret=arguments.s3_secret,
        cpus=arguments.cpus, memory=arguments.machine_memory, mounts=_pairs("--mount", arguments.mounts),
        environment=_pairs("--env", arguments.variables),
    )  # fmt: skip
    job = render_job(spec, placement)
    return job, to_yaml(job).rstrip("\n"), 0


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            # What was written may be a password without its name.
            raise SpecError(f"{option} was given something without NAME=; nothing was rendered: see --help")
        pairs[name] = value
    return pairs


def add_kube_command(command: Callable[..., Parser]) -> None:
    """Register the command; `command` adds one."""
    add = command(
        "k8s", run_kube, "print a spec as a RayJob for Kubernetes (KubeRay)",
        "`volseg k8s render SPEC.yaml | kubectl apply -f -` runs it on a cluster of its own. No credential is ever in "
        "it.",
    )  # fmt: skip
    add.usage = "volseg k8s render SPEC.yaml [--namespace NAME] [--image IMAGE] [--gpus N] [--queue NAME] [options]"
    add.add_argument("action", choices=("render",), help="what to do: print the RayJob")
    add.add_argument("spec", metavar="SPEC.yaml", help="spec file of segment, train or batch")
    add.add_argument("--kind", choices=tuple(_MODELS), help="what the spec is for [default: seen from its options]")
    add.add_argument("--namespace", metavar="NAME", help="namespace to stand in the RayJob [default: kubectl's]")
    add.add_argument("--name", metavar="NAME", help="name of the RayJob [default: from the spec, which is one job]")
    add.add_argument(
        "--image", metavar="IMAGE", dest="container", default=f"volseg:{__version__}",
        help=f"image that deploy/Dockerfile made [default: volseg:{__version__}]",
    )  # fmt: skip
    add.add_argument(
        "--gpus", type=int, metavar="N",
        help="machines with a GPU at most; 0: workers on CPUs [default: the spec's workers, else 1]",
    )  # fmt: skip
    add.add_argument("--cpus", type=int, metavar="N", help="CPUs of a worker's machine [default: 4]")
    add.add_argument(
        "--memory", metavar="SIZE", dest="machine_memory", help="memory of a worker's machine [default: 16Gi]"
    )
    add.add_argument("--queue", metavar="NAME", help="LocalQueue of Kueue that the job waits in")
    add.add_argument("--service-account", metavar="NAME", help="whose S3 role the pods have [default: volseg]")
    add.add_argument(
        "--s3-secret", metavar="NAME", help="Secret with an AWS credentials file, where pods have no role for S3"
    )
    add.add_argument(
        "--mount", metavar="CLAIM=/FOLDER", action="append", default=[], dest="mounts",
        help="persistent volume claim to mount; places in it may be local paths",
    )  # fmt: skip
    add.add_argument(
        "--env", metavar="NAME=VALUE", action="append", default=[], dest="variables",
        help="variable of all pods, such as VOLSEG_S3_RATE=200; never a credential",
    )  # fmt: skip
    add.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments",
        help="set one field of the spec, as YAML; wins over the file",
    )  # fmt: skip
