"""`volseg demo`: the whole job on a phantom whose truth is known, through the commands that a user would type."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from volseg.cli.progress import ProgressLine, clock
from volseg.demo.phantom import CLASS_NAMES, Phantom, make_phantom, multi_otsu_dice
from volseg.errors import InputError
from volseg.storage import files

SHAPE = (128, 192, 192)
LABELLED = (16, 48, 80, 112)
"""The slices that a person would have labelled; the last one validates, the others train."""
_UNLABELLED = 255

Run = Callable[[list[str]], dict[str, Any]]


def run_demo(folder: str, run: Run, *, max_minutes: float, seed: int) -> dict[str, Any]:
    """Make a phantom in `folder`, then import, train, segment, evaluate, verify and draw it; return the scores.

    `run` executes one `volseg` command and returns its JSON document. Raises InputError where the folder is in use.
    """
    place = Path(folder)
    if place.exists() and any(place.iterdir()):
        if not (place / "phantom.tif").exists():
            raise InputError(f"folder {folder} holds something else; nothing was done: name an empty or new folder")
        files.remove(str(place))
    place.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    phantom = _make(place, seed)
    otsu = multi_otsu_dice(phantom)
    _say(f"Thresholding the grey values (multi-Otsu) scores a mean foreground Dice of {otsu:.3f}.")

    def volseg(*words: str) -> dict[str, Any]:
        _say(f"\n$ volseg {shlex.join(words)}")
        return run(list(words))

    def at(name: str) -> str:
        return str(place / name)

    names = ",".join(CLASS_NAMES)
    size = ",".join(f"{side:g}" for side in phantom.voxel_size_um)
    scan, sparse, unseen = at("scan.zarr"), at("labels.zarr"), at("truth.zarr")
    volseg("import", at("phantom.tif"), scan, "--voxel-size", size, "--unit", "micrometer")
    volseg("import", at("labels.tif"), sparse, "--labels", "--classes", names)
    volseg("import", at("truth.tif"), unseen, "--labels", "--classes", names)
    border = (LABELLED[-2] + LABELLED[-1]) // 2
    trained = volseg(
        "train", "--image", scan, "--labels", sparse, "--dims", "2", "--train-roi", f"0:{border},:,:",
        "--val-roi", f"{border}:{SHAPE[0]},:,:", "--out", at("unet"), "--max-minutes", f"{max_minutes:g}",
        "--seed", str(seed),
    )  # fmt: skip
    segmented = volseg("segment", scan, at("result.zarr"), "--model", at("unet"), "--executor", "ray", "--workers", "2")
    scores = volseg("evaluate", at("result.zarr"), unseen)
    verified = volseg("verify", at("result.zarr"), "--deep")
    volseg("overlay", scan, at("result.zarr"), at("overlay.png"))
    return {
        "otsu_dice": round(otsu, 4),
        "mean_foreground_dice": round(scores["mean_foreground_dice"], 4),
        "classes": scores["classes"],
        "verified": verified["status"],
        "training_seconds": round(trained["seconds"], 1),
        "segment_seconds": segmented["seconds"]["wall"],
        "seconds": round(time.monotonic() - started, 1),
        "result": files.absolute(at("result.zarr")),
        "picture": files.absolute(at("overlay.png")),
    }


def summary(result: dict[str, Any]) -> str:
    """Write the scores and where to look."""
    lines = [f"Dice on the {SHAPE[0] - len(LABELLED)} slices that were never labelled:"]
    lines += [f"  {c['name']:18} {c['dice']:.3f}" for c in result["classes"]]
    lines += [
        f"  mean of the foreground {result['mean_foreground_dice']:.3f} (multi-Otsu: {result['otsu_dice']:.3f})",
        f"The output is {result['verified']}; everything took {clock(result['seconds'])}.",
        f"Look at {result['picture']}",
        f"and open {result['result']} in any OME-Zarr viewer.",
    ]
    return "\n".join(lines)


def _make(place: Path, seed: int) -> Phantom:
    _say(f"A porous electrode of {' x '.join(map(str, SHAPE))} voxels is scanned and reconstructed, slice by slice.")
    with ProgressLine("phantom", "slices") as line:
        phantom = make_phantom(SHAPE, seed, progress=line.update)
    labelled = np.isin(np.arange(SHAPE[0]), LABELLED)[:, None, None]
    _write(place / "phantom.tif", phantom.image)
    _write(place / "labels.tif", np.where(labelled, phantom.labels, _UNLABELLED).astype(np.uint8))
    # The slices that somebody labelled do not count when the result is scored.
    _write(place / "truth.tif", np.where(labelled, _UNLABELLED, phantom.labels).astype(np.uint8))
    return phantom


def _write(path: Path, volume: NDArray[Any]) -> None:
    tifffile.imwrite(path, volume, photometric="minisblack", compression="zlib")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
