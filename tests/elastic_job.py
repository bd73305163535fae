"""A job whose blocks take as long as a test wants, run as a program: what it does lies in a folder.

``python -m tests.elastic_job FOLDER OPTIONS`` runs the spec OPTIONS (JSON). In FOLDER, ``blocks/I-NODE`` appears when
block I begins on a machine, with the process' number in it, and it goes on when there is ``go``, ``go-I`` or
``go-NODE``; ``state.json`` is what the executor has. Where there is ``strange``, the next machine that starts a worker
computes with another device. Every crash sets its block aside at once. Classes of a program travel to Ray's workers by
value.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from volseg.cli.main import main as volseg
from volseg.cluster import executor
from volseg.cluster.worker import SegmentActor, Started
from volseg.execution import policy, scaling
from volseg.planning import Plan
from volseg.planning.task import Task
from volseg.spec import SegmentSpec

LONGEST = 120.0


class Gated(SegmentActor):
    """Computes on the CPU, whatever Ray gave it, and begins each block when it is allowed to."""

    folder: Path

    def start(self, spec: SegmentSpec, plan: Plan, bundle_digest: str) -> Started:
        started = super().start(spec, replace(plan, device="cpu"), bundle_digest)
        mark = self.folder / f"strange-{self.here()}"
        with suppress(FileNotFoundError):
            (self.folder / "strange").rename(mark)
        if mark.exists():
            return replace(started, fingerprint={"name": "another", "kind": "device"})
        return started

    def attempt(self, task: Task, *inbox: Any) -> Any:
        node, index = self.here(), task.index
        (self.folder / "blocks" / f"{index}-{node}").write_text(str(os.getpid()))
        allowed = [self.folder / name for name in ("go", f"go-{index}", f"go-{node}")]
        stop = time.monotonic() + LONGEST
        while not any(path.exists() for path in allowed):
            if time.monotonic() > stop:
                raise RuntimeError(f"block {index} was never let go")
            time.sleep(0.01)
        return super().attempt(task, *inbox)


class Watched(executor.RayExecutor):
    """Writes down what it has whenever it was adjusted."""

    folder: Path

    def adjust(self, left: int) -> int:
        expected = super().adjust(left)
        state = {
            "expected": expected,
            "share": self._share,
            "places": {node_id: machine.places for node_id, machine in self._machines.items()},
            "slots": [
                {"node": slot.node, "ready": slot.ready, "asked": slot.asked, "leaving": slot.leaving,
                 "blocks": sorted(slot.blocks.values())}
                for slot in self._slots
            ],
        }  # fmt: skip
        unfinished = self.folder / "state.tmp"
        unfinished.write_text(json.dumps(state))
        unfinished.rename(self.folder / "state.json")
        return expected


def main(folder: str, options: str) -> int:
    """Run the job and return its exit code."""
    Gated.folder = Watched.folder = Path(folder)
    executor.RayExecutor = partial(Watched, actor=Gated)  # type: ignore[misc, assignment]
    executor.LOOK_SECONDS = 0.2
    scaling.HUNGER_SECONDS = 1.0
    policy.MAX_CRASHES = 1
    policy.PATIENCE_SECONDS = 3.0
    settings: dict[str, Any] = {"overlap": 0.25, "block": "24,24,24", "attempts": 1, "batch": 1, **json.loads(options)}
    words = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    return volseg(["segment", *[word for setting in words for word in ("--set", setting)], "--json"])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
