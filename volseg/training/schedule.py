"""The learning rate over a training: a short rise, then a cosine down to nothing (Loshchilov and Hutter 2017)."""

from __future__ import annotations

import math

_WARM_UP = 0.03
_END = 0.002


def learning_rate(peak: float, progress: float) -> float:
    """Return the learning rate where `progress` (0 to 1) of the training is done."""
    if progress < _WARM_UP:
        return peak * max(progress / _WARM_UP, 0.05)
    share = min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))
    return peak * (_END + (1 - _END) * 0.5 * (1 + math.cos(math.pi * share)))


def progress_of(step: int, max_steps: int, seconds: float, max_seconds: float | None) -> float:
    """Return the share of the training that is done: by steps or by time, whichever is further."""
    done = step / max_steps
    if max_seconds is not None:
        done = max(done, seconds / max_seconds if max_seconds > 0 else 1.0)
    return min(1.0, done)
