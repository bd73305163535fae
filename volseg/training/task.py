"""What a training of one rank is given, and what it hands back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from volseg.training.distributed import Group
from volseg.training.losses import LayeredLoss
from volseg.training.metrics import Scores
from volseg.training.progress import TrainProgress
from volseg.training.sampler import Sampler
from volseg.training.schedule import Schedule
from volseg.training.validate import Validator

State = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """Where one rank of a training runs, and whom it tells.

    `save` keeps a checkpoint, `report` takes progress, `record` the rows of metrics.jsonl: of several ranks only the
    first one calls them. `stop` is asked before every step. `started` is the monotonic time at which the training's
    clock began, `spent` the seconds of earlier attempts.
    """

    device: torch.device
    threads: int
    dtype: torch.dtype
    save: Callable[[State], None]
    report: Callable[[TrainProgress], None]
    record: Callable[[list[dict[str, Any]]], object]
    started: float
    spent: float = 0.0
    group: Group = field(default_factory=Group)
    stop: Callable[[], bool] = lambda: False

    @property
    def seconds(self) -> float:
        """Seconds since the training first began, without the pauses between attempts."""
        return self.spent + time.monotonic() - self.started


@dataclass(frozen=True)
class Task:
    """What is trained: network, patches, windows, and the numbers of the optimisation.

    `batch` are the patches of a step over all ranks, which each rank takes in `accumulate` parts. `validations` is how
    often the `validator` scores; with `average` a running average of the weights is what it scores and what is kept,
    with `snapshots` the weights of the end of every cycle of the `schedule`.
    """

    network: nn.Module
    sampler: Sampler
    validator: Validator | None
    loss: LayeredLoss
    schedule: Schedule
    sigmoid: bool
    batch: int
    max_steps: int
    max_seconds: float | None
    weight_decay: float
    seed: int
    accumulate: int = 1
    validations: int = 12
    patience: int | None = None
    average: bool = True
    snapshots: bool = False
    sync_norm: bool = False


@dataclass
class Outcome:
    """The chosen weights in `networks` (several where snapshots were taken), where they come from, how the steps went.

    `scores` are those of their mean answer on the validation regions at `threshold` or with `class_bias`.
    """

    networks: list[nn.Module]
    weights: str
    scores: Scores | None
    threshold: float | None
    class_bias: tuple[float, ...] | None
    steps: int
    rows: list[dict[str, Any]]
    steps_per_second: float = 0.0
    data_wait: float = 0.0
