"""From a spec to a plan: open what was named, ask who can work, refuse what cannot be. No work is done here."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import psutil

from volseg.errors import InputError
from volseg.execution.begun import begun_tile
from volseg.execution.limits import check_allowed
from volseg.geometry import AXES, Halo, TileLattice, Triple
from volseg.models.config import Axis, NetworkConfig, ProgramConfig, TracedConfig, to_network, to_volume
from volseg.models.dependency import halo_of, patch_dependent
from volseg.models.manifest import BundleManifest, read_manifest
from volseg.planning import ModelFacts, Plan, Resources, SeamRoom, ViewFacts, VolumeFacts, compare, make_plan
from volseg.planning.memory import BASELINE_ACTOR, BASELINE_LOCAL, GIB, S3_CLIENTS
from volseg.planning.seams import PARCEL_FLOOR
from volseg.spec import SegmentSpec
from volseg.storage import files
from volseg.storage.ledger import ledger_root
from volseg.storage.places import check_apart, check_places
from volseg.storage.volume import Volume, open_volume

NUMERICS = 2
"""Raised whenever the same inputs would give other bits."""

_MOST_MEMORY = 8 * GIB
_SHARE_OF_FREE = 0.6
_SHARE_FOR_SEAMS = 0.5  # of what a worker may use in all, where seams wait in its own memory
_SHARE_FOR_STORE = 0.1  # of what is free, for the object store of a Ray inside this process
_MOST_STORE = 16 * GIB if sys.platform == "linux" else 2 * GIB
SHARE_OF_STORE = 0.6
"""Of an object store, for what waits: the machines do not all make the same, and copies lie there, too."""


@dataclass(frozen=True)
class Cores:
    """What there is to work with: a laptop or a cluster."""

    cpus: int
    gpus: int
    device: str
    workers: int
    memory: int
    """Bytes that the workers of one machine may use together."""
    slots: int | None = None
    """Workers that share one machine; None where all do."""
    store: int = 0
    """Bytes of all machines' object stores."""


@dataclass(frozen=True)
class Prepared:
    """A checked job: `spec` with absolute places, the opened input, the model and the plan."""

    spec: SegmentSpec
    volume: Volume
    manifest: BundleManifest
    plan: Plan
    facts: tuple[VolumeFacts, ModelFacts, Resources]
    """What the plan was made from."""

    def comparison(self) -> dict[str, Any]:
        """Return what blending and exact mode would each cost; see `volseg.planning.compare`."""
        return compare(self.spec, *self.facts, self.plan)

    def with_storage(self, chunks: Sequence[int], shards: Sequence[int]) -> Prepared:
        """Return the job with the chunks and shards of an output that exists."""
        (a, b, c), (d, e, f) = chunks, shards
        return replace(self, plan=replace(self.plan, chunks=(a, b, c), shards=(d, e, f)))

    @property
    def bundle_digest(self) -> str:
        """Digest that names the bundle."""
        return str(self.manifest.digest)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return everything that determines the bits, in plain JSON values; not the block grid, workers or places."""
        spec, plan = self.spec, self.plan
        return {
            "input": self.volume.identity(),
            "region": str(plan.region),
            "model": self.bundle_digest,
            **_of_views(plan),
            "mirror": spec.mirror,
            "blend": spec.blend,
            "threshold": plan.threshold,
            "precision": spec.precision,
            "nan": spec.nan,
            "probabilities": spec.probabilities,
            "numerics": NUMERICS,
        }

    @cached_property
    def job_key(self) -> str:
        """Name of the job: sha256 of its identity, 32 hexadecimal digits."""
        text = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def name(self) -> str:
        """What events, metrics and submissions call the job."""
        return short_name(self.job_key)


def short_name(job_key: str) -> str:
    """Return the digits of a job's key that name it where room is short."""
    return job_key[:12]


def _of_views(plan: Plan) -> dict[str, Any]:
    """Return axis, patch and stride, in exact mode the halo; lists of them where several views are averaged."""
    values: dict[str, list[Any]] = {
        "axis": [view.axis for view in plan.views],
        "patch": [list(view.patch) for view in plan.views],
        "stride": [list(view.lattice.stride) for view in plan.views],
    }
    if plan.exact:
        # A tile's place in the whole input decides the shape of its forward, and with it the last bits.
        values |= {"halo": [view.lattice.halo for view in plan.views if isinstance(view.lattice, TileLattice)]}
    return values if len(plan.views) > 1 else {name: value[0] for name, value in values.items()}


def local_cores(spec: SegmentSpec) -> Cores:
    """Return what this machine offers."""
    cpus, gpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 0
    device = spec.device
    if device != "cpu" and _may_have_gpu():
        # Asking for GPUs loads torch, which a plan for CPUs does not need.
        from volseg.inference.predictor import count_gpus

        gpus = count_gpus()
    if device == "cuda" and gpus == 0:
        raise InputError(
            "device cuda was asked for, but this machine has no usable GPU: leave --device out, or say cpu"
        )
    device = "cuda" if gpus else "cpu"
    free = psutil.virtual_memory().available
    return Cores(cpus, gpus, device, gpus or cpus, int(free * _SHARE_OF_FREE), store=_store(free))


def _store(free: int) -> int:
    """Return how large Ray's object store may become here: it lies in memory that is shared through a file system."""
    room = psutil.disk_usage("/dev/shm").free // 2 if Path("/dev/shm").exists() else _MOST_STORE
    return min(int(free * _SHARE_FOR_STORE), room, _MOST_STORE)


def _may_have_gpu() -> bool:
    """Tell whether a GPU driver is there; asking torch takes seconds that most laptops need not wait."""
    return sys.platform != "linux" or any(Path(f"/dev/{name}").exists() for name in ("nvidiactl", "dxg", "kfd"))


def prepare(spec: SegmentSpec, cores: Cores, executor: str, block: Triple | None = None) -> Prepared:
    """Open the input and the model and make the plan; raises InputError where something is wrong with them.

    `block` is the grid of an unfinished job, which a resume keeps.
    """
    places = {name: files.absolute(getattr(spec, name)) for name in ("input", "output", "model")}
    spec = spec.model_copy(update=places)
    beside = {"ledger": ledger_root(spec.output)}
    check_allowed({"input": spec.input, "model": spec.model}, {"output": spec.output, **beside})
    check_apart(spec.output, {"input": spec.input, "model": spec.model})
    check_places([spec.input, spec.model], [spec.output, ledger_root(spec.output)])
    if spec.precision == "fp16" and cores.device == "cpu":
        raise InputError("precision fp16 needs a GPU; nothing was done: use bf16, fp32 or auto")
    volume = open_volume(spec.input)
    manifest = read_manifest(spec.model)
    workers = 1 if executor == "serial" else spec.workers or cores.workers
    limit = int(spec.memory * GIB) if spec.memory else min(_MOST_MEMORY, cores.memory // (cores.slots or workers))
    one_process = executor != "ray"
    baseline = BASELINE_LOCAL if one_process else BASELINE_ACTOR
    if any(files.is_s3(place) for place in places.values()):
        baseline += S3_CLIENTS
    room = _local_room(spec, workers, limit) if one_process else _store_room(spec, cores)
    resources = Resources(workers, limit, cores.device, baseline, room, one_process)
    facts = VolumeFacts(volume.shape, volume.channels or 1, volume.dtype.itemsize)
    # The storage of an unfinished job is kept with its grid, whatever is asked for now.
    asked = spec if block is None else spec.model_copy(update={"chunks": None, "shards": None})
    model = model_facts(manifest, spec)
    job = Prepared(spec, volume, manifest, make_plan(asked, facts, model, resources, block), (facts, model, resources))
    tile = begun_tile(spec.output, job.identity) if spec.blend == "exact" and spec.tile is None else None
    if tile is None or tile == job.plan.tile:
        return job
    # Planned when there was other memory; with another tile it would be another job.
    asked = asked.model_copy(update={"tile": tile})
    return replace(job, plan=make_plan(asked, facts, model, resources, block))


def _local_room(spec: SegmentSpec, workers: int, limit: int) -> SeamRoom:
    """Return how much room sums have that wait for other blocks in this process."""
    budget = workers * limit * _SHARE_FOR_SEAMS if spec.seam_memory is None else spec.seam_memory * GIB
    return SeamRoom(int(budget), local=True, in_order=workers == 1)


def _store_room(spec: SegmentSpec, cores: Cores) -> SeamRoom:
    """Return how much room sums have that wait for other blocks in Ray's object stores."""
    budget = int(cores.store * SHARE_OF_STORE if spec.seam_memory is None else spec.seam_memory * GIB)
    return SeamRoom(budget, PARCEL_FLOOR, grows=spec.address is not None and spec.workers is None)


def model_facts(manifest: BundleManifest, spec: SegmentSpec) -> ModelFacts:
    """Return what a plan needs to know of a bundle; for a 2D network, along the axes that the spec asks for."""
    config = manifest.config
    if spec.axis is not None and config.dims == 3:
        raise InputError(
            f"axis {','.join(spec.axis)} was given, but the model is 3D and has no slice axis: leave it out"
        )
    # The mean does not depend on the order, and neither may the name of the job.
    axes = sorted(spec.axis or (manifest.axis,), key=AXES.index)
    # Reduced precision is compared with fp32 first, which takes what fp32 takes.
    itemsize = 4
    return ModelFacts(
        dims=config.dims, in_channels=config.in_channels, classes=len(manifest.classes),
        threshold=manifest.threshold or 0.5, parameter_bytes=config.parameter_count * itemsize,
        views=tuple(_view_facts(manifest, config, axis, itemsize, spec) for axis in axes), members=manifest.members,
        mirrors=2**config.dims if spec.mirror else 1,
    )  # fmt: skip


def _view_facts(
    manifest: BundleManifest, config: NetworkConfig, axis: Axis, itemsize: int, spec: SegmentSpec
) -> ViewFacts:
    def in_network(sides: Triple) -> Triple:
        return to_network(sides, axis) if config.dims == 2 else sides

    sides = manifest.sides(axis)
    halo, inexact = _halo(manifest, config, axis, spec)
    return ViewFacts(
        axis=axis, patch=manifest.patch_along(axis), pooling=sides.pooling, phase=sides.phase, smallest=sides.smallest,
        margin=sides.margin,
        activation_bytes=lambda sides, batch: config.activation_bytes(in_network(sides), batch, itemsize),
        flops=lambda sides: float(config.flops(in_network(sides))), halo=halo, inexact=inexact,
    )  # fmt: skip


@lru_cache(maxsize=16)
def _proven(uri: str, _digest: str) -> tuple[Halo | None, str]:
    """Return the halo of a network that is not known by its layers, or why there is none."""
    # Only such a network needs torch for its plan.
    from volseg.models.bundle import load_networks
    from volseg.models.prove import prove_halo

    manifest, networks = load_networks(uri)
    assert isinstance(manifest.config, TracedConfig)
    return prove_halo(networks[0], manifest.config)


def _halo(manifest: BundleManifest, config: NetworkConfig, axis: Axis, spec: SegmentSpec) -> tuple[Halo | None, str]:
    """Return what exact mode reads around a tile, or why it cannot be."""
    if isinstance(config, ProgramConfig):
        layers = patch_dependent(config.program)
        if layers:
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            return None, f"its layer {layers[0]}{more} normalises over the whole patch, so every voxel depends on all"
        found: Halo | None = halo_of(config.program)
    elif spec.blend != "exact":
        return None, f"the halo of {manifest.architecture} is measured only when --blend exact asks for it"
    else:
        found, why = _proven(spec.model, str(manifest.digest))
        if why:
            return None, why
    if found is None or config.dims == 3:
        return found, ""
    return Halo(*(to_volume(triple, axis) for triple in (found.before, found.after, found.step))), ""
