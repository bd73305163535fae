"""Two ranks of a training in processes of their own, for tests; they meet by gloo."""

from __future__ import annotations

import multiprocessing
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from volseg.spec import TrainSpec
from volseg.training.distributed import Group, TorchGroup
from volseg.training.ranks import run_rank
from volseg.training.site import Site

T = TypeVar("T")
CPU = torch.device("cpu")


class Ranks:
    """Runs a function on each of two ranks at a time."""

    def __init__(self, pool: ProcessPoolExecutor, folder: Path) -> None:
        self._pool = pool
        self._folder = folder

    def run(self, function: Callable[..., T], *values: Any) -> list[T]:
        """Return what `function(group, *values)` returns on either rank; functions and values must be picklable."""
        meeting = str(self._folder / uuid.uuid4().hex)
        jobs = [self._pool.submit(_on_rank, meeting, rank, function, values) for rank in range(2)]
        return [job.result(timeout=100) for job in jobs]


@contextmanager
def two_ranks(folder: Path) -> Iterator[Ranks]:
    """Start two processes, which take a few seconds to load torch, and end them."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield Ranks(pool, folder)


def _on_rank(meeting: str, rank: int, function: Callable[..., T], values: tuple[Any, ...]) -> T:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        return function(TorchGroup(CPU), *values)
    finally:
        dist.destroy_process_group()


def site_of(group: Group, threads: int = 1, **changes: Any) -> Site:
    """Return a quiet site on the CPU."""
    values: dict[str, Any] = {"device": CPU, "threads": threads, "memory": 1 << 32, "group": group}
    return Site(**values | {"report": lambda _: None, "note": lambda _: None} | changes)


def train_here(group: Group, spec: TrainSpec) -> dict[str, Any]:
    """Train and return the result."""
    return run_rank(spec, site_of(group, 2 // group.world)).as_dict()
