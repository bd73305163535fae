"""Scores of a network on the validation region: overlapping windows, of which each voxel takes the most central one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor, nn

from volseg.geometry.box import Box, Triple
from volseg.geometry.lattice import AxisLattice
from volseg.models.fold import for_inference, memory_format
from volseg.training.metrics import ClassCounts, ProbabilityCounts, Scores
from volseg.training.sampler import IGNORED, Region

# A quarter of a window is seen twice; near a window's border a network knows too little.
_OVERLAP = 0.25


def windows(box: Box, patch: Triple) -> list[tuple[Box, Box]]:
    """Return pairs of a window of `patch` sides and its core; the cores tile `box` (network coordinates)."""
    axes = [list(_spans(size, side)) for size, side in zip(box.shape, patch, strict=True)]
    pairs = []
    for (a, i, j), (b, k, m), (c, n, o) in product(*axes):
        window = Box((a, b, c), (a + patch[0], b + patch[1], c + patch[2])).shifted(box.start)
        pairs.append((window, Box((i, k, n), (j, m, o)).shifted(box.start)))
    return pairs


def _spans(size: int, side: int) -> Iterator[tuple[int, int, int]]:
    """Yield origin, core start and core stop along one axis: neighbours share their overlap in the middle."""
    lattice = AxisLattice(size, side, max(1, side - int(side * _OVERLAP)))
    origins = [lattice.origin(i) for i in range(lattice.count)]
    cuts = [0, *((a + side + b) // 2 for a, b in pairwise(origins)), size]
    yield from zip(origins, cuts, cuts[1:], strict=False)


def spread(items: Sequence[tuple[Box, Box]], most: int) -> list[tuple[Box, Box]]:
    """Return at most `most` of `items`, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(most - 1, 1))] for i in range(most)]


class Validator:
    """Scores networks on the same windows of a region; `threads` single-threaded forwards at a time on CPUs."""

    def __init__(self, region: Region, patch: Triple, classes: int, *, sigmoid: bool, threads: int) -> None:
        self._region = region
        self._sigmoid = sigmoid
        self._classes = classes
        self._threads = threads
        self.windows = windows(region.box, patch)

    def score(
        self,
        network: nn.Module,
        dtype: torch.dtype = torch.float32,
        most: int | None = None,
        threshold: float | None = None,
    ) -> Scores:
        """Return the scores of `network`, at most `most` windows looked at, forwards in `dtype`."""
        device = next(network.parameters()).device
        ready = for_inference(network, str(device), dtype)
        chosen = spread(self.windows, most or len(self.windows))
        counts: ClassCounts | ProbabilityCounts
        counts = ProbabilityCounts() if self._sigmoid else ClassCounts(self._classes)
        with ThreadPoolExecutor(self._threads, "validate", torch.set_num_threads, (1,)) as pool:
            for truth, answer in pool.map(lambda pair: self._window(ready, device, dtype, *pair), chosen):
                known = truth != IGNORED
                values = answer[known].numpy()
                counts.add(truth[known].numpy(), values)
        if isinstance(counts, ProbabilityCounts):
            return counts.scores(threshold)
        return counts.scores()

    @torch.inference_mode()
    def _window(
        self, network: nn.Module, device: torch.device, dtype: torch.dtype, window: Box, core: Box
    ) -> tuple[Tensor, Tensor]:
        """Return the truth and the answer in the core, both (voxels,): a probability for sigmoid, else a class."""
        layout = memory_format(network)
        image = torch.from_numpy(np.ascontiguousarray(self._region.read_image(window)))[None]
        x = image[:, :, 0] if layout is torch.channels_last else image
        logits = network(x.to(device, dtype).contiguous(memory_format=layout)).float()
        if layout is torch.channels_last:
            logits = logits[:, :, None]
        inside = (slice(None), *core.relative_to(window.start).slices)
        logits = logits[0][inside]
        answer = torch.sigmoid(logits[0]) if self._sigmoid else logits.argmax(0)
        truth = torch.from_numpy(self._region.read_labels(core))
        return truth.reshape(-1), answer.cpu().reshape(-1)
