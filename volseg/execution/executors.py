"""Which executor a job gets where none is asked for, and what cannot be had."""

from __future__ import annotations

import importlib.util
import sys
from math import prod

from volseg.errors import InputError
from volseg.execution.limits import check_allowed
from volseg.execution.prepare import Cores
from volseg.models.config import to_network
from volseg.models.manifest import read_manifest
from volseg.spec import SegmentSpec
from volseg.storage import files

_MOST_THREADS = 8
_FLOPS_A_THREAD = 1.5e9
"""What a forward must have to do for each worker of a process, that they seldom wait for Python's lock: where it is
less, two threads take 1.2 to 1.9 times as long as two processes; where it is more, as long, and they start sooner."""


def executor_of(spec: SegmentSpec, cores: Cores) -> str:
    """Return serial, threads or ray: what `auto` means for this spec on these cores.

    Raises InputError where what was asked for cannot be had, or the model cannot be read.
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
    chosen = spec.executor if spec.executor != "auto" else _suitable(spec, cores)
    if chosen == "ray" and not _has_ray():
        raise InputError(
            "executor ray needs the package ray, which is not installed: pip install 'volseg[ray]', or use serial"
        )
    return chosen


def _suitable(spec: SegmentSpec, cores: Cores) -> str:
    workers = spec.workers or cores.workers
    if spec.address or (workers > 1 and _ray_runs_here()):
        return "ray"
    if workers == 1:
        return "serial"
    if cores.device == "cpu" and (not _has_ray() or workers <= _most_threads(spec)):
        return "threads"
    return "ray" if _has_ray() else "serial"


def _has_ray() -> bool:
    return importlib.util.find_spec("ray") is not None


def _ray_runs_here() -> bool:
    """Tell whether this program uses Ray already, perhaps a cluster; without loading it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _most_threads(spec: SegmentSpec) -> int:
    """Return how many workers may share one process: as many as forwards of this length keep busy."""
    model = files.absolute(spec.model)
    check_allowed({"model": model}, {})
    manifest = read_manifest(model)
    config, usual = manifest.config, manifest.patch
    flops = config.flops(to_network(usual, manifest.axis) if config.dims == 2 else usual)
    larger = prod(spec.patch or usual) / prod(usual)
    return min(_MOST_THREADS, int(flops * larger / _FLOPS_A_THREAD))
