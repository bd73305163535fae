"""What others do with the same network, volume and windows: each function segments with one of them.

Each gets the plain network, as its users would hand it in, and returns labels (z, y, x). How the windows lie and how
they are put together is each peer's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Image = NDArray[np.float32]
Labels = NDArray[np.uint8]


@dataclass
class Setting:
    """What all peers share; `forward` counts seconds and forwards of single patches."""

    patch: int
    overlap: float
    classes: int
    cores: int
    forward: list[float]

    def timed(self, network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the network with a clock."""

        def call(batch: Tensor) -> Tensor:
            before = time.perf_counter()
            answer = network(batch)
            self.forward[0] += time.perf_counter() - before
            self.forward[1] += len(batch)
            return answer

        return call


class Network(nn.Module):
    """The network at a precision; answers float32 logits."""

    def __init__(self, inner: nn.Module, precision: str, out_channels: int) -> None:
        super().__init__()
        self.inner = inner
        self.out_channels = out_channels
        self._reduced = precision == "bf16"

    def forward(self, batch: Tensor) -> Tensor:
        """Return logits (n, classes, z, y, x)."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._reduced):
            answer: Tensor = self.inner(batch)
        return answer.float()


def monai(image: Image, network: nn.Module, setting: Setting) -> Labels:
    """MONAI's sliding window with Gaussian weights, on logits."""
    from monai.inferers.utils import sliding_window_inference

    logits = sliding_window_inference(
        torch.from_numpy(image)[None, None], setting.patch, 1, setting.timed(network), overlap=setting.overlap,
        mode="gaussian",
    )  # fmt: skip
    assert isinstance(logits, Tensor)
    return _argmax(logits[0])


def nnunet(image: Image, network: nn.Module, setting: Setting) -> Labels:
    """nnU-Net's predictor, without mirroring; its window and weights, in half precision on logits."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    class Clocked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, batch: Tensor) -> Tensor:
            return setting.timed(self.inner)(batch)

    predictor = nnUNetPredictor(
        tile_step_size=1 - setting.overlap, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False
    )
    labels = types.SimpleNamespace(num_segmentation_heads=setting.classes)
    plans = types.SimpleNamespace(get_label_manager=lambda _: labels)
    configuration = types.SimpleNamespace(patch_size=[setting.patch] * 3)
    predictor.manual_initialization(Clocked(), plans, configuration, None, {}, "", None)
    return _argmax(predictor.predict_sliding_window_return_logits(torch.from_numpy(image)[None]))


def torch_em(image: Image, network: nn.Module, setting: Setting) -> Labels:
    """torch-em's prediction with a halo: cropped, not blended."""
    _without_torchvision()
    from torch_em.util.prediction import predict_with_halo

    halo = _halo(setting)
    logits = predict_with_halo(
        image, network, ["cpu"], (setting.patch - 2 * halo,) * 3, (halo,) * 3, preprocess=None, disable_tqdm=True,
        prediction_function=lambda net, batch: setting.timed(net)(batch),
    )  # fmt: skip
    return np.asarray(logits.argmax(0), dtype=np.uint8)


def dask(image: Image, network: nn.Module, setting: Setting) -> Labels:
    """dask's map_overlap: cropped, not blended; one thread computes on each core."""
    from dask import array

    halo = _halo(setting)

    def predict(block: Image) -> Labels:
        # OpenMP counts its threads for every thread that calls it.
        torch.set_num_threads(1)
        with torch.inference_mode():
            return _argmax(setting.timed(network)(torch.from_numpy(np.ascontiguousarray(block))[None, None])[0])

    blocks = array.from_array(image, chunks=setting.patch - 2 * halo)
    work = blocks.map_overlap(
        predict, depth=halo, boundary="reflect", dtype=np.uint8, meta=np.empty((0,) * 3, np.uint8)
    )
    labels: Labels = work.compute(scheduler="threads", num_workers=setting.cores)
    return labels


PEERS: dict[str, tuple[str, Callable[[Image, nn.Module, Setting], Labels]]] = {
    "MONAI": ("monai", monai),
    "MONAI, torch.compile": ("monai", monai),
    "nnU-Net": ("nnunetv2", nnunet),
    "torch-em halo": ("torch_em", torch_em),
    "dask map_overlap": ("dask", dask),
}
"""The package and the function of every peer."""


def installed(peer: str) -> bool:
    """Tell whether a peer's package is there."""
    return importlib.util.find_spec(PEERS[peer][0]) is not None


def compiled(network: nn.Module, setting: Setting) -> nn.Module:
    """Return the network compiled for the patch, after one forward."""
    network.compile()
    with torch.inference_mode():
        network(torch.zeros(1, 1, *(setting.patch,) * 3))
    return network


def _argmax(logits: Tensor) -> Labels:
    labels: Labels = logits.argmax(0).to(torch.uint8).numpy()
    return labels


def _halo(setting: Setting) -> int:
    return round(setting.patch * setting.overlap / 2)


def _without_torchvision() -> None:
    """Put a stand-in where torchvision cannot be loaded.

    Its wheel fits one build of torch, and torch-em imports it for pictures of its trainings, which nobody draws here.
    """
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("torchvision", "torchvision.utils", "torchvision.transforms"):
            sys.modules[name] = _StandIn(name)


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(name)
