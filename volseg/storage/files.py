"""Small files at fsspec URIs: atomic writes, create-only writes, listing, sizes.

Local paths go straight to the operating system, because a rename and a hard link give what no generic layer promises:
a reader never sees half a file, and of two creators exactly one wins. Content reaches the disk before its name does,
and both before a write returns, so a power cut cannot leave a receipt, or an output that says complete, without the
voxels behind it. Measured on a virtual SSD with ext4: 9 ms instead of 3 for 2 MiB. S3 has a module of its own
(`s3.py`); other storage is what fsspec makes of it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import fsspec

from volseg.errors import InputError, JobError, PlaceError, StorageDeniedError, StorageFullError, VolsegError
from volseg.redaction import holds_credential

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# From the headers fcntl.h and fs.h of Linux and stdio.h of macOS.
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCL = 4


class Remote(Protocol):
    """Files that are not on this machine; paths are URIs without their scheme."""

    def read(self, path: str) -> bytes:
        """Return a file's content; raises FileNotFoundError."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Write a file that is there whole or not at all."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Write a file where none is; return whether it is this one that lies there then."""
        ...

    def is_there(self, path: str) -> bool:
        """Tell whether there is a file, or anything below it."""
        ...

    def lengths(self, paths: Sequence[str]) -> list[int | None]:
        """Return the lengths of files in bytes, None for those that are absent."""
        ...

    def below(self, path: str) -> dict[str, int]:
        """Return the lengths of all files below a place, by their paths relative to it."""
        ...

    def names(self, path: str) -> list[str]:
        """Return the sorted names directly below a place."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file and everything below it; nothing there is fine."""
        ...


class _Generic:
    """Whatever fsspec knows."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def read(self, path: str) -> bytes:
        return bytes(self._fs.cat_file(path))

    def write(self, path: str, data: bytes) -> None:
        self._fs.pipe_file(path, data)

    def create(self, path: str, data: bytes) -> bool:
        try:
            self._fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    def is_there(self, path: str) -> bool:
        return bool(self._fs.exists(path))

    def lengths(self, paths: Sequence[str]) -> list[int | None]:
        return [int(self._fs.size(path)) if self._fs.isfile(path) else None for path in paths]

    def below(self, path: str) -> dict[str, int]:
        root = str(self._fs._strip_protocol(path)).rstrip("/")
        found = self._fs.find(path, detail=True)
        return {name[len(root) + 1 :]: int(info["size"]) for name, info in found.items()}

    def names(self, path: str) -> list[str]:
        self._fs.invalidate_cache(path)
        try:
            return sorted(str(p).rstrip("/").rsplit("/", 1)[-1] for p in self._fs.ls(path, detail=False))
        except FileNotFoundError:
            return []

    def remove(self, path: str) -> None:
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)


def is_local(uri: str) -> bool:
    """Tell whether `uri` is a path or a file:// URI."""
    return urlsplit(uri).scheme in {"", "file"}


def is_s3(uri: str) -> bool:
    """Tell whether `uri` lies on S3."""
    return urlsplit(uri).scheme in {"s3", "s3a"}


def local_path(uri: str) -> Path:
    """Return the path of a local `uri`, absolute."""
    return Path(os.path.abspath(uri.removeprefix("file://")))


def absolute(uri: str) -> str:
    """Return `uri` without trailing slashes, local ones as absolute paths: what workers on this machine can open.

    Raises PlaceError where it carries a credential.
    """
    refuse_credentials(uri)
    return str(local_path(uri)) if is_local(uri) else uri.rstrip("/")


def refuse_credentials(uri: str) -> None:
    """Raise PlaceError where a place carries a user name, a password or a signature, in front of the host or behind ?.

    It would stand in ledgers, reports, command lines and the names of jobs, where many can read it.
    """
    if not is_local(uri) and holds_credential(uri):
        raise PlaceError(
            f"{uri} carries a credential; nothing was done: name the place without it, credentials come from the "
            "environment and the AWS configuration of the machines that work"
        )


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
    """Return a file's content; raises FileNotFoundError.

    What lies on S3 raises StorageDeniedError and StorageUnavailableError besides, here and in all functions below.
    """
    if is_local(uri):
        return local_path(uri).read_bytes()
    fs, path = remote(uri)
    return fs.read(path)


def write_bytes(uri: str, data: bytes, *, durable: bool = True) -> None:
    """Write a file so that a reader sees the old content or the new, never a part, also after a power cut.

    Not `durable`: faster, and a power cut may leave an empty file; for what means nothing afterwards. Raises
    StorageFullError and StorageDeniedError.
    """
    with _translated(uri):
        if is_local(uri):
            path = local_path(uri)
            with _temporary(path, data, durable=durable) as temporary:
                temporary.replace(path)
            if durable:
                _sync_folder(path.parent)
        else:
            fs, path_ = remote(uri)
            fs.write(path_, data)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file only where none is, whole and lasting; return whether this call created it.

    On S3, whoever finds its own content there afterwards: several creators of the same content may all be told so, and
    where a server ignores conditional puts, so may two that come within milliseconds. Raises StorageFullError and
    StorageDeniedError, JobError where the file system cannot do it.
    """
    with _translated(uri):
        if not is_local(uri):
            fs, path = remote(uri)
            return fs.create(path, data)
        try:
            _create_local(local_path(uri), data)
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
            _rename_exclusively(temporary, path)
    _sync_folder(path.parent)


def _rename_exclusively(source: Path, target: Path) -> None:
    """Rename a file where no `target` is, on file systems without hard links such as FAT; raises FileExistsError."""
    libc = ctypes.CDLL(None, use_errno=True)
    old, new = os.fsencode(source), os.fsencode(target)
    code = errno.ENOSYS
    if hasattr(libc, "renameat2"):
        code = libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_NOREPLACE) and ctypes.get_errno()
    elif hasattr(libc, "renamex_np"):
        code = libc.renamex_np(old, new, _RENAME_EXCL) and ctypes.get_errno()
    if not code:
        return
    if code in {errno.EINVAL, *_NO_HARD_LINKS}:
        raise JobError(
            f"the file system of {target.parent} has neither hard links nor renames that spare what is there, so two "
            "jobs that start together could not tell who is first; nothing was written: choose another drive"
        )
    raise OSError(code, os.strerror(code), str(target))


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network drives know no such thing: their names are on the server already.
        if error.errno not in {errno.EINVAL, *_NO_HARD_LINKS}:
            raise
    finally:
        os.close(descriptor)


def exists(uri: str) -> bool:
    """Tell whether a file or folder is there."""
    if is_local(uri):
        return local_path(uri).exists()
    fs, path = remote(uri)
    return fs.is_there(path)


def size(uri: str) -> int | None:
    """Return a file's size in bytes, None where there is none."""
    return sizes([uri])[0]


def sizes(uris: Sequence[str]) -> list[int | None]:
    """Return the sizes of files in bytes, None for absent ones; several requests at once where each needs one.

    All of `uris` lie in the same storage.
    """
    if not uris or is_local(uris[0]):
        return [_local_size(local_path(uri)) for uri in uris]
    fs, _ = remote(uris[0])
    return fs.lengths([remote_path(uri) for uri in uris])


def sizes_below(uri: str) -> dict[str, int]:
    """Return the sizes of all files below a folder by their paths relative to it; a request a thousand on S3."""
    if is_local(uri):
        root = local_path(uri)
        return {p.relative_to(root).as_posix(): p.stat().st_size for p in root.rglob("*") if p.is_file()}
    fs, path = remote(uri)
    return fs.below(path)


def _local_size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def list_names(uri: str) -> list[str]:
    """Return the sorted names in a folder; an absent folder is empty."""
    if is_local(uri):
        path = local_path(uri)
        return sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    fs, path_ = remote(uri)
    return fs.names(path_)


def remove(uri: str) -> None:
    """Remove a file or a whole folder; nothing there is fine."""
    if is_local(uri):
        path = local_path(uri)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    fs, path_ = remote(uri)
    fs.remove(path_)


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
def _temporary(path: Path, data: bytes, *, durable: bool = True) -> Iterator[Path]:
    """Write `data` beside `path` under a name of its own, which is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def remote(uri: str) -> tuple[Remote, str]:
    """Return the files that `uri` lies among, and its path there.

    Raises InputError where a package is missing, PlaceError where `uri` carries a credential.
    """
    refuse_credentials(uri)
    try:
        if is_s3(uri):
            from volseg.storage import s3

            return s3.filesystem(), remote_path(uri)
        fs, path = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        raise InputError(
            f"{uri} needs a package that is not installed ({error}); nothing was done: pip install 'volseg[s3]' for "
            "S3, or what fsspec needs for other storage"
        ) from None
    return _Generic(fs), str(path)


def remote_path(uri: str) -> str:
    """Return a URI without its scheme, as `Remote` takes it."""
    return uri.partition("://")[2].strip("/") if is_s3(uri) else str(fsspec.core.url_to_fs(uri)[1])
