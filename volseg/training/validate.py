"""Scores of networks on the validation regions: overlapping windows, of which each voxel takes the most central one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from volseg.errors import VolsegError
from volseg.geometry.box import Box, Triple
from volseg.geometry.lattice import AxisLattice
from volseg.models.fold import for_inference, memory_format
from volseg.training.distributed import Group
from volseg.training.metrics import ClassCounts, ProbabilityCounts, Scores
from volseg.training.region import IGNORED, Region

# A quarter of a window is seen twice; near a window's border a network knows too little.
_OVERLAP = 0.25
# Probabilities that a class bias is tuned on.
_SAMPLED = 2_000_000

Item = tuple[Region, Box, Box]
"""A region, the answer's box of a window in it, and the part of that box which counts."""


def windows(box: Box, side: Triple) -> list[tuple[Box, Box]]:
    """Return pairs of a window of `side` and its core; the cores tile `box` (network coordinates)."""
    axes = [list(_spans(size, s)) for size, s in zip(box.shape, side, strict=True)]
    pairs = []
    for (a, i, j), (b, k, m), (c, n, o) in product(*axes):
        window = Box((a, b, c), (a + side[0], b + side[1], c + side[2])).shifted(box.start)
        pairs.append((window, Box((i, k, n), (j, m, o)).shifted(box.start)))
    return pairs


def _spans(size: int, side: int) -> Iterator[tuple[int, int, int]]:
    """Yield origin, core start and core stop along one axis: neighbours share their overlap in the middle."""
    lattice = AxisLattice(size, side, max(1, side - int(side * _OVERLAP)))
    origins = [lattice.origin(i) for i in range(lattice.count)]
    cuts = [0, *((a + side + b) // 2 for a, b in pairwise(origins)), size]
    yield from zip(origins, cuts, cuts[1:], strict=False)


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most `most` of `items`, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(most - 1, 1))] for i in range(most)]


@dataclass(frozen=True)
class Setting:
    """What is validated: `patch` and the `margin` that the answer lacks on each side, `classes`, and by how many.

    `threads` single-threaded forwards run at a time on CPUs; with a `sigmoid` the network has one channel.
    """

    patch: Triple
    margin: Triple
    classes: int
    sigmoid: bool
    threads: int = 1


class Validator:
    """Scores networks on the same windows of all regions, which the ranks of `group` share."""

    def __init__(self, regions: Sequence[Region], setting: Setting, group: Group | None = None) -> None:
        self._setting = setting
        self._group = group or Group()
        z, y, x = (p - 2 * m for p, m in zip(setting.patch, setting.margin, strict=True))
        self.windows = [(region, *pair) for region in regions for pair in windows(region.box, (z, y, x))]

    def score(
        self,
        networks: Sequence[nn.Module],
        *,
        dtype: torch.dtype = torch.float32,
        most: int | None = None,
        bias: Sequence[float] | None = None,
    ) -> Scores:
        """Return the scores of the mean answer of `networks`, at most `most` windows looked at, forwards in `dtype`.

        `bias` has a value a class, which is added to the logits. Every rank returns the same.
        """
        counts = ProbabilityCounts() if self._setting.sigmoid else ClassCounts(self._setting.classes)

        def add(truth: NDArray[np.int64], answer: Tensor) -> None:
            values = answer[0] if self._setting.sigmoid else answer.argmax(0)
            counts.add(truth, values.numpy())

        self._each(networks, spread(self.windows, most or len(self.windows)), add, dtype, bias)
        table = counts.histogram if isinstance(counts, ProbabilityCounts) else counts.confusion
        self._group.sum_(torch.from_numpy(table))
        return counts.scores()

    def sample(self, networks: Sequence[nn.Module]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return truth (n,) and mean probabilities (n, classes) of labelled voxels of all windows, one after the other.

        At most about two million values, drawn alike on every call; every rank returns those of all.
        """
        share = min(1.0, _SAMPLED / (self._setting.classes * sum(core.size for _, _, core in self.windows)))
        numbers = iter(range(self._group.rank, len(self.windows), self._group.world))
        found: dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}

        def add(truth: NDArray[np.int64], answer: Tensor) -> None:
            number = next(numbers)
            kept = np.flatnonzero(np.random.default_rng(number).random(len(truth)) < share)
            found[number] = (truth[kept], answer.numpy()[:, kept].T)

        self._each(networks, self.windows, add, torch.float32, None)
        every = {number: pair for rank in self._group.gather(found) for number, pair in rank.items()}
        pairs = [every[number] for number in sorted(every)]
        return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])

    def _each(
        self,
        networks: Sequence[nn.Module],
        chosen: Sequence[Item],
        add: Callable[[NDArray[np.int64], Tensor], None],
        dtype: torch.dtype,
        bias: Sequence[float] | None,
    ) -> None:
        """Call `add` with truth (n,) and probabilities (channels, n) of the labelled voxels of this rank's windows."""
        device = next(networks[0].parameters()).device
        ready = [for_inference(network, str(device), dtype) for network in networks]
        offset = torch.tensor(bias, device=device) if bias is not None else None
        error: VolsegError | None = None
        mine = chosen[self._group.rank :: self._group.world]
        with ThreadPoolExecutor(self._setting.threads, "validate", torch.set_num_threads, (1,)) as pool:
            try:
                for truth, answer in pool.map(lambda item: self._window(ready, device, dtype, offset, item), mine):
                    known = truth != IGNORED
                    add(truth[known], answer[:, torch.from_numpy(known)])
            except VolsegError as caught:
                error = caught
        self._group.agree(error=error)

    @torch.inference_mode()
    def _window(
        self, networks: Sequence[nn.Module], device: torch.device, dtype: torch.dtype, bias: Tensor | None, item: Item
    ) -> tuple[NDArray[np.int64], Tensor]:
        """Return the truth (voxels,) in the core and the mean probabilities (channels, voxels) there."""
        region, answer, core = item
        layout = memory_format(networks[0])
        image = torch.from_numpy(np.ascontiguousarray(region.read_image(_grown(answer, self._setting.margin))))[None]
        x = image[:, :, 0] if layout is torch.channels_last else image
        x = x.to(device, dtype).contiguous(memory_format=layout)
        inside = (slice(None), *core.relative_to(answer.start).slices)
        total: Tensor | None = None
        for network in networks:
            logits = network(x).float()
            logits = logits[:, :, None] if layout is torch.channels_last else logits
            values = logits[0][inside].flatten(1)
            if bias is not None:
                values = values + bias[:, None]
            values = torch.sigmoid(values) if self._setting.sigmoid else torch.softmax(values, 0)
            total = values if total is None else total + values
        assert total is not None
        return region.read_labels(core).reshape(-1), (total / len(networks)).cpu()


def _grown(box: Box, margin: Triple) -> Box:
    a, b, c = (i - m for i, m in zip(box.start, margin, strict=True))
    d, e, f = (i + m for i, m in zip(box.stop, margin, strict=True))
    return Box((a, b, c), (d, e, f))
