"""Default chunks and shards of imported volumes, so that a slab of slices stays small in memory."""

from __future__ import annotations

from math import log2, prod

import numpy as np

from volseg.errors import InputError
from volseg.geometry.box import Triple

SLAB_BYTES = 256 * 1024**2
CHUNK_VOXELS = 64**3
MAX_SHARD_CHUNKS = 4


def choose_layout(
    shape: Triple, itemsize: int, chunks: Triple | None = None, shards: Triple | None = None
) -> tuple[Triple, Triple]:
    """Return chunks and shards (z, y, x) for a volume that is written slab by slab along z.

    Chunks hold about 64^3 voxels, wider in the plane where the volume is thin or its slices are so large that a slab of
    64 would exceed 256 MiB; shards hold up to 4 chunks a side. `itemsize` counts the bytes of all channels of a voxel.
    What the caller gives is kept, and the rest follows from it; raises InputError where a side is below 1.
    """
    for name, sides in (("chunks", chunks), ("shards", shards)):
        if sides is not None and min(sides) < 1:
            raise InputError(
                f"{name} {','.join(map(str, sides))}: every side must be at least 1 voxel; nothing was written"
            )
    if chunks is None and shards is not None:
        z, y, x = (_divisor(s, 64) for s in shards)
        return (z, y, x), shards
    if chunks is None:
        chunks = _chunks(shape, itemsize)
    if shards is None:
        counts = [min(MAX_SHARD_CHUNKS, -(-n // c)) for n, c in zip(shape, chunks, strict=True)]
        slab = prod((chunks[0], *shape[1:])) * itemsize
        counts[0] = max(1, min(counts[0], SLAB_BYTES // slab))
        shards = (chunks[0] * counts[0], chunks[1] * counts[1], chunks[2] * counts[2])
    return chunks, shards


def _chunks(shape: Triple, itemsize: int) -> Triple:
    depth = 64
    while depth > 8 and depth * shape[1] * shape[2] * itemsize > SLAB_BYTES:
        depth //= 2
    depth = min(depth, shape[0])
    side = 2 ** round(log2(np.sqrt(CHUNK_VOXELS / depth)))
    return depth, min(side, shape[1]), min(side, shape[2])


def _divisor(number: int, limit: int) -> int:
    return next(d for d in range(limit, 0, -1) if number % d == 0)
