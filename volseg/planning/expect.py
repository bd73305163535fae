"""What a job will take, from a plan and from what one worker was measured to need: plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from volseg.planning.plan import Plan


@dataclass(frozen=True)
class Pace:
    """What was measured: `workers` made `forwards` in `seconds`, reading, blending and writing included."""

    workers: int
    forwards: int
    seconds: float

    @property
    def seconds_a_forward(self) -> float:
        """Time that one worker needs for one forward and all that belongs to it."""
        return self.seconds * self.workers / self.forwards


def expect(plan: Plan, pace: Pace) -> dict[str, Any]:
    """Return what `plan` takes where every one of its workers is as fast as those that were measured.

    ``seconds`` holds where the workers end together, ``seconds_at_most`` in any order of the blocks (Graham, Bounds on
    multiprocessing timing anomalies, 1969). ``storage`` says what all workers together read and write a second, in
    bytes before compression.
    """
    each = pace.seconds_a_forward
    seconds = plan.forwards * each / plan.workers
    longest = plan.largest_block * plan.forwards_a_patch * each
    voxels = plan.region.size
    summary = plan.summary()
    return {
        "shape": plan.shape,
        "workers": plan.workers,
        "blocks": len(plan.grid),
        "forwards": plan.forwards,
        "seconds": round(seconds, 3),
        "seconds_at_most": round(seconds + longest * (1 - 1 / plan.workers), 3),
        "voxels_per_second": round(voxels / seconds, 1),
        "storage": {
            "reads_per_second": round(summary["bytes_read"] / seconds, 1),
            "writes_per_second": round(summary["bytes_written"] / seconds, 1),
        },
        "memory_per_worker": plan.memory.total,
    }
