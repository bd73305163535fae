"""S3 through s3fs, with what a job needs beyond it.

- An operation sends few requests, at a limited pace, and says what went wrong (`s3_requests.py`, `s3_errors.py`).
- Every read is a ranged one, because its answer says how long the object is: a body that is short, but consistent with
  its own header, is found out by that. Large objects are read and written in parts; they appear whole or not at all.
- A missing bucket is an error and never an absent object, which zarr would read as fill value.
- Where a server honours conditional puts, of several creators one wins; where it ignores them, whoever finds its own
  content afterwards. Two may then think so when they come within milliseconds: the ledger looks again (`ledger.py`).

One client a process and event loop, shared by all threads; s3fs itself would make one a thread, 0.1 s each. When the
AWS settings in the environment change, so does the client.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fsspec.asyn import sync_wrapper

from volseg.errors import StorageDeniedError
from volseg.storage.s3_errors import Action, ShortBodyError, unavailable
from volseg.storage.s3_requests import AT_ONCE, Requests

PART_BYTES = 32 * 1024**2
"""Objects larger than this are read and written in parts of this size; at least 5 MiB, which S3 demands of parts."""

PARTS_AT_ONCE = 4
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True)
class Part:
    """Bytes of an object from `start` on; `total` is its whole length and `tag` names this content of it."""

    data: bytes
    start: int
    total: int
    tag: str


class S3Files(Requests):
    """Files on S3; paths are ``bucket/key``.

    Everything may raise StorageDeniedError, StorageFullError and StorageUnavailableError. Asynchronous instances serve
    zarr, the others are for synchronous callers in any thread.
    """

    # ------------------------------------------------------------ reading

    async def _part(self, path: str, wanted: str) -> Part:
        """Return the bytes of the HTTP range `wanted`; raises FileNotFoundError, and EINVAL outside the object."""
        bucket, key, _ = self.split_path(path)

        async def request(client: Any) -> Part:
            answer = await client.get_object(Bucket=bucket, Key=key, Range=f"bytes={wanted}")
            async with answer["Body"] as body:
                data = await body.read()
            found = _RANGE.fullmatch(answer.get("ContentRange") or "")
            # Without a range it is the whole object, as some servers send it when it is empty.
            length = int(answer["ContentLength"])
            start, stop, total = (int(found[1]), int(found[2]) + 1, int(found[3])) if found else (0, length, length)
            if len(data) != stop - start or (start, stop) != _asked(wanted, total):
                raise ShortBodyError(f"{len(data)} bytes came, {start}-{stop} of {total} were announced")
            return Part(data, start, total, str(answer.get("ETag")))

        return await self._tried(Action("get_object", bucket, key), request)

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Return an object, or its bytes from `start` (from the end where negative) to `end`."""
        if start is not None and start < 0 and end is None:
            return await self._tail(path, -start)
        if (start, end) == (None, None):
            return await self._whole(path)
        first = start or 0
        if end is not None and end <= first:
            return b""
        return (await self._part(path, f"{first}-" if end is None else f"{first}-{end - 1}")).data

    async def _tail(self, path: str, length: int) -> bytes:
        try:
            return (await self._part(path, f"-{length}")).data
        except OSError as error:
            if error.errno != _OUTSIDE:
                raise
            # Some servers refuse to send the last bytes of an object that has fewer.
            return (await self._whole(path))[-length:]

    async def _whole(self, path: str) -> bytes:
        try:
            first = await self._part(path, f"0-{PART_BYTES - 1}")
        except OSError as error:
            if error.errno != _OUTSIDE:
                raise
            return b""
        if len(first.data) == first.total:
            return first.data
        content = bytearray(first.total)
        content[: len(first.data)] = first.data
        gate = asyncio.Semaphore(PARTS_AT_ONCE)

        async def fill(start: int) -> None:
            async with gate:
                part = await self._part(path, f"{start}-{min(start + PART_BYTES, first.total) - 1}")
            if (part.tag, part.total) != (first.tag, first.total):
                bucket, key, _ = self.split_path(path)
                raise unavailable(Action("get_object", bucket, key), "it was replaced while it was read", 1)
            content[start : start + len(part.data)] = part.data

        await asyncio.gather(*[fill(start) for start in range(len(first.data), first.total, PART_BYTES)])
        return bytes(content)

    async def _length(self, path: str) -> int | None:
        """Return the length of an object, None where there is none.

        Asked with a read of one byte: other than that of HEAD, its answer tells a missing bucket from a missing object.
        """
        try:
            return (await self._part(path, "0-0")).total
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != _OUTSIDE:
                raise
            return 0

    async def _lengths(self, paths: Sequence[str]) -> list[int | None]:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(path: str) -> int | None:
            async with gate:
                return await self._length(path)

        return list(await asyncio.gather(*[one(path) for path in paths]))

    # ------------------------------------------------------------ listing

    async def _pages(self, path: str, **more: Any) -> AsyncIterator[Any]:
        """Yield the pages of a listing of what lies below `path`."""
        bucket, key, _ = self.split_path(path)
        prefix = f"{key.rstrip('/')}/" if key else ""
        async for page in self._list_pages("list_objects_v2", Bucket=bucket, Prefix=prefix, **more):
            yield page

    async def _below(self, path: str) -> dict[str, int]:
        """Return the length of every object below `path`, by its key relative to it."""
        found: dict[str, int] = {}
        skip = len(self.split_path(path)[1].rstrip("/")) + 1 if self.split_path(path)[1] else 0
        async for page in self._pages(path):
            found |= {entry["Key"][skip:]: int(entry["Size"]) for entry in page.get("Contents", [])}
        return found

    async def _names(self, path: str) -> list[str]:
        """Return the sorted names directly below `path`."""
        names: set[str] = set()
        async for page in self._pages(path, Delimiter="/"):
            keys = [entry["Key"] for entry in page.get("Contents", [])]
            keys += [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
            names |= {key.rstrip("/").rpartition("/")[2] for key in keys}
        # Some clients mark a folder by an object of its name with a slash behind.
        return sorted(names - {path.rpartition("/")[2]} if f"{path}/" in names else names - {""})

    async def _is_there(self, path: str) -> bool:
        """Tell whether there is an object, or any below it."""
        if self.split_path(path)[1] and await self._length(path) is not None:
            return True
        async for page in self._pages(path, MaxKeys=1):
            return bool(page.get("Contents"))
        return False

    # ------------------------------------------------------------ writing

    async def _pipe_file(self, path: str, data: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Write an object; it is there whole or not at all."""
        bucket, key, _version = self.split_path(path)
        if len(data) > PART_BYTES:
            await self._in_parts(bucket, key, data)
            return
        only_new = {"IfNoneMatch": "*"} if mode == "create" else {}
        await self._call_s3("put_object", Bucket=bucket, Key=key, Body=data, **only_new)

    async def _in_parts(self, bucket: str, key: str, data: bytes) -> None:
        started = await self._call_s3("create_multipart_upload", Bucket=bucket, Key=key)
        upload = {"Bucket": bucket, "Key": key, "UploadId": started["UploadId"]}
        gate = asyncio.Semaphore(PARTS_AT_ONCE)

        async def send(number: int) -> dict[str, Any]:
            body = data[(number - 1) * PART_BYTES : number * PART_BYTES]
            async with gate:
                answer = await self._call_s3("upload_part", **upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            parts = await asyncio.gather(*[send(n) for n in range(1, -(-len(data) // PART_BYTES) + 1)])
            try:
                await self._call_s3("complete_multipart_upload", **upload, MultipartUpload={"Parts": parts})
            except StorageDeniedError:
                raise
            except Exception:
                # When the answer to the first request was lost, the second one finds nothing left to complete.
                if await self._length(f"{bucket}/{key}") != len(data):
                    raise
        except BaseException:
            await self._call_s3("abort_multipart_upload", **upload)
            raise

    async def _create(self, path: str, data: bytes) -> bool:
        """Write an object where none is; return whether what lies there then is `data`."""
        if await self._length(path) is not None:
            return False
        try:
            await self._pipe_file(path, data, mode="create")
        except FileExistsError:
            # Somebody else's, or our own: the answer to the request before may have been lost.
            pass
        except OSError as error:
            if error.errno != _UNKNOWN:
                raise
            await self._pipe_file(path, data)
        return await self._cat_file(path) == data

    async def _remove(self, path: str) -> None:
        """Remove an object and everything below it."""
        bucket, key, _ = self.split_path(path)
        if not key:
            raise StorageDeniedError(f"s3://{bucket} is a whole bucket: volseg removes none; name a place inside it")
        async for page in self._pages(path):
            keys = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
            if keys:
                answer = await self._call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
                _check_removed(bucket, answer.get("Errors", []))
        await self._call_s3("delete_object", Bucket=bucket, Key=key)

    read = sync_wrapper(_cat_file)
    write = sync_wrapper(_pipe_file)
    create = sync_wrapper(_create)
    is_there = sync_wrapper(_is_there)
    lengths = sync_wrapper(_lengths)
    below = sync_wrapper(_below)
    names = sync_wrapper(_names)
    remove = sync_wrapper(_remove)


_OUTSIDE, _UNKNOWN = errno.EINVAL, errno.ENOSYS


def _asked(wanted: str, total: int) -> tuple[int, int]:
    """Return where the HTTP range `wanted` starts and stops in an object of `total` bytes."""
    first, _, last = wanted.partition("-")
    if not first:
        return max(0, total - int(last)), total
    return int(first), min(total, int(last) + 1) if last else total


def _check_removed(bucket: str, errors: Iterable[Any]) -> None:
    for error in errors:
        raise StorageDeniedError(
            f"s3://{bucket}/{error.get('Key')} cannot be removed ({error.get('Code')}); stopped: grant "
            "s3:DeleteObject, then run it again"
        )


_held: dict[tuple[bool, tuple[tuple[str, str], ...]], S3Files] = {}
_inherited: list[S3Files] = []
_lock = threading.Lock()


def filesystem(*, asynchronous: bool = False) -> S3Files:
    """Return this process' files on S3, for the AWS settings that its environment holds now."""
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    with _lock:
        found = _held.get((asynchronous, settings))
        if found is None:
            found = _held[asynchronous, settings] = S3Files(asynchronous=asynchronous)
        return found


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - another thread of the parent may have held it
    _lock = threading.Lock()
    # Kept alive for the sake of the process that they belong to: see Requests._client.
    _inherited.extend(_held.values())
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
