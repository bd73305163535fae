"""Global intensity scaling: statistics of the training volume that travel in the bundle, never of a block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator


class Scaling(BaseModel):
    """How raw grey values become network input: ``(clip(v, low, high) - mean) / std``, one entry a channel.

    `low` and `high` are percentiles of the training region, `mean` and `std` those of the clipped values (the scheme of
    nnU-Net for CT, Isensee et al. 2021). All are in the units of the raw data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> Scaling:
        columns = (self.low, self.high, self.mean, self.std)
        if len({len(c) for c in columns}) != 1 or not self.low:
            raise ValueError("low, high, mean and std need one entry each for every channel")
        if not all(math.isfinite(v) for c in columns for v in c):
            raise ValueError("intensity statistics must be finite")
        if any(s <= 0 for s in self.std) or any(b < a for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError("every std must be above 0 and no high below its low")
        return self

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return len(self.low)

    @classmethod
    def measure(cls, samples: NDArray[np.generic], percentiles: Sequence[float] = (0.5, 99.5)) -> Scaling:
        """Take the statistics of `samples` (c, n); non-finite values are left out.

        Raises ValueError when a channel holds no finite value.
        """
        columns: list[tuple[float, float, float, float]] = []
        for channel in samples.reshape(samples.shape[0], -1).astype(np.float64):
            finite = channel[np.isfinite(channel)]
            if finite.size == 0:
                raise ValueError("no finite value to take intensity statistics from")
            low, high = np.percentile(finite, percentiles)
            clipped = np.clip(finite, low, high)
            # A constant channel has no spread; 1 keeps it at zero after scaling.
            columns.append((float(low), float(high), float(clipped.mean()), float(clipped.std()) or 1.0))
        low_, high_, mean_, std_ = zip(*columns, strict=True)
        return cls(low=low_, high=high_, mean=mean_, std=std_)

    def apply(self, raw: NDArray[np.generic]) -> NDArray[np.float32]:
        """Scale `raw` (c, ...) to float32 of the same shape."""
        shape = (-1,) + (1,) * (raw.ndim - 1)
        low, high, mean, std = (
            np.asarray(v, np.float32).reshape(shape) for v in (self.low, self.high, self.mean, self.std)
        )
        scaled: NDArray[np.float32] = (np.clip(raw.astype(np.float32), low, high) - mean) / std
        return scaled
