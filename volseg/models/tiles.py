"""When a convolution is computed in tiles of rows, and how many of them at a time: arithmetic, without torch.

See `winograd`, which computes them, and `footprint`, which foretells their memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from volseg.geometry.box import Triple

MADE = 4
"""Rows that one tile answers for."""
READ = 6
"""Rows that one tile reads, and products that it is made of; a plain convolution would take 12."""

# By bytes of a value: below that a row of products is too short for what its transforms cost. In bfloat16 products cost
# half and transforms as much, and at the outer levels the rounding of what lies between would show in the answer.
_LEAST_CHANNELS = {4: 8, 2: 32}
# Work that a tile at the end does for nothing must not eat up what tiles save.
_LEAST_GAIN = 1.5
# What lies between the transforms and the products should stay in a core's cache; 256 KiB and 1 MiB were slower.
_CHUNK_BYTES = 512 * 1024


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one convolution is tiled along the first axis of its kernel that is not 1."""

    count: int
    """Tiles that cover the answer; the last one may reach beyond it."""
    chunk: int
    """Tiles that are computed together."""
    row: int
    """Voxels of one row: a plane of a volume, a line of a picture."""


def tiles_of(kernel: Triple, cin: int, cout: int, made: Triple, itemsize: int = 4) -> Tiles | None:
    """Return the tiles of a convolution that makes `made` voxels; None where it is computed as it stands.

    Only kernels of 3 along every axis of the network, (1, 3, 3) in 2D, are tiled. The answer depends on shapes alone.
    """
    lead = 0 if kernel == (3, 3, 3) else 1
    if kernel not in {(3, 3, 3), (1, 3, 3)} or min(cin, cout) < _LEAST_CHANNELS[itemsize]:
        return None
    count = -(-made[lead] // MADE)
    if 3 * made[lead] < _LEAST_GAIN * READ * count:
        return None
    row = prod(made) // made[lead]
    chunk = _CHUNK_BYTES // (itemsize * row * max(cin, cout))
    return Tiles(count, max(1, min(count, chunk)), row)
