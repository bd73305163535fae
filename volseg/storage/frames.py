"""What a compressed chunk says of its decoded size, read before anything is allocated for it.

A few kilobytes can announce, and decode to, gigabytes; and one flipped bit in a frame's header can announce more than
any machine has, which ends a process where the decoder is not Python. So the headers are looked at first. For zstd
(RFC 8878, section 3.1.1.1) and Blosc (its format 1), the compressors that nearly all arrays use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

HEAD = 18
"""Bytes from a chunk's start that hold all that is looked at."""

_ZSTD = b"\x28\xb5\x2f\xfd"
_ABSENT = 2**64 - 1


def limit(shape: tuple[int, ...], itemsize: int) -> int:
    """Return how many bytes the compressed form of a chunk may decode to: its size, and what codecs in between add."""
    size = prod(shape) * itemsize
    return size + size // 64 + 65536


def announced(codec: str, head: bytes) -> int | None:
    """Return the decoded size in bytes that a chunk compressed by `codec` announces; None where it does not say."""
    if codec == "blosc":
        return int.from_bytes(head[4:8], "little") if len(head) >= 8 else None
    if codec != "zstd" or len(head) < 6 or head[:4] != _ZSTD:
        return None
    descriptor = head[4]
    single = descriptor >> 5 & 1
    width = (single, 2, 4, 8)[descriptor >> 6]
    start = 6 - single + (0, 1, 2, 4)[descriptor & 3]
    if not width or len(head) < start + width:
        return None
    return int.from_bytes(head[start : start + width], "little") + 256 * (width == 2)


@dataclass(frozen=True)
class Scanner:
    """Looks at the chunks in stored objects of a v3 array: compressed by `codec`, each at most `most` bytes decoded.

    `inner` is the number of chunks in a shard, whose index lies at its `index`; 0 without shards.
    """

    codec: str | None
    most: int
    inner: int
    index: Literal["start", "end"]

    def holds(self, path: Path) -> bool:
        """Tell whether every chunk in a file announces a size that fits; an absent file, or a part of one, does."""
        return self.codec is None or all(
            (size := announced(self.codec, head)) is not None and size <= self.most for head in self._heads(path)
        )

    def _heads(self, path: Path) -> Iterator[bytes]:
        try:
            with path.open("rb") as file:
                if not self.inner:
                    yield file.read(HEAD)
                    return
                # 16 bytes a chunk, and a checksum behind them.
                length = 16 * self.inner + 4
                if path.stat().st_size < length:
                    return
                file.seek(0 if self.index == "start" else -length, 0 if self.index == "start" else 2)
                places = np.frombuffer(file.read(length)[:-4], "<u8")[::2]
                for place in places[places != _ABSENT]:
                    if place < 2**62:
                        file.seek(int(place))
                        yield file.read(HEAD)
        except FileNotFoundError:
            return


def scanner(document: Mapping[str, Any], shape: tuple[int, ...], itemsize: int, inner: int) -> Scanner | None:
    """Return what can look at an array's chunks; None where its codecs keep the announced size out of sight.

    `document` is its v3 metadata, `shape` that of a chunk, `inner` the number of chunks in a shard (0 without shards).
    """
    codecs, index = list(document["codecs"]), "end"
    if inner:
        if len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed":
            return None
        outer = codecs[0]["configuration"]
        if [codec["name"] for codec in outer["index_codecs"]] != ["bytes", "crc32c"]:
            return None
        codecs, index = list(outer["codecs"]), str(outer["index_location"])
    names = [codec["name"] for codec in codecs if codec["name"] != "transpose"]
    if names[:1] != ["bytes"] or names[2:] not in ([], ["crc32c"]):
        return None
    compressor = names[1] if len(names) > 1 else None
    if compressor not in {None, "crc32c", "zstd", "blosc"}:
        return None
    known = compressor if compressor in {"zstd", "blosc"} else None
    return Scanner(known, limit(shape, itemsize), inner, "start" if index == "start" else "end")
