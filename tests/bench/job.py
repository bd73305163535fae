"""One side of the benchmark, in a process of its own: prints its timing as JSON."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

Timing = dict[str, float]
CORES = 2
CLASSES = 3


def prepare(folder: Path, size: int, patch: int) -> None:
    """Write the bundle (random weights) and the volume that every side uses."""
    import numpy as np
    import torch
    import zarr

    from volseg.intensity import Scaling
    from volseg.models.bundle import save_bundle
    from volseg.models.config import UNetConfig
    from volseg.models.manifest import BundleManifest, ClassInfo
    from volseg.models.registry import build

    torch.manual_seed(0)
    config = UNetConfig(dims=3, widths=(16, 32, 64, 128), out_channels=CLASSES)
    classes = tuple(ClassInfo(id=i, name=f"class {i}", color=f"#{i * 60:02x}4040") for i in range(CLASSES))
    manifest = BundleManifest(
        architecture="unet", arguments=config.model_dump(mode="json"), classes=classes, activation="softmax",
        scaling=Scaling(low=(0,), high=(255,), mean=(127,), std=(74,)), patch=(patch, patch, patch),
    )  # fmt: skip
    save_bundle(str(folder / "bundle"), build("unet", config).eval(), manifest)
    voxels = np.random.default_rng(0).integers(0, 256, (size, size, size), dtype=np.uint8)
    array = zarr.create_array(folder / "scan.zarr", shape=voxels.shape, chunks=(64, 64, 64), dtype=voxels.dtype)
    array[:] = voxels


def volseg(folder: Path, executor: str, patch: int, overlap: float) -> Timing:
    """Segment with volseg; `forward` is the time of its forwards alone, shared by its workers."""
    from volseg.api import run_segment
    from volseg.spec import SegmentSpec

    output = folder / "result.zarr"
    for place in (output, folder / "result.zarr.volseg"):
        shutil.rmtree(place, ignore_errors=True)
    values = {
        "input": str(folder / "scan.zarr"), "output": str(output), "model": str(folder / "bundle"),
        "executor": executor, "workers": CORES, "overlap": overlap, "patch": patch,
    }  # fmt: skip
    report = run_segment(SegmentSpec.read(values))
    seconds, workers = report["seconds"], report["workers"]["used"]
    return {
        "start": seconds["start"], "work": seconds["wall"] - seconds["start"] - seconds["stop"],
        "forward": seconds["forward"] / workers, "forwards": report["forwards"],
        "peak": report["memory"]["peak"] * workers,
    }  # fmt: skip


def monai(folder: Path, patch: int, overlap: float) -> Timing:
    """Do the same with MONAI's sliding window: read, scale, infer, argmax, write."""
    started = time.perf_counter()
    import numpy as np
    import torch
    import zarr
    from monai.inferers import sliding_window_inference

    from volseg.inference.worker import resident_peak
    from volseg.models.bundle import load_network

    torch.set_num_threads(CORES)
    manifest, network = load_network(str(folder / "bundle"))
    begun = time.perf_counter()
    forward = [0.0, 0.0]

    def predict(batch: torch.Tensor) -> torch.Tensor:
        before = time.perf_counter()
        answer: torch.Tensor = network(batch)
        forward[0] += time.perf_counter() - before
        forward[1] += 1
        return answer

    with torch.inference_mode():
        voxels = zarr.open_array(folder / "scan.zarr")[:]
        image = torch.from_numpy(manifest.scaling.apply(np.asarray(voxels)[None]))[None]
        logits = sliding_window_inference(image, patch, 1, predict, overlap=overlap, mode="gaussian")
        labels = logits.argmax(1)[0].to(torch.uint8).numpy()
    output = zarr.create_array(
        folder / "monai.zarr", shape=labels.shape, chunks=(64, 64, 64), dtype=labels.dtype, overwrite=True
    )
    output[:] = labels
    work = time.perf_counter() - begun
    return {
        "start": begun - started, "work": work, "forward": forward[0], "forwards": forward[1], "peak": resident_peak(),
    }  # fmt: skip


if __name__ == "__main__":
    side, place, patch_, overlap_ = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    if side == "monai":
        timing = monai(place, patch_, overlap_)
    else:
        timing = volseg(place, side.removeprefix("volseg "), patch_, overlap_)
    print(json.dumps(timing))
