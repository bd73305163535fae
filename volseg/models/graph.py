"""The one module that runs every architecture described by a program.

A tensor is let go as soon as its last reader has run, so that the peak of a forward is what `footprint` foretells.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from volseg.models.network import ProgramConfig
from volseg.models.program import (
    INPUT,
    Activation,
    Add,
    Concat,
    Conv,
    Drop,
    Enlarge,
    Normalisation,
    Normalise,
    Op,
    Pool,
    Raise,
    group_count,
)


class Graph(nn.Module):
    """Network from (b, in_channels, [z,] y, x) to logits (b, out_channels, [z,] y, x), smaller by twice the margin.

    In train mode a program with several answers returns a tuple of logits, finest first; in eval mode there is one
    tensor, whatever the program. Raises ValueError where the sides of the input are not allowed.
    """

    def __init__(self, config: ProgramConfig) -> None:
        super().__init__()
        self.config = config
        for op in config.program.ops:
            if isinstance(op, Conv | Raise | Normalise):
                self._place(op.name, Stage(op, config.dims))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return logits; see the class for shapes."""
        self.check(x)
        program = self.config.program if self.training else self.config.program.main
        tensors = {INPUT: x}
        del x
        for op, released in zip(program.ops, program.releases, strict=True):
            sources = [tensors[name] for name in op.sources]
            for name in released:
                del tensors[name]
            tensors[op.name] = self.run(op, sources)
        answers = tuple(tensors[name] for name in program.answers)
        return answers[0] if len(answers) == 1 else answers

    def for_inference(self) -> Graph:
        """Return a network in eval mode without what only training uses; the weights are copies."""
        smaller = Graph(self.config.for_inference())
        state = self.state_dict()
        smaller.load_state_dict({name: state[name] for name in smaller.state_dict()})
        return smaller.eval()

    def run(self, op: Op, sources: list[Tensor]) -> Tensor:
        """Return what `op` makes of `sources`, a list that is emptied where the memory of its tensors matters."""
        flat = self.config.dims == 2
        match op:
            case Conv() | Raise() | Normalise():
                made: Tensor = self.get_submodule(op.name)(sources)
                return made
            case Pool():
                pool = F.max_pool2d if flat else F.max_pool3d
                skip = 3 - self.config.dims
                return pool(sources.pop(), op.kernel[skip:], op.stride[skip:], op.padding[skip:])
            case Enlarge():
                scale = tuple(float(f) for f in op.factor[3 - self.config.dims :])
                return F.interpolate(sources.pop(), scale_factor=scale, mode="nearest")
            case Concat():
                smallest = min((source.shape[2:] for source in sources), key=prod)
                return torch.cat([cut(source, smallest) for source in sources], dim=1)
            case Add():
                x, other = sources
                return activate(x.add_(cut(other, x.shape[2:])), op.activation)
            case Drop():
                return F.dropout(sources.pop(), op.share, self.training)
        raise AssertionError(op)

    def check(self, x: Tensor) -> None:
        """Raise ValueError where the sides of (b, c, [z,] y, x) are not allowed."""
        dims = self.config.dims
        z, y, x_ = (1,) * (5 - x.ndim) + tuple(x.shape[2:]) if x.ndim == dims + 2 else (0, 0, 0)
        if not self.config.allows((z, y, x_)):
            raise ValueError(
                f"input {tuple(x.shape)} must be (b, c, {'z, ' * (dims - 2)}y, x) with sides that are "
                f"{self.config.side_rule()}"
            )

    def _place(self, name: str, module: nn.Module) -> None:
        parent: nn.Module = self
        *path, last = name.split(".")
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, module)


class Stage(nn.Module):
    """One convolution `conv`, its normalisation `norm`, its activation; each of them may be absent.

    The list that it is called with is emptied: with the caller's reference gone, the input's memory is free once the
    convolution has read it.
    """

    def __init__(self, op: Conv | Raise | Normalise, dims: int) -> None:
        super().__init__()
        self.activation: Activation = op.activation if isinstance(op, Conv) else "none"
        self.conv: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        if isinstance(op, Normalise):
            self.norm = _norm(op.norm, dims, op.channels)
        elif isinstance(op, Conv):
            self.conv = _convolution(op, dims)
            self.norm = _norm(op.norm, dims, op.cout)
        else:
            self.conv = _transposed(op, dims)

    def forward(self, sources: list[Tensor]) -> Tensor:
        """Map the one tensor of `sources` (b, c, [z,] y, x)."""
        x = sources.pop()
        x = self.conv(x)
        x = self.norm(x)
        return activate(x, self.activation)


class GroupNorm(nn.GroupNorm):
    """As torch's, but one value a group is no error: it becomes the bias. The smallest patch is then like any other."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, c, [z,] y, x) to itself."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, torch.backends.cudnn.enabled)


class InstanceNorm(GroupNorm):
    """Normalisation of each channel by itself, by torch's function for it."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, c, [z,] y, x) to itself."""
        cudnn = torch.backends.cudnn.enabled
        return torch.instance_norm(x, self.weight, self.bias, None, None, True, 0.1, self.eps, cudnn)


def build_graph(config: ProgramConfig) -> nn.Module:
    """Return the network that `config` describes, with random weights."""
    return Graph(config)


def cut(x: Tensor, sides: torch.Size) -> Tensor:
    """Return the centre of (b, c, [z,] y, x) with these sides."""
    for axis, side in enumerate(sides, start=2):
        if x.shape[axis] != side:
            x = x.narrow(axis, (x.shape[axis] - side) // 2, side)
    return x


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Change `x` in place: it was made for this."""
    match activation:
        case "relu":
            return F.relu(x, inplace=True)
        case "leaky_relu":
            return F.leaky_relu(x, 0.01, inplace=True)
        case "silu":
            # Its gradient needs the input.
            return F.silu(x, inplace=not torch.is_grad_enabled())
        case "none":
            return x


def _convolution(op: Conv, dims: int) -> nn.Module:
    kernel = op.kernel[3 - dims :]
    kind = nn.Conv2d if dims == 2 else nn.Conv3d
    padding = tuple(k // 2 if op.padded else 0 for k in kernel)
    conv = kind(op.cin, op.cout, kernel, padding=padding, bias=op.norm == "none")  # type: ignore[arg-type]
    # He et al. 2015; torch's own default is meant for linear activations and starts the loss lower than it learns.
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _transposed(op: Raise, dims: int) -> nn.Module:
    kernel, factor, padding = (triple[3 - dims :] for triple in (op.kernel, op.factor, op.padding))
    rest = tuple(f + 2 * p - k for k, f, p in zip(kernel, factor, padding, strict=True))
    kind = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
    conv = kind(op.cin, op.cout, kernel, factor, padding, rest)  # type: ignore[arg-type]
    if op.interpolating:
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        with torch.no_grad():
            conv.weight.copy_(_interpolation(op, kernel, factor))
    return conv


def _interpolation(op: Raise, kernel: tuple[int, ...], factor: tuple[int, ...]) -> Tensor:
    """Return weights (cin, cout, [z,] y, x) that interpolate every channel linearly and mix none."""
    taps = torch.ones(())
    for k, f in zip(kernel, factor, strict=True):
        line = 1 - (torch.arange(k) - (k - 1) / 2).abs() / f
        taps = taps[..., None] * line
    return torch.eye(op.cin, op.cout).view(op.cin, op.cout, *[1] * len(kernel)) * taps


def _norm(kind: Normalisation, dims: int, width: int) -> nn.Module:
    match kind:
        case "batch":
            return nn.BatchNorm2d(width) if dims == 2 else nn.BatchNorm3d(width)
        case "instance":
            return InstanceNorm(width, width)
        case "group":
            return GroupNorm(group_count(width), width)
        case "none":
            return nn.Identity()
