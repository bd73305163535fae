"""Gradients of a step's patches: over the ranks of a training, and on CPUs over several copies of the network in each.

Copies meet once a step, threads inside a network at every layer: with one thread each, two copies keep two cores busy,
also where other load on the machine would stall the layers.

The loss of a step is the mean over small groups of patches that are fixed by the patches' numbers, so that it does not
depend on how many ranks, copies and parts share the step: a Dice over whatever a worker happens to hold would.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from volseg.models.fold import memory_format
from volseg.training.distributed import Group
from volseg.training.dropout import SeededDropout
from volseg.training.losses import LayeredLoss
from volseg.training.syncnorm import synchronise

Outputs = Tensor | tuple[Tensor, ...]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a step's `batch` patches are shared: among ranks by number, on each in `accumulate` rounds of `replicas`."""

    batch: int
    replicas: int = 1
    threads: int = 1
    accumulate: int = 1
    rank: int = 0
    world: int = 1

    @property
    def group_count(self) -> int:
        """Number of groups over which the loss is taken: a power of two that makes groups of two to four."""
        return int(2 ** ((self.batch // 2 or 1).bit_length() - 1))

    def group(self, number: int) -> list[int]:
        """Return the numbers of the patches that share a loss with patch `number`: those equal modulo the groups."""
        return list(range(number % self.group_count, self.batch, self.group_count))

    @property
    def split(self) -> bool:
        """Whether ranks must meet for the loss of a group, because its patches lie on several of them."""
        apart = any(n % self.world != i % self.world for i in range(self.group_count) for n in self.group(i))
        return apart and self.accumulate == 1

    def rounds(self) -> list[list[list[list[int]]]]:
        """Return rounds of parts of groups of patch numbers, all those of this rank.

        Every rank has as many rounds. Groups stay together as long as there are enough of them.
        """
        mine = range(self.rank, self.batch, self.world)
        groups = [own for i in range(self.group_count) if (own := [n for n in self.group(i) if n in mine])]
        parts = min(min(self.accumulate, self.batch // self.world) * self.replicas, len(mine))
        if parts > len(groups):
            groups = [[n] for group in groups for n in group]
        return _split(_split(groups, parts), -(-parts // self.replicas))


def _split(items: Sequence[Item], parts: int) -> list[list[Item]]:
    """Cut `items` into `parts` runs of nearly equal lengths."""
    cuts = [round(i * len(items) / parts) for i in range(parts + 1)]
    return [list(items[a:b]) for a, b in pairwise(cuts)]


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The mean loss of a step over all ranks, and the numbers of the patches in groups whose loss is not finite."""

    mean: float
    broken: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Given:
    """This rank's patches of a step, and the factor of the loss."""

    images: Tensor
    labels: Tensor
    step: int
    scale: float


@dataclass(frozen=True, slots=True)
class _Part:
    """What one copy made of its part: the losses of its groups, and gradients that add up to the step's."""

    losses: list[Tensor]
    gradients: tuple[Tensor, ...]


class Gradients:
    """Computes gradients of `loss` over the patches of a step into the parameters of `network`.

    Copies share the parameters and have their own statistics of batch normalisation; those of `network` follow the
    first part of each round. With `sync_norm` they are taken over a round of all ranks. The order of summation is
    fixed: equal patches give equal gradients. Forwards run in `dtype`; `scale` multiplies the loss of fp16.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: LayeredLoss,
        sharing: Sharing,
        group: Group,
        *,
        dtype: torch.dtype = torch.float32,
        sync_norm: bool = False,
        seed: int = 0,
    ) -> None:
        """Share the work as `sharing` says; `seed` is that of dropout."""
        self._loss = loss
        self._sharing = sharing
        self._group = group
        self._seed = seed
        self._device = next(network.parameters()).device
        self._format = memory_format(network)
        self._dtype = dtype
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self._replicas = [network, *(_sharing(network) for _ in range(sharing.replicas - 1))]
        if sync_norm:
            synchronise(network, group)
        self._rounds = sharing.rounds()
        self._pool = ThreadPoolExecutor(sharing.replicas, "replica", torch.set_num_threads, (sharing.threads,))

    def compute(self, images: Tensor, labels: Tensor, step: int, scale: float = 1.0) -> StepLoss:
        """Set the gradients of one step from this rank's patches, images (b, c, z, y, x) and labels (b, z, y, x)."""
        given = _Given(images, labels, step, scale)
        losses: list[tuple[list[int], Tensor]] = []
        for parameter in self._parameters:
            parameter.grad = None
        for parts in self._rounds:
            work = list(zip(self._replicas, parts, strict=False))
            made = self._pool.map(lambda item: self._part(item[0], item[1], given), work)
            for groups, done in zip(parts, made, strict=True):
                losses += zip(groups, done.losses, strict=True)
                for parameter, gradient in zip(self._parameters, done.gradients, strict=True):
                    if parameter.grad is None:
                        parameter.grad = gradient
                    else:
                        parameter.grad.add_(gradient)
        return self._reduce(losses)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _part(self, network: nn.Module, groups: list[list[int]], given: _Given) -> _Part:
        # Patch n of the step is the (n // world)-th of this rank.
        rows = [n // self._sharing.world for group in groups for n in group]
        x, y = given.images[rows], given.labels[rows]
        if self._format is torch.channels_last:
            x, y = x[:, :, 0], y[:, 0]
        x = x.to(self._device).contiguous(memory_format=self._format)
        y = y.to(self._device)
        dropout = SeededDropout(self._device, (self._seed, given.step, groups[0][0]))
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32), dropout:
            outputs = network(x)
        numbers = [n for group in groups for n in group]
        if self._sharing.split:
            outputs, y, numbers = self._meet(outputs, y, numbers)
            groups = [self._sharing.group(group[0]) for group in groups]
        total = torch.zeros((), device=self._device)
        losses = []
        for group in groups:
            rows = [numbers.index(n) for n in group]
            loss = self._loss(_each(outputs, partial(_take, rows)), y[rows])
            losses.append(loss.detach())
            total = total + loss * (len(group) / self._sharing.batch * given.scale)
        return _Part(losses, torch.autograd.grad(total, self._parameters, allow_unused=True, materialize_grads=True))

    def _meet(self, outputs: Outputs, labels: Tensor, numbers: list[int]) -> tuple[Outputs, Tensor, list[int]]:
        """Return logits and labels of all patches of the step; those of other ranks are constants."""

        def gather(values: Tensor) -> Tensor:
            whole = values.new_zeros((self._sharing.batch, *values.shape[1:]))
            whole[numbers] = values.detach()
            self._group.sum_(whole)
            return whole.index_copy(0, torch.tensor(numbers, device=whole.device), values)

        return _each(outputs, gather), gather(labels), list(range(self._sharing.batch))

    def _reduce(self, losses: list[tuple[list[int], Tensor]]) -> StepLoss:
        """Sum gradients and losses over the ranks."""
        told = torch.zeros(1 + self._sharing.batch, dtype=torch.float64)
        for group, loss in losses:
            value = float(loss)
            told[0] += value * len(group) / self._sharing.batch
            if not math.isfinite(value):
                told[[1 + n for n in group]] = 1.0
        self._group.sum_(told)
        if self._group.world > 1:
            flat = torch.cat([p.grad.reshape(-1) for p in self._parameters if p.grad is not None])
            self._group.sum_(flat)
            first = 0
            for parameter in self._parameters:
                parameter.grad = flat[first : first + parameter.numel()].view_as(parameter)
                first += parameter.numel()
        mean, *broken = told.tolist()
        return StepLoss(mean, tuple(i for i, flag in enumerate(broken) if flag))


def _each(outputs: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    return change(outputs) if isinstance(outputs, Tensor) else tuple(change(level) for level in outputs)


def _take(rows: list[int], values: Tensor) -> Tensor:
    return values[rows]


def share_cores(cores: int, patches: int, *, low_precision: bool) -> tuple[int, int]:
    """Return how many replicas take part in a round of `patches` and how many threads each has.

    In fp32 a replica gets two patches at least: for a single one torch leaves oneDNN for a slower kernel.
    """
    replicas = max(1, min(cores, patches if low_precision else patches // 2))
    return replicas, max(1, cores // replicas)


def _sharing(network: nn.Module) -> nn.Module:
    """Return a copy of `network` whose parameters are the same tensors."""
    replica = copy.deepcopy(network)
    for mine, theirs in zip(replica.modules(), network.modules(), strict=True):
        for name, parameter in theirs.named_parameters(recurse=False):
            setattr(mine, name, parameter)
    return replica
