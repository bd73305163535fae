"""The digest names voxels: not their byte order, not their layout in memory."""

import hashlib

import numpy as np
import pytest

from volseg.storage.digest import digest


def test_it_is_the_sha256_of_little_endian_voxels_in_c_order() -> None:
    data = np.arange(24, dtype="<u2").reshape(2, 3, 4)
    expected = hashlib.sha256(b"".join(int(v).to_bytes(2, "little") for v in range(24))).hexdigest()
    assert digest(data) == expected
    assert digest(data.astype(">u2")) == expected
    assert digest(np.asfortranarray(data)) == expected
    wide = np.zeros((4, 6, 8), np.uint16)
    wide[::2, ::2, ::2] = data
    assert digest(wide[::2, ::2, ::2]) == expected


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "float32", "uint64"])
def test_one_voxel_makes_another_digest(dtype: str) -> None:
    data = np.ones((3, 4, 5), dtype)
    other = data.copy()
    other[2, 3, 4] = 0
    assert digest(data) != digest(other)
