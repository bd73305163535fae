"""Losses over labelled voxels: cross entropy plus Dice (Isensee et al. 2021), in a softmax and a sigmoid form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from volseg.training.sampler import IGNORED

# Keeps the ratio defined where a patch holds next to nothing of a class.
_SMOOTH = 1.0


def softmax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross entropy + Dice loss of `logits` (b, classes, ...) against `labels` (b, ...), IGNORED left out."""
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    known = labels != IGNORED
    entropy = F.nll_loss(log_probabilities, labels, ignore_index=IGNORED, reduction="sum") / known.sum().clamp_min(1)
    probabilities = log_probabilities.exp() * known.unsqueeze(1)
    axes = [0, *range(2, logits.ndim)]
    truth = torch.zeros_like(probabilities).scatter_(1, labels.clamp_min(0).unsqueeze(1), known.unsqueeze(1).float())
    return entropy + _dice_loss((probabilities * truth).sum(axes)[1:], probabilities.sum(axes)[1:], truth.sum(axes)[1:])


def sigmoid_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the two-class form for one channel, `logits` (b, 1, ...): binary cross entropy + Dice loss of class 1."""
    known = (labels != IGNORED).float()
    truth = (labels == 1).float()
    values = logits.float().squeeze(1)
    entropy = F.binary_cross_entropy_with_logits(values, truth, weight=known, reduction="sum")
    probabilities = torch.sigmoid(values) * known
    return entropy / known.sum().clamp_min(1) + _dice_loss(
        (probabilities * truth).sum()[None], probabilities.sum()[None], truth.sum()[None]
    )


def _dice_loss(overlap: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    """Return 1 - Dice, averaged over the classes that the batch holds; 0 where it holds none."""
    dice = (2 * overlap + _SMOOTH) / (predicted + true + _SMOOTH)
    present = (true > 0).float()
    return ((1 - dice) * present).sum() / present.sum().clamp_min(1)
