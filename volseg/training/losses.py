"""Losses over labelled voxels, in a form for softmax (a channel a class) and one for a single sigmoid channel.

Each is a sum of a term over voxels, the weighted mean of -(1 - p)^gamma log p of the true class' probability p, and one
over regions, 1 - Tversky index, averaged over the classes above 0 that the batch holds:

- ce, bce: cross entropy, gamma 0;
- focal: Lin et al. 2017, any gamma;
- dice: the Tversky index with equal weights (Milletari et al. 2016, over the batch as in Isensee et al. 2021);
- tversky: Salehi et al. 2017, `beta` the weight of missed voxels and 1 - beta that of false ones;
- dice_ce: the sum of both (Isensee et al. 2021).

Everything is computed in 32 bits, whatever the logits are; without a labelled voxel a loss is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from volseg.errors import SpecError
from volseg.training.region import IGNORED

Loss = Callable[[Tensor, Tensor], Tensor]
"""Loss of logits (b, channels, [z,] y, x) and labels (b, [z,] y, x) int64; IGNORED voxels have no part in it."""

LayeredLoss = Callable[[Tensor | Sequence[Tensor], Tensor], Tensor]
"""Loss of one or several logits (finest first) and the labels of the finest."""

# Half a voxel keeps the ratio defined where a batch holds next to nothing of a class.
_SMOOTH = 0.5
_TINY = 1e-8
_VOXELS, _REGIONS = ("ce", "bce", "focal", "dice_ce"), ("dice", "dice_ce", "tversky")


@dataclass(frozen=True, eq=False)
class _Loss:
    sigmoid: bool
    voxels: bool
    regions: bool
    gamma: float
    beta: float
    class_weights: Tensor | None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        values = logits.float().flatten(2)
        truth = labels.flatten(1)
        return self._sigmoid(values[:, 0], truth) if self.sigmoid else self._softmax(values, truth)

    def _softmax(self, values: Tensor, truth: Tensor) -> Tensor:
        """Return the loss of `values` (b, classes, n) and `truth` (b, n)."""
        classes = values.shape[1]
        weights = self._weights(classes, values)
        logs = F.log_softmax(values, dim=1)
        true_logs = logs.gather(1, truth.clamp_min(0).unsqueeze(1)).squeeze(1)
        loss = self._voxel_term(true_logs, truth, weights) if self.voxels else values.new_zeros(())
        if self.regions:
            predicted = (logs.exp() * (truth != IGNORED).unsqueeze(1)).sum((0, 2))
            # One bin more, in which unlabelled voxels are left behind.
            bins = truth.reshape(-1) - IGNORED
            true = torch.bincount(bins, minlength=classes + 1).float()[1:]
            overlap = values.new_zeros(classes + 1).index_add(0, bins, true_logs.exp().reshape(-1))[1:]
            loss = loss + self._region_term(overlap[1:], predicted[1:], true[1:], weights[1:classes])
        return loss

    def _sigmoid(self, values: Tensor, truth: Tensor) -> Tensor:
        """Return the loss of `values` (b, n), the logits of class 1, and `truth` (b, n)."""
        weights = self._weights(2, values)
        one = (truth == 1).float()
        loss = values.new_zeros(())
        if self.voxels:
            loss = self._voxel_term(F.logsigmoid(values * (2 * one - 1)), truth, weights)
        if self.regions:
            probability = torch.sigmoid(values).reshape(-1)
            one, known = one.reshape(-1), (truth != IGNORED).float().reshape(-1)
            overlap, predicted, true = torch.dot(probability, one), torch.dot(probability, known), one.sum()
            loss = loss + self._region_term(overlap[None], predicted[None], true[None], weights[1:2])
        return loss

    def _weights(self, classes: int, like: Tensor) -> Tensor:
        """Return the weight of each class and, as the last entry, which is that of IGNORED, 0."""
        weights = like.new_ones(classes + 1)
        if self.class_weights is not None:
            weights[:classes] = self.class_weights.to(like)
        weights[IGNORED] = 0
        return weights

    def _voxel_term(self, true_logs: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean of the focal loss; `true_logs` are log probabilities of the true class."""
        each = weights[truth]
        values = true_logs * each
        if self.gamma:
            # A root of 0 has no finite slope.
            values = values * (-torch.expm1(true_logs)).clamp_min(_TINY) ** self.gamma
        return -values.sum() / each.sum().clamp_min(_TINY)

    def _region_term(self, overlap: Tensor, predicted: Tensor, true: Tensor, weights: Tensor) -> Tensor:
        """Return 1 - Tversky index, averaged over the classes that the batch holds; 0 where it holds none."""
        union = overlap + (1 - self.beta) * (predicted - overlap) + self.beta * (true - overlap)
        index = (overlap + _SMOOTH) / (union + _SMOOTH)
        share = weights * (true > 0)
        return ((1 - index) * share).sum() / share.sum().clamp_min(_TINY)


def make_loss(
    name: str, *, sigmoid: bool, class_weights: Tensor | None = None, gamma: float = 2.0, beta: float = 0.7
) -> Loss:
    """Return the loss called `name`: ce, bce, dice, dice_ce, focal (`gamma`) or tversky (`beta`).

    `sigmoid` says that the network has one channel, class 1 against class 0; bce is ce in that form. `class_weights`
    has an entry a class: voxels and regions of a class count in proportion. Raises SpecError for bce of several
    channels and for class weights below 0 or all 0.
    """
    if name == "bce" and not sigmoid:
        raise SpecError(
            "loss 'bce' needs one sigmoid channel, that is two classes, but this network has a channel for each of its "
            "classes; nothing was trained: use loss ce"
        )
    if class_weights is not None and not bool((class_weights >= 0).all() and (class_weights > 0).any()):
        raise SpecError(
            f"class weights {class_weights.tolist()} must not be negative and not all 0: nothing could be learnt; "
            "nothing was trained: leave class_weights out for equal ones"
        )
    return _Loss(
        sigmoid=sigmoid,
        voxels=name in _VOXELS,
        regions=name in _REGIONS,
        gamma=gamma if name == "focal" else 0.0,
        beta=beta if name == "tversky" else 0.5,
        class_weights=class_weights,
    )


def balanced_weights(totals: Sequence[int]) -> tuple[float, ...]:
    """Return class weights by the root of rarity from the labelled voxels of each class.

    Their mean over the classes that occur is 1; a class without a voxel has weight 0.
    """
    roots = [total**-0.5 if total else 0.0 for total in totals]
    present = sum(1 for root in roots if root)
    return tuple(root * present / sum(roots) if root else 0.0 for root in roots)


def deep_supervision_loss(loss: Loss) -> LayeredLoss:
    """Return `loss` for networks that also answer at coarser levels, finest first; one answer has the loss as it is.

    Each level counts half as much as the finer one, all together 1, as in nnU-Net (Isensee et al. 2021).
    """

    def layered(levels: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        if isinstance(levels, Tensor):
            return loss(levels, labels)
        factors = [1] * (labels.ndim - 1)
        total, part = loss(levels[0], labels), 1.0
        for fine, coarse in pairwise(levels):
            # An unpadded level has lost a border, so that its side times the factor exceeds that of the finer one.
            steps = [ceil(n / m) for n, m in zip(fine.shape[2:], coarse.shape[2:], strict=True)]
            factors = [factor * step for factor, step in zip(factors, steps, strict=True)]
            part /= 2
            total = total + part * loss(coarse, coarsen(labels, tuple(coarse.shape[2:]), factors))
        return total / (2 - part)

    return layered


def coarsen(labels: Tensor, sides: Sequence[int], factors: Sequence[int]) -> Tensor:
    """Bring `labels` (b, [z,] y, x) to a coarser grid of `sides`, whose voxels are `factors` fine ones, same centre.

    A coarse voxel takes the labelled voxel in it that is nearest to its middle, along one axis after the other, so that
    a single labelled slice is not lost; IGNORED where there is none.
    """
    for axis, (side, factor) in enumerate(zip(sides, factors, strict=True), 1):
        size = labels.shape[axis]
        first = (size - side * factor) // 2 + torch.arange(side, device=labels.device) * factor
        found: Tensor | None = None
        for step in sorted(range(factor), key=lambda k: abs(2 * k + 1 - factor)):
            at = first + step
            outside = ((at < 0) | (at >= size)).view(-1, *[1] * (labels.ndim - axis - 1))
            part = labels.index_select(axis, at.clamp(0, size - 1)).masked_fill_(outside, IGNORED)
            found = part if found is None else torch.where(found == IGNORED, part, found)
        if found is not None:
            labels = found
    return labels
