"""Peak memory of one forward, by replaying how `forward.CpuForward` makes and frees the tensors of a program.

The replay runs on a model of glibc's heap (best fit, neighbours merge), because with freed memory kept for reuse, as
the workers run, it is the heap's extent that the process holds: up to two fifths more than the live tensors.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from math import prod

from volseg.geometry.box import Triple
from volseg.models.program import INPUT, Add, Concat, Conv, Drop, Normalise, Op, Pool, Program, Raise
from volseg.models.tiles import READ, tiles_of

_CHANCE = 1.12
"""Where branches of a block are equal in size, small objects decide which gap each gets: the heap's extent was measured
at 1.02 to 1.36 of the replay's, another in every process. This is about the middle. Where an unpadded network cuts its
skips down it was 1.29."""
_ALIGNMENT_SLACK = 96
"""What glibc's memalign asks for beyond a block: an alignment of 64 bytes and the smallest chunk."""


def peak_bytes(program: Program, patch: Triple, batch: int, itemsize: int) -> int:
    """Return the bytes that an eval forward of `program`, its batch normalisations folded, adds at its peak.

    `patch` is in network coordinates, `itemsize` the bytes of one value.
    """
    replay = _Replay(program, patch, batch, itemsize)
    # The first forward leaves the heap cut up; from the second on it is in its steady state.
    for _ in range(3):
        replay.run()
    branched = any(isinstance(op, Concat) and len(op.sources) > 2 for op in program.ops)
    cut_down = any(program.margin) and bool(program.apart)
    return round(replay.heap.extent * (_CHANCE if branched or cut_down else 1))


class Heap:
    """A heap that grows at its end only, places each block in the smallest gap that holds it, and merges gaps.

    A gap must be larger than the block by `slack`: aligned blocks are cut out of larger ones, so that one does not fit
    where an equal one lay, unless something beside it is free, too.
    """

    def __init__(self, slack: int = 0) -> None:
        self.extent = 0
        self._slack = slack
        self._gaps: list[tuple[int, int]] = []
        self._sizes: dict[int, int] = {}

    def new(self, size: int) -> int:
        """Place a block of `size` bytes and return its address."""
        fitting = [(stop - start, start) for start, stop in self._gaps if stop - start >= size + self._slack]
        if fitting:
            length, address = min(fitting)
            self._gaps.remove((address, address + length))
            if length > size:
                insort(self._gaps, (address + size, address + length))
        else:
            # A gap at the very end is what glibc calls the top: the block starts in it and the heap grows by the rest.
            address = self.extent
            if self._gaps and self._gaps[-1][1] == self.extent:
                address = self._gaps.pop()[0]
            self.extent = address + size
        self._sizes[address] = size
        return address

    def free(self, address: int) -> None:
        """Give the block at `address` back."""
        start, stop = address, address + self._sizes.pop(address)
        for gap in list(self._gaps):
            if gap[1] == start or gap[0] == stop:
                self._gaps.remove(gap)
                start, stop = min(start, gap[0]), max(stop, gap[1])
        insort(self._gaps, (start, stop))


class _Replay:
    """The forward of `forward.CpuForward`, tensor by tensor; a GPU's differs in what is there for a moment."""

    def __init__(self, program: Program, patch: Triple, batch: int, itemsize: int) -> None:
        self.program = program
        self.itemsize = itemsize
        self.patch = patch
        self.values = {name: batch * width * program.voxels(name, patch) for name, width in program.channels.items()}
        self.heap = Heap(_ALIGNMENT_SLACK)
        self._places: dict[str, tuple[int, ...]] = {}
        self._names: Counter[int] = Counter()

    def run(self) -> None:
        """Follow one forward, the release of the answer included."""
        # The caller's input is not counted; a small block stands for it.
        self._name(INPUT, self.heap.new(1))
        for op, released in zip(self.program.ops, self.program.releases, strict=True):
            self._name(op.name, *self._make(op))
            for name in released:
                self._release(name)
            if isinstance(op, Conv) and op.norm in {"instance", "group"}:
                self._normalise(op)
        for name in self.program.answers:
            self._release(name)

    def _make(self, op: Op) -> tuple[int, ...]:
        """Return the addresses of what `op` makes before it lets its sources go."""
        match op:
            case Drop() | Add():
                return self._places[op.sources[0]]
            case Concat() if op.name in self.program.apart:
                return tuple(place for source in op.sources for place in self._places[source])
            case Normalise() if op.norm == "instance":
                return (self._copied(op),)
        if isinstance(op, Conv):
            return (self._convolved(op),)
        address = self._new(op)
        match op:
            case Pool() if op.kernel != op.stride:
                # torch computes the places of the maxima, as int64, whether they are asked for or not.
                self._pass([8 * self.values[op.name]])
            case Raise() if self.patch[0] > 1:
                # In 3D torch lays the source out anew and spreads it into columns, as many as the answer has values.
                self._pass([self.values[name] * self.itemsize for name in (*op.sources, op.name)])
        return (address,)

    def _convolved(self, op: Conv) -> int:
        copies = [self.heap.new(size) for size in self._copied_parts(op)]
        address = self._new(op)
        self._pass(self._tiled(op))
        for copy in copies:
            self.heap.free(copy)
        return address

    def _copied_parts(self, op: Conv) -> list[int]:
        """Return the sizes of parts that are cut down to the smallest one, and so copied."""
        parts = self.program.apart.get(op.sources[0], ())
        voxels = {part: self.program.voxels(part, self.patch) for part in parts}
        batch = self.values[INPUT] // (self.program.in_channels * prod(self.patch))
        return [
            self.itemsize * batch * self.program.channels[part] * min(voxels.values())
            for part in parts
            if voxels[part] > min(voxels.values())
        ]

    def _tiled(self, op: Conv) -> list[int]:
        """Return the sizes of what lies between the transforms of a convolution and its products."""
        lines = self.program.lines
        made, read = ([line.side(n) for line, n in zip(lines[name], self.patch, strict=True)]
                      for name in (op.name, op.sources[0]))  # fmt: skip
        tiles = tiles_of(op.kernel, op.cin, op.cout, (made[0], made[1], made[2]), self.itemsize)
        if tiles is None:
            return []
        parts = self.program.apart.get(op.sources[0], op.sources)
        # A row of the source is larger where the convolution is unpadded; tiles at the ends are padded in a copy.
        row = tiles.row * prod(read[-2:]) // prod(made[-2:])
        between = [self.itemsize * READ * tiles.chunk * row * self.program.channels[part] for part in parts]
        return [*between, self.itemsize * READ * tiles.chunk * tiles.row * op.cout, max(between) // tiles.chunk]

    def _pass(self, sizes: list[int]) -> None:
        """Hold blocks of these sizes together for a moment."""
        for address in [self.heap.new(size) for size in sizes]:
            self.heap.free(address)

    def _normalise(self, op: Conv) -> None:
        address = self._copied(op) if op.norm == "instance" else self._new(op)
        self._release(op.name)
        self._name(op.name, address)

    def _copied(self, op: Op) -> int:
        # Instance normalisation of a channels-last tensor goes through a contiguous copy.
        copy, address = self._new(op), self._new(op)
        self.heap.free(copy)
        return address

    def _new(self, op: Op) -> int:
        return self.heap.new(max(1, self.values[op.name] * self.itemsize))

    def _name(self, name: str, *addresses: int) -> None:
        self._places[name] = addresses
        self._names.update(addresses)

    def _release(self, name: str) -> None:
        for address in self._places.pop(name):
            self._names[address] -= 1
            if not self._names[address]:
                self.heap.free(address)
