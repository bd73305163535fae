"""RayExecutor: one actor a GPU or CPU core, two blocks in flight each, dead actors replaced, nothing requeued here.

Ray restarts and retries nothing by itself (``max_restarts=0, max_task_retries=0``): the driver owns both, because only
it can tell an error of the block from a crash and a crash from a lost node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from volseg.cluster.session import RaySession, node_answers
from volseg.cluster.worker import WORKER_ENVIRONMENT, SegmentActor, Started
from volseg.execution.events import BlockDone, BlockFailed, Event, WorkerFailed, WorkerLost, WorkerReady
from volseg.inference.attempt import Failure
from volseg.planning import Plan
from volseg.planning.memory import IN_HAND
from volseg.spec import SegmentSpec


@dataclass
class _Slot:
    """One actor and what it has in hand."""

    number: int
    actor: Any
    starting: Any
    blocks: dict[Any, int] = field(default_factory=dict)
    alone: bool = False
    node: str = ""

    @property
    def ready(self) -> bool:
        return self.starting is None


class RayExecutor:
    """Runs blocks on Ray actors; see `volseg.execution.events.Executor`."""

    def __init__(self, spec: SegmentSpec, plan: Plan, bundle_digest: str) -> None:
        self._job = (spec, plan, bundle_digest)
        self._plan = plan
        self._session = RaySession(spec.address, plan.workers)
        self._slots: list[_Slot] = []
        self._number = 0

    def start(self) -> None:
        """Ask for all actors; they come when Ray has room."""
        self._session.__enter__()
        self._slots = [self._spawn() for _ in range(self._plan.workers)]

    def capacity(self, *, alone: bool = False) -> bool:
        """Tell whether an actor can take a block."""
        return self._free(alone) is not None

    def submit(self, index: int, *, alone: bool = False) -> None:
        """Hand a block to the actor that has least in hand."""
        slot = self._free(alone)
        if slot is None:
            raise RuntimeError(f"no actor has room for block {index}: ask capacity() first")
        slot.alone = alone
        slot.blocks[slot.actor.attempt.remote(index)] = index

    def wait(self, timeout: float) -> list[Event]:
        """Return what happened, after at most `timeout` seconds."""
        refs = [slot.starting for slot in self._slots if not slot.ready]
        refs += [ref for slot in self._slots for ref in slot.blocks]
        if not refs:
            return []
        ray.wait(refs, num_returns=1, timeout=timeout)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        events: list[Event] = []
        for slot in list(self._slots):
            mine = [ref for ref in ready if ref == slot.starting or ref in slot.blocks]
            # What a dying actor finished before counts; so its good answers are taken before its death is.
            errors = [error for ref in mine if (error := self._take(slot, ref, events)) is not None]
            if errors:
                events.append(self._replace(slot, errors[0]))
        return events

    def stop(self) -> None:
        """End all actors, and Ray where it was started here."""
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots = []
        self._session.__exit__(None, None, None)

    def _free(self, alone: bool) -> _Slot | None:
        room = 1 if alone else IN_HAND
        free = [slot for slot in self._slots if slot.ready and not slot.alone and len(slot.blocks) < room]
        return min(free, key=lambda slot: len(slot.blocks), default=None)

    def _spawn(self) -> _Slot:
        self._number += 1
        options: dict[str, Any] = {
            "num_cpus": 1,
            "num_gpus": 1 if self._plan.device == "cuda" else 0,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": IN_HAND,
            "runtime_env": {"env_vars": WORKER_ENVIRONMENT},
        }
        actor: Any = ray.remote(SegmentActor).options(**options).remote()
        return _Slot(self._number, actor, actor.start.remote(*self._job))

    def _take(self, slot: _Slot, ref: Any, events: list[Event]) -> RayError | None:
        """Turn one finished call into an event; return the error when its actor is dead."""
        try:
            answer = ray.get(ref)
        except RayTaskError as error:
            # The actor lives, and its code raised what it should have returned as a value: an error of volseg itself.
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayError as error:
            # Dead, out of memory, its node gone: whatever the name, this actor gives no answer any more.
            return error
        if isinstance(answer, Started):
            slot.starting = None
            if answer.fingerprint is None:
                events.append(WorkerFailed(slot.number, answer.message, answer.fatal))
                ray.kill(slot.actor)
                self._slots[self._slots.index(slot)] = self._spawn()
            else:
                slot.node = answer.node
                events.append(WorkerReady(slot.number, answer.fingerprint))
            return None
        del slot.blocks[ref]
        slot.alone = False
        outcome, peak = answer
        if isinstance(outcome, Failure):
            events.append(BlockFailed(outcome))
        else:
            events.append(BlockDone(outcome, slot.number, peak))
        return None

    def _replace(self, slot: _Slot, error: RayError) -> Event:
        # One that is only out of reach would keep the core that its successor needs.
        ray.kill(slot.actor)
        self._slots[self._slots.index(slot)] = self._spawn()
        if not slot.ready and not slot.blocks:
            return WorkerFailed(slot.number, _cause(error), fatal=False)
        preempted = bool(getattr(error, "preempted", False))
        if preempted or not node_answers(slot.node):
            cause = f"its machine {'was taken away' if preempted else 'does not answer any more'}"
            return WorkerLost(slot.number, tuple(slot.blocks.values()), cause, infrastructure=True)
        return WorkerLost(slot.number, tuple(slot.blocks.values()), _cause(error), infrastructure=False)


def _cause(error: RayError) -> str:
    """Return what Ray says of a death in one line, without its numbers of actors and jobs and its guesses."""
    text = " ".join(str(error).split())
    for mark in ("The actor is dead because ", "The actor died because "):
        text = text.partition(mark)[2] or text
    return text.partition(" Some common causes")[0][:200].rstrip(" .")
