"""Exact mode against Gaussian blending at 50 % overlap: the same network and volume, one worker, interleaved.

``python -m tests.bench.exact IMAGE --model BUNDLE --labels LABELS --roi 14:17,:,:``; with ``--mosaic 4`` it is one
section of IMAGE mirrored to 4 x 4, as large as the sections that exact mode is made for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zarr

from volseg.storage.volume import open_volume

_WAYS = ("gaussian", "exact")


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("--model", required=True)
    parser.add_argument("--labels")
    parser.add_argument("--roi", default=":,:,:")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mosaic", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="volseg-bench-") as folder:
        image = _mosaic(Path(folder), arguments.image, arguments.mosaic) if arguments.mosaic else arguments.image
        planned = _run("plan", image, f"{folder}/none", "--model", arguments.model, "--executor", "serial")["compared"]
        reports: dict[str, list[dict[str, Any]]] = {way: [] for way in _WAYS}
        for _ in range(arguments.rounds):
            for way in _WAYS:
                words = ("--model", arguments.model, "--executor", "serial", "--blend", way, "--overwrite")
                output = f"{folder}/{way}.zarr"
                # A finished output would answer at once.
                subprocess.run(["rm", "-rf", output, f"{output}.volseg"], check=True)
                reports[way].append(_run("segment", image, output, *words))
        _print(planned, reports)
        if arguments.labels:
            for way in _WAYS:
                found = _run("evaluate", f"{folder}/{way}.zarr", arguments.labels, "--roi", arguments.roi)
                print(f"{way}: mean foreground Dice {found['mean_foreground_dice']:.4f}")


def _run(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "volseg", *words, "--json"], stdout=subprocess.PIPE, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def _mosaic(folder: Path, image: str, times: int) -> str:
    """Write the middle section of `image`, continued by its mirror images, and return its place."""
    volume = open_volume(image)
    middle = volume.shape[0] // 2
    section = np.asarray(zarr.open_array(f"{image}/0", mode="r")[middle : middle + 1])
    _, rows, columns = section.shape
    wide = np.pad(section, ((0, 0), (0, (times - 1) * rows), (0, (times - 1) * columns)), mode="symmetric")
    array = zarr.create_array(str(folder / "mosaic.zarr"), shape=wide.shape, dtype=wide.dtype, chunks=(1, 256, 256))
    array[...] = wide
    return str(folder / "mosaic.zarr")


def _print(planned: dict[str, Any], reports: dict[str, list[dict[str, Any]]]) -> None:
    seconds = {way: median(r["seconds"]["compute"] for r in found) for way, found in reports.items()}
    for way, found in reports.items():
        cost = planned["exact" if way == "exact" else "blended"]
        print(
            f"{way}: {found[0]['forwards']} forwards, {cost['forwards_per_voxel']} voxels computed a voxel, "
            f"{seconds[way]:.2f} s, peak {found[0]['memory']['peak'] >> 20} MiB, "
            f"predicted {found[0]['memory']['predicted'] >> 20} MiB"
        )
    ratio = seconds["exact"] / seconds["gaussian"]
    foretold = planned["exact"]["relative_time"]
    print(f"time of exact over gaussian: {ratio:.3f}, planned {foretold:.3f}; {1 / ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
