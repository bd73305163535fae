"""When a training is validated, on how much, and which weights it keeps."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch

from volseg.training.metrics import Scores, tune_class_bias
from volseg.training.schedule import progress_of
from volseg.training.state import Best, Run
from volseg.training.task import Outcome, State
from volseg.training.validate import Validator

# Validations as shares of the training: closer together at the end, where the learning rate has come down.
_SHAPE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.775, 0.85, 0.9, 0.95, 1.0)
_VALIDATION_SHARE = 0.06
# Forwards that a patch of a training step costs: its own, and the backward is worth two.
_STEP_COST = 3
# Of scores that differ by less, the later weights count as the better: they have seen more.
_NOISE = 0.003


def milestones(count: int) -> tuple[float, ...]:
    """Return the shares of a training after which it is validated, without the end, which is the last of `count`."""
    places = np.arange(1, count) * (len(_SHAPE) - 1) / count
    return tuple(np.interp(places, range(len(_SHAPE)), _SHAPE).tolist())


class Validation:
    """Decides when to validate and how many windows of it fit into a small share of the time."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._milestones = milestones(run.task.validations)
        self._next = sum(1 for m in self._milestones if m <= run.done)
        self.spent = 0.0

    def progress(self) -> float:
        """Return the share of the training that is done by this rank's clock.

        Time is kept for the last two validations and the saving.
        """
        run = self._run
        limit = run.task.max_seconds
        if limit is not None:
            limit -= min(0.2 * limit, 1.0 + 4 * self._cost())
        return progress_of(run.step, run.task.max_steps, run.context.seconds, limit)

    def maybe(self, rate: float) -> bool:
        """Validate if it is time, and return whether it was; every hundredth of the training leaves a row besides."""
        run = self._run
        if self._next >= len(self._milestones) or run.done < self._milestones[self._next]:
            if int(run.done * 100) > int(100 * (run.rows[-1]["progress"] if run.rows else 0)):
                run.add_row(run.row(rate) | {"progress": run.done})
            return False
        self._next = sum(1 for m in self._milestones if m <= run.done)
        self.now(rate)
        return True

    def now(self, rate: float) -> None:
        """Score the weights that would be kept, remember them if none were better, and add a row to the metrics."""
        run = self._run
        row: dict[str, Any] = run.row(rate)
        if run.task.validator is not None:
            scores = self._score(run.task.validator)
            run.val_dice = scores.mean_foreground
            row |= {"val_dice": run.val_dice, "dice": list(scores.dice), "threshold": scores.threshold}
            run.task.schedule.after_validation(scores.merit)
            run.stopping.after_validation(scores.merit)
            best = run.best.merit if run.best else 0.0
            if scores.merit >= best - _NOISE:
                run.best = Best(max(best, scores.merit), run.val_dice, run.step, weights_of(run))
        run.add_row(row)

    def _score(self, validator: Validator) -> Scores:
        run = self._run
        # Clocks differ from rank to rank.
        most = int(run.context.group.agree([self._affordable()])[0])
        share_statistics(run)
        dtype = run.context.dtype if run.context.dtype != torch.float16 else torch.float32
        started = time.monotonic()
        scores = validator.score([run.average.network], dtype=dtype, most=most)
        seconds = time.monotonic() - started
        self.spent += seconds
        run.window_seconds = seconds / min(most, len(validator.windows))
        return scores

    def _affordable(self) -> int:
        """Return how many windows a validation may look at.

        Where steps are the limit it follows from them, so that the same steps keep the same weights; else from time.
        """
        run = self._run
        share = _VALIDATION_SHARE / run.task.validations
        if run.task.max_seconds is None:
            return max(8, int(share * run.task.max_steps * run.task.batch * _STEP_COST))
        if run.window_seconds is None:
            # The first time only to learn what a window costs.
            return max(8, run.context.threads * run.context.group.world)
        return max(4, int(share * run.task.max_seconds / run.window_seconds))

    def _cost(self) -> float:
        validator = self._run.task.validator
        if validator is None or self._run.window_seconds is None:
            return 0.0
        members = self._run.task.schedule.cycles if self._run.task.snapshots else 1
        return self._run.window_seconds * len(validator.windows) * members


def weights_of(run: Run) -> State:
    """Return a copy of the weights that would be kept now, on the CPU."""
    return {name: t.detach().to("cpu", copy=True) for name, t in run.average.network.state_dict().items()}


def share_statistics(run: Run) -> None:
    """Give all ranks the first one's statistics of batch normalisation, which each took over its own patches."""
    if run.context.group.world == 1:
        return
    for buffer in run.average.network.buffers():
        if buffer.is_floating_point():
            if not run.first:
                buffer.zero_()
            run.context.group.sum_(buffer)


def choose(run: Run) -> Outcome:
    """Return the weights that are kept, scored as they will be used: fp32, all windows, tuned threshold or bias."""
    validator, task = run.task.validator, run.task
    share_statistics(run)
    states = list(run.snapshots)
    if states:
        weights = f"{len(states)} snapshots, the weights of the end of each cycle"
    elif validator is None or run.best is None:
        states = [weights_of(run)]
        text = "averaged over the last steps" if task.average else "of the last step"
        weights = f"{text}, step {run.step}: no validation region"
    else:
        states = [run.best.state]
        text = "averaged, best" if task.average else "best"
        weights = f"{text} on the validation region, step {run.best.step}"
    networks = [copy.deepcopy(run.average.network) for _ in states]
    for network, state in zip(networks, states, strict=True):
        network.load_state_dict(state)
    scores, threshold, bias = None, 0.5 if task.sigmoid else None, None
    if validator is not None:
        scores = validator.score(networks)
        if task.sigmoid:
            threshold = scores.threshold
        else:
            bias = tune_class_bias(*validator.sample(networks))
            if any(bias):
                scores = validator.score(networks, bias=bias)
            else:
                bias = None
    ready = [network.cpu().eval() for network in networks]
    return Outcome(ready, weights, scores, threshold, bias, run.step, run.rows)
