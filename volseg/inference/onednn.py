"""Convolutions straight through oneDNN on CPUs.

torch's dispatcher takes small inputs for slow ones to set up: a 3D convolution whose batch x channels x depth x height is
at most 20,480 goes to an unfolding kernel, which copies the input 27 times. With one patch a forward that is the first
layer and most of the deep ones: 1.3 times the time of a 64^3 U-Net forward, 5 times that of a small one, and most of its
memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OneDnnConvolution(nn.Module):
    """A convolution (b, c, [z,] y, x) with the weights of `convolution`, always computed by oneDNN."""

    def __init__(self, convolution: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.padding, self.stride = convolution.padding, convolution.stride
        self.dilation, self.groups = convolution.dilation, convolution.groups

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        result: Tensor = torch.mkldnn_convolution(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
        )
        return result


def use_onednn(network: nn.Module) -> nn.Module:
    """Replace the zero-padded convolutions of `network` in place, where oneDNN is there, and return it."""
    if not torch.backends.mkldnn.is_available():
        return network
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            plain = isinstance(child, nn.Conv2d | nn.Conv3d) and child.padding_mode == "zeros"
            if plain and not isinstance(child.padding, str):
                setattr(module, name, OneDnnConvolution(child))
    return network
