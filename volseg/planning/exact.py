"""Exact mode: which tile, its lattices, and why a network or a request cannot have it.

The tile decides the last bits, so it depends neither on workers nor on blocks or region: without --tile it is the one
with which the whole volume costs least while one worker needs at most `TILE_BYTES` for it, less only where a worker has
less than that, and more only where no tile is content with that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product
from math import lcm, prod

from volseg.errors import PlanError
from volseg.geometry import AXES, AxisTiles, Box, TileLattice, Triple
from volseg.planning.plan import ModelFacts, View, ViewFacts
from volseg.spec import SegmentSpec

TILE_BYTES = {2: 2 << 30, 3: 4 << 30}
"""Memory that the choice of a tile may use for a forward and a block of one tile, beside what a worker has anyway.

By dimensions of the network: in 2D the halo costs little beyond that, and forwards of 4 GiB took 1.25 times as long a
voxel as those of up to 2 GiB; in 3D the halo costs more.
"""

_PARTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256, 512, 1024)
_SMALLEST = 16
FIRST_FORWARD = 0.5
"""How much longer the first forward of a shape takes on a CPU, because its memory is new: one tile is not always best.

Measured: 0.45 to 0.8 for sides of 256 to 3072 voxels in 2D.
"""
# Candidates that are asked whether they fit before the search gives up; they come in the order of their cost.
_TRIED = 4000


def check_exact(model: ModelFacts) -> None:
    """Raise PlanError where a network cannot be exact."""
    for facts in model.views:
        if facts.halo is None:
            raise PlanError(f"blend exact is not possible with this model: {facts.inexact}: use --blend gaussian")


def asked_tile(spec: SegmentSpec, model: ModelFacts) -> Triple | None:
    """Return the tile that was asked for; raises PlanError where it is deep along the only slice axis."""
    if spec.tile is not None and model.dims == 2 and len(model.views) == 1:
        flat = AXES.index(model.views[0].axis)
        if spec.tile[flat] != 1:
            raise PlanError(
                f"tile {list(spec.tile)} is {spec.tile[flat]} deep on axis {AXES[flat]}, but a 2D network takes single "
                "slices along it: make that side 1"
            )
    return spec.tile


def lattice_of(facts: ViewFacts, shape: Triple, tile: Triple, model: ModelFacts) -> TileLattice:
    """Return the tiles of one view; along the slice axis of a 2D network they are 1 deep."""
    assert facts.halo is not None
    halo = facts.halo.symmetric() if model.mirrors > 1 else facts.halo

    def line(axis: int) -> AxisTiles:
        side = 1 if model.dims == 2 and axis == AXES.index(facts.axis) else tile[axis]
        step = halo.step[axis]
        least = facts.smallest[axis] + (facts.phase[axis] - facts.smallest[axis]) % step
        return AxisTiles(
            shape[axis], side, halo.before[axis], halo.after[axis], step, facts.phase[axis], least, facts.margin[axis]
        )

    return TileLattice((line(0), line(1), line(2)))


def exact_view(facts: ViewFacts, lattice: TileLattice, region: Box) -> View:
    """Return a view with the mean cost of its tiles in `region`."""
    count = lattice.count_touching(region)
    total = once = 0.0
    for windows in product(*(of.items() for of in lattice.lengths(region))):
        (z, a), (y, b), (x, c) = windows
        flops = facts.flops((z, y, x))
        total, once = total + a * b * c * flops, once + flops
    return View(facts.axis, lattice, total / count, lattice.voxels(region) / count, once)


def choose_tile(
    shape: Triple, model: ModelFacts, bytes_of: Callable[[Sequence[TileLattice]], int], limit: int
) -> Triple | None:
    """Return the tile with which the whole volume is computed soonest by one worker; None when none fits.

    `bytes_of` tells what a worker needs beside its baseline for one block of one tile, `limit` what it may need.
    """
    lines = [_Table(shape, model, axis) for axis in range(3)]
    z, y, x = (line.sides for line in lines)
    tiles: list[Triple] = [(a, b, c) for a, b, c in product(z, y, x)]
    ranked = sorted((sum(_cost(lines, tile, view) for view in range(len(model.views))), tile) for tile in tiles)
    # Where not even the smallest tile is content with the usual memory, it may have all there is.
    for most in sorted({min(limit, TILE_BYTES[model.dims]), limit}):
        for _, tile in islice(_plausible(ranked, lines, model, most), _TRIED):
            if bytes_of(lattices_of(model, shape, tile)) <= most:
                return tile
    return None


def smallest_tile(shape: Triple, model: ModelFacts) -> Triple:
    """Return the smallest tile that `choose_tile` considers."""
    z, y, x = (min(_Table(shape, model, axis).sides) for axis in range(3))
    return z, y, x


def lattices_of(model: ModelFacts, shape: Triple, tile: Triple) -> list[TileLattice]:
    """Return the tiles of every view."""
    return [lattice_of(facts, shape, tile, model) for facts in model.views]


class _Table:
    """Candidates along one axis; by view and candidate what is read, the sum of different lengths, and the longest."""

    def __init__(self, shape: Triple, model: ModelFacts, axis: int) -> None:
        steps = [facts.halo.step[axis] for facts in model.views if facts.halo is not None]
        flat = model.dims == 2 and all(facts.axis == AXES[axis] for facts in model.views)
        self.sides = [1] if flat else _sides(shape[axis], lcm(*steps))
        self.read: dict[tuple[int, int], int] = {}
        self.kinds: dict[tuple[int, int], int] = {}
        self.longest: dict[tuple[int, int], int] = {}
        for view, facts in enumerate(model.views):
            for side in self.sides:
                tile: Triple = (side, side, side)
                line = lattice_of(facts, shape, tile, model).axes[axis]
                lengths = line.lengths(0, line.size)
                self.read[view, side] = sum(n * count for n, count in lengths.items())
                self.kinds[view, side] = sum(lengths)
                self.longest[view, side] = line.longest


def _cost(lines: Sequence[_Table], tile: Triple, view: int) -> float:
    """Return voxels computed, and for each shape what its first forward costs more."""
    read = prod(line.read[view, side] for line, side in zip(lines, tile, strict=True))
    return read + FIRST_FORWARD * prod(line.kinds[view, side] for line, side in zip(lines, tile, strict=True))


def _plausible(
    ranked: Sequence[tuple[float, Triple]], lines: Sequence[_Table], model: ModelFacts, limit: int
) -> Iterator[tuple[float, Triple]]:
    """Leave out what is far too large, by the bytes a voxel of a usual patch: replaying a forward takes a while."""
    rates = [facts.activation_bytes(facts.patch, 1) / prod(facts.patch) for facts in model.views]
    for entry in ranked:
        windows = (
            prod(line.longest[view, side] for line, side in zip(lines, entry[1], strict=True))
            for view in range(len(rates))
        )
        if all(rate * voxels <= 1.5 * limit for rate, voxels in zip(rates, windows, strict=True)):
            yield entry


def _sides(size: int, step: int) -> list[int]:
    """Return equal parts of an axis, rounded up to what pools evenly and is stored in usual chunks."""
    found = set()
    for parts in _PARTS:
        side = -(-size // parts)
        # Blocks are made of tiles, and chunks divide blocks: see `blockshape.chunk_for`.
        unit = lcm(step, 32) if side > 64 else step
        found.add(-(-side // unit) * unit)
        if side <= _SMALLEST:
            break
    return sorted(found)
