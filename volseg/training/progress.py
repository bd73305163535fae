"""What a training tells while it runs and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """State of a running training.

    `seconds` counts from the first start, earlier attempts included. `loss` is a running mean; `val_dice` the mean
    foreground Dice of the last validation, `best_dice` the best so far, None before the first. `data_wait` is the share
    of the time that was spent waiting for patches.
    """

    step: int
    max_steps: int
    seconds: float
    max_seconds: float | None
    loss: float
    learning_rate: float
    val_dice: float | None = None
    best_dice: float | None = None
    data_wait: float = 0.0


ProgressCallback = Callable[[TrainProgress], None]
"""Called about twice a second from the thread that trains."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a training ended: where the bundle is and how well it does on the validation region.

    `dice` maps class names to the Dice on the validation region, None for a class that is neither there nor predicted;
    it is None without a validation region. `weights` says which weights the bundle holds, of `members` networks.
    """

    bundle: str
    digest: str
    steps: int
    seconds: float
    resumed_from: int
    dice: dict[str, float | None] | None
    mean_foreground_dice: float | None
    weights: str
    threshold: float | None
    steps_per_second: float
    data_wait: float
    class_bias: tuple[float, ...] | None = None
    members: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)
