"""Which executor a job gets where none is asked for, and what cannot be had."""

from __future__ import annotations

import importlib.util
import sys
from math import prod

from volseg.errors import InputError
from volseg.execution.limits import check_allowed
from volseg.execution.prepare import Cores
from volseg.geometry import Box, Triple
from volseg.models.config import to_network
from volseg.models.manifest import BundleManifest, read_manifest
from volseg.planning.make import DEFAULT_OVERLAP
from volseg.spec import SegmentSpec
from volseg.storage import files
from volseg.storage.volume import open_volume

_MOST_THREADS = 8
_FLOPS_A_THREAD = 1.5e9
"""What a forward must have to do for each worker of a process, that they seldom wait for Python's lock: where it is
less, two threads take 1.2 to 1.9 times as long as two processes; where it is more, as long, and they start sooner."""
_SHORT_FLOPS = 4e11
"""What a worker does in the eight seconds that Ray takes to start: a shorter job is over before, even with waiting."""


def executor_of(spec: SegmentSpec, cores: Cores, *, many: bool = False) -> str:
    """Return serial, threads or ray: what `auto` means for this spec on these cores; `many`: a batch of volumes.

    Raises InputError where what was asked for cannot be had, or model or input cannot be read.
    """
    if spec.in_process and spec.address:
        raise InputError(
            f"executor {spec.executor} and an address were given together: {spec.executor} uses no cluster; drop one "
            "of them"
        )
    if spec.executor == "threads" and cores.device == "cuda":
        raise InputError(
            "executor threads computes on CPU cores, and this machine has a GPU; nothing was done: use --executor "
            "serial or ray for the GPU, or --device cpu"
        )
    chosen = spec.executor if spec.executor != "auto" else _suitable(spec, cores, many=many)
    if chosen == "ray" and not _has_ray():
        raise InputError(
            "executor ray needs the package ray, which is not installed: pip install 'volseg[ray]', or use serial"
        )
    return chosen


def _suitable(spec: SegmentSpec, cores: Cores, *, many: bool) -> str:
    workers = spec.workers or cores.workers
    if spec.address or (workers > 1 and _ray_runs_here()):
        return "ray"
    if workers == 1:
        return "serial"
    if cores.device == "cpu" and (not _has_ray() or _may_share(spec, workers, many=many)):
        return "threads"
    return "ray" if _has_ray() else "serial"


def _has_ray() -> bool:
    return importlib.util.find_spec("ray") is not None


def _ray_runs_here() -> bool:
    """Tell whether this program uses Ray already, perhaps a cluster; without loading it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _may_share(spec: SegmentSpec, workers: int, *, many: bool) -> bool:
    """Tell whether workers do as well in one process: their forwards are long enough, or the whole job is short."""
    if workers > _MOST_THREADS:
        return False
    model = files.absolute(spec.model)
    check_allowed({"model": model}, {})
    manifest = read_manifest(model)
    patch = spec.patch or manifest.patch
    # A patch that was asked for may be one that the network cannot take, which planning says.
    each = _flops(manifest, manifest.patch) * prod(patch) / prod(manifest.patch)
    if each >= workers * _FLOPS_A_THREAD:
        return True
    return not many and each * _forwards(spec, manifest, patch) <= workers * _SHORT_FLOPS


def _flops(manifest: BundleManifest, patch: Triple) -> float:
    config = manifest.config
    return float(config.flops(to_network(patch, manifest.axis) if config.dims == 2 else patch))


def _forwards(spec: SegmentSpec, manifest: BundleManifest, patch: Triple) -> float:
    """Return about how many forwards segmenting takes."""
    place = files.absolute(spec.input)
    check_allowed({"input": place}, {})
    shape = open_volume(place).shape
    sides = Box.parse(spec.roi, shape).shape if spec.roi else shape
    overlap = 0.0 if spec.blend == "exact" else DEFAULT_OVERLAP if spec.overlap is None else spec.overlap
    steps = (max(1.0, side * (1 - overlap)) for side in patch)
    patches = prod(1 + max(0.0, n - side) / step for n, side, step in zip(sides, patch, steps, strict=True))
    mirrors = 2**manifest.config.dims if spec.mirror else 1
    return patches * manifest.members * mirrors * len(spec.axis or "z")
