"""From a spec to a plan: open what was named, ask who can work, refuse what cannot be. No work is done here."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from volseg.errors import InputError
from volseg.geometry import Triple
from volseg.models.config import to_network, to_volume
from volseg.models.manifest import BundleManifest, read_manifest
from volseg.planning import ModelFacts, Plan, Resources, VolumeFacts, make_plan
from volseg.planning.memory import BASELINE_ACTOR, BASELINE_SERIAL, GIB
from volseg.spec import SegmentSpec
from volseg.storage import files
from volseg.storage.volume import Volume, open_volume

NUMERICS = 1
"""Raised whenever the same inputs would give other bits."""

_MOST_MEMORY = 8 * GIB
_SHARE_OF_FREE = 0.6


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


@dataclass(frozen=True)
class Prepared:
    """A checked job: `spec` with absolute places, the opened input, the model and the plan."""

    spec: SegmentSpec
    volume: Volume
    manifest: BundleManifest
    plan: Plan

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
            "axis": plan.axis,
            "patch": list(plan.patch),
            "stride": list(plan.stride),
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
    return Cores(cpus, gpus, device, gpus or cpus, int(psutil.virtual_memory().available * _SHARE_OF_FREE))


def _may_have_gpu() -> bool:
    """Tell whether a GPU driver is there; asking torch takes seconds that most laptops need not wait."""
    return sys.platform != "linux" or any(Path(f"/dev/{name}").exists() for name in ("nvidiactl", "dxg", "kfd"))


def executor_of(spec: SegmentSpec, cores: Cores) -> str:
    """Return serial or ray: what `auto` means for this spec on these cores."""
    workers = spec.workers or cores.workers
    if spec.executor == "serial" and spec.address:
        raise InputError("executor serial and an address were given together: serial uses no cluster; drop one of them")
    if spec.executor != "auto":
        chosen = spec.executor
    else:
        chosen = "ray" if spec.address or (workers > 1 and importlib.util.find_spec("ray")) else "serial"
    if chosen == "ray" and importlib.util.find_spec("ray") is None:
        raise InputError(
            "executor ray needs the package ray, which is not installed: pip install 'volseg[ray]', or use serial"
        )
    return chosen


def prepare(spec: SegmentSpec, cores: Cores, executor: str, block: Triple | None = None) -> Prepared:
    """Open the input and the model and make the plan; raises InputError where something is wrong with them.

    `block` is the grid of an unfinished job, which a resume keeps.
    """
    places = {name: files.absolute(getattr(spec, name)) for name in ("input", "output", "model")}
    spec = spec.model_copy(update=places)
    _check_places(spec)
    volume = open_volume(spec.input)
    manifest = read_manifest(spec.model)
    workers = 1 if executor == "serial" else spec.workers or cores.workers
    limit = int(spec.memory * GIB) if spec.memory else min(_MOST_MEMORY, cores.memory // (cores.slots or workers))
    resources = Resources(workers, limit, cores.device, BASELINE_SERIAL if executor == "serial" else BASELINE_ACTOR)
    facts = VolumeFacts(volume.shape, volume.channels or 1, volume.dtype.itemsize)
    # The storage of an unfinished job is kept with its grid, whatever is asked for now.
    asked = spec if block is None else spec.model_copy(update={"chunks": None, "shards": None})
    plan = make_plan(asked, facts, model_facts(manifest, spec), resources, block)
    return Prepared(spec, volume, manifest, plan)


def model_facts(manifest: BundleManifest, spec: SegmentSpec) -> ModelFacts:
    """Return what a plan needs to know of a bundle; for a 2D network, along the axis that the spec asks for."""
    config = manifest.config
    axis = spec.axis or manifest.axis
    if spec.axis is not None and config.dims == 3:
        raise InputError(f"axis {spec.axis} was given, but the model is 3D and has no slice axis: leave it out")
    itemsize = 2 if spec.precision == "bf16" else 4
    patch, pooling = manifest.patch, manifest.pooling
    if config.dims == 2:
        patch, pooling = to_volume(to_network(patch, manifest.axis), axis), to_volume(config.pooling, axis)

    def in_network(sides: Triple) -> Triple:
        return to_network(sides, axis) if config.dims == 2 else sides

    return ModelFacts(
        dims=config.dims, in_channels=config.in_channels, classes=len(manifest.classes), pooling=pooling, patch=patch,
        axis=axis, threshold=manifest.threshold or 0.5, parameter_bytes=config.parameter_count * itemsize,
        activation_bytes=lambda sides, batch: config.activation_bytes(in_network(sides), batch, itemsize),
        flops=lambda sides: float(config.flops(in_network(sides))),
    )  # fmt: skip


def _check_places(spec: SegmentSpec) -> None:
    if not files.is_local(spec.output):
        return
    output = files.local_path(spec.output)
    for name in ("input", "model"):
        place = getattr(spec, name)
        if not files.is_local(place):
            continue
        other = files.local_path(place)
        if output == other or output in other.parents or other in output.parents:
            raise InputError(
                f"output {output} and {name} {other} overlap: writing would destroy what is read; choose another output"
            )
