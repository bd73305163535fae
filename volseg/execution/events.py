"""What executors tell the driver, and what an executor is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from volseg.inference.attempt import Failure
from volseg.storage.ledger import Receipt


@dataclass(frozen=True)
class WorkerReady:
    """A worker loaded the model; `fingerprint` is what its numerics depend on."""

    worker: int
    fingerprint: dict[str, str]


@dataclass(frozen=True)
class BlockDone:
    """A block is written and checked; `peak_memory` is its worker's resident peak in bytes."""

    receipt: Receipt
    worker: int
    peak_memory: int


@dataclass(frozen=True)
class BlockFailed:
    """A block failed by itself, its worker lives."""

    failure: Failure


@dataclass(frozen=True)
class WorkerLost:
    """A worker died with `blocks` in hand; `infrastructure` is True where its node went, which is nobody's fault."""

    worker: int
    blocks: tuple[int, ...]
    cause: str
    infrastructure: bool


@dataclass(frozen=True)
class WorkerFailed:
    """A worker could not start; `message` says why. `fatal` where no other would."""

    worker: int
    message: str
    fatal: bool


Event = WorkerReady | BlockDone | BlockFailed | WorkerLost | WorkerFailed


class Executor(Protocol):
    """Runs blocks somewhere. The driver alone decides what runs again."""

    def start(self) -> None:
        """Begin to start workers; does not wait for them."""
        ...

    def capacity(self, *, alone: bool = False) -> bool:
        """Tell whether a block can be handed out now; `alone`: to a worker that has nothing else in hand."""
        ...

    def submit(self, index: int, *, alone: bool = False) -> None:
        """Hand out one block; only when there is capacity."""
        ...

    def wait(self, timeout: float) -> list[Event]:
        """Return what happened, after at most `timeout` seconds."""
        ...

    def stop(self) -> None:
        """End all workers; blocks in hand are dropped."""
        ...
