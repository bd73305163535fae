"""Batch normalisation over the patches of all ranks, on CPUs and GPUs alike (torch's own one needs GPUs).

With it the statistics do not depend on how many ranks share a step's patches. Names and values of the state are those
of the plain layers, so that checkpoints and bundles know nothing of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from volseg.training.distributed import Group


class _Normalise(torch.autograd.Function):
    """Normalises with the mean and variance over all ranks; each direction costs one sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, group: Group, eps: float) -> tuple[Tensor, ...]:
        axes = [0, *range(2, x.ndim)]
        var, mean = torch.var_mean(x.float(), axes, correction=0)
        # In double precision, because the squares nearly cancel where a mean is large.
        count = torch.full_like(mean, x.numel() // x.shape[1], dtype=torch.float64)
        wide = mean.double()
        totals = torch.stack([count, count * wide, count * (var.double() + wide * wide)])
        group.sum_(totals)
        count = totals[0]
        wide = totals[1] / count
        var, mean = (totals[2] / count - wide * wide).clamp_min(0).float(), wide.float()
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.group, ctx.eps = group, eps
        unbiased = var * (count / (count - 1).clamp_min(1)).float()
        ctx.mark_non_differentiable(mean, unbiased)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, unbiased

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        # With the statistics held fixed; how they move with x comes on top.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            gradients[0].contiguous(memory_format=_layout(x)), x, weight, mean, var, None, None, False, ctx.eps,
            [True, True, True],
        )  # fmt: skip
        totals = torch.stack([dbias.double(), dweight.double()])
        ctx.group.sum_(totals)
        of_mean, of_spread = (totals / count).float()
        inverse = torch.rsqrt(var + ctx.eps)
        slope = weight * inverse
        shape = [1, -1, *[1] * (x.ndim - 2)]
        factor = (slope * of_spread * inverse).view(shape)
        constant = (slope * (of_mean - of_spread * mean * inverse)).view(shape)
        return dx - (x * factor + constant).to(dx.dtype), dweight, dbias, None, None


def _layout(x: Tensor) -> torch.memory_format:
    kind = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return kind if x.is_contiguous(memory_format=kind) else torch.contiguous_format


class _Synchronised(_BatchNorm):
    """A batch normalisation that shares its parameters and statistics with the plain layer it stands for."""

    def __init__(self, plain: _BatchNorm, group: Group) -> None:
        super().__init__(plain.num_features, plain.eps, plain.momentum)
        self.weight, self.bias = plain.weight, plain.bias
        self.running_mean, self.running_var = plain.running_mean, plain.running_var
        self.num_batches_tracked = plain.num_batches_tracked
        self._group = group

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - the base class' name
        """Take any shape (b, c, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (b, c, ...); in eval mode with the running statistics."""
        if not self.training:
            return super().forward(x)
        result, mean, variance = _Normalise.apply(x, self.weight, self.bias, self._group, self.eps)  # type: ignore[no-untyped-call]
        assert self.running_mean is not None
        assert self.running_var is not None
        with torch.no_grad():
            rate = self.momentum if self.momentum is not None else 0.1
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(variance, rate)
        return result  # type: ignore[no-any-return]


def synchronise(network: nn.Module, group: Group) -> None:
    """Replace the batch normalisations inside `network` by ones over all ranks; parameters and state stay the same."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d | nn.BatchNorm3d):
                setattr(module, name, _Synchronised(child, group))
