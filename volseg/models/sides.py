"""How the sides of a network's tensors follow from the side of its input, one axis at a time.

A tensor's voxel stands for a cell of `scale` input voxels. Convolutions without padding lose voxels at both ends alike,
so the side of a tensor is ``(input - lost) / scale``, and its first cell begins ``lost / 2`` voxels into the input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd


@dataclass(frozen=True, slots=True)
class Line:
    """One axis of one tensor: cells of `scale` input voxels, `lost` input voxels at both ends together.

    A voxel depends on the input from `before` voxels before its cell to `after` voxels behind it.
    """

    scale: int = 1
    lost: int = 0
    before: int = 0
    after: int = 0

    def side(self, length: int) -> int:
        """Return the tensor's side for an input side of `length` voxels."""
        return (length - self.lost) // self.scale

    def convolved(self, kernel: int, *, padded: bool) -> Line:
        """Return the line behind a convolution, or a pooling of stride 1, of odd `kernel`."""
        reach = kernel // 2 * self.scale
        lost = self.lost if padded else self.lost + 2 * reach
        return Line(self.scale, lost, self.before + reach, self.after + reach)

    def pooled(self, factor: int) -> Line:
        """Return the line behind a pooling whose kernel and stride are `factor`."""
        return replace(self, scale=self.scale * factor)

    def raised(self, kernel: int, factor: int) -> Line:
        """Return the line behind a transposed convolution that multiplies the side by `factor`.

        Raises ValueError where the result would be finer than the input.
        """
        if self.scale % factor:
            raise ValueError(f"a tensor of scale {self.scale} cannot be enlarged {factor} times")
        fine, padding = self.scale // factor, raise_padding(kernel, factor)
        places = range(factor)
        first = [-((kernel - 1 - padding - j) // factor) for j in places]
        last = [(j + padding) // factor for j in places]
        before = max(j - factor * i for j, i in zip(places, first, strict=True))
        after = max(factor * i + factor - 1 - j for j, i in zip(places, last, strict=True))
        return Line(fine, self.lost, self.before + before * fine, self.after + after * fine)

    def joined(self, other: Line) -> Line:
        """Return the line of two tensors put together, the larger one cut at both ends alike.

        Raises ValueError where their voxels do not lie on one another.
        """
        if self.scale != other.scale or (self.lost - other.lost) % (2 * self.scale):
            raise ValueError(f"{self} and {other} cannot be joined: their voxels do not lie on one another")
        return Line(
            self.scale, max(self.lost, other.lost), max(self.before, other.before), max(self.after, other.after)
        )


def raise_padding(kernel: int, factor: int) -> int:
    """Return the padding with which a transposed convolution multiplies sides by `factor`.

    Where ``kernel - factor`` is odd, an output padding of 1 goes with it.
    """
    return (kernel - factor + 1) // 2


@dataclass(frozen=True, slots=True)
class Allowed:
    """The input sides n of one axis that a network takes: ``n >= smallest and (n - phase) % step == 0``."""

    step: int = 1
    phase: int = 0
    smallest: int = 1

    def __contains__(self, side: int) -> bool:
        return side >= self.smallest and (side - self.phase) % self.step == 0

    def fit(self, side: int, *, up: bool) -> int:
        """Return the nearest allowed side that is not smaller (`up`) or not larger; at least the smallest."""
        rest = (side - self.phase) % self.step
        fitted = side - rest + (self.step if up and rest else 0)
        return max(fitted, self.smallest)

    def divided(self, line: Line, stride: int) -> Allowed:
        """Return the sides for which the pooling of `line` by `stride` also leaves no remainder.

        Raises ValueError where no side can fulfil both.
        """
        step = line.scale * stride
        both = self.step * step // gcd(self.step, step)
        for phase in range(self.phase, self.phase + both, self.step):
            if (phase - line.lost) % step == 0:
                return replace(self, step=both, phase=phase % both)
        raise ValueError(f"no side leaves no remainder for {self} and a pooling of {line} by {stride}")

    def filling(self, line: Line) -> Allowed:
        """Return the sides for which the tensor of `line` has at least one voxel, too."""
        return replace(
            self, smallest=Allowed(self.step, self.phase).fit(max(self.smallest, line.lost + line.scale), up=True)
        )
