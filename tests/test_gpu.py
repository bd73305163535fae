"""The forward on a GPU against the one on a CPU; skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import Case, labels_of, make_bundle, probabilities_of, segment, smooth, store
from volseg.inference.transfer import Transfer

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU on this machine")
OPTIONS: dict[str, Any] = {"overlap": 0.25, "block": "24,24,24", "probabilities": True}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_voxels_come_back_as_they_went(device: str, dtype: str) -> None:
    transfer = Transfer(torch.device(device))
    voxels = smooth((6, 7, 8)).astype(dtype)[None]
    tensor = transfer.up(voxels).get()
    assert tensor.device.type == device
    np.testing.assert_array_equal(transfer.down(tensor), voxels)


@needs_gpu
@pytest.mark.parametrize("dims", [2, 3])
def test_a_gpu_answers_as_a_cpu_does_and_as_itself(dims: int, tmp_path: Path) -> None:
    patch = (1, 32, 32) if dims == 2 else (16, 16, 16)
    bundle = make_bundle(tmp_path / "bundle", dims=dims, patch=patch)
    case = Case(store(tmp_path / "a.zarr", smooth((48, 48, 48))), bundle, tmp_path)
    for name, more in {"cpu": {}, "cuda": {}, "again": {"block": "48,48,48"}}.items():
        device = "cpu" if name == "cpu" else "cuda"
        segment(case, tmp_path / f"{name}.zarr", device=device, **{**OPTIONS, **more})
    near = probabilities_of(tmp_path / "cuda.zarr").astype(int) - probabilities_of(tmp_path / "cpu.zarr")
    assert np.abs(near).max() <= 1
    np.testing.assert_array_equal(labels_of(tmp_path / "cuda.zarr"), labels_of(tmp_path / "again.zarr"))
