"""`python -m tests.bench.loader`: patches a second from volseg's loader and from MONAI's, interleaved in one run.

Both read the same Zarr volume, cut patches of the same sides with half of them around the foreground, and change them
with the same probabilities: flips, quarter turns, rotation with zoom, contrast, gamma, noise. MONAI keeps the volume
and the places of its foreground in memory (CacheDataset, FgBgToIndices) and works in as many processes as volseg in
threads. With ``--network`` the patches go through training steps of one and the same small U-Net, on both sides in the
same plain loop. Each measurement is a process of its own; the medians and their ratio are printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIDES = ("volseg", "monai")
WARP, GREY, ANGLE, ZOOM = 0.4, 0.5, 20.0, 0.25
WIDTHS = (8, 16, 32)

Batches = Iterator[tuple[Tensor, Tensor]]


def main() -> None:
    """Measure both sides `--runs` times in turn and print one table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.loader", description=__doc__)
    parser.add_argument("--dims", type=int, choices=(2, 3), default=3)
    parser.add_argument("--size", type=int, default=160, help="side of the cubic volume")
    parser.add_argument("--patch", type=int, help="side of a patch [default: 64 in 3D, 128 in 2D]")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="threads of volseg, processes of MONAI")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one measurement")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--network", action="store_true", help="take training steps with the patches")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.patch = arguments.patch or (64 if arguments.dims == 3 else 128)
    if arguments.patch > arguments.size:
        parser.error(f"a patch of {arguments.patch} does not fit a volume of {arguments.size}")
    if arguments.side:
        print(json.dumps(measure(arguments)))
        return
    if importlib.util.find_spec("monai") is None:
        print("MONAI is not installed here: pip install 'volseg[bench]' to compare with it", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), arguments.size)
        rates: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(arguments.runs):
            for side in SIDES:
                rates[side].append(_run(side, folder))
                print(f"{side}: {rates[side][-1]:.1f} patches a second", file=sys.stderr, flush=True)
    ours, theirs = (statistics.median(rates[side]) for side in SIDES)
    print(f"{'':8} {'patches/s':>10} {'least':>8} {'most':>8}")
    for side in SIDES:
        print(f"{side:8} {statistics.median(rates[side]):10.1f} {min(rates[side]):8.1f} {max(rates[side]):8.1f}")
    print(f"volseg gives {ours / theirs:.2f} times the patches of MONAI")


def _run(side: str, folder: str) -> float:
    words = [sys.executable, "-m", "tests.bench.loader", *sys.argv[1:], "--side", side, "--folder", folder]
    # Threads of a library in every loader process would only fight each other, on both sides.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def prepare(folder: Path, size: int) -> None:
    """Write the volume and its labels: blobs of which about a tenth is foreground."""
    import zarr

    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.standard_normal((1, 1, *[max(4, size // 12)] * 3)).astype(np.float32))
    blobs = torch.nn.functional.interpolate(coarse, (size,) * 3, mode="trilinear")[0, 0].numpy()
    labels = (blobs > np.quantile(blobs, 0.9)).astype(np.uint8)
    image = (labels * 60 + rng.normal(100, 25, labels.shape)).clip(0, 255).astype(np.uint8)
    for name, values in (("image", image), ("labels", labels)):
        array = zarr.create_array(folder / f"{name}.zarr", shape=values.shape, chunks=(64,) * 3, dtype=values.dtype)
        array[:] = values


def measure(arguments: argparse.Namespace) -> float:
    """Return the patches a second of one side."""
    torch.set_num_threads(1)
    batches = (volseg_batches if arguments.side == "volseg" else monai_batches)(arguments)
    use = trainer(arguments.dims, arguments.workers) if arguments.network else lambda images, labels: None
    # What was made ahead while nothing was measured does not count.
    for _ in range(4 + 2 * arguments.workers):
        use(*next(batches))
    started, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < arguments.seconds:
        images, labels = next(batches)
        use(images, labels)
        count += len(images)
    return count / seconds


def trainer(dims: int, threads: int) -> Callable[[Tensor, Tensor], None]:
    """Return a training step of a small U-Net."""
    from volseg.models.registry import build, make_config
    from volseg.training.region import IGNORED

    torch.manual_seed(0)
    config = make_config("unet", {"dims": dims, "in_channels": 1, "out_channels": 2, "widths": list(WIDTHS)})
    network = build("unet", config).train()
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3)

    def step(images: Tensor, labels: Tensor) -> None:
        # Until its first operation a thread takes the number that any thread named last: 1 in those of the loader.
        torch.set_num_threads(threads)
        if dims == 2:
            images, labels = images.reshape(-1, 1, *images.shape[-2:]), labels.reshape(-1, *labels.shape[-2:])
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(images), labels.long(), ignore_index=IGNORED)
        torch.autograd.backward(loss)
        optimiser.step()

    return step


def volseg_batches(arguments: argparse.Namespace) -> Batches:
    """Yield batches of volseg's loader."""
    from volseg.spec import TrainSpec
    from volseg.training.augment import Augmentation
    from volseg.training.data import open_data
    from volseg.training.prefetch import Prefetcher
    from volseg.training.sampler import Sampler

    flat = arguments.dims == 2
    folder = Path(arguments.folder)
    spec = TrainSpec.read({
        "image": str(folder / "image.zarr"), "labels": str(folder / "labels.zarr"), "out": "-", "dims": arguments.dims,
    })  # fmt: skip
    planes = ((1, 2),) if flat else ((0, 1), (0, 2), (1, 2))
    how = Augmentation(
        planes=planes, quarter_turns=planes, flips=(1, 2) if flat else (0, 1, 2), warp_probability=WARP, angle=ANGLE,
        zoom=ZOOM, elastic=0.0, intensity_probability=GREY, field=0.0, blur=0.0,
    )  # fmt: skip
    side = arguments.patch
    sides = (1, side, side) if flat else (side, side, side)
    sampler = Sampler(open_data(spec, lambda _: None), sides, sides, how, 0)
    patches = Prefetcher(sampler, arguments.batch, 0, threads=arguments.workers)
    try:
        while True:
            yield patches.next()
    finally:
        patches.close()


def monai_batches(arguments: argparse.Namespace) -> Batches:
    """Yield batches of MONAI's loader: the volume cached, random changes in worker processes."""
    import zarr
    from monai import transforms as mt
    from monai.data.dataloader import DataLoader
    from monai.data.dataset import CacheDataset
    from monai.data.meta_obj import set_track_meta
    from monai.data.utils import list_data_collate
    from torch.utils.data import RandomSampler

    # Tensors that carry places along would slow every step of the network.
    set_track_meta(False)
    flat = arguments.dims == 2
    folder, keys = Path(arguments.folder), ["image", "labels"]
    sides = (1, arguments.patch, arguments.patch) if flat else (arguments.patch,) * 3
    axes = [1, 2] if flat else [0, 1, 2]
    planes = [(1, 2)] if flat else [(0, 1), (0, 2), (1, 2)]
    angle = float(np.deg2rad(ANGLE))
    low, high = 1 / (1 + ZOOM) - 1, ZOOM

    # Only what is a Transform and not random is kept in memory.
    class Load(mt.Transform):  # type: ignore[misc]
        def __call__(self, data: dict[str, str]) -> dict[str, Any]:
            return {key: np.asarray(zarr.open_array(data[key], mode="r")[:])[None] for key in keys}

    steps = [
        Load(),
        mt.EnsureTyped(keys, dtype=[torch.float32, torch.uint8], track_meta=False),
        mt.NormalizeIntensityd("image"),
        mt.FgBgToIndicesd("labels"),
        mt.RandCropByPosNegLabeld(
            keys, "labels", sides, pos=1, neg=1, num_samples=arguments.batch,
            fg_indices_key="labels_fg_indices", bg_indices_key="labels_bg_indices",
        ),
        mt.SelectItemsd(keys),
        *(mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in axes),
        *(mt.RandRotate90d(keys, prob=0.75 / len(planes), spatial_axes=plane) for plane in planes),
        # One slice is bent as the picture that it is: MONAI does nothing like it to a volume.
        *([mt.SqueezeDimd(keys, dim=1)] if flat else []),
        mt.RandAffined(
            keys, prob=WARP, rotate_range=angle if flat else [angle] * 3, scale_range=[(low, high)] * len(axes),
            mode=["bilinear", "nearest"], padding_mode="border",
        ),
        mt.RandScaleIntensityd("image", factors=0.25, prob=GREY),
        mt.RandAdjustContrastd("image", prob=GREY / 2, gamma=(1 / 1.3, 1.3)),
        mt.RandGaussianNoised("image", prob=GREY / 2, std=0.2),
    ]  # fmt: skip
    item = {"image": str(folder / "image.zarr"), "labels": str(folder / "labels.zarr")}
    dataset = CacheDataset([item], mt.Compose(steps), progress=False, copy_cache=False)
    loader = DataLoader(
        dataset, batch_size=1, sampler=RandomSampler(dataset, replacement=True, num_samples=10**7),
        num_workers=arguments.workers, collate_fn=list_data_collate, persistent_workers=True,
    )  # fmt: skip
    for batch in loader:
        yield batch["image"], batch["labels"][:, 0]


if __name__ == "__main__":
    main()
