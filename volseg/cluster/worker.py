"""The Ray actor: a thin shell around `volseg.inference.worker.Worker`."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from volseg.errors import InputError, VolsegError
from volseg.inference.attempt import Failure
from volseg.planning import Plan
from volseg.spec import SegmentSpec
from volseg.storage.ledger import Receipt

# What a worker's process must have in its environment before it starts: large tensors stay mapped, all threads share
# one heap (the others would map large tensors anew each time), and one thread computes.
WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


@dataclass(frozen=True)
class Started:
    """What a worker says after it loaded the model: its fingerprint, or why it cannot work; `node` is its machine."""

    fingerprint: dict[str, str] | None
    message: str = ""
    fatal: bool = False
    node: str = ""


class SegmentActor:
    """One worker in a process of its own; errors come back as values, voxels never do."""

    def start(self, spec: SegmentSpec, plan: Plan, bundle_digest: str) -> Started:
        """Load the model and open the volumes."""
        from volseg.inference.worker import Worker

        try:
            self._worker = Worker(spec, plan, bundle_digest)
        except VolsegError as error:
            # What is wrong with the user's input is wrong for every worker.
            return Started(None, str(error), fatal=isinstance(error, InputError))
        return Started(self._worker.fingerprint, node=ray.get_runtime_context().get_node_id())

    def attempt(self, index: int) -> tuple[Receipt | Failure, int]:
        """Process one block; return its outcome and the process' peak memory in bytes."""
        return self._worker.attempt(index), self._worker.peak_memory()
