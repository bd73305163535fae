"""What the tests of training share: a volume of bright cuboids, its labels, and a spec that learns them in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support import store
from volseg.geometry import Triple
from volseg.spec import TrainSpec

SHAPE = (12, 48, 40)


def scene(shape: Triple = SHAPE, classes: int = 2, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return an image (z, y, x) of bright cuboids on noise, and its labels."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    for _ in range(60):
        z, y, x = (int(rng.integers(0, max(1, n - 4))) for n in shape)
        labels[z : z + 4, y : y + 8, x : x + 8] = rng.integers(1, classes)
    image = 60 + 60 * labels.astype(np.float64) + rng.normal(0, 20, shape)
    return image.clip(0, 255).astype(np.uint8), labels


def volumes(folder: Path, classes: int = 2, **changes: NDArray[Any]) -> dict[str, str]:
    """Write image and labels, those of `changes` instead where given, and return their places by option."""
    image, labels = scene(classes=classes)
    image, labels = changes.get("image", image), changes.get("labels", labels)
    return {"image": store(folder / "image.zarr", image, None), "labels": store(folder / "labels.zarr", labels, None)}


def spec_for(folder: Path, data: dict[str, str], **options: Any) -> TrainSpec:
    """Return a spec of a small 2D training of 40 steps; `options` win."""
    values: dict[str, Any] = {
        "out": str(folder / "bundle"), "dims": 2, "train_roi": "0:8,:,:", "val_roi": "9:12,:,:", "widths": (8, 16),
        "patch": (1, 32, 32), "batch": 4, "max_steps": 40, "threads": 2, "precision": "fp32",
    }  # fmt: skip
    return TrainSpec.read(values | data | options)


def rows_of(spec: TrainSpec) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl in the bundle of a finished training."""
    return [json.loads(line) for line in (Path(spec.out) / "metrics.jsonl").read_text().splitlines()]
