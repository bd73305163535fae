"""A worker: one process' torch settings, its block processor, and what it reports about itself."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from volseg.inference.attempt import Answer, Failure, attempt
from volseg.inference.block_processor import BlockProcessor
from volseg.inference.predictor import fingerprint, named
from volseg.models.allocator import keep_freed_memory, status_bytes
from volseg.planning import Plan
from volseg.planning.task import Task
from volseg.spec import SegmentSpec
from volseg.storage.volume import configure


class Worker:
    """Holds one process' share of a job, the same in this process and in a Ray actor.

    CPU workers compute with one thread: more workers use a machine better than more threads, and the bits of a forward
    depend on the number of threads. `other` is one of the same process, of this job or an earlier one: its networks
    are used again where they fit.
    """

    def __init__(self, spec: SegmentSpec, plan: Plan, bundle_digest: str, other: Worker | None = None) -> None:
        self._threads = torch.get_num_threads()
        self._measuring = threading.Lock()
        self._highest = self._peak = 0
        self._shared = resident_shared()
        self._on_gpu = plan.device == "cuda"
        settle(plan.device)
        configure(threads=1 + (plan.workers if plan.one_process else 1))
        beside = other._processor if other is not None else None
        self._processor: BlockProcessor = BlockProcessor(spec, plan, bundle_digest, beside)
        self.fingerprint = named(fingerprint(plan.device) | self._processor.numerics)

    def announce(self, index: int) -> None:
        """Say that a task of this block comes next; see `volseg.inference.block_processor`."""
        self._processor.announce(index)

    def attempt(self, task: Task, inbox: Sequence[NDArray[np.int32]] = ()) -> Answer | Failure:
        """Do one task, with its parcels; see `volseg.inference.attempt`."""
        # OpenMP counts for every thread that calls it: in a new one, a small convolution would use all cores.
        torch.set_num_threads(1)
        return attempt(lambda: self._processor.process(task, inbox), task.index)

    def peak_memory(self) -> int:
        """Return this process' resident peak in bytes, with what it shares with others as far as it was new to it.

        Ray's object store is memory that all processes of a machine share, and pages that a process has once seen count
        as its own for ever. So of those only what a block added is counted: the seams that it read and wrote.
        """
        peak, shared = resident_peak(), resident_shared()
        with self._measuring:
            if peak > self._highest:
                self._highest = peak
                self._peak = max(self._peak, peak - self._shared)
            self._shared = shared
            return self._peak

    def gpu_memory(self) -> dict[str, int]:
        """Return bytes of GPU memory by kind: allocated, reserved and peak of this process, total; empty on a CPU."""
        if not self._on_gpu:
            return {}
        return {
            "allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(),
            "peak": torch.cuda.max_memory_reserved(), "total": torch.cuda.mem_get_info()[1],
        }  # fmt: skip

    def close(self) -> None:
        """Stop blocks under way and give torch its threads back."""
        self._processor.cancel()
        torch.set_num_threads(self._threads)


def workers_of(spec: SegmentSpec, plan: Plan, bundle_digest: str, other: Worker | None = None) -> list[Worker]:
    """Return the workers of a plan whose workers share this process, and with it the networks; see `Worker`."""
    first = Worker(spec, plan, bundle_digest, other)
    return [first, *(Worker(spec, plan, bundle_digest, first) for _ in range(plan.workers - 1))]


def settle(device: str) -> None:
    """Give this process the settings that numerics and speed of a forward depend on."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if device == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def resident_shared() -> int:
    """Return how much shared memory counts as resident in this process now, in bytes; 0 where nobody says."""
    return status_bytes("RssShmem") or 0


def resident_peak() -> int:
    """Return the largest resident size that this process ever had, in bytes."""
    # Not from getrusage, where it can be helped: there a new process begins with the peak of the one that started it.
    if (here := status_bytes("VmHWM")) is not None:
        return here
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
