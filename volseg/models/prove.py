"""The halo of a network without a program: found by putting NaN outside, and proven by comparing parts with the whole.

Such a network (MONAI's, a plug-in's) may do anything, so nothing is believed: the halo is what NaN reaches, and windows
of a random input have to give the answers of the whole of it. A network that pools sizes which are no multiples of its
true step, and so takes any, is tried with windows on coarser and coarser steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from volseg.geometry.tiles import Halo
from volseg.models.network import TracedConfig
from volseg.models.sides import Allowed

_LONGEST = {2: 1024, 3: 384}
_SHORTEST = {2: 256, 3: 96}
_COARSEST = 64
_ACROSS = 16
# Of the largest answer, at 64 bits: what deep levels add to the answer of an untrained network may be very little.
_TOLERANCE = 1e-9
_INSTANCE: tuple[Any, ...] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_BATCH: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_GLOBAL: tuple[Any, ...] = (
    nn.GroupNorm, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip


def prove_halo(network: nn.Module, config: TracedConfig) -> tuple[Halo | None, str]:
    """Return the halo of `network`, which is in eval mode, in network coordinates; or None and why there is none."""
    network = copy.deepcopy(network).double()
    layer = _patch_dependent(network)
    if layer:
        return None, f"its layer {layer} takes statistics of the whole patch, so that every voxel depends on all"
    found: list[tuple[int, int, int]] = [(0, 0, 1)] * (3 - config.dims)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        for axis in range(3 - config.dims, 3):
            try:
                proven = _along(network, config, axis)
            except RuntimeError as error:
                return None, f"it fails on parts of an input ({str(error).strip().partition(chr(10))[0]})"
            if isinstance(proven, str):
                return None, proven
            found.append(proven)
    (a, b, c), (d, e, f), (g, h, i) = zip(*found, strict=True)
    return Halo((a, b, c), (d, e, f), (g, h, i)), ""


def _patch_dependent(network: nn.Module) -> str:
    for name, module in network.named_modules():
        counted = isinstance(module, _INSTANCE + _BATCH) and module.running_mean is None
        if counted or isinstance(module, _GLOBAL):
            return f"{name} ({type(module).__name__})"
    return ""


def _along(network: nn.Module, config: TracedConfig, axis: int) -> tuple[int, int, int] | str:
    """Return before, after and step along one axis, or why there are none."""
    for step in _steps(config, axis):
        probe = _Probe(network, config, axis, step)
        cut = probe.spoilt()
        if cut is None:
            return f"what one voxel depends on was not seen to end within {probe.side} voxels"
        if probe.holds(*cut):
            return *cut, step
    return "its answer to a part of an input differs from that to the whole, wherever the part begins"


def _steps(config: TracedConfig, axis: int) -> Iterator[int]:
    step = config.pooling[axis]
    yield step
    if config.phase[axis] == 0 and config.margin[axis] == 0:
        while (step := 2 * step) <= _COARSEST:
            yield step


class _Probe:
    """A network with a random input that is long along one axis; windows of it begin on multiples of `step`."""

    def __init__(self, network: nn.Module, config: TracedConfig, axis: int, step: int) -> None:
        self._network, self._config, self._step = network, config, step
        self._dim = axis - (3 - config.dims) + 2
        self._axis, self._margin = axis, config.margin[axis]
        self.side = 0

    def spoilt(self) -> tuple[int, int] | None:
        """Return how many answers NaN before a cut and behind it spoils beyond it; None where it spoils all."""
        length = _SHORTEST[self._config.dims]
        while length <= _LONGEST[self._config.dims]:
            self._make(max(length, 8 * self._step) + 2 * self._margin)
            first, last = self._cuts()
            low, high = self._x.clone(), self._x.clone()
            low.narrow(self._dim, 0, first).fill_(torch.nan)
            high.narrow(self._dim, last, self.side - last).fill_(torch.nan)
            begin, end = self._bad(low), self._bad(high)
            if not (bool(begin[-1]) or bool(end[0])):
                places = torch.arange(len(begin))
                before = int(places[begin].max()) + 1 - first if bool(begin.any()) else 0
                after = last - 2 * self._margin - int(places[end].min()) if bool(end.any()) else 0
                return max(0, before), max(0, after)
            length *= 2
        return None

    def holds(self, before: int, after: int) -> bool:
        """Tell whether windows give, but for what is spoilt, what the whole input gives."""
        whole, dim, lost = self._network(self._x), self._dim, 2 * self._margin
        worst, most = 0.0, float(whole.abs().max())
        # Other phases of a coarser true step are what must not be missed.
        for shift in (self._step, 2 * self._step, 3 * self._step):
            for a, b in ((shift, self.side), (0, self.side - shift)):
                kept_from, kept_to = a + (before if a else 0), b - lost - (after if b < self.side else 0)
                if kept_to <= kept_from:
                    return False
                part = self._network(self._x.narrow(dim, a, b - a).contiguous())
                found = part.narrow(dim, kept_from - a, kept_to - kept_from)
                worst = max(worst, float((found - whole.narrow(dim, kept_from, kept_to - kept_from)).abs().max()))
        return worst <= _TOLERANCE * most

    def _make(self, length: int) -> None:
        config = self._config
        sides = []
        for axis in range(3 - config.dims, 3):
            step = self._step if axis == self._axis else config.pooling[axis]
            least = config.smallest[axis] + (config.phase[axis] - config.smallest[axis]) % step
            wanted = length if axis == self._axis else _ACROSS + 2 * config.margin[axis]
            sides.append(Allowed(step, config.phase[axis] % step, least).fit(wanted, up=True))
        self.side = sides[self._dim - 2]
        self._x = torch.randn(1, config.in_channels, *sides, dtype=torch.float64)

    def _cuts(self) -> tuple[int, int]:
        """Return a begin and an end of windows, both near the middle."""
        first = self.side // 2 // self._step * self._step
        return first, self.side - first

    def _bad(self, x: Tensor) -> Tensor:
        """Return along the axis where any answer is NaN."""
        answer = torch.isnan(self._network(x))
        return answer.any(dim=[i for i in range(answer.ndim) if i != self._dim])
