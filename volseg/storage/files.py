"""Small files at fsspec URIs: atomic writes, create-only writes, listing, sizes.

Local paths go straight to the operating system, because a rename and a hard link give what no generic layer promises:
a reader never sees half a file, and of two creators exactly one wins.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from volseg.errors import StorageDeniedError, StorageFullError, VolsegError

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def is_local(uri: str) -> bool:
    """Tell whether `uri` is a path or a file:// URI."""
    return urlsplit(uri).scheme in {"", "file"}


def local_path(uri: str) -> Path:
    """Return the path of a local `uri`, absolute."""
    return Path(os.path.abspath(uri.removeprefix("file://")))


def absolute(uri: str) -> str:
    """Return `uri` without trailing slashes, local ones as absolute paths: what workers on this machine can open."""
    return str(local_path(uri)) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI."""
    return "/".join([uri.rstrip("/"), *parts])


def storage_error(error: OSError, what: str) -> VolsegError | None:
    """Translate an operating-system error that concerns every block alike; None for any other."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return StorageFullError(f"no space left while writing {what}; the job stopped: free space and run it again")
    # Clients of object stores raise PermissionError without a number.
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return StorageDeniedError(f"no permission to write {what}; the job stopped: grant it and run it again")
    return None


def read_bytes(uri: str) -> bytes:
    """Return a file's content; raises FileNotFoundError."""
    if is_local(uri):
        return local_path(uri).read_bytes()
    fs, path = _remote(uri)
    return bytes(fs.cat_file(path))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises StorageFullError and StorageDeniedError.
    """
    with _translated(uri):
        if is_local(uri):
            path = local_path(uri)
            with _temporary(path, data) as temporary:
                temporary.replace(path)
        else:
            fs, path_ = _remote(uri)
            fs.pipe_file(path_, data)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file only where none is; return whether this call created it.

    Raises StorageFullError and StorageDeniedError.
    """
    with _translated(uri):
        try:
            if is_local(uri):
                _create_local(local_path(uri), data)
            else:
                fs, path = _remote(uri)
                fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True


def _create_local(path: Path, data: bytes) -> None:
    with _temporary(path, data) as temporary:
        try:
            path.hardlink_to(temporary)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            # FAT and some network drives: one creator wins here, too, but a reader may come before the content.
            with path.open("xb") as file:
                file.write(data)


def exists(uri: str) -> bool:
    """Tell whether a file or folder is there."""
    if is_local(uri):
        return local_path(uri).exists()
    fs, path = _remote(uri)
    return bool(fs.exists(path))


def size(uri: str) -> int | None:
    """Return a file's size in bytes, None where there is none."""
    if is_local(uri):
        try:
            return local_path(uri).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
    fs, path = _remote(uri)
    try:
        return int(fs.size(path))
    except FileNotFoundError:
        return None


def list_names(uri: str) -> list[str]:
    """Return the sorted names in a folder; an absent folder is empty."""
    if is_local(uri):
        path = local_path(uri)
        return sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    fs, path_ = _remote(uri)
    fs.invalidate_cache(path_)
    try:
        return sorted(str(p).rstrip("/").rsplit("/", 1)[-1] for p in fs.ls(path_, detail=False))
    except FileNotFoundError:
        return []


def remove(uri: str) -> None:
    """Remove a file or a whole folder; nothing there is fine."""
    if is_local(uri):
        path = local_path(uri)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    fs, path_ = _remote(uri)
    if fs.exists(path_):
        fs.rm(path_, recursive=True)


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        general = storage_error(error, uri)
        if general is None:
            raise
        raise general from error


@contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    """Write `data` beside `path` under a name of its own, which is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _remote(uri: str) -> tuple[Any, str]:
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, str(path)
