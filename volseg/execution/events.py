"""What executors tell the driver, and what an executor is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from volseg.execution.policy import Loss
from volseg.inference.attempt import Failure
from volseg.planning.task import Parcel, Task
from volseg.storage.ledger import Receipt


@dataclass(frozen=True)
class WorkerReady:
    """A worker loaded the model; `fingerprint` is what its numerics depend on."""

    worker: int
    fingerprint: dict[str, str]


@dataclass(frozen=True)
class BlockDone:
    """A block is written and checked; `peak_memory` is its worker's resident peak in bytes.

    `parcels` are handles of what it gives to others, which only an executor can open.
    """

    receipt: Receipt
    worker: int
    peak_memory: int
    parcels: Mapping[Parcel, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockParked:
    """A block computed its own patches and lacks those of others; its core is among the `parcels`.

    `stats` are figures that come back with the task that finishes it.
    """

    index: int
    worker: int
    peak_memory: int
    parcels: Mapping[Parcel, Any]
    stats: Mapping[str, float]


@dataclass(frozen=True)
class ParcelsLost:
    """A task could not begin, because these of its parcels are gone; its worker lives."""

    index: int
    worker: int
    parcels: tuple[Parcel, ...]


@dataclass(frozen=True)
class BlockFailed:
    """A block failed by itself, its worker lives."""

    failure: Failure


@dataclass(frozen=True)
class WorkerLost:
    """A worker is gone with `blocks` in hand; `loss` says what went with it, `cause` the same in words."""

    worker: int
    blocks: tuple[int, ...]
    cause: str
    loss: Loss


@dataclass(frozen=True)
class WorkerLeft:
    """A ready worker with nothing in hand was let go; `cause` says why, empty where nobody need know."""

    worker: int
    cause: str = ""


@dataclass(frozen=True)
class WorkerFailed:
    """A worker could not start; `message` says why. `fatal` where no other would."""

    worker: int
    message: str
    fatal: bool


@dataclass(frozen=True)
class Word:
    """Something worth reading about the machines that work; `text` is a line without its end."""

    text: str


Event = (
    WorkerReady | BlockDone | BlockParked | ParcelsLost | BlockFailed | WorkerLost | WorkerLeft | WorkerFailed | Word
)


class Executor(Protocol):
    """Runs blocks somewhere. The driver alone decides what runs again."""

    def start(self) -> None:
        """Connect to whoever gives workers."""
        ...

    def adjust(self, left: int) -> int:
        """Ask for workers or let some go, for `left` blocks that are neither done nor set aside; does not wait.

        Returns how many the job counts on: those that were asked for, or that there is room for.
        """
        ...

    def capacity(self, *, alone: bool = False) -> bool:
        """Tell whether a block can be handed out now; `alone`: to a worker that has nothing else in hand."""
        ...

    def hand(self, *, alone: bool = False) -> Collection[int]:
        """Return what the worker has in hand that would take the next block; only when there is capacity."""
        ...

    def submit(self, task: Task, inbox: Sequence[Any], *, alone: bool = False) -> None:
        """Hand out one task, with the handles of its parcels; only when there is capacity."""
        ...

    def wait(self, timeout: float) -> list[Event]:
        """Return what happened, after at most `timeout` seconds."""
        ...

    def refuse(self, worker: int) -> None:
        """Let a worker go that has just become ready, and start no other on its machine."""
        ...

    def missing(self) -> str:
        """Say what workers that are not ready wait for; empty where all are."""
        ...

    def stop(self) -> None:
        """End all workers; blocks in hand are dropped."""
        ...
