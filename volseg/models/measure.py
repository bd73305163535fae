"""Finding out by running it what a network without a program takes and costs: `Measured`, for its configuration."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from volseg.errors import BundleError
from volseg.geometry.box import Triple
from volseg.models.monai import first_line
from volseg.models.network import Measured, NetworkConfig, TracedConfig
from volseg.models.registry import build
from volseg.models.sides import Allowed

_USUAL = (64, 96, 128)
_LARGEST = {2: 384, 3: 160}
_MOST_POOLING = 128
# Large enough for margins not to matter much.
_COSTED = {2: 512, 3: 128}
_PRODUCTS = {torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}
# What a network may raise at a size that it does not take, or always.
_REFUSALS = (RuntimeError, ValueError, AssertionError, IndexError, TypeError, ImportError)
# What freed memory between tensors adds at most; see `footprint`.
_HEAP = 1.4


def complete(name: str, config: NetworkConfig) -> NetworkConfig:
    """Return `config` of architecture `name`, measured where it has to be and was not yet.

    Raises BundleError as `measure_network` does.
    """
    if not isinstance(config, TracedConfig) or config.measured is not None:
        return config
    found = measure_network(build(name, config), config.dims, config.in_channels, config.out_channels)
    return config.model_copy(update={"measured": found})


def measure_network(network: nn.Module, dims: int, in_channels: int, out_channels: int | None = None) -> Measured:
    """Run `network` on inputs (1, in_channels, [z,] y, x) of many sizes and return what it takes and costs.

    Sizes are tried on tensors without values where the network can work on such. A receptive field that is not seen to
    end is given as the side that it was measured with. Raises BundleError where no size gives one tensor of logits, of
    `out_channels` channels where these are given, that is smaller by the same margin at each end.
    """
    kept = network.training
    network.eval()
    try:
        probe = _find(network, dims, in_channels, out_channels)
        rules = [Allowed()] * (3 - dims) + [_rule(probe, axis) for axis in range(dims)]
        sides = (
            [rule.fit(_COSTED[dims], up=True) for rule in rules[3 - dims :]] if probe.device == "meta" else probe.sides
        )
        cost = _cost(probe, sides)
        reach = _receptive_field(network, probe, rules)
    finally:
        network.train(kept)
    voxels = prod(sides)
    return Measured(
        pooling=_triple([rule.step for rule in rules]),
        phase=_triple([rule.phase for rule in rules]),
        smallest=_triple([rule.smallest for rule in rules]),
        margin=_triple([0] * (3 - dims) + [lost // 2 for lost in probe.lost]),
        receptive_field=reach,
        parameter_count=sum(p.numel() for p in network.parameters()),
        state_bytes=sum(t.numel() * t.element_size() for t in network.state_dict().values()),
        macs_per_voxel=cost.flops / 2 / voxels,
        convolved_values_per_voxel=cost.convolved / voxels,
        activation_bytes_per_voxel=_HEAP * cost.peak / voxels,
    )


@dataclass
class _Probe:
    """A network, on a device, with sides that it takes and what it cuts off of them."""

    network: nn.Module
    device: str
    channels: int
    outputs: int | None
    sides: tuple[int, ...]
    lost: tuple[int, ...] = field(default=())

    @torch.no_grad()
    def run(self, sides: Sequence[int]) -> Tensor:
        """Return the answer to an input of `sides`; raises what the network raises, BundleError for a wrong answer."""
        answer = self.network(torch.zeros(1, self.channels, *sides, device=self.device))
        if isinstance(answer, Tensor) and answer.ndim == len(sides) + 2 and self.outputs in {None, answer.shape[1]}:
            return answer
        found = f"a tensor of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        wanted = f"(1, {self.outputs or 'c'}, {'z, ' * (len(sides) - 2)}y, x)"
        raise BundleError(
            f"{type(self.network).__name__} answers to {self.channels} channels of {tuple(sides)} with {found}; it "
            f"cannot be used: it must give one tensor of logits {wanted}"
        )

    def lose(self, sides: Sequence[int]) -> tuple[int, ...] | None:
        """Return by how much the answer is smaller than `sides`; None where these are not possible."""
        try:
            answer = self.run(sides)
        except _REFUSALS:
            return None
        lost = tuple(side - a for side, a in zip(sides, answer.shape[2:], strict=True))
        return lost if all(n >= 0 and n % 2 == 0 for n in lost) else None


def _find(network: nn.Module, dims: int, channels: int, outputs: int | None) -> _Probe:
    without_values = copy.deepcopy(network).to("meta")
    sides = (*_USUAL, *range(_USUAL[0] // 2, _LARGEST[dims], 2))
    for probed, device, candidates in ((without_values, "meta", sides), (network, "cpu", _USUAL)):
        for side in candidates:
            probe = _Probe(probed, device, channels, outputs, (side,) * dims)
            lost = probe.lose(probe.sides)
            if lost is not None:
                probe.lost = lost
                return probe
    try:
        probe.run(probe.sides)
        why = "its answer is not smaller by the same at both ends"
    except _REFUSALS as error:
        why = first_line(error)
    raise BundleError(
        f"{type(network).__name__} gives no usable answer to inputs from {min(sides)} to {max(sides)} voxels a side "
        f"({why}); it cannot be used: it must map (b, {channels}, {'z, ' * (dims - 2)}y, x) to one tensor of logits"
    )


def _rule(probe: _Probe, axis: int) -> Allowed:
    """Return the allowed sides along `axis`."""

    def allowed(side: int) -> bool:
        sides = list(probe.sides)
        sides[axis] = side
        return side > 0 and probe.lose(sides) == probe.lost

    base = probe.sides[axis]
    for step in range(1, _MOST_POOLING + 1):
        if allowed(base + step):
            smallest = base
            while allowed(smallest - step):
                smallest -= step
            return Allowed(step, base % step, smallest)
    raise BundleError(
        f"{type(probe.network).__name__} takes {base} voxels a side and no other size up to {_MOST_POOLING} more; it "
        "cannot be used: patches of different sizes must be possible"
    )


@dataclass(frozen=True, slots=True)
class _Cost:
    """Of one forward: floating-point operations, values that convolutions make, most bytes alive at a time."""

    flops: int
    convolved: int
    peak: int


def _cost(probe: _Probe, sides: Sequence[int]) -> _Cost:
    counter = FlopCounterMode(display=False)
    with counter:
        probe.run(sides)
    weights = {_storage(tensor).cdata for tensor in probe.network.state_dict().values()}
    watch = _Watch(weights)
    with watch:
        probe.run(sides)
    # The input does not count.
    peak = max(0, watch.highest - 4 * probe.channels * prod(sides))
    return _Cost(counter.get_total_flops(), watch.convolved, peak)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches which of the tensors that operations make are alive, and counts what convolutions and products make."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.highest = 0
        self.convolved = 0
        self._known = known
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in _PRODUCTS:
            self.convolved += made.numel()
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                place = _storage(tensor)
                if place.cdata not in self._known:
                    self._alive[place.cdata] = (place, tensor.untyped_storage().nbytes())
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}  # type: ignore[no-untyped-call]
        self.highest = max(self.highest, sum(size for _, size in self._alive.values()))
        return made


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


@torch.no_grad()
def _receptive_field(network: nn.Module, probe: _Probe, rules: Sequence[Allowed]) -> Triple:
    """Return how far a NaN in the middle of the input reaches, and what other places within a pooled cell may add."""
    own = rules[-len(probe.sides) :]
    # Where a margin is lost, the middle must be far enough from the ends of what is left.
    sides = [rule.fit(side + 2 * lost, up=True) for rule, side, lost in zip(own, probe.sides, probe.lost, strict=True)]
    x = torch.zeros(1, probe.channels, *sides)
    place = x[0]
    for side in sides:
        place = place.select(1, side // 2)
    place.fill_(torch.nan)
    touched = torch.isnan(network(x)[0]).any(dim=0)
    found = [0] * (3 - len(sides))
    for axis, (rule, side, lost) in enumerate(zip(own, sides, probe.lost, strict=True)):
        places = torch.nonzero(touched.any(dim=[i for i in range(touched.ndim) if i != axis])).flatten()
        first, last = (int(places.min()), int(places.max())) if len(places) else (0, 0)
        if first == 0 or last == touched.shape[axis] - 1:
            found.append(side)
        else:
            reach = max(side // 2 - lost // 2 - first, last + lost // 2 - side // 2) + rule.step - 1
            found.append(min(side, reach))
    return _triple(found)


def _triple(values: Sequence[int]) -> Triple:
    a, b, c = values
    return a, b, c
