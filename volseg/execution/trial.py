"""Measures this machine: segments a volume of noise that is as large as the time allows, and extrapolates.

What a network computes takes the same time for noise as for a scan, so weights and voxels may be random.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from volseg.errors import InputError
from volseg.execution.prepare import SHARE_OF_STORE, Cores, model_facts
from volseg.geometry import Box, Triple
from volseg.intensity import Scaling
from volseg.journal import Note
from volseg.models.manifest import BundleManifest, ClassInfo, read_manifest
from volseg.planning import Plan, Resources, SeamRoom, VolumeFacts, make_plan
from volseg.planning.expect import Pace, expect
from volseg.planning.memory import BASELINE_ACTOR, GIB
from volseg.planning.seams import PARCEL_FLOOR
from volseg.spec import BenchSpec, SegmentSpec
from volseg.storage import files, ome
from volseg.storage.volume import Layout, create_array

Report = dict[str, Any]
Run = Callable[[SegmentSpec], Report]

PROBE_PATCHES = 3
MOST_VOXELS = 1 << 30
"""Largest volume that is made to be measured: a GiB of uint8."""
_DEFAULT_PATCH = (64, 64, 64)
_DEFAULT_WIDTHS = (16, 32, 64, 128)
_CHUNK = 64


def measure(spec: BenchSpec, cores: Cores, run: Run, note: Note) -> dict[str, Any]:
    """Segment noise with `run` in a temporary folder and tell what a volume of `spec.shape` would take.

    `cores` is this machine. ``measured`` of the answer is what was seen, ``expected`` what follows for the shape,
    ``assumed`` what was taken for granted on the way, in words. Raises InputError where a bundle, patch or memory limit
    cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="volseg-bench-") as name:
        folder = Path(name)
        model = files.absolute(spec.model) if spec.model else _default_bundle(folder / "bundle")
        manifest = read_manifest(model)
        here = min(spec.workers or cores.workers, cores.workers)
        target = _target(spec, cores, model, manifest)
        note(f"measuring {'this bundle' if spec.model else 'a network with random weights'} on one worker first")
        probe = run(_trial(spec, model, folder, _volume(folder, "probe", target, PROBE_PATCHES), 1, "serial"))
        patches = max(PROBE_PATCHES, spec.seconds * here / (probe["seconds"]["forward"] / probe["forwards"]))
        patches /= target.forwards_a_patch
        scan = _volume(folder, "scan", target, int(patches))
        note(f"measuring {here} worker(s) for about {spec.seconds:.0f} s on {' x '.join(map(str, scan[1]))} voxels")
        report = run(_trial(spec, model, folder, scan, here, "auto"))
        return _answer(spec, manifest, target, report, cores)


def _answer(spec: BenchSpec, manifest: BundleManifest, target: Plan, report: Report, cores: Cores) -> dict[str, Any]:
    seconds = report["seconds"]
    pace = Pace(report["workers"]["used"], report["forwards"], max(seconds["work"], 1e-9))
    busy = pace.seconds * pace.workers
    assumed = [
        "every worker is as fast as those measured here, and storage keeps up with all of them",
        "the input is uint8, and nothing of it is skipped",
    ]
    if target.workers > pace.workers:
        assumed.insert(0, f"{target.workers} workers were not measured: {pace.workers} were, on this machine")
    if spec.model is None:
        assumed.append("the network is the one named above: give your bundle to measure yours")
    return {
        "measured": {
            "model": spec.model or f"3D U-Net {'-'.join(map(str, _DEFAULT_WIDTHS))}, random weights",
            "digest": manifest.digest,
            "device": cores.device,
            "precision": spec.precision,
            "patch": target.views[0].patch,
            "overlap": spec.overlap,
            "workers": pace.workers,
            "voxels": report["voxels"],
            "forwards": pace.forwards,
            "start_seconds": seconds["start"],
            "seconds": round(pace.seconds, 3),
            "seconds_per_forward": round(pace.seconds_a_forward, 6),
            "voxels_per_second": round(report["voxels"] / pace.seconds, 1),
            "share_of_time": {name: round(seconds[name] / busy, 4) for name in ("forward", "read", "write")},
            "peak_memory_per_worker": report["memory"]["peak"],
        },
        "expected": expect(target, pace),
        "assumed": assumed,
    }


def _options(spec: BenchSpec) -> dict[str, Any]:
    names = ("patch", "overlap", "mirror", "precision", "device", "memory")
    return {name: getattr(spec, name) for name in names}


def _trial(
    spec: BenchSpec, model: str, folder: Path, scan: tuple[str, Triple], workers: int, executor: str
) -> SegmentSpec:
    return SegmentSpec.read({
        **_options(spec), "input": scan[0], "output": str(folder / f"{Path(scan[0]).stem}-result.zarr"), "model": model,
        "workers": workers, "executor": executor,
    })  # fmt: skip


def _target(spec: BenchSpec, cores: Cores, model: str, manifest: BundleManifest) -> Plan:
    """Return the plan for the volume that is asked about."""
    asked = SegmentSpec.read({**_options(spec), "input": "-", "output": "-", "model": model})
    memory = int(spec.memory * GIB) if spec.memory else cores.memory // (cores.slots or cores.workers)
    workers = spec.workers or cores.workers
    room = SeamRoom(int(cores.store * SHARE_OF_STORE) * max(1, workers // cores.workers), PARCEL_FLOOR)
    resources = Resources(workers, memory, cores.device, BASELINE_ACTOR, room)
    facts = VolumeFacts(spec.shape, manifest.config.in_channels, 1)
    return make_plan(asked, facts, model_facts(manifest, asked), resources)


def _volume(folder: Path, name: str, target: Plan, patches: int) -> tuple[str, Triple]:
    """Write noise that about so many patches cover; return its place and shape."""
    shape = trial_shape(target, patches)
    channels = target.channels if target.channels > 1 else None
    layout = Layout(shape, (_CHUNK,) * 3, None, np.dtype("uint8"), channels)
    place = str(folder / f"{name}.zarr")
    writer = create_array(place, layout, ome.group_attributes(layout.axes, voxel_size=None, unit=None, name=name))
    generator = np.random.default_rng(0)
    for start in range(0, shape[0], _CHUNK):
        slab = Box((start, 0, 0), (min(start + _CHUNK, shape[0]), shape[1], shape[2]))
        voxels = generator.integers(0, 256, (target.channels, *slab.shape), dtype=np.uint8)
        writer.write(slab, voxels if channels else voxels[0])
    return place, shape


def trial_shape(target: Plan, patches: int) -> Triple:
    """Return the shape (z, y, x) that about so many patches of the plan's first view cover, at least one.

    Patches are added one by one along the axis that is shortest, so that borders count as little as in a large volume.
    """
    lattice = target.lattices[0]
    counts = [1, 1, 1]

    def sides() -> list[int]:
        pairs = zip(lattice.answer, lattice.stride, counts, strict=True)
        return [answer + (count - 1) * stride for answer, stride, count in pairs]

    while math.prod(counts) < patches and math.prod(sides()) < MOST_VOXELS:
        counts[int(np.argmin(sides()))] += 1
    z, y, x = sides()
    return z, y, x


def _default_bundle(path: Path) -> str:
    from volseg.models.bundle import build_apart, save_bundle
    from volseg.models.registry import make_config

    arguments = {"dims": 3, "in_channels": 1, "out_channels": 1, "widths": _DEFAULT_WIDTHS}
    config = make_config("unet", arguments)
    classes = (ClassInfo(id=0, name="background", color="#000000"), ClassInfo(id=1, name="class 1", color="#ffffff"))
    manifest = BundleManifest(
        architecture="unet", arguments=config.model_dump(mode="json"), classes=classes, activation="sigmoid",
        threshold=0.5, scaling=Scaling(low=(0,), high=(255,), mean=(127,), std=(74,)), patch=_DEFAULT_PATCH,
    )  # fmt: skip
    save_bundle(str(path), [build_apart("unet", config).eval()], manifest)
    return str(path)


def refuse_cluster(address: str | None) -> None:
    """Raise InputError where a cluster is named: what one machine of it would take is measured there."""
    if address is not None:
        raise InputError(
            f"volseg bench measures the machine it runs on, but RAY_ADDRESS names a cluster ({address}); nothing was "
            "measured: unset it, and give the cluster's workers with --workers"
        )
