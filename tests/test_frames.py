"""Compressed chunks that decode to more than a chunk: told from their headers, refused before memory is spent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec

from volseg.geometry import Box
from volseg.storage import frames
from volseg.storage.volume import open_volume

SHAPE = (32, 32, 32)
CHUNK = (16, 16, 16)
MIB = 1 << 20
MAGIC = b"\x28\xb5\x2f\xfd"


def rle(size: int, value: bytes) -> bytes:
    """Return zstd blocks of at most 128 KiB that repeat one byte `size` times."""
    sizes = [min(1 << 17, size - start) for start in range(0, size, 1 << 17)]
    last = len(sizes) - 1
    return b"".join(((n << 3) | 2 | (i == last)).to_bytes(3, "little") + value for i, n in enumerate(sizes))


def unsized(size: int, value: bytes = b"\1") -> bytes:
    """Return a frame as streaming writers make it: a window of 2 MiB and no content size."""
    return MAGIC + b"\x00\x58" + rle(size, value)


def lying(announces: int, size: int) -> bytes:
    """Return a frame that announces another size than it holds, in 8 bytes."""
    return MAGIC + b"\xe0" + announces.to_bytes(8, "little") + rle(size, b"\1")


@pytest.mark.parametrize("size", [1, 200, 255, 256, 300, 65_791, 65_792, 3_000_000])
def test_the_announced_size_of_zstd_and_blosc(size: int) -> None:
    data = np.arange(size, dtype="u4").astype("u1")
    assert frames.announced("zstd", bytes(numcodecs.Zstd(1).encode(data))[: frames.HEAD]) == size
    assert frames.announced("blosc", bytes(numcodecs.Blosc().encode(data))[: frames.HEAD]) == size


def test_what_does_not_say_its_size() -> None:
    assert frames.announced("zstd", unsized(1000)) is None
    assert frames.announced("zstd", b"no frame at all...") is None
    assert frames.announced("zstd", MAGIC) is None
    assert frames.announced("zstd", lying(1 << 40, 10)[:8]) is None
    assert frames.announced("blosc", b"\2\1") is None
    assert frames.announced("gzip", lying(10, 10)) is None
    assert frames.announced("zstd", lying(1 << 45, 10)) == 1 << 45


def make(path: Path, codecs: Any, version: Literal[2, 3] = 3, **options: Any) -> Path:
    array = zarr.create_array(
        path, shape=SHAPE, chunks=CHUNK, dtype="u1", zarr_format=version, compressors=codecs, **options
    )
    array[:] = 1
    return path / ("c/0/0/0" if version == 3 else "0.0.0")


@pytest.mark.parametrize("version", [2, 3])
def test_frames_that_do_not_say_their_size_are_read(tmp_path: Path, version: Literal[2, 3]) -> None:
    chunk = make(tmp_path / "a", ZstdCodec() if version == 3 else numcodecs.Zstd(), version)
    chunk.write_bytes(unsized(16**3, b"\7"))
    read = open_volume(str(tmp_path / "a")).read(Box.of(SHAPE))[0]
    assert (read[:16, :16, :16] == 7).all()
    assert (read[16:] == 1).all()


READ = """
import sys
from pathlib import Path
from volseg.errors import CorruptChunkError
from volseg.geometry import Box
from volseg.storage.volume import open_volume

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)

before = peak()
for path in sys.argv[1:]:
    # A box across chunks, and a part of one: they are decoded in different ways.
    for box in (Box((0, 0, 0), (32, 32, 32)), Box((0, 0, 0), (15, 16, 16))):
        try:
            open_volume(path).read(box)
        except CorruptChunkError as error:
            print(error)
print((peak() - before) // 1024)
"""


def test_no_chunk_takes_more_memory_than_it_can_hold(tmp_path: Path) -> None:
    """Kilobytes that decode to half a gigabyte, and headers that announce more than there is, which ended a process."""
    large = np.zeros(512 * MIB, "u1")
    sized, blosc, endless = bytes(numcodecs.Zstd(1).encode(large)), bytes(numcodecs.Blosc().encode(large)), unsized
    del large
    cases: dict[str, tuple[Any, Literal[2, 3], bytes]] = {
        "zstd": (ZstdCodec(), 3, sized),
        "zstd without a size": (ZstdCodec(), 3, endless(512 * MIB)),
        "zstd that lies": (ZstdCodec(), 3, lying(1 << 45, 16**3)),
        "blosc": (BloscCodec(), 3, blosc),
        "v2 zstd": (numcodecs.Zstd(), 2, sized),
        "v2 zstd without a size": (numcodecs.Zstd(), 2, endless(512 * MIB)),
        "v2 zstd that lies": (numcodecs.Zstd(), 2, lying(1 << 45, 16**3)),
        "v2 blosc": (numcodecs.Blosc(), 2, blosc),
    }
    for name, (codecs, version, data) in cases.items():
        make(tmp_path / name, codecs, version).write_bytes(data)
    # Inside a shard: the first chunk's header, found through the shard's index.
    for where in ("start", "end"):
        shards: Any = {"shape": SHAPE, "index_location": where}
        shard = make(tmp_path / f"shard {where}", ZstdCodec(), shards=shards)
        content = bytearray(shard.read_bytes())
        first = content.index(MAGIC)
        content[first : first + 13] = MAGIC + b"\xe0" + (1 << 45).to_bytes(8, "little")
        shard.write_bytes(content)
    paths = sorted(str(path) for path in tmp_path.iterdir())
    ran = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    *lines, grown = ran.stdout.splitlines()
    assert len(lines) == 2 * len(paths)
    for place, line in zip((path for path in paths for _ in range(2)), lines, strict=True):
        assert place in line
        assert "it is truncated or damaged" in line
        assert "it announces" in line or "buffer is too small" in line
    assert int(grown) < 256


def test_the_scanner_knows_what_it_cannot_see() -> None:
    def document(*codecs: Any) -> dict[str, Any]:
        return {"codecs": [codec.to_dict() for codec in codecs]}

    assert frames.scanner(document(BytesCodec(), GzipCodec()), CHUNK, 1, 0) is None
    assert frames.scanner(document(BytesCodec(), ZstdCodec(), GzipCodec()), CHUNK, 1, 0) is None
    assert frames.scanner(document(BytesCodec(), Crc32cCodec(), ZstdCodec()), CHUNK, 1, 0) is None
    plain = frames.scanner(document(BytesCodec(), Crc32cCodec()), CHUNK, 1, 0)
    assert plain is not None
    assert plain.codec is None
    ours = frames.scanner(document(BytesCodec(), ZstdCodec(), Crc32cCodec()), CHUNK, 2, 0)
    assert ours == frames.Scanner("zstd", frames.limit(CHUNK, 2), 0, "end")
