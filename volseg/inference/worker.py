"""A worker: one process' torch settings, its block processor, and what it reports about itself."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from volseg.inference.attempt import Failure, attempt
from volseg.inference.block_processor import BlockProcessor
from volseg.inference.predictor import fingerprint
from volseg.models.allocator import keep_freed_memory
from volseg.planning import Plan
from volseg.spec import SegmentSpec
from volseg.storage.ledger import Receipt
from volseg.storage.volume import configure


class Worker:
    """Holds one process' share of a job, the same in this process and in a Ray actor.

    CPU workers compute with one thread: more workers use a machine better than more threads, and the bits of a forward
    depend on the number of threads.
    """

    def __init__(self, spec: SegmentSpec, plan: Plan, bundle_digest: str) -> None:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        keep_freed_memory()
        configure(threads=2)
        if plan.device == "cuda":
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        self.fingerprint = fingerprint(plan.device)
        self._processor = BlockProcessor(spec, plan, bundle_digest)

    def attempt(self, index: int) -> Receipt | Failure:
        """Process one block; see `volseg.inference.attempt`."""
        # OpenMP counts for every thread that calls it: in a new one, a small convolution would use all cores.
        torch.set_num_threads(1)
        return attempt(self._processor.process, index)

    def peak_memory(self) -> int:
        """Return this process' resident peak in bytes."""
        return resident_peak()

    def close(self) -> None:
        """Stop blocks under way and give torch its threads back."""
        self._processor.cancel()
        torch.set_num_threads(self._threads)


def resident_peak() -> int:
    """Return the largest resident size that this process ever had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not from getrusage: there a new process begins with the peak of the one that started it.
        (kib,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kib) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
