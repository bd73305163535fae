"""What the ranks of one training tell each other: sums, the first rank's decisions, and each other's errors.

All collectives of a step are asked for here and run in the same order on every rank. Gradients are summed explicitly,
not by torch's DistributedDataParallel: the copies of `replicas.py` share their parameters, which its hooks do not
foresee, ranks may have unequal shares of a step's patches, which its plain mean would weigh wrongly, and one sum a step
needs no `no_sync` around accumulated parts. What is lost is the overlap of the sum with the backward: a few per cent of
a step for networks of the sizes that segment volumes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from volseg.errors import VolsegError

T = TypeVar("T")


class Group:
    """A training of one rank; `TorchGroup` is one of several. Every rank must make the same calls."""

    rank = 0
    world = 1

    def sum_(self, values: Tensor) -> None:
        """Replace `values` by their sum over the ranks."""

    def first(self, value: T) -> T:
        """Return what the first rank passed in; any picklable value."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return what each rank passed in, in their order; any picklable value."""
        return [value]

    def agree(self, values: Sequence[float] = (), error: VolsegError | None = None) -> list[float]:
        """Return the `values` of the first rank; where any rank comes with an error, raise it on all of them."""
        if error is not None:
            raise error
        return list(values)


class TorchGroup(Group):
    """A rank among several, by the default process group of torch.distributed: gloo on CPUs, nccl on GPUs."""

    def __init__(self, device: torch.device) -> None:
        """Take part from `device`, on which collectives work."""
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self._device = device

    def sum_(self, values: Tensor) -> None:
        """Replace `values` by their sum over the ranks; on another device than the group's they are moved."""
        if values.device.type == self._device.type and values.is_contiguous():
            dist.all_reduce(values)
            return
        moved = values.to(self._device).contiguous()
        dist.all_reduce(moved)
        values.copy_(moved)

    def first(self, value: T) -> T:
        """Return what the first rank passed in; any picklable value."""
        holder: list[Any] = [value if self.rank == 0 else None]
        dist.broadcast_object_list(holder, 0, device=self._device)
        return cast(T, holder[0])

    def gather(self, value: T) -> list[T]:
        """Return what each rank passed in, in their order; any picklable value."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def agree(self, values: Sequence[float] = (), error: VolsegError | None = None) -> list[float]:
        """Return the `values` of the first rank; where any rank comes with an error, raise it on all of them."""
        mine = list(values) if self.rank == 0 else [0.0] * len(values)
        told = torch.tensor([float(error is not None), *mine], dtype=torch.float64, device=self._device)
        dist.all_reduce(told)
        failed, *agreed = told.tolist()
        if failed:
            raise next(e for e in self.gather(error) if e is not None)
        return agreed


def together(group: Group, action: Callable[[], T]) -> T:
    """Return what `action` returns here; where it raises an error of volseg on any rank, raise that on all of them."""
    error: VolsegError | None = None
    try:
        value = action()
    except VolsegError as caught:
        error = caught
    group.agree(error=error)
    return value
