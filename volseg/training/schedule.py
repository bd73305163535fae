"""The learning rate over a training, and when to stop: plain arithmetic of progress (0 to 1) and of validations.

cosine and restarts follow Loshchilov and Hutter 2017 (with snapshots at the ends of cycles: Huang et al. 2017), poly is
that of nnU-Net (Isensee et al. 2021), one_cycle of Smith and Topin 2019. Progress, not steps, drives them, because a
training may be limited by time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

_END = 0.002
_LOWEST_START = 0.05
_POWER = 0.9
_RISE = 0.3
_START = 1 / 25
_DROP = 0.1
_DROP_PATIENCE = 5
_DROP_FLOOR = 1e-5


@dataclass
class Schedule:
    """The learning rate `peak` at first, after a linear rise over the share `warm_up`; subclasses let it fall."""

    peak: float
    warm_up: float = 0.0
    cycles: int = 1

    def rate(self, progress: float) -> float:
        """Return the learning rate where `progress` (0 to 1) of the training is done."""
        if progress < self.warm_up:
            return self.peak * max(progress / self.warm_up, _LOWEST_START)
        return self.peak * self._level(self._share(progress))

    def cycle(self, progress: float) -> int:
        """Return the number of the cycle, from 0 to `cycles` - 1; the first one includes the rise."""
        return min(int(self._share(progress) * self.cycles), self.cycles - 1)

    def cycle_ends(self, before: float, after: float) -> bool:
        """Whether a cycle ends between two states of progress; the last one ends where `after` reaches 1."""
        return self.cycle(after) > self.cycle(before) or before < 1.0 <= after

    def after_validation(self, merit: float) -> None:
        """Take the merit of a validation, the higher the better; only plateau looks at it."""

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on; empty where progress says it all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""

    def _share(self, progress: float) -> float:
        return min(1.0, max(0.0, progress - self.warm_up) / (1 - self.warm_up))

    def _level(self, share: float) -> float:
        """Return the learning rate as a share of the peak where `share` of the time after the rise is over."""
        return 1.0


def _fall(share: float) -> float:
    return _END + (1 - _END) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass
class _Restarts(Schedule):
    """A cosine a cycle, down to nearly nothing; with one cycle the plain cosine."""

    def _level(self, share: float) -> float:
        turns = share * self.cycles
        return _fall(turns - min(int(turns), self.cycles - 1))


@dataclass
class _Poly(Schedule):
    def _level(self, share: float) -> float:
        return float((1 - share) ** _POWER)


@dataclass
class _OneCycle(Schedule):
    """A rise from a 25th of the peak over 30 % of the training, then a fall; the rise is its warm-up."""

    def _level(self, share: float) -> float:
        if share < _RISE:
            return _START + (1 - _START) * 0.5 * (1 - math.cos(math.pi * share / _RISE))
        return _fall((share - _RISE) / (1 - _RISE))


@dataclass
class EarlyStopping:
    """Says when `patience` validations in a row were no better than the best before; None: never."""

    patience: int | None
    best: float = -math.inf
    waited: int = 0

    @property
    def stopped(self) -> bool:
        """Whether it is time to stop."""
        return self.patience is not None and self.waited >= self.patience

    def after_validation(self, merit: float) -> bool:
        """Take the merit of a validation, the higher the better, and return whether it is time to stop."""
        self.waited = 0 if merit > self.best else self.waited + 1
        self.best = max(self.best, merit)
        return self.stopped

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.best, self.waited = state["best"], state["waited"]


@dataclass
class _Plateau(Schedule):
    """A tenth of the learning rate after every five validations without improvement, not below 1e-5."""

    level: float = 1.0
    stalled: EarlyStopping = field(default_factory=lambda: EarlyStopping(_DROP_PATIENCE))

    def after_validation(self, merit: float) -> None:
        if self.stalled.after_validation(merit):
            self.level = max(self.level * _DROP, min(1.0, _DROP_FLOOR / self.peak))
            self.stalled.waited = 0

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, **self.stalled.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level = state["level"]
        self.stalled.load_state_dict(state)

    def _level(self, share: float) -> float:
        return self.level


_KINDS: dict[str, type[Schedule]] = {
    "cosine": _Restarts,
    "restarts": _Restarts,
    "poly": _Poly,
    "one_cycle": _OneCycle,
    "plateau": _Plateau,
    "constant": Schedule,
}


def make_schedule(name: str, peak: float, *, warm_up: float, cycles: int) -> Schedule:
    """Return the schedule called `name`: cosine, restarts (with `cycles`), poly, one_cycle, plateau or constant.

    `peak` is the highest learning rate, `warm_up` the share of the training in which it rises (one_cycle has a rise of
    its own). Only restarts has more than one cycle.
    """
    return _KINDS[name](
        peak, warm_up=0.0 if name == "one_cycle" else warm_up, cycles=cycles if name == "restarts" else 1
    )


def progress_of(step: int, max_steps: int, seconds: float, max_seconds: float | None) -> float:
    """Return the share of the training that is done: by steps or by time, whichever is further."""
    done = step / max_steps
    if max_seconds is not None:
        done = max(done, seconds / max_seconds if max_seconds > 0 else 1.0)
    return min(1.0, done)
