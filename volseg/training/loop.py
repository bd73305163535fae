"""The training loop of one rank: steps, running average, validation, checkpoints; it knows no Ray and no files."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from volseg.errors import JobError, JobInterrupted
from volseg.training.average import WeightAverage
from volseg.training.losses import sigmoid_loss, softmax_loss
from volseg.training.metrics import Scores
from volseg.training.progress import TrainProgress
from volseg.training.replicas import Gradients, share_cores
from volseg.training.sampler import Prefetcher, Sampler
from volseg.training.schedule import learning_rate, progress_of
from volseg.training.validate import Validator

# Validations as shares of the training: closer together at the end, where the learning rate has come down.
_MILESTONES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.775, 0.85, 0.9, 0.95)
_VALIDATION_SHARE = 0.06
# Of scores that differ by less, the later weights count as the better: they have seen more.
_NOISE = 0.003
_CHECKPOINT_SECONDS = 30.0
_REPORT_SECONDS = 0.5
_CLIP = 5.0

State = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """Where one rank of a training runs, and whom it tells.

    `save` keeps a checkpoint, `report` takes progress, `record` the rows of metrics.jsonl. `started` is the monotonic
    time at which the training's clock began; `spent` the seconds of earlier attempts.
    """

    device: torch.device
    threads: int
    low_precision: bool
    save: Callable[[State], None]
    report: Callable[[TrainProgress], None]
    record: Callable[[list[dict[str, Any]]], object]
    started: float
    spent: float = 0.0
    rank: int = 0
    world: int = 1

    @property
    def seconds(self) -> float:
        """Seconds since the training first began, without the pauses between attempts."""
        return self.spent + time.monotonic() - self.started


@dataclass(frozen=True)
class Task:
    """What one rank trains: network, patches, windows, and the numbers of the optimisation."""

    network: nn.Module
    sampler: Sampler
    validator: Validator | None
    sigmoid: bool
    batch: int
    max_steps: int
    max_seconds: float | None
    learning_rate: float
    weight_decay: float
    seed: int


@dataclass
class Outcome:
    """The chosen weights in `network`, where they come from, and how the steps went."""

    network: nn.Module
    weights: str
    scores: Scores | None
    steps: int
    rows: list[dict[str, Any]]
    steps_per_second: float
    data_wait: float


@dataclass
class _Best:
    merit: float
    dice: float | None
    step: int
    state: State


@dataclass
class _Run:
    """The mutable state of a training; all of it goes into a checkpoint."""

    task: Task
    context: Context
    step: int = 0
    best: _Best | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    val_dice: float | None = None
    loss: float = 0.0

    def __post_init__(self) -> None:
        self.network = self.task.network.to(self.context.device)
        self.average = WeightAverage(self.network)
        self.optimiser = _optimiser(self.network, self.task)

    def restore(self, state: State) -> None:
        """Go on from what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.average.network.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.rows = state["step"], state["rows"]
        self.val_dice, self.loss = state["val_dice"], state["loss"]
        self.best = _Best(**state["best"]) if state["best"] else None

    def state_dict(self) -> State:
        """Return tensors and plain values."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "val_dice": self.val_dice,
            "loss": self.loss,
            "best": vars(self.best) if self.best else None,
            "seconds": self.context.seconds,
        }


def fit(task: Task, context: Context, stored: State | None = None) -> Outcome:
    """Train until the steps or the time are used up and return the best weights on the validation region.

    Without a validator, the last weights. `stored` is the checkpoint of an earlier attempt. Raises JobError where the
    loss is no longer finite, JobInterrupted on Ctrl-C after a checkpoint.
    """
    run = _Run(task, context)
    if stored is not None:
        run.restore(stored)
    loss = sigmoid_loss if task.sigmoid else softmax_loss
    shares = share_cores(context.threads, task.batch, low_precision=context.low_precision)
    gradients = Gradients(run.network, loss, *shares, low_precision=context.low_precision)
    first, began = run.step, time.monotonic()
    with closing(gradients), closing(Prefetcher(task.sampler, task.batch, run.step)) as patches:
        try:
            spent = _steps(run, gradients, patches)
        except KeyboardInterrupt:
            context.save(run.state_dict())
            raise JobInterrupted(
                f"training stopped at step {run.step} by the user; the same command goes on from there"
            ) from None
        training = max(time.monotonic() - began - spent, 1e-9)
        speed, wait = (run.step - first) / training, patches.waited / training
    outcome = _choose(run)
    outcome.steps_per_second, outcome.data_wait = speed, wait
    return outcome


def _steps(run: _Run, gradients: Gradients, patches: Prefetcher) -> float:
    """Run all steps and return the seconds that validation took."""
    task, context = run.task, run.context
    validation = _Validation(run)
    reported = saved = time.monotonic()
    run.network.train()
    while (done := validation.progress()) < 1.0 or run.step == 0:
        rate = learning_rate(task.learning_rate, done)
        for group in run.optimiser.param_groups:
            group["lr"] = rate
        loss = gradients.compute(*patches.next())
        norm = float(torch.nn.utils.clip_grad_norm_(run.network.parameters(), _CLIP))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise JobError(_diverged(run, loss if math.isfinite(norm) else norm))
        run.optimiser.step()
        run.step += 1
        run.average.update(run.network, run.step)
        run.loss = loss if run.step == 1 else run.loss + (loss - run.loss) / min(run.step, 25)
        validated = validation.maybe(rate)
        now = time.monotonic()
        if validated or now - saved > _CHECKPOINT_SECONDS:
            context.save(run.state_dict())
            saved = now
        if validated or now - reported > _REPORT_SECONDS or run.step == 1:
            context.report(_progress(run, rate, patches))
            reported = now
    validation.last(learning_rate(task.learning_rate, 1.0))
    context.save(run.state_dict())
    context.report(_progress(run, 0.0, patches))
    return validation.spent


class _Validation:
    """Decides when to validate and how many windows of it fit into a small share of the time."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._seconds_a_window: float | None = None
        self.spent = 0.0
        self._next = sum(1 for m in _MILESTONES if m <= self.progress())

    def progress(self) -> float:
        """Return the share of the training that is done; time is kept for the last two validations and the saving."""
        run = self._run
        limit = run.task.max_seconds
        if limit is not None:
            limit -= min(0.2 * limit, 1.0 + 4 * self._cost())
        return progress_of(run.step, run.task.max_steps, run.context.seconds, limit)

    def maybe(self, rate: float) -> bool:
        """Validate if it is time; every milestone leaves a row in the metrics. Return whether it was one."""
        done = self.progress()
        if self._next >= len(_MILESTONES) or done < _MILESTONES[self._next]:
            return self._log_between(done, rate)
        self._next = sum(1 for m in _MILESTONES if m <= done)
        self.last(rate)
        return True

    def last(self, rate: float) -> None:
        """Validate the averaged weights, remember them if none were better, and add a row to the metrics."""
        run = self._run
        row: dict[str, Any] = _row(run, rate)
        if run.task.validator is not None:
            scores = self._score(run.task.validator)
            run.val_dice = scores.mean_foreground
            row |= {"val_dice": run.val_dice, "dice": list(scores.dice), "threshold": scores.threshold}
            best = run.best.merit if run.best else 0.0
            if scores.merit >= best - _NOISE:
                state = copy.deepcopy(run.average.network.state_dict())
                run.best = _Best(max(best, scores.merit), run.val_dice, run.step, state)
        run.rows.append(row)
        run.context.record(run.rows)

    def _log_between(self, done: float, rate: float) -> bool:
        if int(done * 100) > int(100 * (self._run.rows[-1]["progress"] if self._run.rows else 0)):
            self._run.rows.append(_row(self._run, rate) | {"progress": done})
            self._run.context.record(self._run.rows)
        return False

    def _score(self, validator: Validator) -> Scores:
        run = self._run
        dtype = torch.bfloat16 if run.context.low_precision else torch.float32
        most = None
        if self._seconds_a_window is not None:
            total = run.task.max_seconds or run.context.seconds / max(self.progress(), 1e-3)
            allowed = _VALIDATION_SHARE * total / (len(_MILESTONES) + 1)
            most = max(4, int(allowed / self._seconds_a_window))
        else:
            # The first time only to learn what a window costs.
            most = max(8, run.context.threads)
        started = time.monotonic()
        scores = validator.score(run.average.network, dtype, most)
        seconds = time.monotonic() - started
        self.spent += seconds
        self._seconds_a_window = seconds / min(most, len(validator.windows))
        return scores

    def _cost(self) -> float:
        validator = self._run.task.validator
        if validator is None or self._seconds_a_window is None:
            return 0.0
        return self._seconds_a_window * len(validator.windows)


def _choose(run: _Run) -> Outcome:
    """Load the best weights into the averaged network and score them as they will be used: fp32, all windows."""
    network, validator = run.average.network, run.task.validator
    if validator is None or run.best is None:
        weights, scores = f"averaged over the last steps, step {run.step}: no validation region", None
    else:
        network.load_state_dict(run.best.state)
        weights = f"averaged, best on the validation region, step {run.best.step}"
        scores = validator.score(network)
    return Outcome(network.cpu().eval(), weights, scores, run.step, run.rows, 0.0, 0.0)


def _optimiser(network: nn.Module, task: Task) -> torch.optim.AdamW:
    # Norms and biases are not pulled towards zero.
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": task.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=task.learning_rate, foreach=True)


def _row(run: _Run, rate: float) -> dict[str, Any]:
    limit = run.task.max_seconds
    done = progress_of(run.step, run.task.max_steps, run.context.seconds, limit)
    return {
        "step": run.step,
        "seconds": round(run.context.seconds, 2),
        "progress": done,
        "loss": round(run.loss, 5),
        "learning_rate": rate,
    }


def _progress(run: _Run, rate: float, patches: Prefetcher) -> TrainProgress:
    elapsed = max(time.monotonic() - run.context.started, 1e-9)
    return TrainProgress(
        step=run.step,
        max_steps=run.task.max_steps,
        seconds=run.context.seconds,
        max_seconds=run.task.max_seconds,
        loss=run.loss,
        learning_rate=rate,
        val_dice=run.val_dice,
        best_dice=run.best.dice if run.best else None,
        data_wait=patches.waited / elapsed,
    )


def _diverged(run: _Run, value: float) -> str:
    rate = run.task.learning_rate
    return (
        f"the loss or its gradient is {value} at step {run.step + 1}: training diverged and stopped, no bundle was "
        f"written; the last checkpoint is kept: run it again with a --learning-rate below {rate:g} to go on from there"
    )
