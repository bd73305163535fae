"""RayExecutor: one actor a GPU or CPU core, two blocks in flight each; actors come and go with the cluster's machines.

Nothing is requeued here: blocks of an actor that is gone, or whose machine will be, are told to the driver. How many
actors there should be is decided in `volseg.execution.scaling`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from volseg.cluster.crew import Crew, Member
from volseg.cluster.machines import Machine, left_in_order, look, shortage, silent_nodes
from volseg.cluster.neighbours import Neighbours
from volseg.cluster.session import RaySession
from volseg.cluster.slots import Slot, cause_of, lost_its_node, make_actor, was_told_to_end
from volseg.cluster.worker import SegmentActor, Started
from volseg.errors import JobError
from volseg.execution.events import (
    BlockFailed,
    Event,
    ParcelsLost,
    Word,
    WorkerFailed,
    WorkerLeft,
    WorkerLost,
    WorkerReady,
)
from volseg.execution.local import event_of
from volseg.execution.prepare import SHARE_OF_STORE
from volseg.execution.scaling import Crowd, change, keep_block
from volseg.inference.attempt import Failure
from volseg.planning import Plan
from volseg.planning.memory import IN_HAND
from volseg.planning.task import Task, parcels_of
from volseg.spec import SegmentSpec

LOOK_SECONDS = 2.0
"""How often the cluster's machines are looked at."""

_TAKEN_AWAY = "its machine is taken away"
_BAD_STARTS = 2
"""Processes that may die while they start on one machine before no other starts there."""


class RayExecutor:
    """Runs blocks on Ray actors of class `actor`; see `volseg.execution.events.Executor`.

    With a `crew`, actors that are idle in the end go there instead of being ended, and those that are there begin.
    `name` is what the actors' metrics call the job.
    """

    def __init__(
        self, spec: SegmentSpec, plan: Plan, bundle_digest: str, *, actor: type[SegmentActor] = SegmentActor,
        crew: Crew | None = None, name: str = "",
    ) -> None:  # fmt: skip
        self._actor, self._crew, self._name = actor, crew, name
        self._job, self._plan = (spec, plan, bundle_digest), plan
        self._kind = "GPU" if plan.device == "cuda" else "CPU"
        self._session = RaySession(spec.address, plan.workers, int(plan.seams.bound / SHARE_OF_STORE))
        # Without an address Ray is inside this process, on a machine that does not grow and that was planned for.
        cluster = spec.address is not None
        self._limit = min(spec.workers or len(plan.grid), len(plan.grid)) if cluster else plan.workers
        self._exact = spec.workers is not None or not cluster
        self._memory = plan.memory.total if cluster else 0
        self._neighbours = Neighbours(self._kind) if cluster else None
        self._slots: list[Slot] = []
        self._number = self._expected = 0
        self._machines: dict[str, Machine] = {}
        self._looked = -math.inf
        self._free = 0
        self._share: int | None = None
        self._target = 0
        self._usual: float | None = None
        self._doomed: set[str] = set()
        self._shunned: set[str] = set()
        self._bad_starts: Counter[str] = Counter()
        self._told: list[Event] = []
        self._deaf = False

    def start(self) -> None:
        """Connect to Ray."""
        self._session.__enter__()

    def adjust(self, left: int) -> int:
        """Ask for actors, or let some go; those whose machine is taken away finish what they can and go."""
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._look(left)
        self._leave_doomed_machines()
        crowd = self._crowd(left)
        step = change(crowd)
        self._target = crowd.target
        self._slots += [self._spawn() for _ in range(step)]
        self._let_go(-step)
        for slot in [slot for slot in self._slots if slot.leaving is not None and not slot.blocks]:
            self._dismiss(slot, slot.leaving or "")
        self._expected = crowd.target if self._exact else crowd.here
        return self._expected

    def capacity(self, *, alone: bool = False) -> bool:
        """Tell whether an actor can take a block."""
        return self._open(alone) is not None

    def hand(self, *, alone: bool = False) -> Collection[int]:
        """Return what the actor has in hand that would take the next block."""
        slot = self._open(alone)
        return tuple(slot.blocks.values()) if slot is not None else ()

    def submit(self, task: Task, inbox: Sequence[Any], *, alone: bool = False) -> None:
        """Hand a task to the actor that has least in hand; `inbox` are references, which are passed on unopened."""
        slot = self._open(alone)
        if slot is None:
            raise RuntimeError(f"no actor has room for block {task.index}: ask capacity() first")
        slot.give(task, inbox, parcels_of(task, self._plan.ownership), alone=alone)

    def wait(self, timeout: float) -> list[Event]:
        """Return what happened, after at most `timeout` seconds."""
        events, self._told = self._told, []
        refs = [ref for slot in self._slots for ref in slot.calls]
        if not refs:
            return events
        ray.wait(refs, num_returns=1, timeout=0 if events else timeout)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        dead: list[tuple[Slot, RayError]] = []
        for slot in list(self._slots):
            mine = [ref for ref in slot.calls if ref in ready]
            # What a dying actor finished before counts; so its good answers are taken before its death is.
            errors = [error for ref in mine if (error := self._take(slot, ref, events)) is not None]
            if errors:
                dead.append((slot, errors[0]))
        if dead:
            nodes = {slot.node for slot, _ in dead if slot.node}
            silent = silent_nodes(nodes)
            ended = self._doomed | left_in_order(silent)
            events += [event for slot, error in dead if (event := self._bury(slot, error, silent, ended)) is not None]
        return events

    def refuse(self, worker: int) -> None:
        """Let an actor go that has just become ready, and keep off its machine."""
        for slot in [slot for slot in self._slots if slot.number == worker]:
            self._shun(slot.node)
            self._end(slot)

    def missing(self) -> str:
        """Say what the actors that are not ready wait for."""
        waiting = self._expected - sum(slot.ready for slot in self._slots)
        if waiting <= 0:
            return ""
        more = self._neighbours.word() if self._neighbours is not None else ""
        if self._shunned:
            more += f"{'; ' if more else ''}{len(self._shunned)} machine(s) cannot take part, as was said"
        return f"{waiting} to come: {shortage(self._kind, self._memory)}{'; ' if more else ''}{more}"

    def stop(self) -> None:
        """End all actors that no crew keeps, and Ray where it was started here."""
        for slot in list(self._slots):
            self._end(slot)
        if self._neighbours is not None:
            self._neighbours.leave()
        self._session.__exit__(None, None, None)

    # ------------------------------------------------------------ who should be there

    def _look(self, left: int) -> None:
        self._looked = time.monotonic()
        try:
            self._count(left, look(self._kind, self._memory))
        except RayError as error:
            # A head that starts anew is away for a while, and the actors work without it.
            if not self._deaf:
                self._told.append(Word(f"the cluster's head gives no answer ({cause_of(error)}); those who work go on"))
            self._deaf = True
        else:
            self._deaf = False
        self._share_rate()

    def _count(self, left: int, machines: Sequence[Machine]) -> None:
        self._machines = {machine.node_id: machine for machine in machines}
        self._doomed |= {machine.node_id for machine in machines if machine.deadline is not None}
        usable = [m for m in machines if m.deadline is None and m.node_id not in self._shunned]
        self._free = sum(machine.free for machine in usable)
        if self._neighbours is not None:
            has = sum(not slot.asked and slot.leaving is None for slot in self._slots)
            places = sum(machine.places for machine in usable)
            self._share = self._neighbours.share(min(self._limit, left), has, places, self._free)

    def _share_rate(self) -> None:
        """Tell all who work how many they are: together they keep the limit on requests of a job."""
        sharers = sum(not slot.asked for slot in self._slots)
        for slot in self._slots:
            if slot.ready and slot.sharers != sharers:
                slot.sharers = sharers
                slot.actor.share.remote(sharers)

    def _crowd(self, left: int) -> Crowd:
        stay = [slot for slot in self._slots if slot.leaving is None]
        asked, ready = sum(slot.asked for slot in stay), sum(slot.ready for slot in stay)
        return Crowd(
            self._limit, left, ready, len(stay) - asked - ready, asked, len(self._slots) - len(stay), self._free,
            self._share,
        )  # fmt: skip

    def _let_go(self, count: int) -> None:
        """Let actors go: those that have no place first, then those that start, then those with least in hand."""
        stay = [slot for slot in self._slots if slot.leaving is None]
        for slot in sorted(stay, key=lambda s: (not s.asked, s.ready, len(s.blocks)))[: max(0, count)]:
            if slot.ready:
                slot.leaving = "other jobs lack their part of the cluster" if slot.blocks else ""
            else:
                self._end(slot)

    def _leave_doomed_machines(self) -> None:
        """Give no more blocks to machines that are taken away, and take back what cannot be finished there."""
        now = time.monotonic()
        for slot in [slot for slot in self._slots if slot.node in self._doomed]:
            if not slot.ready:
                self._end(slot)
                continue
            slot.leaving = _TAKEN_AWAY
            machine = self._machines.get(slot.node)
            date = machine.deadline if machine is not None else None
            remaining = None if date is None or math.isinf(date) else date - time.time()
            if slot.blocks and not any(keep_block(now - at, remaining, self._usual) for at in slot.since.values()):
                self._told.append(
                    WorkerLost(slot.number, tuple(slot.blocks.values()), f"{_TAKEN_AWAY}, too soon", "preemption")
                )
                self._end(slot)

    # ------------------------------------------------------------ coming and going

    def _open(self, alone: bool) -> Slot | None:
        room = 1 if alone else IN_HAND
        free = [
            slot for slot in self._slots
            if slot.ready and slot.leaving is None and not slot.alone and len(slot.blocks) < room
        ]  # fmt: skip
        return min(free, key=lambda slot: len(slot.blocks), default=None)

    def _spawn(self) -> Slot:
        self._number += 1
        kept = self._crew.take(self._kind) if self._crew is not None else None
        if kept is not None and kept.starting is not None:
            # Two starts at the same time would leave either job's model: the earlier one goes first.
            return Slot(self._number, kept.actor, None, kept.starting, kept.node, earlier=True)
        if kept is not None:
            return Slot(self._number, kept.actor, None, kept.actor.start.remote(*self._job), kept.node)
        actor = make_actor(self._actor, self._kind, self._memory, self._shunned, self._name)
        return Slot(self._number, actor, actor.here.remote(), actor.start.remote(*self._job))

    def _end(self, slot: Slot) -> None:
        """Take an actor out, for the crew where it has nothing in hand, else for good."""
        self._slots.remove(slot)
        fit = not slot.asked and not slot.blocks and slot.node not in self._doomed | self._shunned
        if self._crew is not None and fit:
            self._crew.keep(Member(self._kind, slot.actor, slot.starting, slot.node))
        else:
            ray.kill(slot.actor)

    def _dismiss(self, slot: Slot, cause: str) -> None:
        self._end(slot)
        self._told.append(WorkerLeft(slot.number, cause))

    def _shun(self, node: str) -> None:
        """Start no actor on a machine any more."""
        self._shunned.add(node)
        # Those without a place might get theirs there.
        for slot in [slot for slot in self._slots if slot.asked or (slot.node == node and not slot.ready)]:
            self._end(slot)

    def _take(self, slot: Slot, ref: Any, events: list[Event]) -> RayError | None:
        """Turn one finished call into an event; return the error when its actor is dead."""
        try:
            answer = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError) and slot.taken.get(ref):
                events.append(_parcels_lost(slot, ref, error.cause))
                return None
            if isinstance(error.cause, ObjectStoreFullError | OutOfDiskError):
                raise JobError(
                    f"Ray's object store is full ({cause_of(error.cause)}); the job stopped and what is done is kept: "
                    "others may use it, too: give a smaller --seam-memory, or --seams off, and run it again"
                ) from None
            # The actor lives, and its code raised what it should have returned as a value: an error of volseg itself.
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayError as error:
            # Dead, out of memory, its node gone: whatever the name, this actor gives no answer any more.
            return error
        if ref == slot.placing:
            slot.placing, slot.node = None, answer
            self._free = max(0, self._free - 1)
        elif isinstance(answer, Started) and slot.earlier:
            slot.earlier = False
            slot.starting = slot.actor.start.remote(*self._job)
        elif isinstance(answer, Started):
            slot.starting = None
            self._started(slot, answer, events)
        else:
            seconds, made = slot.take_back(ref)
            self._usual = _mean(self._usual, seconds)
            outcome, peak = answer
            if isinstance(outcome, Failure):
                events.append(BlockFailed(outcome))
            else:
                core = (outcome.index, outcome.index)
                events.append(
                    event_of(outcome, slot.number, peak, {
                        name: parcel for name, parcel in made.items() if outcome.receipt is None or name != core
                    })
                )  # fmt: skip
        return None

    def _started(self, slot: Slot, answer: Started, events: list[Event]) -> None:
        if answer.fingerprint is not None:
            events.append(WorkerReady(slot.number, answer.fingerprint))
            return
        # Where others work it is the machine's fault, and the job goes on without that machine.
        others = self._others_work(slot)
        events.append(WorkerFailed(slot.number, answer.message, answer.fatal and not others))
        self._slots.remove(slot)
        ray.kill(slot.actor)
        if others:
            self._shun(slot.node)
        self._spawn_again()

    def _others_work(self, slot: Slot) -> bool:
        return any(other.ready and other.node != slot.node for other in self._slots)

    def _spawn_again(self) -> None:
        """Ask for an actor in place of one that is gone, at once: its place may be free again."""
        if sum(slot.leaving is None for slot in self._slots) < self._target:
            self._slots.append(self._spawn())

    def _bury(self, slot: Slot, error: RayError, silent: set[str], ended: set[str]) -> Event | None:
        # One that is only out of reach would keep the core that its successor needs.
        ray.kill(slot.actor)
        self._slots.remove(slot)
        told = getattr(error, "preempted", False) or slot.node in ended or was_told_to_end(error)
        if not slot.ready:
            return None if told or (slot.asked and lost_its_node(error)) else self._failed_start(slot, error)
        self._spawn_again()
        blocks = tuple(slot.blocks.values())
        if told:
            return WorkerLost(
                slot.number, blocks, _TAKEN_AWAY if slot.node in ended else "it was told to end", "preemption"
            )
        if slot.node in silent:
            return WorkerLost(slot.number, blocks, "its machine does not answer any more", "node")
        return WorkerLost(slot.number, blocks, cause_of(error), "crash")

    def _failed_start(self, slot: Slot, error: RayError) -> Event:
        self._bad_starts[slot.node] += bool(slot.node)
        if self._bad_starts[slot.node] >= _BAD_STARTS and self._others_work(slot):
            self._shun(slot.node)
        self._spawn_again()
        return WorkerFailed(slot.number, cause_of(error), fatal=False)


def _parcels_lost(slot: Slot, call: Any, error: ObjectLostError) -> ParcelsLost:
    """Take back a call that could not begin; which of its parcels are gone Ray says of one at a time."""
    taken, index = slot.taken[call], slot.blocks[call]
    gone = tuple(name for name, parcel in taken.items() if parcel.hex() == error.object_ref_hex)
    slot.take_back(call)
    return ParcelsLost(index, slot.number, gone or tuple(taken))


def _mean(before: float | None, seconds: float) -> float:
    """Return a running mean that follows the last ten or so."""
    return seconds if before is None else 0.8 * before + 0.2 * seconds
