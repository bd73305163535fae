"""The plan: what will be done and what it costs, as plain values that travel to every worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from volseg.geometry import BlockGrid, Box, PatchLattice, Triple
from volseg.planning.memory import MemoryEstimate


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


def sum_reach(lattice: PatchLattice, grid: BlockGrid) -> int:
    """Return how many voxels all blocks read together, halos included."""
    sums = []
    for axis, lattice_axis in enumerate(lattice.axes):
        spans = (lattice_axis.reach(start, stop) for start, stop in _clipped_spans(grid, axis))
        sums.append(sum(end - first for first, end in spans))
    return prod(sums)


def _patches_per_block(lattice: PatchLattice, grid: BlockGrid) -> list[list[int]]:
    return [
        [len(lattice_axis.touching(start, stop)) for start, stop in _clipped_spans(grid, axis)]
        for axis, lattice_axis in enumerate(lattice.axes)
    ]


def _clipped_spans(grid: BlockGrid, axis: int) -> list[tuple[int, int]]:
    low, high = grid.region.start[axis], grid.region.stop[axis]
    return [(max(a, low), min(b, high)) for a, b in grid.axis_spans(axis)]
