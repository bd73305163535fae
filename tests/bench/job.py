"""One side of the benchmark, in a process of its own: prints its timing as JSON."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Timing = dict[str, float]
CORES = 2

VOLSEG = {
    "forwards alone, 1 core": 1,
    "forwards alone, 2 cores": CORES,
    "volseg, serial": 1,
    "volseg, threads": CORES,
    "volseg, Ray": CORES,
}
"""Volseg's sides and the cores that each computes on; the peers compute on all."""

CHUNKS = (64, 64, 64)


@dataclass(frozen=True)
class Setting:
    """What all sides share; `folder` holds the scan, the bundle and what every side writes."""

    folder: str
    patch: int
    overlap: float
    precision: str

    def result(self, side: str) -> Path:
        """Return where a side writes its labels."""
        return Path(self.folder, "".join(c if c.isalnum() else "-" for c in side) + ".zarr")


def prepare(folder: Path, size: int, patch: int, minutes: float) -> float:
    """Scan a phantom, train the network that every side uses on it, and return its validation Dice."""
    import zarr

    from volseg import api
    from volseg.demo.phantom import make_phantom

    phantom = make_phantom((size, size, size), 1)
    for name, voxels in (("scan", phantom.image), ("truth", phantom.labels)):
        array = zarr.create_array(folder / f"{name}.zarr", shape=voxels.shape, chunks=CHUNKS, dtype=voxels.dtype)
        array[:] = voxels
    border = size * 3 // 4
    options: dict[str, Any] = {
        "dims": 3, "widths": [16, 32, 64, 128], "train_roi": f"0:{border},:,:",
        "val_roi": f"{border}:{size},:,:", "max_minutes": minutes, "patch": [patch // 2] * 3, "seed": 1,
    }  # fmt: skip
    result = api.train(str(folder / "scan.zarr"), str(folder / "truth.zarr"), str(folder / "bundle"), **options)
    return float(result["mean_foreground_dice"])


def volseg(side: str, setting: Setting) -> Timing:
    """Segment with volseg; `forward` is the time of its forwards alone, shared by its workers."""
    from volseg.api import run_segment

    spec = _spec(side, setting)
    for place in (spec.output, f"{spec.output}.volseg"):
        shutil.rmtree(place, ignore_errors=True)
    report = run_segment(spec)
    seconds, workers = report["seconds"], report["workers"]["used"]
    return {
        "start": seconds["start"], "work": seconds["wall"] - seconds["start"] - seconds["stop"],
        "forward": seconds["forward"] / workers, "forwards": report["forwards"],
        "peak": report["memory"]["peak"] * workers,
    }  # fmt: skip


def forwards_alone(side: str, setting: Setting) -> Timing:
    """Run the forwards of volseg's patches, each once, and nothing else, in a process a core."""
    import multiprocessing

    cores = VOLSEG[side]
    context = multiprocessing.get_context("spawn")
    started, barrier, answers = time.perf_counter(), context.Barrier(cores + 1), context.SimpleQueue()
    processes = [
        context.Process(target=_forward_share, args=(setting, share, cores, barrier, answers)) for share in range(cores)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    begun = time.perf_counter()
    found: list[Timing] = [answers.get() for _ in processes]
    work = time.perf_counter() - begun
    for process in processes:
        process.join()
    return {
        "start": begun - started, "work": work, "forward": max(f["forward"] for f in found),
        "forwards": sum(f["forwards"] for f in found), "peak": sum(f["peak"] for f in found),
    }  # fmt: skip


def _forward_share(setting: Setting, share: int, cores: int, barrier: Any, answers: Any) -> None:
    import torch

    from volseg.execution.output import create_output
    from volseg.execution.prepare import local_cores, prepare
    from volseg.inference.block_processor import take_patch
    from volseg.inference.worker import Worker
    from volseg.storage.volume import open_volume

    spec = _spec("forwards", setting).model_copy(update={"output": str(setting.result(f"forwards {share} {cores}"))})
    job = prepare(spec, local_cores(spec), "serial")
    # A worker opens the output, though nothing is written here.
    create_output(job)
    worker = Worker(job.spec, job.plan, job.bundle_digest)
    (view,) = job.plan.views
    indices = list(view.lattice.touching(job.plan.region))[share::cores]
    voxels = torch.from_numpy(open_volume(spec.input).read(job.plan.region))
    patches = [take_patch(voxels, view.lattice.source(index), job.plan.region) for index in indices]
    predictor = worker._processor._predictor
    # The first forward touches memory and prepares kernels; as on the other sides, that is part of the work.
    barrier.wait()
    begun = time.perf_counter()
    for _ in predictor.run(patches, view.axis):
        pass
    answers.put({
        "forward": time.perf_counter() - begun, "forwards": len(patches), "peak": worker.peak_memory(),
    })  # fmt: skip


def _spec(side: str, setting: Setting) -> Any:
    from volseg.spec import SegmentSpec

    cores = VOLSEG.get(side, 1)
    executor = side.rpartition(" ")[2].lower() if side in VOLSEG else "serial"
    return SegmentSpec.read({
        "input": str(Path(setting.folder, "scan.zarr")), "output": str(setting.result(side)),
        "model": str(Path(setting.folder, "bundle")), "executor": executor, "workers": cores,
        "overlap": setting.overlap, "patch": setting.patch, "precision": setting.precision,
    })  # fmt: skip


def peer(side: str, setting: Setting) -> Timing:
    """Do the same with a peer: read, scale, infer, write."""
    started = time.perf_counter()
    import numpy as np
    import torch
    import zarr

    from tests.bench import peers
    from volseg.inference.worker import resident_peak
    from volseg.models.bundle import load_networks

    torch.set_num_threads(CORES)
    manifest, (plain,) = load_networks(str(Path(setting.folder, "bundle")))
    classes = len(manifest.classes)
    network = peers.Network(plain, setting.precision, classes).eval()
    shared = peers.Setting(setting.patch, setting.overlap, classes, CORES, [0.0, 0.0])
    before = time.perf_counter()
    if side.endswith("torch.compile"):
        peers.compiled(network, shared)
    begun = time.perf_counter()
    with torch.inference_mode():
        voxels = np.asarray(zarr.open_array(Path(setting.folder, "scan.zarr"), mode="r")[:])
        labels = peers.PEERS[side][1](manifest.scaling.apply(voxels[None])[0], network, shared)
    array = zarr.create_array(setting.result(side), shape=labels.shape, chunks=CHUNKS, dtype="uint8", overwrite=True)
    array[:] = labels
    seconds, forwards = shared.forward
    return {
        "start": before - started, "once": begun - before, "work": time.perf_counter() - begun, "forward": seconds,
        "forwards": forwards, "peak": resident_peak(),
    }  # fmt: skip


def measure(side: str, setting: Setting) -> Timing:
    """Run one side."""
    if side.startswith("forwards alone"):
        return forwards_alone(side, setting)
    return volseg(side, setting) if side in VOLSEG else peer(side, setting)


def read_setting(text: str) -> Setting:
    """Return a setting from JSON."""
    values: Mapping[str, Any] = json.loads(text)
    return Setting(**values)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], read_setting(sys.argv[2]))))
