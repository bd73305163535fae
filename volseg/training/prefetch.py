"""Batches made ahead by threads, in the order of the steps whatever the threads do."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from volseg.training.sampler import Sampler

_BATCHES_AHEAD = 3


@dataclass(frozen=True, eq=False)
class _Batch:
    """Tensors that several threads fill, one patch each."""

    images: Tensor
    labels: Tensor
    patches: list[Future[None]]


class Prefetcher:
    """Makes the batches of worker `rank` of `world` ahead, from step `first` on; close it in the end.

    Each of the `threads` makes one patch at a time; the batches are the same for any number of them. What goes wrong
    there is raised where the batch is asked for. `waited`: the seconds spent waiting.
    """

    def __init__(
        self, sampler: Sampler, size: int, first: int, rank: int = 0, world: int = 1, threads: int = 1
    ) -> None:
        self.waited = 0.0
        self._sampler = sampler
        self._size = size
        self._numbers = range(rank, size, world)
        self._step = first
        # A patch takes one core; the others belong to the network.
        self._pool = ThreadPoolExecutor(threads, "patches", torch.set_num_threads, (1,))
        self._batches: deque[_Batch] = deque()
        # Every thread has a patch in hand and one to come, in whole batches.
        ahead = max(_BATCHES_AHEAD, -(-2 * threads // max(len(self._numbers), 1)))
        for _ in range(ahead):
            self._start()

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the next batch, images (b, c, ...) and labels (b, ...); raises what its making raised."""
        started = time.perf_counter()
        batch = self._batches.popleft()
        for patch in batch.patches:
            patch.result()
        self.waited += time.perf_counter() - started
        self._start()
        return batch.images, batch.labels

    def close(self) -> None:
        """Drop what was not begun and wait for the rest."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> None:
        images, labels = self._sampler.empty(len(self._numbers))
        step = self._step

        def make(i: int, number: int) -> None:
            images[i], labels[i] = self._sampler.draw(step, number, self._size)

        patches = [self._pool.submit(make, i, number) for i, number in enumerate(self._numbers)]
        self._batches.append(_Batch(images, labels, patches))
        self._step += 1
