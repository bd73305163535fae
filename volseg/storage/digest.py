"""The digest that names a block's voxels."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def digest(data: NDArray[Any]) -> str:
    """Return the sha256 of decoded voxels in C order, little-endian."""
    little = np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("<"))
    return hashlib.sha256(little.data).hexdigest()
