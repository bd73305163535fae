"""Making a plan: every refusal stands here, before a second of work is spent."""

from __future__ import annotations

from functools import lru_cache

from volseg.errors import PlanError, SpecError
from volseg.geometry import AXES, AxisLattice, BlockGrid, Box, PatchLattice, Triple, stride_for
from volseg.planning.blockshape import choose_block, chunk_for, smallest_block
from volseg.planning.memory import GIB, BlockCost, MemoryEstimate, predict
from volseg.planning.plan import ModelFacts, Plan, Resources, VolumeFacts
from volseg.spec import SegmentSpec


def make_plan(
    spec: SegmentSpec, volume: VolumeFacts, model: ModelFacts, resources: Resources, block: Triple | None = None
) -> Plan:
    """Plan a segmentation; `block` is the grid of an unfinished job, which a resume keeps.

    Raises PlanError or SpecError where the job cannot fit or cannot be right.
    """
    _check_model(spec, volume, model)
    patch = _patch(spec, volume, model)
    region = Box.of(volume.shape) if spec.roi is None else Box.parse(spec.roi, volume.shape)
    lattice = PatchLattice(volume.shape, patch, stride_for(patch, spec.overlap))
    batch = spec.batch or (1 if resources.device == "cpu" else 4)

    def memory_of(candidate: Triple) -> MemoryEstimate:
        return predict(_cost(candidate, lattice, region, volume, model, batch, spec.probabilities), resources.baseline)

    def fits(candidate: Triple) -> bool:
        return memory_of(candidate).total <= resources.memory

    unit = spec.shards or spec.chunks
    chosen = block or spec.block or choose_block(lattice, region, resources.workers, fits, unit)
    if chosen is None:
        smallest = memory_of(smallest_block(lattice, unit)).total
        raise PlanError(
            f"memory limit {resources.memory / GIB:.2f} GiB is too small for one block with patch {list(patch)}: at "
            f"least {_ceil2(smallest / GIB)} GiB a worker is needed; nothing was done: raise --memory, or choose a "
            "smaller --patch"
        )
    # What was free when the job began may be less now; a limit that the user sets is another matter.
    if not fits(chosen) and (block is None or spec.memory is not None):
        other = None if block else choose_block(lattice, region, resources.workers, fits, unit)
        _refuse_block(chosen, memory_of(chosen).total, resources.memory, other, begun=block is not None)
    chunks, shards = _storage_shapes(spec, chosen)
    return Plan(
        shape=volume.shape, channels=volume.channels, region=region, patch=patch, stride=lattice.stride, block=chosen,
        chunks=chunks, shards=shards, classes=model.classes, axis=model.axis,
        threshold=model.threshold if spec.threshold is None else spec.threshold, batch=batch,
        workers=min(resources.workers, len(BlockGrid(volume.shape, chosen, region))), device=resources.device,
        memory=memory_of(chosen), memory_limit=resources.memory, itemsize=volume.itemsize,
        probabilities=spec.probabilities, flops_per_patch=model.flops(patch),
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


def _patch(spec: SegmentSpec, volume: VolumeFacts, model: ModelFacts) -> Triple:
    if spec.patch is None:
        # A bundle's patch that exceeds the volume would only compute replicated edges.
        z, y, x = (
            min(p, -(-size // pool) * pool)
            for p, size, pool in zip(model.patch, volume.shape, model.pooling, strict=True)
        )
        return z, y, x
    for axis, side, pool in zip(AXES, spec.patch, model.pooling, strict=True):
        if side % pool:
            lower, upper = side // pool * pool, -(-side // pool) * pool
            choice = f"{lower} or {upper}" if lower else f"{upper}"
            raise PlanError(
                f"patch side {side} on axis {axis} is no multiple of the network's pooling factor {pool}; the network "
                f"cannot take it: use {choice}"
            )
    if model.dims == 2:
        flat = AXES.index(model.axis)
        if spec.patch[flat] != 1:
            raise PlanError(
                f"patch {list(spec.patch)} is {spec.patch[flat]} deep on axis {AXES[flat]}, but a 2D network takes "
                "single slices along it: make that side 1"
            )
    return spec.patch


def _cost(
    block: Triple, lattice: PatchLattice, region: Box, volume: VolumeFacts, model: ModelFacts, batch: int,
    probabilities: bool,
) -> BlockCost:  # fmt: skip
    largest, reach = zip(
        *(
            _widest(a, b, low, high)
            for a, b, low, high in zip(lattice.axes, block, region.start, region.stop, strict=True)
        ),
        strict=True,
    )
    return BlockCost(
        block=(largest[0], largest[1], largest[2]), reach=(reach[0], reach[1], reach[2]), patch=lattice.patch,
        channels=volume.channels, itemsize=volume.itemsize, sums=1 if model.classes == 2 else model.classes,
        classes=model.classes, probabilities=probabilities, batch=batch,
        activation_bytes=model.activation_bytes(lattice.patch, batch), parameter_bytes=model.parameter_bytes,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _widest(axis: AxisLattice, side: int, low: int, high: int) -> tuple[int, int]:
    """Return the largest block and the largest reach along one axis of a region ``low:high``, blocks of `side`."""
    largest = reach = 0
    for start in range(low // side * side, high, side):
        stop = min(start + side, axis.size)
        first, end = axis.reach(max(start, low), min(stop, high))
        largest, reach = max(largest, stop - start), max(reach, end - first)
    return largest, reach


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
