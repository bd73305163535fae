"""The Ray actor: a thin shell around `volseg.inference.worker.Worker`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from numpy.typing import NDArray

from volseg.cluster.metrics import tell_gpu_memory
from volseg.errors import InputError, VolsegError
from volseg.inference.attempt import Answer
from volseg.planning import Plan
from volseg.planning.task import Task, parcels_of
from volseg.redaction import redact
from volseg.spec import SegmentSpec

if TYPE_CHECKING:
    from volseg.inference.worker import Worker

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
JOB = "VOLSEG_JOB"
"""Environment variable with what the metrics of a worker's process call its job."""

_TELL_SECONDS = 5.0


@dataclass(frozen=True)
class Started:
    """What a worker says after it loaded the model: its fingerprint, or why it cannot work."""

    fingerprint: dict[str, str] | None
    message: str = ""
    fatal: bool = False


@contextmanager
def clean_errors() -> Iterator[None]:
    """Take credentials out of whatever a library raises inside, before Ray keeps and shows it."""
    try:
        yield
    except VolsegError:
        raise
    except Exception as error:  # noqa: BLE001 - raised again, in words that may be read
        message = redact(traceback.format_exc(limit=20))
        raise RuntimeError(f"{type(error).__name__} in a worker:\n{message}") from None


class SegmentActor:
    """One worker in a process of its own; errors come back as values, voxels as objects that no driver opens."""

    _worker: Worker | None = None
    _plan: Plan | None = None
    _teller: threading.Thread | None = None

    def here(self) -> str:
        """Return the id of this process' machine; long before the model is loaded."""
        return str(ray.get_runtime_context().get_node_id())

    def start(self, spec: SegmentSpec, plan: Plan, bundle_digest: str) -> Started:
        """Load the model and open the volumes; called again, for another job."""
        from volseg.inference.predictor import count_gpus
        from volseg.inference.worker import Worker
        from volseg.storage import rate

        rate.share(plan.workers)
        if plan.device == "cuda" and not count_gpus():
            return Started(None, _no_gpu(), fatal=True)
        before, self._worker = self._worker, None
        self._plan = plan
        if before is not None:
            before.close()
        try:
            with clean_errors():
                self._worker = Worker(spec, plan, bundle_digest, before)
        except VolsegError as error:
            # What is wrong with the user's input is wrong for every worker.
            return Started(None, str(error), fatal=isinstance(error, InputError))
        if self._teller is None and self.gpu_memory():
            self._teller = threading.Thread(target=self._tell_memory, name="gpu-memory", daemon=True)
            self._teller.start()
        return Started(self._worker.fingerprint)

    def gpu_memory(self) -> dict[str, int]:
        """Return bytes of GPU memory by kind; nothing on a CPU."""
        return self._worker.gpu_memory() if self._worker is not None else {}

    def _tell_memory(self) -> None:
        # Over and over: Ray forgets a gauge that is not set again, and a block may take long.
        while True:
            tell_gpu_memory(os.environ.get(JOB, ""), self.gpu_memory())
            time.sleep(_TELL_SECONDS)

    def share(self, workers: int) -> None:
        """Take note that so many workers of the job share its limit on requests to S3 now."""
        from volseg.storage import rate

        rate.share(workers)

    def attempt(self, task: Task, *inbox: NDArray[np.int32]) -> Any:
        """Do one task; return its outcome and the process' peak memory in bytes, and every parcel as an object apart.

        The parcels are those of `volseg.planning.task.parcels_of`, None for one that was not made. Without any the
        first is the only answer.
        """
        worker, plan = self._worker, self._plan
        assert worker is not None
        assert plan is not None
        with clean_errors():
            outcome = worker.attempt(task, inbox)
        made = outcome.parcels if isinstance(outcome, Answer) else {}
        if isinstance(outcome, Answer):
            outcome = replace(outcome, parcels={})
        first = outcome, worker.peak_memory()
        names = parcels_of(task, plan.ownership)
        return (first, *map(made.get, names)) if names else first


def _no_gpu() -> str:
    return (
        f"Ray gave the worker on {platform.node()} a GPU, but torch {importlib.metadata.version('torch')} there sees "
        "none; nothing was computed: install a torch built for CUDA and its driver on the cluster's machines, or use "
        "--device cpu"
    )
