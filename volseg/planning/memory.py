"""A worker's peak memory, from plain values: it depends on block, patch, classes and batch, never on the volume.

Every term is a product that can be checked by hand; `tests` compare the sum with the measured peak of real workers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

from volseg.geometry.box import Triple

GIB = 1 << 30

IN_HAND = 2
"""Blocks that a worker holds at once: one is computed while the next is read and the last is written."""

SLAB_VOXELS = 1 << 20
"""The accumulator is turned into labels a slab at a time; a slab holds about this many voxels (at least one slice)."""

_MIB = 1 << 20

# Python, torch and zarr, in an actor Ray too: resident memory of a worker that has not read a voxel yet, as measured.
BASELINE_SERIAL = 290 * _MIB
BASELINE_ACTOR = 325 * _MIB
# What the allocator keeps beyond the live bytes: freed pieces stay mapped, because mapping them anew costs more time.
_ALLOCATOR_SHARE = 0.06


@dataclass(frozen=True)
class BlockCost:
    """What decides the size of one block's work; all shapes (z, y, x) in voxels."""

    block: Triple
    """Largest block."""
    reach: Triple
    """Largest block plus halo: what is read."""
    patch: Triple
    channels: int
    itemsize: int
    """Bytes of one raw voxel and channel."""
    sums: int
    """Channels of the accumulator: 1 for two classes, else the number of classes."""
    classes: int
    probabilities: bool
    batch: int
    activation_bytes: int
    """Live activations of one forward of a batch."""
    parameter_bytes: int

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
    patch: int
    accumulator: int
    output: int
    allocator: int

    @property
    def total(self) -> int:
        """Predicted peak in bytes."""
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        """Return the terms and their sum, in bytes."""
        return {**asdict(self), "total": self.total}


def predict(cost: BlockCost, baseline: int) -> MemoryEstimate:
    """Predict the peak memory of one worker."""
    block, patch = prod(cost.block), prod(cost.patch)
    raw = prod(cost.reach) * cost.channels * cost.itemsize
    written = block * (cost.label_itemsize + (cost.classes if cost.probabilities else 0))
    slab = min(block, max(SLAB_VOXELS, block // max(cost.block[0], 1)))
    terms = {
        "network": 2 * cost.parameter_bytes,
        "input": IN_HAND * raw,
        # scaled patches, logits, probabilities, and the weighted product as float and as integer
        "patch": cost.activation_bytes + 4 * patch * (cost.batch * cost.channels + (cost.batch + 3) * cost.sums),
        "accumulator": 4 * block * cost.sums,
        # the blocks in hand; while one is written its encoded chunks, the shard made of them and a copy of it, where
        # later stands what is read back to be checked; and the temporary slab of 64-bit sums
        "output": (IN_HAND + 3) * written + 12 * slab,
    }
    return MemoryEstimate(baseline=baseline, allocator=int(_ALLOCATOR_SHARE * sum(terms.values())), **terms)
