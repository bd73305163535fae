"""Making a trained network ready for inference: same answers, fewer passes over memory."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Conv = nn.Conv2d | nn.Conv3d


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Return a copy of `network` in eval mode whose batch normalisations are part of their convolutions.

    Works on every module that has a convolution `conv` followed by its `norm`; other normalisations stay.
    """
    folded = copy.deepcopy(network).eval()
    for module in folded.modules():
        conv, norm = getattr(module, "conv", None), getattr(module, "norm", None)
        if isinstance(conv, Conv) and isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d):
            module.conv = fuse_conv_bn_eval(conv, norm)
            module.norm = nn.Identity()
    return folded


def for_inference(network: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy of `network` that runs forwards only: folded, channels last, on `device`, in `dtype`.

    The input must be channels last, too (`memory_format`). On a CPU every convolution goes to oneDNN.
    """
    ready = fold_batch_norm(network).requires_grad_(False).to(device=device, dtype=dtype)
    ready.to(memory_format=memory_format(ready))  # type: ignore[call-overload]
    if torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        for module in list(ready.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Conv):
                    setattr(module, name, OneDnnConv(child))
    return ready


def memory_format(network: nn.Module) -> torch.memory_format:
    """Return the channels-last format that suits the network's convolutions, 2D or 3D."""
    flat = any(
        isinstance(m, nn.Conv2d) or (isinstance(m, OneDnnConv) and m.weight.ndim == 4) for m in network.modules()
    )
    return torch.channels_last if flat else torch.channels_last_3d


class OneDnnConv(nn.Module):
    """A convolution that always runs in oneDNN.

    On one thread with batch 1, torch sends small convolutions to its own im2col kernel instead: a 3D U-Net 16-32-64-128
    at 64^3 then takes 1.3 times as long and a third more memory (measured).
    """

    def __init__(self, conv: Conv) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        assert not isinstance(conv.padding, str)  # our networks give numbers, never "same"
        self.padding, self.stride, self.dilation, self.groups = conv.padding, conv.stride, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (b, c, [z,] y, x)."""
        return torch.mkldnn_convolution(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
        )
