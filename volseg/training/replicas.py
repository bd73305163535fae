"""Gradients of a batch: on CPUs by several copies of the network, each with a part of the batch and of the cores.

Copies meet once a step, threads inside a network at every layer: with one thread each, two copies keep two cores busy,
also where other load on the machine would stall the layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from volseg.models.fold import memory_format

Loss = Callable[[Tensor, Tensor], Tensor]


class Gradients:
    """Computes gradients of `loss` over batches into the parameters of `network`.

    Copies share the parameters and have their own statistics of batch normalisation; those of `network` follow the
    first part of each batch. The order of summation is fixed: equal batches give equal gradients.
    """

    def __init__(
        self, network: nn.Module, loss: Loss, replicas: int, threads: int = 1, *, low_precision: bool = False
    ) -> None:
        """Share the work among `replicas` copies of `threads` threads each."""
        self._network = network
        self._loss = loss
        self._device = next(network.parameters()).device
        self._format = memory_format(network)
        self._low_precision = low_precision
        self._parameters = list(network.parameters())
        self._replicas = [network, *(_sharing(network) for _ in range(replicas - 1))]
        self._pool = ThreadPoolExecutor(replicas, "replica", torch.set_num_threads, (threads,))

    def compute(self, images: Tensor, labels: Tensor) -> float:
        """Set the gradients of one batch, images (b, c, z, y, x) and labels (b, z, y, x), and return its mean loss."""
        parts = min(len(self._replicas), len(images))
        work = list(zip(self._replicas, images.chunk(parts), labels.chunk(parts), strict=False))
        total = 0.0
        for i, (loss, gradients, size) in enumerate(self._pool.map(lambda item: self._part(*item), work)):
            share = size / len(images)
            total += loss * share
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if i == 0:
                    parameter.grad = gradient.mul_(share)
                else:
                    assert parameter.grad is not None
                    parameter.grad.add_(gradient, alpha=share)
        return total

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _part(self, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, tuple[Tensor, ...], int]:
        flat = self._format is torch.channels_last
        x = images[:, :, 0] if flat else images
        y = labels[:, 0] if flat else labels
        x = x.to(self._device).contiguous(memory_format=self._format)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._low_precision):
            logits = network(x)
        loss = self._loss(logits, y.to(self._device))
        return float(loss.detach()), torch.autograd.grad(loss, self._parameters), len(images)


def share_cores(cores: int, batch: int, *, low_precision: bool) -> tuple[int, int]:
    """Return how many replicas take part in a batch and how many threads each has.

    In fp32 a replica gets two patches at least: for a single one torch leaves oneDNN for a slower kernel.
    """
    replicas = max(1, min(cores, batch if low_precision else batch // 2))
    return replicas, max(1, cores // replicas)


def _sharing(network: nn.Module) -> nn.Module:
    """Return a copy of `network` whose parameters are the same tensors."""
    replica = copy.deepcopy(network)
    for mine, theirs in zip(replica.modules(), network.modules(), strict=True):
        for name, parameter in theirs.named_parameters(recurse=False):
            setattr(mine, name, parameter)
    return replica
