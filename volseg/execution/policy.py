"""What happens to a block after a failure: plain functions of counts, nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from volseg.inference.attempt import Kind

Decision = Literal["retry", "retry alone", "retry apart", "set aside", "stop the job"]

Loss = Literal["crash", "node", "preemption"]
"""Why a worker is gone: its process died, its machine did not answer any more, or its machine was taken away with
notice, which says nothing about the blocks on it."""

MAX_CRASHES = 5
"""Workers that may die with one block in hand before the block is set aside."""

NODES_TOGETHER = 3
"""Machines that may be lost with a block in hand, among others, before it is suspected and runs apart."""

NODES_APART = 5
"""Machines that may be lost while the block was the only suspect on any of them before it is set aside."""

MAX_LOSSES = 4 * MAX_CRASHES
"""Workers, or machines, that may go one after the other, with no block finished between, before the job stops."""

PATIENCE_SECONDS = 30.0
"""How long workers may be missing before a line says so."""

REPEAT_SECONDS = 600.0
"""How often that line comes again while there is no worker at all."""


SLOW_FACTOR = 2.0
SLOW_SECONDS = 3.0
"""A block is slow that takes so many times as long as usual, and so much more: what a call and a pause may cost."""


@dataclass(frozen=True)
class Strikes:
    """What a block has behind it: errors that it raised, workers that died and machines that went while they held it.

    `nodes_apart` counts those of the `nodes` that went while this block was the only suspect that was computed.
    """

    errors: int = 0
    crashes: int = 0
    nodes: int = 0
    nodes_apart: int = 0

    def with_loss(self, loss: Loss, *, apart: bool) -> Strikes:
        """Return the strikes after one more loss; `apart` says that no other suspect was computed."""
        node = loss == "node"
        return replace(
            self,
            crashes=self.crashes + (loss == "crash"),
            nodes=self.nodes + node,
            nodes_apart=self.nodes_apart + (node and apart),
        )


def after_error(strikes: Strikes, kind: Kind, attempts: int) -> Decision:
    """Decide after an error; `strikes` already counts it, `attempts` is how many errors a block may raise."""
    if kind == "job":
        return "stop the job"
    if kind == "hopeless" or strikes.errors >= attempts:
        return "set aside"
    return _retry(strikes)


def after_loss(strikes: Strikes, loss: Loss) -> Decision:
    """Decide after a worker was lost; `strikes` already counts the loss.

    Machines come and go, and a block that takes its machine down cannot be told from one that was there by chance, nor
    from its neighbours on the same machine. So the suspects are computed one at a time, while the others go on: chance
    does not hit the same one again and again.
    """
    crashed = loss == "crash" and strikes.crashes >= MAX_CRASHES
    if crashed or (loss == "node" and strikes.nodes_apart >= NODES_APART):
        return "set aside"
    return _retry(strikes)


def _retry(strikes: Strikes) -> Decision:
    if strikes.nodes >= NODES_TOGETHER:
        return "retry apart"
    # A block that was there when a worker died for a second time runs alone on its worker from then on, so that its
    # neighbour in the pipeline does not get the blame.
    return "retry alone" if strikes.crashes >= 2 else "retry"


def losses_exhausted(lost_in_a_row: int) -> bool:
    """Tell whether so many workers or machines went without one finished block between that no block is to blame."""
    return lost_in_a_row >= MAX_LOSSES


def starts_exhausted(failed_in_a_row: int, workers: int) -> bool:
    """Tell whether so many workers in a row could not start that the next would not, either."""
    return failed_in_a_row >= 3 + workers


def worth_a_second_copy(elapsed: float, usual: float | None, copies: int) -> bool:
    """Tell whether a block should be started once more on a worker that is idle, with nothing left to begin.

    `elapsed` is for how long it has been under way, `usual` how long blocks take on the whole (None before the first
    was done), both in seconds; `copies` is how many workers have it in hand. Where a block is only a little late, its
    second copy would come later than the first.
    """
    return usual is not None and copies == 1 and elapsed > SLOW_FACTOR * usual + SLOW_SECONDS


class Vigil:
    """When to say that workers are missing: after a while, and again where there is none at all."""

    def __init__(self) -> None:
        self._seen = -1
        self._due = self._again = 0.0
        self._said = ""

    def word(self, there: int, wanted: int, now: float, reason: Callable[[], str]) -> str:
        """Return the `reason` where a line about it is due at `now` (seconds), with `there` of `wanted` workers ready.

        With no worker at all it comes again when it has changed, or after a long while. Empty where none is due.
        """
        if there != self._seen:
            self._seen, self._due, self._again, self._said = there, now + PATIENCE_SECONDS, now, ""
        if there >= wanted or now < self._due:
            return ""
        self._due = math.inf if there else now + PATIENCE_SECONDS
        text = reason()
        if text == self._said and now < self._again:
            return ""
        self._said, self._again = text, now + REPEAT_SECONDS
        return text
