"""A worker's peak memory, from plain values: it depends on block, patch, classes and batch, never on the volume.

Every term is a product that can be checked by hand; `tests` compare the sum with the measured peak of real workers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

from volseg.geometry.box import Triple
from volseg.planning.seams import NOT_SHARED, Seams

GIB = 1 << 30

IN_HAND = 2
"""Blocks that a worker holds at once: one is computed while the next is read and the last is written."""

SLAB_VOXELS = 1 << 20
"""The accumulator is turned into labels a slab at a time; a slab holds about this many voxels (at least one slice)."""

_MIB = 1 << 20

# Python, torch and zarr, in an actor Ray too: resident memory of a worker that has not read a voxel yet, as measured.
BASELINE_LOCAL = 290 * _MIB
BASELINE_ACTOR = 325 * _MIB
# What botocore and its clients add where a place is on S3, as measured (46 MiB), and room for answers on their way.
S3_CLIENTS = 64 * _MIB
# What the allocator keeps beyond the live bytes: freed pieces stay mapped, because mapping them anew costs more time.
_ALLOCATOR_SHARE = 0.06


@dataclass(frozen=True)
class ForwardCost:
    """What decides the size of one forward; shapes (z, y, x) in voxels."""

    patch: Triple
    answer: Triple
    """What the network answers for: smaller than the patch where it is unpadded."""
    activation_bytes: int
    """Live activations of one forward of a batch."""


@dataclass(frozen=True)
class BlockCost:
    """What decides the size of one block's work; all shapes (z, y, x) in voxels."""

    block: Triple
    """Largest block."""
    reach: Triple
    """Largest block plus halo: what is read."""
    extent: Triple
    """Largest block with all that its own patches answer: what is summed up."""
    forwards: tuple[ForwardCost, ...]
    """One a view: they take turns, so the largest counts."""
    channels: int
    itemsize: int
    """Bytes of one raw voxel and channel."""
    sums: int
    """Channels of the accumulator: 1 for two classes, else the number of classes."""
    classes: int
    probabilities: bool
    batch: int
    parameter_bytes: int
    """Weights of one member."""
    members: int = 1
    mirrors: int = 1
    seams: Seams = NOT_SHARED

    @property
    def label_itemsize(self) -> int:
        """Bytes of one label."""
        return 1 if self.classes <= 256 else 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one worker needs at its peak, term by term."""

    baseline: int
    network: int
    input: int
    cache: int
    patch: int
    accumulator: int
    seams: int
    output: int
    allocator: int

    @property
    def total(self) -> int:
        """Predicted peak in bytes."""
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        """Return the terms and their sum, in bytes."""
        return {**asdict(self), "total": self.total}


def predict(cost: BlockCost, baseline: int, together: int = 1) -> MemoryEstimate:
    """Predict the peak memory of one worker; of so many `together` in one process, the share that each of them has."""
    block = prod(cost.block)
    raw = prod(cost.reach) * cost.channels * cost.itemsize
    written = block * (cost.label_itemsize + (cost.classes if cost.probabilities else 0))
    slab = min(block, max(SLAB_VOXELS, block // max(cost.block[0], 1)))
    terms = {
        # every member's weights made ready, and its kernels transformed to twice their size, where those lay that were
        # loaded; the members' activations follow one another
        "network": _share(3 * cost.members * cost.parameter_bytes, together),
        "input": IN_HAND * raw,
        # chunks that are kept for the halo of the next block
        "cache": raw if cost.reach != cost.block else 0,
        "patch": max(_forward_bytes(cost, forward) for forward in cost.forwards),
        "accumulator": 4 * prod(cost.extent) * cost.sums,
        "seams": _seam_bytes(cost.seams, together),
        # the blocks in hand; while one is written its encoded chunks, the shard made of them and a copy of it, where
        # later stands what is read back to be checked; and the temporary slab of 64-bit sums
        "output": (IN_HAND + 3) * written + 12 * slab,
    }
    kept = int(_ALLOCATOR_SHARE * sum(terms.values()))
    return MemoryEstimate(baseline=_share(baseline, together), allocator=kept, **terms)


def _share(size: int, together: int) -> int:
    return -(-size // together)


def _seam_bytes(seams: Seams, together: int) -> int:
    """Return what a worker holds of what blocks give each other.

    In one process its share of all that waits. An actor has what its blocks in hand give, the core of one that is
    parked, and a copy of either on its way into the object store; what it is given lies there, and is looked at one
    object at a time.
    """
    if seams.local or not seams.shared:
        return _share(seams.bound, together)
    return IN_HAND * seams.out + 2 * seams.core


def _forward_bytes(cost: BlockCost, forward: ForwardCost) -> int:
    read, answer = 4 * prod(forward.patch) * cost.channels, 4 * prod(forward.answer) * cost.sums
    # scaled patches, logits, probabilities, and the weighted product as float and as integer
    live = cost.batch * read + (cost.batch + 3) * answer
    if cost.members * cost.mirrors > 1:
        live += cost.batch * answer  # the mean so far
    if cost.mirrors > 1:
        live += cost.batch * (read + answer)  # the mirrored patches, and their answers turned back
    return forward.activation_bytes + live
