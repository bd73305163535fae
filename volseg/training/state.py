"""The state of a running training of one rank: what it changes, and what of it a checkpoint holds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from volseg.errors import VolsegError
from volseg.training.average import WeightAverage
from volseg.training.progress import TrainProgress
from volseg.training.schedule import EarlyStopping, progress_of
from volseg.training.task import Context, State, Task

# Steps that the shown loss is a mean over.
_SMOOTHED = 25
# A loss this many times its lowest says that the training is on its way out, though every number is still finite.
_ASTRAY = 5.0
_LOW = 0.1
# fp16: gradients are computed of a multiple of the loss, so that small ones do not vanish (Micikevicius et al. 2018).
_SCALE = 2.0**16
_SCALE_STEPS = 1000


@dataclass
class Best:
    """The best weights so far, by the `merit` of their scores."""

    merit: float
    dice: float | None
    step: int
    state: State


@dataclass
class LossScale:
    """The factor of the loss in fp16: halved where gradients overflow, doubled after a while without."""

    value: float = _SCALE
    since: int = 0

    def after_step(self, *, overflow: bool) -> None:
        """Adapt to what a step found."""
        self.since = 0 if overflow else self.since + 1
        if overflow:
            self.value /= 2
        elif self.since == _SCALE_STEPS:
            self.value, self.since = self.value * 2, 0


@dataclass
class Run:
    """The mutable state of a training; all of it goes into a checkpoint.

    Random streams are derived from seed, step and patch, so that `step` is their whole state. `done` is the share of
    the training that the ranks last agreed on. What fails while the first rank writes waits in `failed` until all ranks
    hear of it: raised at once, the others would wait for the first one for ever.
    """

    task: Task
    context: Context
    step: int = 0
    done: float = 0.0
    best: Best | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    snapshots: list[State] = field(default_factory=list)
    val_dice: float | None = None
    loss: float = 0.0
    lowest: float = float("inf")
    window_seconds: float | None = None
    saved_step: int = 0
    whole: bool = True
    failed: VolsegError | None = None

    def __post_init__(self) -> None:
        self.network = self.task.network.to(self.context.device)
        self.average = WeightAverage(self.network, averaging=self.task.average)
        self.optimiser = make_optimiser(self.network, self.task)
        self.stopping = EarlyStopping(self.task.patience)
        self.scale = LossScale() if self.context.dtype == torch.float16 else None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and tells."""
        return self.context.group.rank == 0

    def restore(self, state: State) -> None:
        """Go on from what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.average.network.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.task.schedule.load_state_dict(state["schedule"])
        self.stopping.load_state_dict(state["stopping"])
        if self.scale is not None and state["scale"]:
            self.scale = LossScale(**state["scale"])
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.saved_step = self.step
        self.best = Best(**state["best"]) if state["best"] else None

    def state_dict(self) -> State:
        """Return tensors and plain values."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.task.schedule.state_dict(),
            "stopping": self.stopping.state_dict(),
            "scale": vars(self.scale) if self.scale else None,
            "best": vars(self.best) if self.best else None,
            "seconds": self.context.seconds,
            **{name: getattr(self, name) for name in _PLAIN},
        }

    def save(self) -> None:
        """Keep a checkpoint, unless the training has gone astray: then the one from before is worth more."""
        if self.first and self.whole and self.step and self.loss <= _ASTRAY * max(self.lowest, _LOW):
            try:
                self.context.save(self.state_dict())
                self.saved_step = self.step
            except VolsegError as error:
                self.failed = error

    def note_loss(self, loss: float) -> None:
        """Take the loss of a finished step into the running mean."""
        self.loss = loss if self.step == 1 else self.loss + (loss - self.loss) / min(self.step, _SMOOTHED)
        self.lowest = min(self.lowest, self.loss)

    def row(self, rate: float) -> dict[str, Any]:
        """Return the start of a row of the metrics."""
        done = progress_of(self.step, self.task.max_steps, self.context.seconds, self.task.max_seconds)
        return {
            "step": self.step,
            "seconds": round(self.context.seconds, 2),
            "progress": done,
            "loss": round(self.loss, 6),
            "learning_rate": rate,
        }

    def add_row(self, row: dict[str, Any]) -> None:
        """Add a row to the metrics."""
        self.rows.append(row)
        if self.first:
            try:
                self.context.record(self.rows)
            except VolsegError as error:
                self.failed = error

    def report(self, rate: float, waited: float) -> None:
        """Tell how far the training is; `waited` are the seconds that were spent waiting for patches."""
        if not self.first:
            return
        elapsed = max(time.monotonic() - self.context.started, 1e-9)
        self.context.report(
            TrainProgress(
                step=self.step,
                max_steps=self.task.max_steps,
                seconds=self.context.seconds,
                max_seconds=self.task.max_seconds,
                loss=self.loss,
                learning_rate=rate,
                val_dice=self.val_dice,
                best_dice=self.best.dice if self.best else None,
                data_wait=waited / elapsed,
            )
        )


_PLAIN = ("step", "done", "rows", "snapshots", "val_dice", "loss", "lowest", "window_seconds")


def make_optimiser(network: nn.Module, task: Task) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019), which does not pull norms and biases towards zero."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": task.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=task.schedule.peak, foreach=True)
