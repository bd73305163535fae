"""A job on a cluster that claims GPUs, run as a program: its actors note what Ray gave them and compute on the CPU.

``python -m tests.gpu_job ADDRESS IMAGE BUNDLE OUTPUT`` prints what the driver saw as one JSON document. The actors'
notes lie in the folder ``notes`` beside the output. Classes of a program travel to Ray's workers by value.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from volseg import api
from volseg.cluster import executor
from volseg.cluster.session import RaySession
from volseg.cluster.worker import SegmentActor, Started
from volseg.planning import Plan
from volseg.planning.task import Task
from volseg.spec import SegmentSpec

LONGEST = 60.0


class Witness(SegmentActor):
    """Notes its GPU and computes on the CPU: the first that has a block dies, the others work when two are left."""

    def start(self, spec: SegmentSpec, plan: Plan, bundle_digest: str) -> Started:
        self._notes = Path(spec.output).parent / "notes"
        note = {
            "device": plan.device,
            "gpus": ray.get_gpu_ids(),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }
        unfinished = self._notes / f"{os.getpid()}.tmp"
        unfinished.write_text(json.dumps(note))
        unfinished.rename(self._notes / f"{os.getpid()}.json")
        return super().start(spec, replace(plan, device="cpu"), bundle_digest)

    def attempt(self, task: Task, *inbox: Any) -> Any:
        self._wait_for(2)
        try:
            with (self._notes / "died").open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            self._wait_for(3)
            return super().attempt(task, *inbox)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("alive after SIGKILL")

    def _wait_for(self, actors: int) -> None:
        stop = time.monotonic() + LONGEST
        while len(list(self._notes.glob("*.json"))) < actors:
            if time.monotonic() > stop:
                raise RuntimeError(f"no actor number {actors} came")
            time.sleep(0.01)


def main(address: str, image: str, bundle: str, output: str) -> dict[str, Any]:
    """Run the job with one worker more than there are GPUs."""
    (Path(output).parent / "notes").mkdir()
    executor.RayExecutor = partial(executor.RayExecutor, actor=Witness)  # type: ignore[misc, assignment]
    spec = SegmentSpec.read({
        "input": image, "output": output, "model": bundle, "address": address, "workers": 3, "batch": 1,
        "overlap": 0.25, "block": "24,24,24",
    })  # fmt: skip
    with RaySession(address, 3) as session:
        free = ray.available_resources().get("GPU")  # type: ignore[no-untyped-call]
        report = api.run_segment(spec)
        driver = ray.get_gpu_ids()
        return {"cores": asdict(session.cores(spec)), "free": free, "driver": driver, "report": report}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
