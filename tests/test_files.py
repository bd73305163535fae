"""Small files: readers never see a part, of many creators one wins, and a full disk is named as one."""

import ctypes
import errno
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from volseg.errors import JobError, StorageDeniedError, StorageFullError, VolsegError
from volseg.storage import files


@pytest.fixture(params=["path", "file URI", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Return a folder, local by path and by URI, and remote."""
    uri = {"path": str(tmp_path), "file URI": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}[
        request.param
    ]
    yield uri
    files.remove(uri)


def only(folder: Path) -> list[str]:
    """Return all names in a folder, hidden ones included."""
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- what every storage does


def test_what_is_written_is_read(root: str) -> None:
    uri = files.join(root, "a", "b.json")
    assert not files.exists(uri)
    assert files.size(uri) is None
    files.write_bytes(uri, b"old")
    files.write_bytes(uri, b"newer")
    assert files.read_bytes(uri) == b"newer"
    assert files.size(uri) == 5
    assert files.exists(uri)
    assert files.exists(files.join(root, "a"))


def test_what_is_absent_is_not_found(root: str) -> None:
    with pytest.raises(FileNotFoundError):
        files.read_bytes(files.join(root, "none"))
    assert files.list_names(files.join(root, "none")) == []
    files.remove(files.join(root, "none"))


def test_a_file_is_created_once(root: str) -> None:
    uri = files.join(root, "header.json")
    assert files.create_bytes(uri, b"first")
    assert not files.create_bytes(uri, b"second")
    assert files.read_bytes(uri) == b"first"


def test_names_are_listed_and_removed(root: str) -> None:
    for name in ("b", "a", "c/d"):
        files.write_bytes(files.join(root, name), b"x")
    assert files.list_names(root) == ["a", "b", "c"]
    files.remove(files.join(root, "a"))
    files.remove(files.join(root, "c"))
    assert files.list_names(root) == ["b"]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("uri", "local"),
    [("a/b", True), ("/a/b", True), ("file:///a", True), ("s3://bucket/a", False), ("memory://a", False)],
)
def test_what_is_local(uri: str, local: bool) -> None:
    assert files.is_local(uri) == local


def test_absolute_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert files.absolute("out.zarr/") == str(tmp_path / "out.zarr")
    assert files.absolute("a/../b") == str(tmp_path / "b")
    assert files.absolute(f"file://{tmp_path}/a") == str(tmp_path / "a")
    assert files.absolute("s3://bucket/a/") == "s3://bucket/a"
    assert files.join("s3://bucket/a/", "0", "zarr.json") == "s3://bucket/a/0/zarr.json"


# ---------------------------------------------------------------- whole or not at all


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    uri = str(tmp_path / "state")
    contents = {bytes([letter]) * 300_000 for letter in b"abc"}
    files.write_bytes(uri, min(contents))
    ended = threading.Event()

    def write() -> None:
        for _ in range(30):
            for content in contents:
                files.write_bytes(uri, content)
        ended.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not ended.is_set() and not writing.done():
            assert files.read_bytes(uri) in contents
        writing.result()
    assert only(tmp_path) == ["state"]


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "state")
    files.write_bytes(uri, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        files.write_bytes(uri, b"newer")
    with pytest.raises(OSError, match="Input/output"):
        files.create_bytes(str(tmp_path / "header"), b"newer")
    monkeypatch.undo()
    assert files.read_bytes(uri) == b"old"
    assert only(tmp_path) == ["state"]


def test_a_write_over_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        files.write_bytes(str(tmp_path / "folder"), b"x")
    assert only(tmp_path) == ["folder"]


def no_hard_links(monkeypatch: pytest.MonkeyPatch, code: int = errno.EPERM) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.parametrize("links", [True, False])
def test_of_many_threads_one_creates_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Also on FAT, which has no hard links; who loses sees the winner's file at once, never a part of it."""
    if not links:
        no_hard_links(monkeypatch)
    uri, start = str(tmp_path / "a" / "header"), threading.Barrier(16)

    def create(number: int) -> tuple[bool, bytes]:
        start.wait()
        return files.create_bytes(uri, b"%2d" % number * 300_000), files.read_bytes(uri)

    with ThreadPoolExecutor(16) as pool:
        won, seen = zip(*pool.map(create, range(16)), strict=True)
    assert sum(won) == 1
    assert set(seen) == {b"%2d" % won.index(True) * 300_000}
    assert only(tmp_path / "a") == ["header"]


class NoRenames:
    """A system whose file systems know no rename that spares what is there."""

    def renameat2(self, *_: Any) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1


def test_a_file_system_that_cannot_tell_who_is_first_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_hard_links(monkeypatch)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: NoRenames())
    with pytest.raises(JobError, match=f"the file system of {tmp_path} has neither .* choose another drive"):
        files.create_bytes(str(tmp_path / "header"), b"first")
    assert only(tmp_path) == []


@pytest.mark.parametrize(("how", "when"), [("write_bytes", "replace"), ("create_bytes", "link")])
def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, when: str
) -> None:
    """What a power cut could lose cannot be tested; that nothing is left to lose can."""
    steps: list[str] = []
    sync, name = os.fsync, getattr(os, when)

    def watched(descriptor: int) -> None:
        folder = os.fstat(descriptor).st_ino == tmp_path.stat().st_ino
        steps.append("folder" if folder else f"{os.fstat(descriptor).st_size} bytes")
        sync(descriptor)

    def named(*places: Any, **options: Any) -> None:
        steps.append("name")
        name(*places, **options)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, when, named)
    getattr(files, how)(str(tmp_path / "state"), b"x" * 5000)
    assert steps == ["5000 bytes", "name", "folder"]


def test_what_means_nothing_after_a_power_cut_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("waited for the disk"))
    files.write_bytes(str(tmp_path / "heartbeat"), b"now", durable=False)
    assert only(tmp_path) == ["heartbeat"]


CREATE = """
import sys
from volseg.storage import files
print("ready", flush=True)
sys.stdin.readline()
print(files.create_bytes(sys.argv[1], sys.argv[2].encode()), flush=True)
"""


def test_of_many_processes_one_creates(tmp_path: Path) -> None:
    uri = str(tmp_path / "header")
    with ExitStack() as stack:
        creators = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", CREATE, uri, str(number)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                )
            )
            for number in range(6)
        ]  # fmt: skip
        for creator in creators:
            assert creator.stdout
            assert creator.stdout.readline() == "ready\n"
        for creator in creators:
            assert creator.stdin
            creator.stdin.write("go\n")
            creator.stdin.flush()
        answers = [creator.communicate()[0].strip() for creator in creators]
    assert sorted(answers) == ["False"] * 5 + ["True"]
    assert files.read_bytes(uri) == b"%d" % answers.index("True")


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_one_creates_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    no_hard_links(monkeypatch, code)
    uri = str(tmp_path / "header")
    assert files.create_bytes(uri, b"first")
    assert not files.create_bytes(uri, b"second")
    assert files.read_bytes(uri) == b"first"
    assert only(tmp_path) == ["header"]


# ---------------------------------------------------------------- what concerns every block alike

FULL = """
import resource, sys
from volseg.errors import StorageFullError
from volseg.storage import files
uri, how = sys.argv[1], getattr(files, sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    how(uri, bytes(5000))
except StorageFullError as error:
    print(error)
"""


@pytest.mark.parametrize("how", ["write_bytes", "create_bytes"])
def test_no_room_for_a_file(tmp_path: Path, how: str) -> None:
    """A limit on the size of files is what a full disk is: the system refuses to write on in the middle."""
    uri = str(tmp_path / "state")
    if how == "write_bytes":
        files.write_bytes(uri, b"old")
    before = only(tmp_path)
    ran = subprocess.run([sys.executable, "-c", FULL, uri, how], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"no space left while writing {uri}; the job stopped: free space and run it again"
    assert only(tmp_path) == before
    assert not before or files.read_bytes(uri) == b"old"


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (errno.ENOSPC, StorageFullError, "no space left while writing out.zarr"),
        (errno.EDQUOT, StorageFullError, "no space left while writing out.zarr"),
        (errno.EACCES, StorageDeniedError, "no permission to write out.zarr"),
        (errno.EROFS, StorageDeniedError, "no permission to write out.zarr"),
    ],
)
def test_what_concerns_every_block(code: int, kind: type[VolsegError], says: str) -> None:
    error = files.storage_error(OSError(code, os.strerror(code)), "out.zarr")
    assert type(error) is kind
    assert str(error).startswith(says)


def test_other_errors_are_left_alone() -> None:
    assert files.storage_error(OSError(errno.EIO, "Input/output error"), "out.zarr") is None
    assert files.storage_error(FileNotFoundError(errno.ENOENT, "No such file"), "out.zarr") is None


@pytest.mark.parametrize("how", [files.write_bytes, files.create_bytes])
def test_remote_errors_are_translated_too(monkeypatch: pytest.MonkeyPatch, how: Any) -> None:
    class Denied:
        def pipe_file(self, *_: Any, **__: Any) -> None:
            raise PermissionError(errno.EACCES, "Access Denied")

    monkeypatch.setattr(files, "remote", lambda uri: (files._Generic(Denied()), uri))
    with pytest.raises(StorageDeniedError, match="no permission to write gs://bucket/a") as caught:
        how("gs://bucket/a", b"x")
    assert isinstance(caught.value.__cause__, PermissionError)


def test_a_permission_error_without_a_number_is_denied_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 clients raise PermissionError with a message only."""
    assert isinstance(files.storage_error(PermissionError("Forbidden"), "s3://bucket/a"), StorageDeniedError)
