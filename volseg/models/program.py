"""A network as a list of operations on named tensors, and all that follows from it by arithmetic, without torch.

Every architecture is a function from its arguments to a `Program`; `graph.Graph` runs one, `footprint` foretells the
memory of doing so. Kernels, factors and patches are in network coordinates: see `network`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from math import prod
from typing import Literal

from volseg.geometry.box import Triple
from volseg.models.sides import Allowed, Line, raise_padding

Normalisation = Literal["batch", "instance", "group", "none"]
Activation = Literal["relu", "leaky_relu", "silu", "none"]

# float32 values in a register of AVX-512.
_VECTOR = 16

INPUT = "input"
"""Name of the tensor that a program starts from."""


@dataclass(frozen=True, slots=True)
class Op:
    """One step: reads the tensors `sources` and makes the tensor `name`, which is also where its weights are found."""

    name: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conv(Op):
    """Convolution of odd kernel and stride 1, normalisation, activation; it has a bias where no norm follows."""

    cin: int
    cout: int
    kernel: Triple
    norm: Normalisation
    activation: Activation
    padded: bool


@dataclass(frozen=True, slots=True)
class Raise(Op):
    """Transposed convolution with bias that multiplies the sides by `factor`; may start out as an interpolation."""

    cin: int
    cout: int
    kernel: Triple
    factor: Triple
    interpolating: bool

    @property
    def padding(self) -> Triple:
        """What is cut off at each end of what the kernels span."""
        a, b, c = (raise_padding(k, f) for k, f in zip(self.kernel, self.factor, strict=True))
        return a, b, c


@dataclass(frozen=True, slots=True)
class Enlarge(Op):
    """Every voxel repeated `factor` times along each axis."""

    factor: Triple


@dataclass(frozen=True, slots=True)
class Pool(Op):
    """Largest value of each `kernel`: side by side (`stride` equal to it), or padded around every voxel (stride 1)."""

    kernel: Triple
    stride: Triple

    @property
    def padding(self) -> Triple:
        """Voxels that are added at each end, never to be the largest."""
        a, b, c = ((k - s) // 2 for k, s in zip(self.kernel, self.stride, strict=True))
        return a, b, c


@dataclass(frozen=True, slots=True)
class Normalise(Op):
    """A normalisation that follows no convolution."""

    channels: int
    norm: Normalisation


@dataclass(frozen=True, slots=True)
class Concat(Op):
    """Channels of all sources, each cut down around its centre to the smallest of them."""


@dataclass(frozen=True, slots=True)
class Add(Op):
    """Sum of two sources, the second cut down around its centre to the first, then an activation.

    The sum overwrites the first source, which nothing else may need: see `Builder.add`.
    """

    activation: Activation


@dataclass(frozen=True, slots=True)
class Drop(Op):
    """Dropout of a `share` of the values in training; the same tensor otherwise."""

    share: float


@dataclass(frozen=True)
class Program:
    """The operations of a network in their order, and its answers: the logits, and those that only training uses.

    `answers` are finest first; the first one has the input's resolution.
    """

    in_channels: int
    ops: tuple[Op, ...]
    answers: tuple[str, ...]

    @cached_property
    def channels(self) -> dict[str, int]:
        """Channels of every tensor by name."""
        found = {INPUT: self.in_channels}
        for op in self.ops:
            sources = [found[name] for name in op.sources]
            found[op.name] = (
                op.cout if isinstance(op, Conv | Raise) else sum(sources) if isinstance(op, Concat) else sources[0]
            )
        return found

    @cached_property
    def lines(self) -> dict[str, tuple[Line, Line, Line]]:
        """The three axes of every tensor by name."""
        found = {INPUT: (Line(), Line(), Line())}
        for op in self.ops:
            a, b, c = (_line(op, [found[name][axis] for name in op.sources], axis) for axis in range(3))
            found[op.name] = (a, b, c)
        return found

    @cached_property
    def allowed(self) -> tuple[Allowed, Allowed, Allowed]:
        """The input sides that the program takes, one entry an axis."""
        a, b, c = (self._allowed(axis) for axis in range(3))
        return a, b, c

    @cached_property
    def releases(self) -> tuple[tuple[str, ...], ...]:
        """For every operation the tensors that nothing reads after it."""
        seen = set(self.answers)
        found: list[tuple[str, ...]] = []
        for op in reversed(self.ops):
            last = tuple(name for name in dict.fromkeys(op.sources) if name not in seen)
            seen.update(last)
            found.append(last)
        return tuple(reversed(found))

    @cached_property
    def main(self) -> Program:
        """The program of the first answer alone."""
        wanted = {self.answers[0]}
        kept: list[Op] = []
        for op in reversed(self.ops):
            if op.name in wanted:
                wanted.update(op.sources)
                kept.append(op)
        return Program(self.in_channels, tuple(reversed(kept)), self.answers[:1])

    @cached_property
    def apart(self) -> dict[str, tuple[str, ...]]:
        """Concatenations, and their parts, that nothing but convolutions read: on a CPU these read the parts instead.

        Parts of fewer channels than a vector register holds would leave much of it idle: they are joined.
        """
        readers: dict[str, list[Op]] = {}
        for op in self.ops:
            for name in op.sources:
                readers.setdefault(name, []).append(op)
        return {
            op.name: op.sources
            for op in self.ops
            if isinstance(op, Concat)
            and min(self.channels[part] for part in op.sources) >= _VECTOR
            and all(isinstance(reader, Conv) for reader in readers.get(op.name, []))
            and op.name not in self.answers
        }

    @property
    def margin(self) -> Triple:
        """Voxels by which the answer is smaller than the input at each end."""
        a, b, c = (line.lost // 2 for line in self.lines[self.answers[0]])
        return a, b, c

    @property
    def receptive_field(self) -> Triple:
        """Voxels to each side on which one voxel of the answer depends, normalisation aside."""
        a, b, c = (max(line.before, line.after) for line in self.lines[self.answers[0]])
        return a, b, c

    @property
    def convolutions(self) -> int:
        """Number of convolutions, transposed ones included."""
        return sum(isinstance(op, Conv | Raise) for op in self.ops)

    @property
    def parameter_count(self) -> int:
        """Number of trained values."""
        return sum(_parameters(op) for op in self.ops)

    @property
    def state_bytes(self) -> int:
        """Bytes of all stored tensors at 32 bits: trained values and the statistics of batch normalisation."""
        # Running mean and variance of each channel, and a 64-bit counter of the batches.
        return 4 * self.parameter_count + sum(8 * width + 8 for width in map(_batch_normed, self.ops) if width)

    def flops(self, patch: Triple) -> int:
        """Floating-point operations, two a multiply-add, of the convolutions for one input of sides `patch`."""
        total = 0
        for op in self.ops:
            if isinstance(op, Conv | Raise):
                # A transposed convolution spreads each voxel that it reads; a plain one gathers each that it makes.
                where = op.name if isinstance(op, Conv) else op.sources[0]
                total += 2 * op.cin * op.cout * prod(op.kernel) * self.voxels(where, patch)
        return total

    def voxels(self, name: str, patch: Triple) -> int:
        """Return the number of voxels of tensor `name` for an input of sides `patch`."""
        return prod(line.side(n) for line, n in zip(self.lines[name], patch, strict=True))

    def convolved_values(self, patch: Triple) -> int:
        """Return how many values all convolutions together make for one input of sides `patch`."""
        return sum(op.cout * self.voxels(op.name, patch) for op in self.ops if isinstance(op, Conv | Raise))

    def _allowed(self, axis: int) -> Allowed:
        found = Allowed()
        for op in self.ops:
            if isinstance(op, Pool) and op.stride[axis] > 1:
                found = found.divided(self.lines[op.sources[0]][axis], op.stride[axis])
        return reduce(Allowed.filling, (lines[axis] for lines in self.lines.values()), found)


def group_count(width: int) -> int:
    """Return the number of groups of a group normalisation over `width` channels: 8, or all where there are fewer."""
    return min(8, width)


def _line(op: Op, sources: Sequence[Line], axis: int) -> Line:
    first = sources[0]
    match op:
        case Conv():
            return first.convolved(op.kernel[axis], padded=op.padded)
        case Raise():
            return first.raised(op.kernel[axis], op.factor[axis])
        case Enlarge():
            return first.raised(op.factor[axis], op.factor[axis])
        case Pool() if op.stride[axis] == op.kernel[axis]:
            return first.pooled(op.stride[axis])
        case Pool():
            return first.convolved(op.kernel[axis], padded=True)
        case _:
            return reduce(Line.joined, sources)


def _parameters(op: Op) -> int:
    match op:
        case Conv():
            # The norm's weight and bias, or the convolution's bias.
            return op.cin * op.cout * prod(op.kernel) + (op.cout if op.norm == "none" else 2 * op.cout)
        case Raise():
            return op.cin * op.cout * prod(op.kernel) + op.cout
        case Normalise():
            return 2 * op.channels
        case _:
            return 0


def _batch_normed(op: Op) -> int:
    if isinstance(op, Conv) and op.norm == "batch":
        return op.cout
    return op.channels if isinstance(op, Normalise) and op.norm == "batch" else 0


@dataclass
class Builder:
    """Puts a program together: every method adds one operation and returns the name of the tensor that it makes.

    Kernels may be given as one number; for a 2D network the slice axis then keeps 1.
    """

    dims: int
    in_channels: int
    ops: dict[str, Op] = field(default_factory=dict)
    channels: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.channels = {INPUT: self.in_channels}

    def cube(self, side: int) -> Triple:
        """Return a kernel of equal sides along the axes of the network."""
        return (side if self.dims == 3 else 1), side, side

    def conv(
        self, name: str, source: str, cout: int, kernel: int, *,
        norm: Normalisation = "none", activation: Activation = "none", padded: bool = True,
    ) -> str:  # fmt: skip
        """Add a convolution."""
        cin = self.channels[source]
        return self._add(Conv(name, (source,), cin, cout, self.cube(kernel), norm, activation, padded), cout)

    def up(
        self, name: str, source: str, cout: int, factor: Triple, kernel: Triple, *, interpolating: bool = False
    ) -> str:
        """Add a transposed convolution."""
        return self._add(Raise(name, (source,), self.channels[source], cout, kernel, factor, interpolating), cout)

    def enlarge(self, name: str, source: str, factor: Triple) -> str:
        """Add an enlargement by repetition."""
        return self._add(Enlarge(name, (source,), factor), self.channels[source])

    def pool(self, name: str, source: str, factor: Triple) -> str:
        """Add a pooling whose stride is its kernel."""
        return self._add(Pool(name, (source,), factor, factor), self.channels[source])

    def spread(self, name: str, source: str, kernel: int) -> str:
        """Add a padded pooling of stride 1."""
        return self._add(Pool(name, (source,), self.cube(kernel), (1, 1, 1)), self.channels[source])

    def normalise(self, name: str, source: str, norm: Normalisation) -> str:
        """Add a normalisation, unless it is none."""
        if norm == "none":
            return source
        return self._add(Normalise(name, (source,), self.channels[source], norm), self.channels[source])

    def concat(self, name: str, *sources: str) -> str:
        """Add a concatenation."""
        return self._add(Concat(name, sources), sum(self.channels[source] for source in sources))

    def add(self, name: str, first: str, second: str, activation: Activation = "none") -> str:
        """Add a sum that overwrites `first`.

        Raises ValueError where a gradient or another operation needs `first`: it must be what a convolution without
        activation made, for the sum alone.
        """
        maker = self.ops.get(first)
        plain = isinstance(maker, Raise) or (isinstance(maker, Conv) and maker.activation == "none")
        if not plain or any(first in op.sources for op in self.ops.values()):
            raise ValueError(f"{first} cannot be overwritten by {name}: add to a convolution that nothing else reads")
        return self._add(Add(name, (first, second), activation), self.channels[first])

    def drop(self, name: str, source: str, share: float) -> str:
        """Add a dropout, unless the share is 0."""
        return self._add(Drop(name, (source,), share), self.channels[source]) if share else source

    def program(self, *answers: str) -> Program:
        """Return the program with these answers, finest first."""
        return Program(self.in_channels, tuple(self.ops.values()), answers)

    def _add(self, op: Op, channels: int) -> str:
        if op.name in self.channels:
            raise ValueError(f"there are two tensors {op.name}: give each its own name")
        gone = {earlier.sources[0] for earlier in self.ops.values() if isinstance(earlier, Add)}
        if gone & set(op.sources):
            raise ValueError(f"{op.name} reads {', '.join(gone & set(op.sources))}, which a sum has overwritten")
        self.ops[op.name] = op
        self.channels[op.name] = channels
        return op.name
