"""A job whose reads fail with all that a client knows of a request, run as a program on a cluster.

``python -m tests.leaky_job RELEASE INPUT OUTPUT ...`` takes what `volseg segment` takes: block 0 raises an error that
repeats headers and credentials, the others wait until there is a file RELEASE. The workers say that they hold memory of
a GPU. Classes of a program travel to Ray's workers by value.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from volseg.cli.main import main
from volseg.cluster import executor
from volseg.cluster.worker import SegmentActor, Started
from volseg.planning import Plan
from volseg.planning.task import Task
from volseg.spec import SegmentSpec

LONGEST = 60.0
SESSION_TOKEN = "canary-session-token-9a41c07be2d8"
SIGNATURE = "canary5163aa0c9e7d41f8signature"
GPU_MEMORY = {"allocated": 1234567, "reserved": 2345678, "peak": 3456789, "total": 9876543}


def dump() -> str:
    """Return what a careless client might say of a request."""
    key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    return (
        f"403 for https://{key}:{secret}@s3.example.org/scans/a?X-Amz-Signature={SIGNATURE}, headers="
        f"{{'Authorization': 'AWS4-HMAC-SHA256 Credential={key}/eu/s3/aws4_request, SignedHeaders=host, Signature="
        f"{SIGNATURE}', 'X-Amz-Security-Token': '{SESSION_TOKEN}'}}, config={{'aws_secret_access_key': '{secret}'}}"
    )


class Leaky(SegmentActor):
    """Fails with `dump` on block 0, and waits with the others."""

    release = ""

    def start(self, spec: SegmentSpec, plan: Plan, bundle_digest: str) -> Started:
        answer = super().start(spec, plan, bundle_digest)
        assert self._worker is not None
        processor = self._worker._processor
        read = processor._read

        def failing(task: Task) -> Any:
            if task.index == 0:
                raise RuntimeError(dump())
            stop = time.monotonic() + LONGEST
            while not Path(self.release).exists():
                if time.monotonic() > stop:
                    raise RuntimeError("nobody released the blocks")
                time.sleep(0.01)
            return read(task)

        processor._read = failing  # type: ignore[method-assign]
        return answer

    def gpu_memory(self) -> dict[str, int]:
        return GPU_MEMORY


def run(release: str, *words: str) -> int:
    """Segment with leaky workers."""
    Leaky.release = release
    executor.RayExecutor = partial(executor.RayExecutor, actor=Leaky)  # type: ignore[misc, assignment]
    return main(["segment", *words, "--json"])


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
