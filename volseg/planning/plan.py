"""The plan: what will be done and what it costs, as plain values that travel to every worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from volseg.geometry import BlockGrid, Box, Halo, Lattice, Ownership, Sweep, TileLattice, Triple
from volseg.planning.memory import MemoryEstimate
from volseg.planning.seams import NO_ROOM, SeamRoom, Seams, describe


@dataclass(frozen=True)
class VolumeFacts:
    """What a plan needs to know of the input: shape (z, y, x), channels, bytes a voxel and channel."""

    shape: Triple
    channels: int
    itemsize: int


@dataclass(frozen=True)
class ViewFacts:
    """What a plan needs to know of the network along one axis; all triples (z, y, x) of the volume.

    The network takes a side n where ``n >= smallest`` and ``(n - phase) % pooling == 0``, and answers for ``margin``
    voxels less on each side.
    """

    axis: str
    """Slice axis of a 2D network; for a 3D one it means nothing."""
    patch: Triple
    pooling: Triple
    phase: Triple
    smallest: Triple
    margin: Triple
    activation_bytes: Callable[[Triple, int], int]
    """Live bytes of one forward, from patch and batch."""
    flops: Callable[[Triple], float]
    halo: Halo | None = None
    """What exact mode reads around a tile; None where that is not possible or was not asked for."""
    inexact: str = "nobody asked for its halo"
    """Why there is none."""


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs to know of a bundle and of what is averaged."""

    dims: int
    in_channels: int
    classes: int
    threshold: float
    parameter_bytes: int
    """Bytes of the weights of one member."""
    views: tuple[ViewFacts, ...]
    """One an axis; several are averaged (2.5D)."""
    members: int = 1
    mirrors: int = 1
    """Mirrored copies of a patch that are averaged, itself included."""


@dataclass(frozen=True)
class Resources:
    """Who does the work."""

    workers: int
    memory: int
    """Bytes that one worker may use."""
    device: str
    baseline: int
    """Bytes that a worker occupies before it reads a voxel."""
    seams: SeamRoom = NO_ROOM
    one_process: bool = False
    """The workers are threads that share `baseline` and the network."""


@dataclass(frozen=True)
class View:
    """One way to look at the volume: a 2D network along one axis, or a 3D network."""

    axis: str
    lattice: Lattice
    flops: float
    """Of one forward of one patch; of tiles, which are read by windows of several shapes, the mean."""
    voxels: float
    """Read and computed by one forward; the mean, too."""
    flops_of_shapes: float
    """Of one forward of each shape together."""

    @property
    def patch(self) -> Triple:
        """Sides (z, y, x) of what the network takes."""
        return self.lattice.patch


@dataclass(frozen=True)
class Plan:
    """What will be done: everything that a worker needs beside the spec, in plain values."""

    shape: Triple
    channels: int
    region: Box
    views: tuple[View, ...]
    members: int
    mirrors: int
    block: Triple
    chunks: Triple
    shards: Triple
    classes: int
    threshold: float
    batch: int
    workers: int
    device: str
    memory: MemoryEstimate
    memory_limit: int
    itemsize: int
    probabilities: bool
    seams: Seams
    one_process: bool
    """The workers are threads of one process; `memory` is the share of it that each of them has."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what travels to workers: not what follows from it, which may be large and is quickly made again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def lattices(self) -> tuple[Lattice, ...]:
        """Return the patch lattice of every view, anchored to the volume."""
        return tuple(view.lattice for view in self.views)

    @cached_property
    def grid(self) -> BlockGrid:
        """Return the grid of blocks that meet the region."""
        return BlockGrid(self.shape, self.block, self.region)

    @cached_property
    def ownership(self) -> Ownership:
        """Return which block computes which patches."""
        return Ownership(self.grid, self.lattices, self.seams.column)

    @cached_property
    def sweep(self) -> Sweep:
        """Return the order in which blocks are begun."""
        return Sweep(self.grid.counts, self.seams.column, self.seams.along)

    @property
    def exact(self) -> bool:
        """Whether the result is that of one forward over the whole volume."""
        return any(isinstance(lattice, TileLattice) for lattice in self.lattices)

    @property
    def tile(self) -> Triple | None:
        """The tile of exact mode as `--tile` would name it, None where patches are blended."""
        if not self.exact:
            return None
        # Along its slice axis, a view's tile is 1 deep.
        z, y, x = (max(lattice.stride[axis] for lattice in self.lattices) for axis in range(3))
        return z, y, x

    @property
    def patches(self) -> int:
        """Number of patches that the region needs in all views, each counted once."""
        return sum(lattice.count_touching(self.region) for lattice in self.lattices)

    @property
    def computed(self) -> tuple[int, ...]:
        """Number of patches computed in each view: those that no block shares once for every block that needs them."""
        return self.ownership.computed

    @property
    def largest_block(self) -> int:
        """Number of patches, of all views together, that the block with most of them computes."""
        return sum(self.ownership.most_own)

    @property
    def forwards_a_patch(self) -> int:
        """Forwards whose mean is the answer for one patch: members times mirrored copies."""
        return self.members * self.mirrors

    @property
    def forwards(self) -> int:
        """Number of forwards: patches computed, times members, times mirrored copies."""
        return sum(self.computed) * self.forwards_a_patch

    @property
    def sums(self) -> int:
        """Channels of the accumulator."""
        return 1 if self.classes == 2 else self.classes

    def summary(self) -> dict[str, Any]:
        """Return the plan as plain JSON values; `patch` and `stride` are those of the first view, `views` has all."""
        voxels = self.region.size
        label = 1 if self.classes <= 256 else 2
        each, counted = self.forwards_a_patch, list(zip(self.views, self.computed, strict=True))
        return {
            "shape": self.shape,
            "region": str(self.region),
            "patch": self.views[0].patch,
            "stride": self.views[0].lattice.stride,
            "views": [
                {
                    "axis": view.axis,
                    "patch": view.patch,
                    "answer": view.lattice.answer,
                    "stride": view.lattice.stride,
                    "patches": view.lattice.count_touching(self.region),
                    "computed": count,
                }
                | _tiles(view.lattice)
                for view, count in counted
            ],
            "tile": self.tile,
            "members": self.members,
            "mirrors": self.mirrors,
            "block": self.block,
            "chunks": self.chunks,
            "shards": self.shards,
            "blocks": len(self.grid),
            "patches": self.patches,
            "forwards": self.forwards,
            "forwards_counted": "patches computed x members x mirrored copies",
            "forwards_per_patch": round(sum(self.computed) / self.patches, 4),
            "seams": describe(self.seams, self.ownership),
            "forwards_per_voxel": round(sum(n * view.voxels for view, n in counted) * each / voxels, 4),
            "flops": sum(n * view.flops for view, n in counted) * each,
            "workers": self.workers,
            "device": self.device,
            "batch": self.batch,
            "memory_per_worker": self.memory.as_dict(),
            "memory_limit": self.memory_limit,
            "bytes_read": self.ownership.read * self.channels * self.itemsize,
            "bytes_written": voxels * (label + (self.classes if self.probabilities else 0)),
        }


def _tiles(lattice: Lattice) -> dict[str, Any]:
    if not isinstance(lattice, TileLattice):
        return {}
    before, after = lattice.halo
    return {"tile": lattice.stride, "halo_before": before, "halo_after": after}
