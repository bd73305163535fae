"""Making a plan: every refusal stands here, before a second of work is spent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import lcm, prod
from typing import NoReturn

from volseg.errors import PlanError, SpecError
from volseg.geometry import AXES, BlockGrid, Box, Lattice, Ownership, PatchLattice, Triple, stride_for
from volseg.planning.blockscore import Demand
from volseg.planning.blockshape import choose_block, chunk_for, judge_block, smallest_block
from volseg.planning.exact import (
    asked_tile,
    check_exact,
    choose_tile,
    exact_view,
    lattices_of,
    smallest_tile,
)
from volseg.planning.memory import GIB, IN_HAND, BlockCost, ForwardCost, MemoryEstimate, predict
from volseg.planning.plan import ModelFacts, Plan, Resources, View, ViewFacts, VolumeFacts
from volseg.planning.seams import NO_COLUMNS, NOT_SHARED, Seams
from volseg.spec import SegmentSpec

DEFAULT_OVERLAP = 0.5
# What a worker does a second, within a factor of two, counted as direct convolutions: only the worth of a saved patch
# against a block's own cost depends on it.
_CORE_FLOPS = 8e10
_GPU_FLOPS = 5e12


def make_plan(
    spec: SegmentSpec, volume: VolumeFacts, model: ModelFacts, resources: Resources, block: Triple | None = None
) -> Plan:
    """Plan a segmentation; `block` is the grid of an unfinished job, which a resume keeps.

    Raises PlanError or SpecError where the job cannot fit or cannot be right.
    """
    _check_model(spec, volume, model)
    region = Box.of(volume.shape) if spec.roi is None else Box.parse(spec.roi, volume.shape)
    # Tiles are as large as memory allows, so that more of them at once would gain nothing.
    batch = spec.batch or (1 if resources.device == "cpu" or spec.blend == "exact" else 4)
    if spec.blend == "exact":
        views = _exact_views(spec, volume, model, resources, region, batch)
    else:
        views = tuple(_view(spec, volume, model, facts) for facts in model.views)
    lattices = [view.lattice for view in views]

    whole = _cost(spec, volume, model, lattices, batch)

    def memory_of(candidate: Triple, seams: Seams, *, alone: bool = False) -> MemoryEstimate:
        grid = BlockGrid(volume.shape, candidate, region)
        together = min(resources.workers, len(grid)) if resources.one_process else 1
        return predict(_sized(whole, grid, lattices, seams, alone=alone), resources.baseline, together)

    def fits(candidate: Triple, seams: Seams) -> bool:
        return memory_of(candidate, seams, alone=True).total <= resources.memory

    demand = _demand(spec, model, views, region, resources)
    given = block or spec.block
    choice = judge_block(demand, given, fits) if given else choose_block(demand, fits)
    if choice is None:
        patches = " and ".join(str(list(view.patch)) for view in views)
        smaller = "--tile" if spec.blend == "exact" else "--patch"
        smallest = memory_of(smallest_block(lattices, demand.unit), NOT_SHARED).total
        raise PlanError(
            f"memory limit {resources.memory / GIB:.2f} GiB is too small for one block with patch {patches}: at "
            f"least {_ceil2(smallest / GIB)} GiB a worker is needed; nothing was done: raise --memory, or choose a "
            f"smaller {smaller}"
        )
    chosen, seams = choice.block, choice.seams
    # What was free when the job began may be less now; a limit that the user sets is another matter.
    if not fits(chosen, seams) and (block is None or spec.memory is not None):
        other = None if block else choose_block(demand, fits)
        needed = memory_of(chosen, seams, alone=True).total
        _refuse_block(chosen, needed, resources.memory, other and other.block, begun=block is not None)
    if spec.blend == "exact":
        _check_block(chosen, lattices, volume.shape)
    chunks, shards = _storage_shapes(spec, chosen)
    return Plan(
        shape=volume.shape, channels=volume.channels, region=region, views=views, members=model.members,
        mirrors=model.mirrors, block=chosen, chunks=chunks, shards=shards, classes=model.classes,
        threshold=model.threshold if spec.threshold is None else spec.threshold, batch=batch,
        workers=min(resources.workers, len(BlockGrid(volume.shape, chosen, region))), device=resources.device,
        memory=memory_of(chosen, seams), memory_limit=resources.memory, itemsize=volume.itemsize,
        probabilities=spec.probabilities, seams=seams, one_process=resources.one_process,
    )  # fmt: skip


def _check_model(spec: SegmentSpec, volume: VolumeFacts, model: ModelFacts) -> None:
    if volume.channels != model.in_channels:
        raise PlanError(
            f"the input has {volume.channels} channel(s), the model was trained on {model.in_channels}; nothing was "
            "done: choose another input or another model"
        )
    if spec.threshold is not None and model.classes != 2:
        raise PlanError(
            f"threshold {spec.threshold} was given, but the model has {model.classes} classes: a threshold decides "
            "between two; leave it out"
        )


def _refuse_block(block: Triple, needed: int, limit: int, other: Triple | None, *, begun: bool) -> None:
    what = f"block {list(block)} needs {needed / GIB:.2f} GiB a worker, the limit is {limit / GIB:.2f} GiB"
    more = f"--memory {_ceil2(needed / GIB)}"
    if begun:
        raise PlanError(f"{what}; this job was begun with it and keeps it: go on with {more}, or start a new output")
    advice = f"--block {','.join(map(str, other))} would fit" if other else "use a smaller --patch and --block"
    raise PlanError(f"{what}; nothing was done: {advice}, or {more}")


def _view(spec: SegmentSpec, volume: VolumeFacts, model: ModelFacts, facts: ViewFacts) -> View:
    if spec.patch is None:
        # A bundle's patch that exceeds what the volume needs would only compute replicated edges.
        patch = _map(
            lambda axis: min(facts.patch[axis], _fit(facts, axis, volume.shape[axis] + 2 * facts.margin[axis]))
        )
    else:
        patch = _asked_patch(spec.patch, model, facts)
    answer = _map(lambda axis: patch[axis] - 2 * facts.margin[axis])
    overlap = DEFAULT_OVERLAP if spec.overlap is None else spec.overlap
    lattice = PatchLattice(volume.shape, patch, stride_for(answer, overlap), facts.margin)
    flops = facts.flops(patch)
    return View(facts.axis, lattice, flops, prod(patch), flops)


def _exact_views(
    spec: SegmentSpec, volume: VolumeFacts, model: ModelFacts, resources: Resources, region: Box, batch: int
) -> tuple[View, ...]:
    """Return the tiles of all views, planned where none was asked for."""
    check_exact(model)

    def bytes_of(lattices: Sequence[Lattice]) -> int:
        block = _map(lambda axis: max(of.stride[axis] for of in lattices))
        grid = BlockGrid(volume.shape, block, Box.of(volume.shape))
        whole = _cost(spec, volume, model, lattices, batch)
        return predict(_sized(whole, grid, lattices, NOT_SHARED, alone=False), 0).total

    limit = resources.memory - resources.baseline
    tile = asked_tile(spec, model) or choose_tile(volume.shape, model, bytes_of, limit)
    if tile is None:
        least = resources.baseline + bytes_of(lattices_of(model, volume.shape, smallest_tile(volume.shape, model)))
        raise PlanError(
            f"memory limit {resources.memory / GIB:.2f} GiB is too small for one tile of exact mode: at least "
            f"{_ceil2(least / GIB)} GiB a worker is needed; nothing was done: raise --memory, or use --blend gaussian"
        )
    lattices = lattices_of(model, volume.shape, tile)
    return tuple(exact_view(facts, of, region) for facts, of in zip(model.views, lattices, strict=True))


def _unit(spec: SegmentSpec, lattices: Sequence[Lattice]) -> Triple | None:
    """Return what a planned block must be a multiple of: a given shard or chunk, and whole tiles."""
    given = spec.shards or spec.chunks
    if spec.blend != "exact":
        return given
    return _map(lambda axis: lcm(given[axis] if given else 1, *(of.stride[axis] for of in lattices)))


def _check_block(block: Triple, lattices: Sequence[Lattice], shape: Triple) -> None:
    for axis, side in enumerate(block):
        tile = lcm(*(of.stride[axis] for of in lattices))
        if side % tile and side < shape[axis]:
            raise PlanError(
                f"block side {side} on axis {AXES[axis]} is no multiple of tile side {tile}; tiles at its border would "
                f"be computed twice: use a block of {-(-side // tile) * tile}, or name a --tile"
            )


def _asked_patch(asked: Triple, model: ModelFacts, facts: ViewFacts) -> Triple:
    """Return the patch that the user asked for as this view takes it; raises PlanError where the network cannot.

    Along several axes, a patch that is flat along one of them turns as a bundle's does; any other is made flat.
    """
    patch, flat = asked, AXES.index(facts.axis)
    if len(model.views) > 1:
        thin = next((i for i in (AXES.index(v.axis) for v in model.views) if asked[i] == 1), flat)
        rest = [side for axis, side in enumerate(asked) if axis != thin]
        rest.insert(flat, 1)
        patch = rest[0], rest[1], rest[2]
    for axis, side in enumerate(patch):
        larger = _fit(facts, axis, side)
        if side != larger:
            _refuse_side(facts, axis, side, larger)
    if model.dims == 2 and patch[flat] != 1:
        raise PlanError(
            f"patch {list(patch)} is {patch[flat]} deep on axis {AXES[flat]}, but a 2D network takes single slices "
            "along it: make that side 1"
        )
    return patch


def _fit(facts: ViewFacts, axis: int, side: int) -> int:
    """Return the smallest side that the network takes and that is not below `side`."""
    least = max(side, facts.smallest[axis])
    return least + (facts.phase[axis] - least) % facts.pooling[axis]


def _refuse_side(facts: ViewFacts, axis: int, side: int, larger: int) -> NoReturn:
    pooling, smallest = facts.pooling[axis], _fit(facts, axis, 1)
    lower = larger - pooling
    choice = f"{lower} or {larger}" if lower >= smallest else f"{larger}"
    if facts.margin[axis] or facts.phase[axis]:
        rule = (
            f"is none that this unpadded network takes ({smallest}, {smallest + pooling}, {smallest + 2 * pooling}, "
            "...: every level must pool evenly)"
        )
    else:
        rule = f"is no multiple of the network's pooling factor {pooling}; the network cannot take it"
    raise PlanError(f"patch side {side} on axis {AXES[axis]} {rule}: use {choice}")


def _map(of: Callable[[int], int]) -> Triple:
    return of(0), of(1), of(2)


def _cost(
    spec: SegmentSpec, volume: VolumeFacts, model: ModelFacts, lattices: Sequence[Lattice], batch: int
) -> BlockCost:
    """Return the cost of one block that is the whole volume."""
    forwards = tuple(
        ForwardCost(of.patch, _answered(of), facts.activation_bytes(of.patch, batch))
        for of, facts in zip(lattices, model.views, strict=True)
    )
    return BlockCost(
        block=volume.shape, reach=volume.shape, extent=volume.shape, forwards=forwards, channels=volume.channels,
        itemsize=volume.itemsize, sums=1 if model.classes == 2 else model.classes, classes=model.classes,
        probabilities=spec.probabilities, batch=batch, parameter_bytes=model.parameter_bytes, members=model.members,
        mirrors=model.mirrors,
    )  # fmt: skip


def _answered(lattice: Lattice) -> Triple:
    """Return the sides of the largest answer, before a tile is cut out of it."""
    return _map(lambda axis: lattice.patch[axis] - 2 * lattice.margin[axis])


def _sized(whole: BlockCost, grid: BlockGrid, lattices: Sequence[Lattice], seams: Seams, *, alone: bool) -> BlockCost:
    """Return the cost of the largest block of a grid; `alone`: where it reads what it would read without neighbours."""
    owner = Ownership(grid, tuple(lattices), seams.column)
    largest = owner.largest()
    reach = replace(owner, column=NO_COLUMNS).largest().read if alone else largest.read
    # A block is written as a whole, wherever it meets the region.
    block = _map(lambda axis: max(b - a for a, b in grid.axis_spans(axis)))
    return replace(whole, block=block, reach=reach, extent=largest.extent, seams=seams)


def _demand(spec: SegmentSpec, model: ModelFacts, views: tuple[View, ...], region: Box, resources: Resources) -> Demand:
    rate = _CORE_FLOPS if resources.device == "cpu" else _GPU_FLOPS
    flops = sum(view.flops for view in views) / len(views) * model.members * model.mirrors
    lattices = [view.lattice for view in views]
    return Demand(
        lattices=lattices, region=region, workers=resources.workers, hands=IN_HAND * resources.workers,
        sums=1 if model.classes == 2 else model.classes, patch_seconds=flops / rate,
        mode="off" if spec.blend == "exact" else spec.seams, room=resources.seams, unit=_unit(spec, lattices),
    )  # fmt: skip


def _storage_shapes(spec: SegmentSpec, block: Triple) -> tuple[Triple, Triple]:
    shards = spec.shards or block
    for axis, side, shard in zip(AXES, block, shards, strict=True):
        if side % shard:
            raise SpecError(
                f"block side {side} on axis {axis} is no multiple of shard side {shard}; two workers would write one "
                f"shard and lose each other's voxels: use a block of {-(-side // shard) * shard}"
            )
    chunks = spec.chunks or chunk_for(shards)
    for axis, shard, chunk in zip(AXES, shards, chunks, strict=True):
        if shard % chunk:
            raise SpecError(
                f"shard side {shard} on axis {axis} is no multiple of chunk side {chunk}; a shard holds whole chunks: "
                f"use a chunk that divides {shard}"
            )
    return chunks, shards


def _ceil2(value: float) -> float:
    return int(value * 100 + 1) / 100
