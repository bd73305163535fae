"""The plan: geometry, cost and every refusal, from plain values, before a second of work is spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

from volseg.blockshape import choose_block, chunk_for, smallest_block
from volseg.errors import PlanError, SpecError
from volseg.geometry import AXES, AxisLattice, BlockGrid, Box, PatchLattice, Triple, stride_for
from volseg.memory import GIB, BlockCost, MemoryEstimate, predict
from volseg.spec import SegmentSpec


@dataclass(frozen=True)
class VolumeFacts:
    """What a plan needs to know of the input: shape (z, y, x), channels, bytes a voxel and channel."""

    shape: Triple
    channels: int
    itemsize: int


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs to know of the network; `pooling` and `patch` in (z, y, x) of the volume."""

    dims: int
    in_channels: int
    classes: int
    pooling: Triple
    patch: Triple
    axis: str
    """Axis that a 2D network goes along."""
    threshold: float
    activation_bytes: Callable[[Triple, int], int]
    """Live bytes of one forward, from patch and batch."""
    parameter_bytes: int
    flops: Callable[[Triple], float]


@dataclass(frozen=True)
class Resources:
    """Who does the work."""

    workers: int
    memory: int
    """Bytes that one worker may use."""
    device: str
    baseline: int
    """Bytes that a worker occupies before it reads a voxel."""


@dataclass(frozen=True)
class Plan:
    """What will be done: everything that a worker needs beside the spec, in plain values."""

    shape: Triple
    channels: int
    region: Box
    patch: Triple
    stride: Triple
    block: Triple
    chunks: Triple
    shards: Triple
    classes: int
    axis: str
    threshold: float
    batch: int
    workers: int
    device: str
    memory: MemoryEstimate
    memory_limit: int
    itemsize: int
    probabilities: bool
    flops_per_patch: float

    @cached_property
    def lattice(self) -> PatchLattice:
        """Return the patch lattice, anchored to the volume."""
        return PatchLattice(self.shape, self.patch, self.stride)

    @cached_property
    def grid(self) -> BlockGrid:
        """Return the grid of blocks that meet the region."""
        return BlockGrid(self.shape, self.block, self.region)

    @property
    def patches(self) -> int:
        """Number of patches that the region needs, each counted once."""
        return self.lattice.count_touching(self.region)

    @cached_property
    def forwards(self) -> int:
        """Number of patches computed, border patches once for every block that needs them."""
        return prod(sum(counts) for counts in _patches_per_block(self.lattice, self.grid))

    @property
    def sums(self) -> int:
        """Channels of the accumulator."""
        return 1 if self.classes == 2 else self.classes

    def summary(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        voxels = self.region.size
        read = sum_reach(self.lattice, self.grid) * self.channels * self.itemsize
        label = 1 if self.classes <= 256 else 2
        return {
            "shape": self.shape,
            "region": str(self.region),
            "patch": self.patch,
            "stride": self.stride,
            "block": self.block,
            "chunks": self.chunks,
            "shards": self.shards,
            "blocks": len(self.grid),
            "patches": self.patches,
            "forwards": self.forwards,
            "forwards_per_patch": round(self.forwards / self.patches, 4),
            "forwards_per_voxel": round(self.forwards * prod(self.patch) / voxels, 4),
            "flops": self.forwards * self.flops_per_patch,
            "workers": self.workers,
            "device": self.device,
            "batch": self.batch,
            "memory_per_worker": self.memory.as_dict(),
            "memory_limit": self.memory_limit,
            "bytes_read": read,
            "bytes_written": voxels * (label + (self.classes if self.probabilities else 0)),
        }


def make_plan(
    spec: SegmentSpec, volume: VolumeFacts, model: ModelFacts, resources: Resources, block: Triple | None = None
) -> Plan:
    """Plan a segmentation; `block` is the grid of an unfinished job, which a resume keeps.

    Raises PlanError or SpecError where the job cannot fit or cannot be right.
    """
    _check_channels(volume, model)
    patch = _patch(spec, volume, model)
    stride = stride_for(patch, spec.overlap)
    region = Box.of(volume.shape) if spec.roi is None else Box.parse(spec.roi, volume.shape)
    lattice = PatchLattice(volume.shape, patch, stride)
    batch = spec.batch or (1 if resources.device == "cpu" else 4)
    if spec.threshold is not None and model.classes != 2:
        raise PlanError(
            f"threshold {spec.threshold} was given, but the model has {model.classes} classes: a threshold decides "
            "between two; leave it out"
        )

    def memory_of(candidate: Triple) -> MemoryEstimate:
        return predict(_cost(candidate, lattice, region, volume, model, batch, spec.probabilities), resources.baseline)

    chosen = (
        block
        or spec.block
        or choose_block(
            lattice,
            region,
            resources.workers,
            lambda b: memory_of(b).total <= resources.memory,
            spec.shards or spec.chunks,
        )
    )
    if chosen is None:
        smallest = memory_of(smallest_block(lattice, spec.shards or spec.chunks)).total
        raise PlanError(
            f"memory limit {resources.memory / GIB:.2f} GiB is too small for one block with patch {list(patch)}: at least "
            f"{_ceil2(smallest / GIB)} GiB a worker is needed; nothing was done: raise --memory, or choose a smaller --patch"
        )
    memory = memory_of(chosen)
    if memory.total > resources.memory and block is None:
        fits = choose_block(
            lattice,
            region,
            resources.workers,
            lambda b: memory_of(b).total <= resources.memory,
            spec.shards or spec.chunks,
        )
        advice = (
            f"--block {','.join(map(str, fits))} would fit, or" if fits else "use a smaller --patch and --block, or"
        )
        raise PlanError(
            f"block {list(chosen)} needs {memory.total / GIB:.2f} GiB a worker, the limit is "
            f"{resources.memory / GIB:.2f} GiB; nothing was done: {advice} --memory {_ceil2(memory.total / GIB)}"
        )
    chunks, shards = _storage_shapes(spec, chosen)
    return Plan(
        shape=volume.shape, channels=volume.channels, region=region, patch=patch, stride=stride, block=chosen,
        chunks=chunks, shards=shards, classes=model.classes, axis=model.axis,
        threshold=model.threshold if spec.threshold is None else spec.threshold, batch=batch,
        workers=min(resources.workers, len(BlockGrid(volume.shape, chosen, region))), device=resources.device,
        memory=memory, memory_limit=resources.memory, itemsize=volume.itemsize, probabilities=spec.probabilities,
        flops_per_patch=model.flops(patch),
    )  # fmt: skip


def sum_reach(lattice: PatchLattice, grid: BlockGrid) -> int:
    """Return how many voxels all blocks read together, halos included."""
    sums = []
    for axis, lattice_axis in enumerate(lattice.axes):
        total = 0
        for start, stop in _clipped_spans(grid, axis):
            touching = lattice_axis.touching(start, stop)
            end = min(lattice_axis.origin(touching[-1]) + lattice_axis.patch, lattice_axis.size)
            total += end - lattice_axis.origin(touching[0])
        sums.append(total)
    return prod(sums)


def _patches_per_block(lattice: PatchLattice, grid: BlockGrid) -> list[list[int]]:
    return [
        [len(lattice_axis.touching(start, stop)) for start, stop in _clipped_spans(grid, axis)]
        for axis, lattice_axis in enumerate(lattice.axes)
    ]


def _clipped_spans(grid: BlockGrid, axis: int) -> list[tuple[int, int]]:
    low, high = grid.region.start[axis], grid.region.stop[axis]
    return [(max(a, low), min(b, high)) for a, b in grid.axis_spans(axis)]


def _check_channels(volume: VolumeFacts, model: ModelFacts) -> None:
    if volume.channels != model.in_channels:
        raise PlanError(
            f"the input has {volume.channels} channel(s), the model was trained on {model.in_channels}; nothing was done: "
            "choose another input or another model"
        )


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
                f"patch {list(spec.patch)} is {spec.patch[flat]} deep on axis {AXES[flat]}, but a 2D network takes single "
                f"slices along it: make that side 1"
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
        touching = axis.touching(max(start, low), min(stop, high))
        end = min(axis.origin(touching[-1]) + axis.patch, axis.size)
        largest, reach = max(largest, stop - start), max(reach, end - axis.origin(touching[0]))
    return largest, reach


def _storage_shapes(spec: SegmentSpec, block: Triple) -> tuple[Triple, Triple]:
    shards = spec.shards or block
    for axis, side, shard in zip(AXES, block, shards, strict=True):
        if side % shard:
            raise SpecError(
                f"block side {side} on axis {axis} is no multiple of shard side {shard}; two workers would write one shard "
                f"and lose each other's voxels: use a block of {-(-side // shard) * shard}"
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
