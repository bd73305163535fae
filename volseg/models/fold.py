"""Making a trained network ready for inference: same answers, fewer passes over memory."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from volseg.models.forward import CpuForward
from volseg.models.graph import Graph, Stage

Conv = nn.Conv2d | nn.Conv3d
Kernels = Literal["tiled", "direct", "plain", "compiled"]
"""tiled: convolutions on a CPU in tiles of rows where that pays; direct: as they stand; plain: torch's own forward;
compiled: that, compiled with its weights frozen, which needs a C++ compiler and memory that nothing foretells."""


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Return a copy of `network` in eval mode whose batch normalisations are part of their convolutions.

    Those that follow something else stay, and so do those of networks that are no `Graph`: only of a `Stage` is it
    known what runs between the two.
    """
    folded = copy.deepcopy(network).eval()
    for module in folded.modules():
        if not isinstance(module, Stage):
            continue
        conv, norm = module.conv, module.norm
        if isinstance(conv, Conv) and isinstance(norm, _BatchNorm):
            module.conv = fuse_conv_bn_eval(conv, norm)
            module.norm = nn.Identity()
    return folded


def for_inference(
    network: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32, kernels: Kernels = "tiled"
) -> nn.Module:
    """Return a copy of `network` that runs forwards only: folded, channels last, on `device`, in `dtype`.

    The input must be channels last, too (`memory_format`). On a CPU every convolution goes to oneDNN: those of a
    `Graph` by `forward.CpuForward`, those of other networks one by one. `kernels` says how much of that is wanted.
    """
    ready = fold_batch_norm(network).requires_grad_(False).to(device=device, dtype=dtype)
    ready.to(memory_format=memory_format(ready))  # type: ignore[call-overload]
    if kernels == "compiled":
        return Compiled(ready)
    on_cpu = torch.device(device).type == "cpu"
    if kernels == "plain" or not on_cpu or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return ready
    if isinstance(ready, Graph):
        return CpuForward(ready, tiled=kernels == "tiled")
    for module in list(ready.modules()):
        for name, child in list(module.named_children()):
            # oneDNN pads with zeros only, by numbers.
            if isinstance(child, Conv) and child.padding_mode == "zeros" and not isinstance(child.padding, str):
                setattr(module, name, OneDnnConv(child))
    return ready


def memory_format(network: nn.Module) -> torch.memory_format:
    """Return the channels-last format that suits the network's convolutions, 2D or 3D."""
    flat = any(
        isinstance(m, nn.Conv2d) or (isinstance(m, OneDnnConv) and m.weight.ndim == 4) for m in network.modules()
    )
    return torch.channels_last if flat else torch.channels_last_3d


class OneDnnConv(nn.Module):
    """A convolution of a network that is no `Graph`; it always runs in oneDNN, see `winograd.CpuConv`."""

    def __init__(self, conv: Conv) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        assert not isinstance(conv.padding, str)
        self.padding, self.stride, self.dilation, self.groups = conv.padding, conv.stride, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (b, c, [z,] y, x)."""
        return torch.mkldnn_convolution(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
        )


class Compiled(nn.Module):
    """A network that is compiled, with its weights frozen, when it meets its first input; the shape must stay."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._run: Callable[[Tensor], Tensor] | None = None
        self._compiling = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, c, [z,] y, x); raises whatever tracing and compiling raise."""
        with self._compiling:
            if self._run is None:
                # Traced first: the compiler would follow the interpreter of the program instead of the program.
                traced = torch.export.export(self.network, (x,), strict=False).module()
                run = torch.compile(traced, dynamic=False, options={"freezing": True})
                # It compiles when it first runs, which threads that share the network must not do at the same time.
                run(x)
                self._run = run
        return self._run(x)
