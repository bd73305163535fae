"""Dropout (Srivastava et al. 2014) whose draws can be made again: torch's own share one stream between all threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class SeededDropout(TorchFunctionMode):
    """Inside it, dropout in this thread draws from a stream that belongs to `key`, such as (seed, step, patch).

    It concerns `torch.nn.Dropout` and `torch.nn.functional.dropout`, whatever network calls them.
    """

    def __init__(self, device: torch.device, key: Sequence[int]) -> None:
        """Seed the stream on `device`, that of the tensors."""
        super().__init__()
        seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)
        self._stream = torch.Generator(device).manual_seed(int(seed))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or this class' dropout in its stead."""
        return (self._dropout if func is F.dropout else func)(*args, **(kwargs or {}))

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return x
        kept = torch.empty_like(x, requires_grad=False).bernoulli_(1 - p, generator=self._stream).div_(1 - p)
        return x.mul_(kept) if inplace else x * kept
