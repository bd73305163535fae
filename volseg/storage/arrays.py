"""Zarr arrays by box: opening, reading with checks, encoding. Only `volume.py` uses this module.

Only it and `shards.py` import zarr.

Which codec pipeline: measured on one core, 256^3 uint8 and uint16, 64^3 chunks in shards, zarrs reads whole shards as
fast as zarr-python and boxes across chunks 1.3 times as fast; on several cores it gains more. Where it needs a part of
a chunk only (also at the volume's end) it does NOT check a CRC-32C: of 60 bit flips it missed up to 59. The checksum of
zstd itself it checks always. Its writes are 1.0 to 1.5 times as fast, but open the file in place, so that a crash
leaves half a shard, and lose the operating system's error number. Hence zarrs reads local v3 arrays that have no
checksum or zstd's, and never writes; ours have both checksums.

Neither library asks whether a chunk decodes to more than it can hold: 32 KB of zstd took 1 GiB (3 GiB where it did not
say so), and zarrs aborts the process where a damaged header announces more than there is. So zarrs gets only chunks
whose headers were looked at, and zarr-python decodes zstd and Blosc within the bounds of a chunk.
"""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any

import imagecodecs
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.array import AsyncArray
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.metadata import ArrayV2Metadata, ArrayV3Metadata
from zarr.registry import register_codec
from zarr.storage import FsspecStore, LocalStore, MemoryStore, StorePath

from volseg.errors import BlockError, CorruptChunkError, StorageDeniedError, VolsegError, VolumeError
from volseg.geometry.box import Box, Triple
from volseg.storage import files, frames
from volseg.storage.shards import JoinedSharding

ZSTD_LEVEL = 1
"""Levels 1 and 3 gave sizes within 2 % of each other on label and grey volumes; 1 is the faster to write."""

PLAIN = "zarr.core.codec_pipeline.BatchedCodecPipeline"
ZARRS = "zarrs.ZarrsCodecPipeline"
_CHECKSUMS = ("crc32", "adler32", "fletcher32", "jenkins")
_OPEN_LOCK = threading.Lock()


def configure(threads: int) -> None:
    """Set how many threads zarr decodes and encodes with, for the whole process.

    For processes that volseg owns (workers, the command line); call it before the first volume is opened, because zarr
    makes its thread pool only once.
    """
    zarr.config.set({"threading.max_workers": threads})


def _decode_within(codec: str, data: Any, most: int, decode: Callable[[Any], Any]) -> Any:
    """Decode a chunk with `decode` where it announces at most `most` bytes; raises ValueError where it has more."""
    view = memoryview(data).cast("B")
    size = frames.announced(codec, bytes(view[: frames.HEAD]))
    if size is None and codec == "zstd":
        # Some writers stream without saying the size; one buffer that is full ends what never would.
        return np.frombuffer(imagecodecs.zstd_decode(bytes(view), out=bytearray(most)), np.uint8)
    if size is not None and size > most:
        raise ValueError(f"it announces {size} bytes, a chunk of this array has at most {most}")
    return decode(data)


class BoundedZstd(ZstdCodec):
    """zstd that decodes no more than a chunk can hold."""

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return await _decode_v3("zstd", self._zstd_codec.decode, chunk_bytes, chunk_spec)


class BoundedBlosc(BloscCodec):
    """Blosc that decodes no more than a chunk can hold."""

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return await _decode_v3("blosc", self._blosc_codec.decode, chunk_bytes, chunk_spec)


async def _decode_v3(codec: str, decode: Callable[[Any], Any], data: Buffer, spec: ArraySpec) -> Buffer:
    most = frames.limit(spec.shape, np.dtype(spec.dtype.to_native_dtype()).itemsize)
    decoded = await asyncio.to_thread(_decode_within, codec, data.as_numpy_array(), most, decode)
    return spec.prototype.buffer.from_bytes(decoded)


_OURS = {}
for _name, _codec in (("zstd", BoundedZstd), ("blosc", BoundedBlosc), ("sharding_indexed", JoinedSharding)):
    _OURS[f"codecs.{_name}"] = f"{_codec.__module__}.{_codec.__name__}"
    register_codec(_name, _codec)


@dataclass(eq=False)
class _BoundedV2:
    """A compressor of Zarr v2 that decodes no more than a chunk can hold; `codec` is the numcodecs one behind it."""

    codec: Any
    most: int
    codec_id: str = "volseg.bounded"

    def decode(self, buf: Any, out: Any | None = None) -> Any:
        return _decode_within(str(self.codec.codec_id), buf, self.most, self.codec.decode)

    def encode(self, buf: Any) -> Any:
        return self.codec.encode(buf)

    def get_config(self) -> Any:
        return self.codec.get_config()

    @classmethod
    def from_config(cls, config: Any) -> _BoundedV2:
        raise NotImplementedError("made from an opened array, never from its metadata")


def _bounded(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Return a v2 array whose compressor is bounded; those of v3 arrays are so from the start."""
    metadata = array.metadata
    if not isinstance(metadata, ArrayV2Metadata) or metadata.compressor is None:
        return array
    most = frames.limit(metadata.chunks, np.dtype(array.dtype).itemsize)
    bounded = replace(metadata, compressor=_BoundedV2(metadata.compressor, most))
    return zarr.Array(AsyncArray(bounded, array.store_path))


class _RemoteStore(FsspecStore):
    """Objects that are not on this machine; those of a whole array must all be there, once it is opened.

    That is found out by the reads themselves: to ask for each object beforehand would cost a request each.
    """

    whole_at: str | None = None

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        found = await super().get(key, prototype, byte_range)
        if found is None and self.whole_at is not None:
            raise absent(key, self.whole_at)
        return found


def absent(key: str, uri: str) -> CorruptChunkError:
    """Return the error of a stored object that was written and is not there."""
    return CorruptChunkError(
        f"chunk {key} of {uri} is absent, but the array says that all were written: part of it was lost; restore it "
        "from a copy or write the volume again"
    )


@dataclass(frozen=True, eq=False)
class StoredArray:
    """A Zarr array whose axes are known by name: z, y, x once each, at most one c, others of size 1."""

    uri: str
    zarr_format: int
    axes: tuple[str, ...]
    array: zarr.Array[Any] = field(repr=False)
    scanner: frames.Scanner | None = field(repr=False, default=None)
    """Looks at chunks before they are decoded, where the pipeline itself does not."""
    whole: bool = False
    """Every object was written: an absent one is an error."""

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of what one stored object holds, on the array's own axes: a shard, else a chunk."""
        return tuple(self.array.shards or self.array.chunks)

    def objects(self, box: Box) -> Iterator[tuple[str, Triple]]:
        """Yield the key and the first voxel (z, y, x) of every stored object that meets `box`."""
        sizes = dict(zip(self.axes, self.array.shape, strict=True))
        spans = dict(zip("zyx", zip(box.start, box.stop, strict=True), strict=True))
        stored, ranges = self.stored, []
        for axis, tile in zip(self.axes, stored, strict=True):
            start, stop = spans.get(axis, (0, sizes[axis]))
            ranges.append(range(start // tile, -(-stop // tile)) if stop > start else range(0))
        z, y, x = (self.axes.index(axis) for axis in "zyx")
        for index in product(*ranges):
            origin = (index[z] * stored[z], index[y] * stored[y], index[x] * stored[x])
            yield self.array.metadata.encode_chunk_key(index), origin

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """Return the sizes in bytes of stored objects, None for absent ones."""
        return files.sizes([files.join(self.uri, key) for key in keys])

    def read(self, box: Box, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the voxels of `box` as a C-contiguous array (c, z, y, x); raises as `Volume.read` does."""
        if self.whole and files.is_local(self.uri):
            keys = [key for key, _ in self.objects(box)]
            for key, size in zip(keys, self.sizes(keys), strict=True):
                if size is None:
                    raise absent(key, self.uri)
        try:
            return self._within_bounds(box)._read(box, dtype)
        except (MemoryError, VolsegError):
            raise
        except Exception as error:  # whatever a codec or a store raises: looked at object by object
            raise self._diagnose(box, dtype, error) from error

    def _within_bounds(self, box: Box) -> StoredArray:
        """Return an array that decodes the chunks of `box` and allocates no more than they can hold."""
        scanner = self.scanner
        if scanner is None:
            return self
        if all(scanner.holds(files.local_path(files.join(self.uri, key))) for key, _ in self.objects(box)):
            return self
        return self._plain()

    def _plain(self) -> StoredArray:
        return open_array(self.uri, self.zarr_format, self.axes, pipeline=PLAIN, whole=self.whole)

    def _read(self, box: Box, dtype: np.dtype[Any]) -> NDArray[Any]:
        spans = dict(zip("zyx", box.slices, strict=True))
        values = np.asarray(self.array[tuple(spans.get(axis, slice(None)) for axis in self.axes)])
        kept = [axis for axis in "czyx" if axis in self.axes]
        order = [axis for axis in self.axes if axis not in kept] + kept
        values = values.transpose([self.axes.index(axis) for axis in order])
        return np.ascontiguousarray(values.reshape(-1, *box.shape), dtype=dtype)

    def _diagnose(self, box: Box, dtype: np.dtype[Any], error: Exception) -> Exception:
        """Find out which stored object made a read fail; return the error to raise.

        Through zarr's own pipeline, which keeps the operating system's errors.
        """
        plain = self._plain()
        sides = dict(zip(self.axes, self.stored, strict=True))
        for key, (z, y, x) in self.objects(box):
            part = Box((z, y, x), (z + sides["z"], y + sides["y"], x + sides["x"])).intersect(box)
            try:
                plain._read(part, dtype)
            except (MemoryError, VolsegError):
                raise
            except Exception as cause:  # noqa: BLE001 - becomes the error that is raised
                return self._explain(key, cause)
        return BlockError(
            f"reading {box} of {self.uri} failed ({_one_line(error)}), but each of its chunks can be read alone: the "
            "storage may be overloaded; the block can be tried again"
        )

    def _explain(self, key: str, cause: Exception) -> Exception:
        what = f"chunk {key} of {self.uri}"
        if isinstance(cause, PermissionError):
            return StorageDeniedError(f"no permission to read {what}; the job stopped: grant it and run it again")
        if isinstance(cause, OSError) and cause.errno is not None:
            return BlockError(
                f"{what} cannot be read ({cause.strerror or cause}): check the storage; the block can be tried again"
            )
        return CorruptChunkError(
            f"{what} ({self.sizes([key])[0]} bytes) cannot be decoded ({_one_line(cause)}): it is truncated or "
            "damaged; restore it from a copy or write the volume again"
        )

    def encode(self, box: Box, values: NDArray[Any]) -> dict[str, bytes]:
        """Return by key the stored form of `values` (c, z, y, x) in the tiles of `box`, as in a fresh v3 array.

        Encoding in memory avoids zarr's read-modify-write of shards at the volume's end, which would fail on the very
        shard that is damaged and to be replaced, and makes each write one put on every kind of storage.
        """
        metadata = self.array.metadata
        if not isinstance(metadata, ArrayV3Metadata):
            raise VolumeError(f"{self.uri} is a Zarr v2 array: volseg writes v3 only")
        held: dict[str, Buffer] = {}
        store = StorePath(MemoryStore(store_dict=held))
        fresh = zarr.Array(AsyncArray(metadata, store, {"order": "C", "write_empty_chunks": True}))
        if "c" in self.axes:
            fresh[(slice(None), *box.slices)] = values
        else:
            fresh[box.slices] = values[0]
        return {key: encoded.to_bytes() for key, encoded in held.items()}


def open_array(
    uri: str, zarr_format: int, axes: tuple[str, ...], *, pipeline: str | None = None, whole: bool = False
) -> StoredArray:
    """Open the array at `uri` for reading; raises VolumeError where its metadata cannot be understood.

    `whole` says that every object of it was written, so that reading an absent one is an error.
    """
    local = files.is_local(uri)
    store = LocalStore(files.local_path(uri), read_only=True) if local else _remote_store(uri)
    if pipeline is None:
        fast = local and zarr_format == 3 and importlib.util.find_spec("zarrs") is not None
        pipeline = ZARRS if fast else PLAIN
    # The pipeline is chosen by zarr's global configuration while an array is opened: set it for just that long.
    try:
        settings = {"codec_pipeline.path": pipeline, "codec_pipeline.strict": True, **_OURS}
        with _OPEN_LOCK, zarr.config.set(settings):
            array = _bounded(zarr.open_array(store, mode="r", zarr_format=3 if zarr_format == 3 else 2))
    except VolsegError:
        raise
    except Exception as error:  # whatever the parsers of metadata and codecs raise
        if pipeline != PLAIN:
            return open_array(uri, zarr_format, axes, pipeline=PLAIN, whole=whole)
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise VolumeError(
            f"{uri} cannot be opened ({_one_line(error)}); nothing was read: its metadata are damaged, or name a codec "
            "that is not installed"
        ) from error
    if whole and isinstance(array.store, _RemoteStore):
        array.store.whole_at = uri
    if pipeline != ZARRS:
        return StoredArray(uri, zarr_format, axes, array, whole=whole)
    document = array.metadata.to_dict()
    inner = 0 if array.shards is None else prod(s // c for s, c in zip(array.shards, array.chunks, strict=True))
    scanner = frames.scanner(document, array.chunks, array.dtype.itemsize, inner)
    if scanner is None or _has_unchecked_sums(document["codecs"]):
        return open_array(uri, zarr_format, axes, pipeline=PLAIN, whole=whole)
    return StoredArray(uri, zarr_format, axes, array, scanner, whole)


def _remote_store(uri: str) -> Store:
    if not files.is_s3(uri):
        return _RemoteStore.from_url(uri, read_only=True)
    from volseg.storage import s3

    return _RemoteStore(s3.filesystem(asynchronous=True), read_only=True, path=files.remote_path(uri))


def _has_unchecked_sums(codecs: Any) -> bool:
    """Tell whether the codecs of a v3 array hold a checksum that zarrs would skip, and none that it checks."""
    inner = [codec["configuration"]["codecs"] for codec in codecs if codec["name"] == "sharding_indexed"]
    if inner:
        return any(_has_unchecked_sums(codecs) for codecs in inner)
    if any(c["name"] == "zstd" and c.get("configuration", {}).get("checksum") for c in codecs):
        return False
    return any(part in str(codec["name"]) for codec in codecs for part in _CHECKSUMS)


def array_document(
    shape: Triple, chunks: Triple, shards: Triple | None, dtype: np.dtype[Any], channels: int | None
) -> bytes:
    """Return the v3 metadata document of a new array: zstd and a CRC-32C a chunk, one shard for all channels."""
    channel, one = ((), ()) if channels is None else ((channels,), (1,))
    held: dict[str, Buffer] = {}
    zarr.create_array(
        MemoryStore(store_dict=held),
        shape=(*channel, *shape),
        dtype=dtype,
        chunks=(*one, *chunks),
        shards=None if shards is None else (*channel, *shards),
        compressors=[ZstdCodec(level=ZSTD_LEVEL, checksum=True), Crc32cCodec()],
        dimension_names=("z", "y", "x") if channels is None else ("c", "z", "y", "x"),
        zarr_format=3,
    )
    return held["zarr.json"].to_bytes()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
