"""Every patch once on Ray: bits, forwards, and who touches the seams."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from tests.support import Case, labels_of, long, probabilities_of, segment
from tests.test_seams import Bits, alone, assert_same, shared
from volseg.cluster import executor as executor_module
from volseg.cluster.slots import Slot
from volseg.cluster.worker import SegmentActor
from volseg.execution import local
from volseg.geometry import BlockGrid, Box, Ownership, PatchLattice
from volseg.planning.task import Parcel, Task

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("one_ray")]

OPTIONS: dict[str, Any] = {"overlap": 0.5, "block": "16,16,16", "probabilities": True}


@pytest.fixture(scope="module")
def reference(case: Case) -> Bits:
    return alone(case, case.folder / "seams-ray-reference.zarr", overlap=0.5, block="40,45,50")


@pytest.mark.parametrize(("workers", "block"), [long(1, "12,24,36"), long(2, "16,16,16"), (3, "40,7,50")])
def test_every_patch_is_computed_once(case: Case, reference: Bits, tmp_path: Path, workers: int, block: str) -> None:
    options = {**OPTIONS, "executor": "ray", "workers": workers, "block": block}
    report, found = shared(case, tmp_path / "out.zarr", **options)
    assert report["forwards"] == report["patches"]
    assert report["forwards_per_patch"] == 1.0
    assert 0 < report["seams"]["most_bytes"] <= report["seams"]["bound_bytes"]
    assert report["seams"]["lost"] == 0
    assert_same(found, reference)


def test_voxels_never_pass_the_driver(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens receipts only, and of what blocks give each other nothing lies in its own memory."""
    from ray.experimental import get_object_locations

    opened: list[Any] = []
    passed: list[int] = []
    get, take = ray.get, local.event_of

    def watched(ref: Any, **more: Any) -> Any:
        answer = get(ref, **more)
        opened.append(answer)
        return answer

    def noted(*arguments: Any) -> Any:
        handles = list(arguments[3].values())
        locations = get_object_locations(handles) if handles else {}
        passed.extend(locations[handle]["object_size"] for handle in handles)
        return take(*arguments)

    monkeypatch.setattr(ray, "get", watched)
    monkeypatch.setattr(executor_module, "event_of", noted)
    report, _ = shared(case, tmp_path / "out.zarr", **OPTIONS, executor="ray", workers=2)
    assert len(passed) > report["blocks"]["total"]
    # What is smaller comes with the answer itself, through the driver's memory.
    assert min(passed) > 100 * 1024
    outcomes = [answer for answer in opened if isinstance(answer, tuple)]
    assert len(outcomes) >= report["blocks"]["total"]
    assert all(not outcome.parcels for outcome, _ in outcomes)


@pytest.mark.chaos
def test_a_block_that_fails_once_and_one_that_always_fails(
    case: Case, reference: Bits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their neighbours go on with what they compute themselves; the job again does what is left."""
    marks = tmp_path / "marks"
    marks.mkdir()

    class Poisoned(SegmentActor):
        def attempt(self, task: Task, *inbox: Any) -> Any:
            first = not (marks / str(task.index)).exists()
            (marks / str(task.index)).touch()
            if task.index == 0 or (task.index == 5 and first):
                from volseg.inference.attempt import Failure
                from volseg.planning.task import parcels_of

                failure = Failure(task.index, "hopeless" if task.index == 0 else "retryable", "poison"), 1
                assert self._plan is not None
                names = parcels_of(task, self._plan.ownership)
                return (failure, *[None] * len(names)) if names else failure
            return super().attempt(task, *inbox)

    with monkeypatch.context() as patch:
        patch.setattr(executor_module, "RayExecutor", partial(executor_module.RayExecutor, actor=Poisoned))
        report = segment(case, tmp_path / "out.zarr", **OPTIONS, seams="on", executor="ray", workers=2)
    assert report["status"] == "partial"
    assert [failed["block"] for failed in report["failed_blocks"]] == [0]
    report, found = shared(case, tmp_path / "out.zarr", **OPTIONS, executor="ray", workers=2)
    assert report["blocks"]["computed"] == 1
    assert_same(found, reference)


class Doomed:
    """Owns an object that is lost with it."""

    def make(self) -> list[Any]:
        return [ray.put(np.zeros(10**5, np.int32))]


@pytest.mark.chaos
def test_parcels_that_are_gone_are_no_strike(
    case: Case, reference: Bits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks compute again what touches them, and nothing else."""
    doomed: Any = ray.remote(Doomed).options(num_cpus=0).remote()
    (gone,) = ray.get(doomed.make.remote())
    ray.kill(doomed)
    give, lost = Slot.give, list[Parcel]()

    def losing(slot: Slot, task: Task, inbox: Sequence[Any], made: Sequence[Parcel], *, alone: bool) -> None:
        seams = [name for name in task.inbox if name[0] != name[1]]
        if seams and len(lost) < 3 and seams[0] not in lost:
            lost.append(seams[0])
            inbox = [gone if name == seams[0] else ref for name, ref in zip(task.inbox, inbox, strict=True)]
        give(slot, task, inbox, made, alone=alone)

    monkeypatch.setattr(Slot, "give", losing)
    options = {**OPTIONS, "executor": "ray", "workers": 2, "attempts": 1}
    report, found = shared(case, tmp_path / "out.zarr", **options)
    assert (report["blocks"]["failed"], report["retried"]) == (0, 0)
    assert report["seams"]["lost"] == len(lost) == 3
    grid = BlockGrid((40, 45, 50), (16, 16, 16), Box.of((40, 45, 50)))
    owner = Ownership(grid, (PatchLattice(grid.shape, (16,) * 3, (8,) * 3),), grid.counts)
    again = sum(patches.count for name in lost for patches in owner.shared(*name))
    assert report["forwards"] == report["patches"] + again
    assert_same(found, reference)


def test_slow_blocks_are_started_once_more(
    case: Case, reference: Bits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call of one block waits until the second one was made; the first receipt counts."""
    from volseg.execution import policy

    marks = tmp_path / "marks"
    marks.mkdir()

    class Slow(SegmentActor):
        def attempt(self, task: Task, *inbox: Any) -> Any:
            if task.index == 35:
                import time

                number = len(list(marks.iterdir()))
                (marks / str(number)).touch()
                stop = time.monotonic() + 60
                while not number and len(list(marks.iterdir())) < 2 and time.monotonic() < stop:
                    time.sleep(0.01)
            return super().attempt(task, *inbox)

    monkeypatch.setattr(policy, "SLOW_SECONDS", 0.2)
    monkeypatch.setattr(executor_module, "RayExecutor", partial(executor_module.RayExecutor, actor=Slow))
    report, found = shared(case, tmp_path / "out.zarr", **OPTIONS, executor="ray", workers=2)
    assert report["second_copies"] == 1
    assert len(list(marks.iterdir())) == 2
    assert_same(found, reference)
    assert report["blocks"]["computed"] == report["blocks"]["total"] == 36
    assert (labels_of(tmp_path / "out.zarr") == found[0]).all()
    assert probabilities_of(tmp_path / "out.zarr").shape == found[1].shape
