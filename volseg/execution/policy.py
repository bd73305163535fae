"""What happens to a block after a failure: plain functions of counts, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from volseg.inference.attempt import Kind

Decision = Literal["retry", "retry alone", "set aside", "stop the job"]

MAX_CRASHES = 5
"""Workers that may die with one block in hand before the block is set aside."""


MAX_LOSSES = 4 * MAX_CRASHES
"""Workers that may die one after the other, with no block finished between them, before the job stops."""


@dataclass(frozen=True)
class Strikes:
    """What a block has behind it: errors that it raised, and workers that died while they held it."""

    errors: int = 0
    crashes: int = 0


def after_error(strikes: Strikes, kind: Kind, attempts: int) -> Decision:
    """Decide after an error; `strikes` already counts it, `attempts` is how many errors a block may raise."""
    if kind == "job":
        return "stop the job"
    if kind == "hopeless" or strikes.errors >= attempts:
        return "set aside"
    return _retry(strikes)


def after_loss(strikes: Strikes, *, infrastructure: bool) -> Decision:
    """Decide after a worker was lost; `strikes` already counts a crash, but never a lost node."""
    if not infrastructure and strikes.crashes >= MAX_CRASHES:
        return "set aside"
    return _retry(strikes)


def _retry(strikes: Strikes) -> Decision:
    # A block that was there when a worker died for a second time runs alone on its worker from then on, so that its
    # neighbour in the pipeline does not get the blame.
    return "retry alone" if strikes.crashes >= 2 else "retry"


def losses_exhausted(lost_in_a_row: int) -> bool:
    """Tell whether so many workers died without one finished block between that no block is to blame."""
    return lost_in_a_row >= MAX_LOSSES


def starts_exhausted(failed_in_a_row: int, workers: int) -> bool:
    """Tell whether so many workers in a row could not start that the next would not, either."""
    return failed_in_a_row >= 3 + workers
