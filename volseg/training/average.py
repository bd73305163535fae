"""A running average of the weights: what is validated and saved (Polyak and Juditsky 1992, Karras et al. 2024)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

# The average reaches back over this share of the steps so far: short trainings and long ones alike.
_REACH = 0.05
_LONGEST = 0.999


class WeightAverage:
    """Keeps `network`, an average of the trained weights and of the statistics of batch normalisation."""

    def __init__(self, network: nn.Module, *, averaging: bool = True) -> None:
        """Start from the weights of `network`; without `averaging`, follow them as they are."""
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._averaging = averaging

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move the average towards `network` after `step` steps (from 1 on)."""
        rate = max(1 / (1 + _REACH * step), 1 - _LONGEST) if self._averaging else 1.0
        mine, theirs = self._tensors(self.network), self._tensors(network)
        torch._foreach_lerp_(mine, theirs, rate)

    @staticmethod
    def _tensors(network: nn.Module) -> list[Tensor]:
        return [t for t in network.state_dict().values() if t.is_floating_point()]
