"""The forward of a program on a CPU: as `graph.Graph`, with convolutions fused, nothing joined that need not be."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from volseg.models.graph import Graph, Stage, activate, cut
from volseg.models.program import INPUT, Concat, Conv, Op, Pool
from volseg.models.winograd import CpuConv

_CACHED = 1 << 19
"""Bytes of a tensor that are worked on at a time, so that several operations find them in a core's cache."""


class CpuForward(nn.Module):
    """Runs forwards of `graph`, whose batch normalisations were folded, from (b, c, [z,] y, x) to logits.

    The answers differ from those of the graph in their last bits only. What it needs of memory is what
    `footprint.peak_bytes` foretells.
    """

    def __init__(self, graph: Graph, *, tiled: bool = True) -> None:
        super().__init__()
        self._graph = graph
        self._program = graph.config.program.main
        self._apart = self._program.apart
        self.convolutions = nn.ModuleDict()
        for op in self._program.ops:
            if isinstance(op, Conv):
                stage = graph.get_submodule(op.name)
                assert isinstance(stage, Stage)
                assert isinstance(stage.conv, nn.Conv2d | nn.Conv3d)
                fused = stage.activation if isinstance(stage.norm, nn.Identity) else "none"
                self.convolutions[_key(op)] = CpuConv(stage.conv, self._widths(op), fused, tiled=tiled)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits; raises ValueError where the sides of the input are not allowed."""
        self._graph.check(x)
        tensors = {INPUT: [x]}
        del x
        for op, released in zip(self._program.ops, self._program.releases, strict=True):
            sources = [part for name in op.sources for part in tensors[name]]
            for name in released:
                del tensors[name]
            tensors[op.name] = self._run(op, sources)
        (answer,) = tensors[self._program.answers[0]]
        return answer

    def _run(self, op: Op, sources: list[Tensor]) -> list[Tensor]:
        match op:
            case Conv():
                x: Tensor = self.convolutions[_key(op)](sources)
                stage = self._graph.get_submodule(op.name)
                if not isinstance(stage.norm, nn.Identity):
                    x = activate(stage.norm(x), op.activation)  # type: ignore[operator]
                return [x]
            case Concat() if op.name in self._apart:
                smallest = min((source.shape[2:] for source in sources), key=lambda sides: sides.numel())
                return [cut(source, smallest) for source in sources]
            case Pool() if op.kernel == op.stride:
                return [pool(sources.pop(), op.kernel[3 - self._graph.config.dims :])]
        return [self._graph.run(op, sources)]

    def _widths(self, op: Conv) -> list[int]:
        (source,) = op.sources
        if source not in self._apart:
            return [op.cin]
        return [self._program.channels[part] for part in self._apart[source]]


def pool(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Return the largest value of each `kernel` of (b, c, [z,] y, x), whose sides are multiples of it.

    torch's own also finds the place of each maximum, as int64, whether it is asked for or not: 1.4 times the time.
    """
    rows = x.movedim(1, -1)
    made = rows.new_empty([rows.shape[0], *(n // k for n, k in zip(rows.shape[1:-1], kernel, strict=True)), x.shape[1]])
    # So many planes or lines at a time stay in the cache.
    step = max(1, _CACHED // (kernel[0] * rows[0, 0].numel() * rows.itemsize))
    grouped = rows.reshape(len(rows), -1, kernel[0], *rows.shape[2:])
    for picture, answer in zip(grouped, made, strict=True):
        for part, target in zip(picture.split(step), answer.split(step), strict=True):
            target.copy_(_largest(part, kernel))
    return made.movedim(-1, 1)


def _largest(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Return the maxima of rows of kernels, x (n, kernel[0], [y,] x, c), without the second axis."""
    found, *others = x.unbind(1)
    for other in others:
        found = torch.maximum(found, other)
    for axis, factor in enumerate(kernel[1:], start=1):
        whole = found
        steps = [(slice(None),) * axis + (slice(k, None, factor),) for k in range(factor)]
        found = whole[steps[0]]
        for step in steps[1:]:
            found = torch.maximum(found, whole[step])
    return found


def _key(op: Op) -> str:
    # A module's name may hold no dot.
    return op.name.replace(".", "/")
