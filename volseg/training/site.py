"""Where a rank of a training runs: device, cores, memory, the other ranks, and whom it tells."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import torch

from volseg.errors import SpecError
from volseg.journal import Note
from volseg.models.hardware import fast_bf16, has_bf16
from volseg.spec import TrainSpec
from volseg.training.distributed import Group
from volseg.training.progress import ProgressCallback

# Of the memory that is free, the rest is for what else runs.
_MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Site:
    """What an adapter, local or on Ray, gives to one rank.

    `threads` are the CPU threads and `memory` the bytes that it may use. `report` takes progress, `note` single lines:
    of several ranks the first one calls them. `stop` is asked before every step whether the user wants an end;
    `restarted` says that this is another attempt of the same command, which goes on even where a fresh start was asked.
    """

    device: torch.device
    threads: int
    memory: int
    report: ProgressCallback
    note: Note
    stop: Callable[[], bool] = lambda: False
    restarted: bool = False
    group: Group = field(default_factory=Group)
    started: float = field(default_factory=time.monotonic)


def choose_device(spec: TrainSpec) -> torch.device:
    """Return the device that `spec` asks for; raises SpecError where it is not there."""
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise SpecError("--device cuda: no GPU can be used here; nothing was trained: say --device cpu, or auto")
    return torch.device("cuda" if spec.device != "cpu" and torch.cuda.is_available() else "cpu")


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_share(device: torch.device, ranks: int = 1) -> int:
    """Return the bytes that each of `ranks` on this machine may use: of the GPU's memory, else of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _MEMORY_SHARE)
    return int(psutil.virtual_memory().available * _MEMORY_SHARE / ranks)


def choose_dtype(spec: TrainSpec, device: torch.device) -> torch.dtype:
    """Return the arithmetic of the steps; left open, bf16 where the processor computes in it.

    Raises SpecError for fp16 on a CPU, and for bf16 where the processor has none.
    """
    if spec.precision == "fp16":
        if device.type == "cpu":
            raise SpecError(
                "--precision fp16 needs a GPU: CPUs compute in it more slowly than in fp32; nothing was trained: say "
                "--precision auto, bf16 or fp32"
            )
        return torch.float16
    if spec.precision == "bf16" and not has_bf16(device.type):
        raise SpecError(
            "--precision bf16 needs a processor that has it, and this one has not (on CPUs: AVX-512 or newer); nothing "
            "was trained: say --precision auto or fp32"
        )
    low = spec.precision == "bf16" or (spec.precision == "auto" and fast_bf16(device.type))
    return torch.bfloat16 if low else torch.float32
