"""From raw voxels of a patch to probabilities: scale, forward, activation, always in batches of the same size."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import combinations, islice

import torch
from torch import Tensor, nn

from volseg.errors import NonFiniteError
from volseg.geometry import AXES
from volseg.inference.stopwatch import Stopwatch
from volseg.models.allocator import large_blocks_mapped
from volseg.models.fold import Kernels, for_inference
from volseg.models.manifest import BundleManifest


class Predictor:
    """Runs a bundle's networks on patches and averages what they answer.

    The mean goes over the members of an ensemble and, with `mirror`, over the patch and its mirror images along every
    axis of the network (4 in 2D, 8 in 3D), in float32 and always in the same order. The forward of a patch is the same
    wherever it runs: batches always have `batch` places, the last one is padded with what stood there before, and a CPU
    works with one thread (the caller's business).
    """

    def __init__(
        self, manifest: BundleManifest, networks: Sequence[nn.Module], *, mirror: bool, batch: int, precision: str,
        device: torch.device, kernels: Kernels = "tiled",
    ) -> None:  # fmt: skip
        self.classes = len(manifest.classes)
        self.sums = 1 if self.classes == 2 else self.classes
        self._sigmoid = manifest.activation == "sigmoid"
        self._dims = manifest.config.dims
        self._device = device
        self._ask_at_once = device.type == "cpu"
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self._layout = torch.channels_last if self._dims == 2 else torch.channels_last_3d
        self._networks = [for_inference(network, str(device), self._dtype, kernels) for network in networks]
        spatial = range(2, 2 + self._dims)
        most = self._dims if mirror else 0
        self._flips = [flip for count in range(most + 1) for flip in combinations(spatial, count)]
        scaling = manifest.scaling
        columns = (scaling.low, scaling.high, scaling.mean, [1.0 / s for s in scaling.std])
        self._low, self._high, self._mean, self._inverse_std = (self._channels(c) for c in columns)
        self._bias = None if manifest.class_bias is None else self._channels(manifest.class_bias)
        self.batch = batch
        self.forwards = 0
        """Forwards of single patches: patches times members times mirror images."""
        self._watch = Stopwatch(device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._input = torch.zeros(0, device=device)
        self._warm: set[torch.Size] = set()

    def twin(self) -> Predictor:
        """Return a predictor for another thread: the same networks, with a batch and counts of its own."""
        other = copy.copy(self)
        other.forwards = 0
        other._watch = Stopwatch(self._device)
        other._finite = torch.ones_like(self._finite)
        other._input = torch.zeros(0, device=self._device)
        return other

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self._device

    @property
    def seconds(self) -> float:
        """Time spent in forwards, activation and averaging included; waits for the device."""
        return self._watch.seconds

    @torch.inference_mode()
    def run(self, patches: Iterable[Tensor], axis: str) -> Iterator[Tensor]:
        """Yield the probabilities (sums, z, y, x), float32, of patches (c, z, y, x) in raw units, views welcome.

        All patches have one shape; a 2D network goes along `axis`, on which they are 1 deep. What an unpadded network
        answers is smaller than the patch. Raises NonFiniteError when a network answers NaN or Inf: at once on a CPU, on
        a GPU at the end, because asking in between would keep it waiting.
        """
        flat = AXES.index(axis) + 1 if self._dims == 2 else None
        waiting = iter(patches)
        self._finite.fill_(True)
        while group := list(islice(waiting, self.batch)):
            self._fill([raw if flat is None else raw.squeeze(flat) for raw in group])
            with self._watch.running(), nullcontext() if self._input.shape in self._warm else large_blocks_mapped():
                probabilities = self._answer(len(group))
            self._warm.add(self._input.shape)
            self.forwards += len(group) * len(self._networks) * len(self._flips)
            for probability in probabilities[: len(group)]:
                yield probability if flat is None else probability.unsqueeze(flat)
        self._refuse_nonfinite()

    def _channels(self, values: Sequence[float]) -> Tensor:
        """Return one value a channel, ready to meet a patch (c, [z,] y, x)."""
        return torch.tensor(values, dtype=torch.float32, device=self._device).view(-1, *[1] * self._dims)

    def _fill(self, group: list[Tensor]) -> None:
        """Put scaled patches into the batch."""
        shape = (self.batch, *group[0].shape)
        if self._input.shape != shape:
            self._input = torch.zeros(shape, dtype=torch.float32, device=self._device)
        for place, raw in zip(self._input, group, strict=False):
            torch.clamp(raw.to(torch.float32), self._low, self._high, out=place)
            place.sub_(self._mean).mul_(self._inverse_std)

    def _answer(self, count: int) -> Tensor:
        """Return the probabilities (batch, sums, [z,] y, x): the mean over members and mirror images."""
        x = self._input.to(self._dtype).contiguous(memory_format=self._layout)
        total: Tensor | None = None
        for network in self._networks:
            for flip in self._flips:
                logits: Tensor = network(x.flip(flip) if flip else x)
                # The places beyond hold what stood there before, perhaps the patch that another block failed with.
                self._finite.logical_and_(torch.isfinite(logits[:count]).all())
                if self._ask_at_once:
                    self._refuse_nonfinite()
                probability = self._activate(logits.float())
                if flip:
                    probability = probability.flip(flip)
                total = probability if total is None else total.add_(probability)
        assert total is not None
        copies = len(self._networks) * len(self._flips)
        return total if copies == 1 else total.div_(copies)

    def _activate(self, logits: Tensor) -> Tensor:
        if self._sigmoid:
            return torch.sigmoid(logits)
        if self._bias is not None:
            logits = logits + self._bias
        if self.classes == 2:
            return torch.sigmoid(logits[:, 1:] - logits[:, :1])
        return torch.softmax(logits.contiguous(), dim=1)

    def _refuse_nonfinite(self) -> None:
        if not bool(self._finite):
            raise NonFiniteError(
                "the network answered NaN or Inf; the block was set aside: look for extreme grey values there, or "
                "train the model longer"
            )


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
        facts["deterministic"] = str(torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32)
    else:
        facts |= {
            "chip": platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "onednn": _onednn(),
        }
    return named(facts)


def named(facts: dict[str, str]) -> dict[str, str]:
    """Return the facts with a short name for all of them together."""
    facts = {name: value for name, value in facts.items() if name != "name"}
    facts["name"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return facts


@cache
def _onednn() -> str:
    """Return the version of oneDNN that torch was built with."""
    found = re.search(r"MKL-DNN v([0-9.]+)", torch.__config__.show())
    return found[1] if found else "none"
