"""From raw voxels of a patch to probabilities: scale, forward, activation, always in batches of the same size."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from volseg.errors import NonFiniteError
from volseg.geometry import AXES, Triple
from volseg.inference.onednn import use_onednn
from volseg.models.allocator import large_blocks_mapped
from volseg.models.fold import fold_batch_norm
from volseg.models.manifest import BundleManifest


class Predictor:
    """Runs a bundle's network on patches of one shape.

    The forward of a patch is the same wherever it runs: batches always have `batch` places, the last one is padded with
    what stood there before, and a CPU works with one thread (the caller's business).
    """

    def __init__(
        self, manifest: BundleManifest, network: nn.Module, patch: Triple, *, axis: str, batch: int,
        precision: str, device: torch.device,
    ) -> None:  # fmt: skip
        self.classes = len(manifest.classes)
        self.sums = 1 if self.classes == 2 else self.classes
        self._sigmoid = manifest.activation == "sigmoid"
        self._flat = AXES.index(axis) if manifest.config.dims == 2 else None
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        layout = torch.channels_last if manifest.config.dims == 2 else torch.channels_last_3d
        network = fold_batch_norm(network.eval()).to(device=device, dtype=self._dtype)
        if device.type == "cpu":
            network = use_onednn(network)
        self._network = network.to(memory_format=layout)  # type: ignore[call-overload]
        scaling = manifest.scaling
        columns = (scaling.low, scaling.high, scaling.mean, [1.0 / s for s in scaling.std])
        self._low, self._high, self._mean, self._inverse_std = (
            torch.tensor(c, dtype=torch.float32, device=device).view(-1, 1, 1, 1) for c in columns
        )
        self.batch = batch
        self.forwards = 0
        self.seconds = 0.0
        """Time spent in forwards, activation included."""
        self._input = torch.zeros((batch, scaling.channels, *patch), dtype=torch.float32, device=device)

    @torch.inference_mode()
    def run(self, patches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the probabilities (sums, z, y, x), float32, of patches (c, z, y, x) in raw units, views welcome.

        Raises NonFiniteError when the network answers NaN or Inf.
        """
        for start in range(0, len(patches), self.batch):
            group = patches[start : start + self.batch]
            for place, raw in zip(self._input, group, strict=False):
                torch.clamp(raw.to(torch.float32), self._low, self._high, out=place)
                place.sub_(self._mean).mul_(self._inverse_std)
            started = time.perf_counter()
            with nullcontext() if self.forwards else large_blocks_mapped():
                probabilities = self._activate(self._forward(len(group)))
            self.seconds += time.perf_counter() - started
            self.forwards += len(group)
            yield from probabilities[: len(group)]

    def _forward(self, count: int) -> Tensor:
        x = self._input.to(self._dtype)
        if self._flat is None:
            logits: Tensor = self._network(x.contiguous(memory_format=torch.channels_last_3d))
        else:
            flat = self._flat + 2
            logits = self._network(x.squeeze(flat).contiguous(memory_format=torch.channels_last)).unsqueeze(flat)
        # The places beyond hold what stood there before, perhaps the patch that another block failed with.
        if not bool(torch.isfinite(logits[:count]).all()):
            raise NonFiniteError(
                "the network answered NaN or Inf; the block was set aside: look for extreme grey values there, or "
                "train the model longer"
            )
        return logits.float()

    def _activate(self, logits: Tensor) -> Tensor:
        if self._sigmoid:
            return torch.sigmoid(logits)
        if self.classes == 2:
            return torch.sigmoid(logits[:, 1:] - logits[:, :1])
        return torch.softmax(logits.contiguous(), dim=1)


def count_gpus() -> int:
    """Return how many GPUs torch can use on this machine."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def fingerprint(device: str) -> dict[str, str]:
    """Return what the numerics depend on beside bundle, patch and precision: chip, instructions, library versions."""
    facts = {"device": device, "torch": torch.__version__.partition("+")[0]}
    if device == "cuda":
        facts |= {
            "chip": torch.cuda.get_device_name(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        }
    else:
        facts |= {"chip": platform.machine(), "instructions": torch.backends.cpu.get_cpu_capability()}
    facts["name"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return facts
