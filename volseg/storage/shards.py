"""Parts of shards that lie on other machines: chunks that are neighbours there come with one request.

zarr 3.1 asks for the chunks of a shard one after the other, each by itself; on S3 that is a round trip a chunk. Later
versions join neighbours themselves (`Store.get_ranges`), and then this module changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.codecs import ShardingCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, BufferPrototype, NDBuffer, default_buffer_prototype
from zarr.core.chunk_grids import RegularChunkGrid
from zarr.core.indexing import SelectorTuple, get_indexer
from zarr.storage import LocalStore

GAP_BYTES = 256 << 10
"""Chunks no further apart come together: to read so much more takes no longer than another round trip."""

MOST_BYTES = 16 << 20
"""Longest range that several chunks are joined to."""

AT_ONCE = 4
"""Ranges of one shard that are asked for together; zarr reads several shards at a time."""

Span = tuple[int, int]


def join(spans: Iterable[Span], gap: int, most: int) -> list[Span]:
    """Return few ranges of bytes that cover all of `spans`, each (start, stop), sorted.

    Those with at most `gap` bytes between them are joined, to no more than `most` bytes.
    """
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined and start - joined[-1][1] <= gap and max(stop, joined[-1][1]) - joined[-1][0] <= most:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


class _Ahead:
    """Gives bytes of one object, those that were read ahead without asking again."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._answers: dict[ByteRequest | None, Buffer | None] = {}
        self._held: list[tuple[Span, Buffer]] = []

    async def get(self, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if isinstance(byte_range, RangeByteRequest):
            for (start, stop), data in self._held:
                if start <= byte_range.start and byte_range.end <= stop:
                    return data[byte_range.start - start : byte_range.end - start]
        # The index is asked for twice: to know what to read ahead, and by zarr.
        if byte_range not in self._answers:
            self._answers[byte_range] = await self._source.get(prototype=prototype, byte_range=byte_range)
        return self._answers[byte_range]

    async def read(self, spans: Iterable[Span]) -> None:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(span: Span) -> None:
            async with gate:
                data = await self._source.get(default_buffer_prototype(), RangeByteRequest(*span))
            # What is gone or too short is left to whoever wants it.
            if data is not None and len(data) == span[1] - span[0]:
                self._held.append((span, data))

        await asyncio.gather(*[one(span) for span in spans])


class JoinedSharding(ShardingCodec):
    """The sharding codec, with few requests for a part of a shard that is not on this machine."""

    async def _decode_partial_single(
        self, byte_getter: Any, selection: SelectorTuple, shard_spec: ArraySpec
    ) -> NDBuffer | None:
        if isinstance(getattr(byte_getter, "store", None), LocalStore) or hasattr(Store, "get_ranges"):
            return await super()._decode_partial_single(byte_getter, selection, shard_spec)
        ahead = _Ahead(byte_getter)
        inner = self._get_chunks_per_shard(shard_spec)
        indexer = get_indexer(
            selection, shape=shard_spec.shape, chunk_grid=RegularChunkGrid(chunk_shape=self.chunk_shape)
        )
        wanted = {chunk for chunk, *_ in indexer}
        if not self._is_total_shard(wanted, inner):
            index = await self._load_shard_index_maybe(ahead, inner)
            if index is not None:
                spans = [span for chunk in wanted if (span := index.get_chunk_slice(chunk))]
                await ahead.read(join(spans, GAP_BYTES, MOST_BYTES))
        return await super()._decode_partial_single(ahead, selection, shard_spec)
