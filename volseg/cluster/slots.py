"""One actor and what it has in hand, and the options that actors are asked for with."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from volseg.cluster.worker import JOB, WORKER_ENVIRONMENT, SegmentActor
from volseg.planning.memory import IN_HAND
from volseg.planning.task import Parcel, Task
from volseg.redaction import redact


@dataclass
class Slot:
    """An actor that was asked for: without a place at first, then starting, then ready, then perhaps leaving."""

    number: int
    actor: Any
    placing: Any
    """The call that answers as soon as the actor has a place; None when it has one."""
    starting: Any
    """The call that loads the model; None when it is ready."""
    node: str = ""
    blocks: dict[Any, int] = field(default_factory=dict)
    taken: dict[Any, dict[Parcel, Any]] = field(default_factory=dict)
    """References of the parcels that came along with each call."""
    made: dict[Any, dict[Parcel, Any]] = field(default_factory=dict)
    """References of those that each call may return."""
    since: dict[Any, float] = field(default_factory=dict)
    """When each block in hand was handed out, by its call; on the clock of `time.monotonic`."""
    alone: bool = False
    leaving: str | None = None
    """Why it gets no more blocks; None where it stays."""
    earlier: bool = False
    """What starts is an earlier job."""
    sharers: int = 0
    """How many workers it was told to share the limit on requests with."""

    @property
    def ready(self) -> bool:
        """Tell whether the model is loaded."""
        return self.starting is None

    @property
    def asked(self) -> bool:
        """Tell whether there is no place for it yet."""
        return self.placing is not None

    @property
    def calls(self) -> list[Any]:
        """Return all calls whose answer is to come."""
        return [call for call in (self.placing, self.starting, *self.blocks) if call is not None]

    def give(self, task: Task, inbox: Sequence[Any], made: Sequence[Parcel], *, alone: bool) -> None:
        """Hand it a task, with the references of its parcels; `made` are the names of those that it may return."""
        self.alone = alone
        called = self.actor.attempt.options(num_returns=1 + len(made)).remote(task, *inbox)
        call, *parcels = called if made else [called]
        self.blocks[call] = task.index
        self.taken[call] = dict(zip(task.inbox, inbox, strict=True))
        self.made[call] = dict(zip(made, parcels, strict=True))
        self.since[call] = time.monotonic()

    def take_back(self, call: Any) -> tuple[float, dict[Parcel, Any]]:
        """Take a finished task out of its hands; return how many seconds it was there, and what it may have made."""
        self.alone = False
        del self.taken[call], self.blocks[call]
        return time.monotonic() - self.since.pop(call), self.made.pop(call)


def make_actor(actor: type[SegmentActor], kind: str, memory: int, shunned: Collection[str], job: str) -> Any:
    """Ask Ray for an actor on a GPU or CPU (`kind`) with `memory` bytes, 0 for whatever there is.

    `job` is what its metrics call the job.

    Ray restarts and retries nothing by itself: only the driver can tell an error of the block from a crash, and a crash
    from a lost node. A machine that comes later may have less memory than those that the plan was made for: Ray counts
    what the actors of all jobs were promised, and an autoscaler sees what kind of machine is needed.
    """
    gpu = kind == "GPU"
    options: dict[str, Any] = {
        # A GPU alone says where an actor fits: some machines offer Ray fewer CPUs than GPUs, or none.
        "num_cpus": 0 if gpu else 1,
        "num_gpus": 1 if gpu else 0,
        "max_restarts": 0,
        "max_task_retries": 0,
        # One more than blocks, for what is told meanwhile.
        "max_concurrency": IN_HAND + 1,
        "runtime_env": {"env_vars": {**WORKER_ENVIRONMENT, JOB: job}},
    }
    if memory:
        options["memory"] = memory
    if shunned:
        options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(shunned))})"}
    return ray.remote(actor).options(**options).remote()


def cause_of(error: RayError) -> str:
    """Return what Ray says of a death in one line, without its numbers of actors and jobs and its guesses."""
    text = " ".join(str(error).split())
    for mark in ("The actor is dead because ", "The actor died because "):
        text = text.partition(mark)[2] or text
    return redact(text.partition(" Some common causes")[0][:200].rstrip(" ."))


def was_told_to_end(error: RayError) -> bool:
    """Tell whether the actor's process ended because of SIGTERM, which all get on a machine that is taken away."""
    # Ray's workers answer the signal by an exit whose reason has these words.
    return "receives a SIGTERM" in str(error)


def lost_its_node(error: RayError) -> bool:
    """Tell whether the actor is gone with a machine: those without a place wait at one, which need not be theirs."""
    return "its node has died" in str(error)
