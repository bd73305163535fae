"""Files and volumes on S3, on two servers: what local files do, lengths checked, requests bounded, nothing silent."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.core.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from tests.flaky_proxy import TROUBLES, Canned, FlakyProxy, Request, Trouble
from tests.s3_servers import Server
from tests.support import LONGEST
from volseg.errors import (
    CorruptChunkError,
    InputError,
    JobError,
    StorageDeniedError,
    StorageUnavailableError,
    VolumeError,
)
from volseg.geometry import Box
from volseg.storage import files, ledger, ome, rate, s3, shards
from volseg.storage.describe import describe, stored_bytes
from volseg.storage.ledger import Ledger, Receipt
from volseg.storage.s3_requests import ATTEMPTS
from volseg.storage.volume import ArrayWriter, Layout, create_array, open_volume

pytest_plugins = ("tests.s3_fixtures",)
pytestmark = pytest.mark.usefixtures("short_pauses")

SHAPE = (12, 20, 18)
U8 = np.dtype("uint8")


def voxels(shape: tuple[int, ...] = SHAPE) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(1, 250, shape).astype(np.uint8)


def written(uri: str, **marks: Any) -> ArrayWriter:
    attributes = ome.group_attributes("zyx", voxel_size=(2, 1, 1), unit="micrometer", name="test", volseg=marks)
    writer = create_array(uri, Layout(SHAPE, (8, 8, 8), (16, 16, 16), U8), attributes)
    writer.write(Box.of(SHAPE), voxels())
    return writer


WHOLE: dict[str, Any] = {"status": "complete", "all_chunks_written": True}

# ---------------------------------------------------------------- files


def test_files(bucket: str) -> None:
    place = files.join(bucket, "a")
    assert not files.exists(place)
    assert files.list_names(place) == []
    content = {"x": b"hello", "empty": b"", "b/c": b"12345" * 1000, "b/ü ö+%2F": b"1"}
    for name, data in content.items():
        files.write_bytes(files.join(place, name), data)
    files.write_bytes(f"{place}b", b"a neighbour of that name")
    assert {name: files.read_bytes(files.join(place, name)) for name in content} == content
    assert files.exists(place)
    assert files.exists(files.join(place, "b/c"))
    assert files.list_names(place) == ["b", "empty", "x"]
    assert files.list_names(bucket) == ["a", "ab"]
    assert files.sizes([files.join(place, n) for n in ("x", "empty", "none", "b")]) == [5, 0, None, None]
    assert files.sizes_below(place) == {name: len(data) for name, data in content.items()}
    files.write_bytes(files.join(place, "x"), b"other")
    assert files.read_bytes(files.join(place, "x")) == b"other"
    with pytest.raises(FileNotFoundError):
        files.read_bytes(files.join(place, "none"))
    files.remove(place)
    files.remove(place)
    assert files.list_names(bucket) == ["ab"]


def test_parts_of_files(bucket: str) -> None:
    path = files.remote_path(files.join(bucket, "a"))
    fs = s3.filesystem()
    fs.write(path, b"0123456789")
    assert [fs.read(path, *ends) for ends in ((2, 5), (7, 99), (8, None), (-3, None), (-99, None), (4, 4))] == [
        b"234", b"789", b"89", b"789", b"0123456789", b"",
    ]  # fmt: skip
    with pytest.raises(OSError, match="not satisfiable"):
        fs.read(path, 10, 12)


def test_large_files_in_parts(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 1024**2)
    data = np.random.default_rng(0).bytes(11 * 1024**2)
    files.write_bytes(files.join(bucket, "large"), data)
    assert files.read_bytes(files.join(bucket, "large")) == data
    assert files.list_names(bucket) == ["large"]


def test_a_file_is_created_once(bucket: str) -> None:
    uri = files.join(bucket, "header.json")
    assert files.create_bytes(uri, b"first")
    assert not files.create_bytes(uri, b"second")
    assert files.read_bytes(uri) == b"first"


def test_of_many_threads_one_creates(moto: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server honours conditional puts."""
    moto.use(monkeypatch)
    uri = f"s3://{moto.new_bucket()}/header.json"
    together = threading.Barrier(8)

    def create(number: int) -> bool:
        together.wait()
        return files.create_bytes(uri, b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert sum(won) == 1
    assert files.read_bytes(uri) == b"%d" % won.index(True)


def test_a_creator_whose_answer_was_lost_knows_its_own(flaky: FlakyProxy, moto: Server) -> None:
    uri = f"s3://{moto.new_bucket()}/header.json"
    flaky.rule = lambda request: "lost" if request.method == "PUT" and request.number == 1 else None
    assert files.create_bytes(uri, b"mine")
    assert [r.method for r in flaky.seen].count("PUT") == 2


def test_whose_content_was_replaced_did_not_create(flaky: FlakyProxy, moto: Server) -> None:
    """As on a server that ignores conditional puts, when another one comes at the same time."""
    bucket = moto.new_bucket()

    def another_comes(request: Request) -> None:
        if request.method == "GET" and request.span != "bytes=0-0":
            moto.client().put_object(Bucket=bucket, Key="header.json", Body=b"another's")

    flaky.slow = another_comes
    assert not files.create_bytes(f"s3://{bucket}/header.json", b"mine")


def test_a_server_without_conditional_puts_is_asked_without(flaky: FlakyProxy, moto: Server) -> None:
    uri = f"s3://{moto.new_bucket()}/header.json"
    unknown = Canned(501, "NotImplemented")
    flaky.rule = lambda request: unknown if request.method == "PUT" and request.number == 1 else None
    assert files.create_bytes(uri, b"mine")
    assert files.read_bytes(uri) == b"mine"


def test_a_missing_bucket_is_never_a_missing_file(server: Server) -> None:
    uri = "s3://volseg-no-such-bucket/a"
    for ask in (files.size, files.exists, files.read_bytes, files.list_names, files.remove):
        with pytest.raises(StorageDeniedError, match="there is no bucket 'volseg-no-such-bucket' at http://127"):
            ask(uri)
    with pytest.raises(StorageDeniedError, match="there is no bucket"):
        files.create_bytes(uri, b"")


def test_a_whole_bucket_is_not_removed(bucket: str) -> None:
    files.write_bytes(files.join(bucket, "a"), b"x")
    with pytest.raises(StorageDeniedError, match="is a whole bucket"):
        files.remove(bucket)
    assert files.list_names(bucket) == ["a"]


def test_what_cannot_be_removed_is_said(flaky: FlakyProxy, moto: Server) -> None:
    uri = f"s3://{moto.new_bucket()}/a"
    files.write_bytes(f"{uri}/b", b"x")
    denied = "<Error><Key>a/b</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
    flaky.rule = lambda request: Canned(200, "none", more=denied) if request.method == "POST" else None
    flaky.form = "<DeleteResult>{more}</DeleteResult>"
    with pytest.raises(
        StorageDeniedError, match=r"a/b cannot be removed \(AccessDenied\); stopped: grant s3:DeleteObject"
    ):
        files.remove(uri)


# ---------------------------------------------------------------- volumes


def test_a_volume(bucket: str) -> None:
    uri = files.join(bucket, "v.zarr")
    writer = written(uri, **WHOLE)
    volume = open_volume(uri)
    assert (volume.shape, volume.chunks, volume.shards) == (SHAPE, (8, 8, 8), (16, 16, 16))
    for box in (Box.of(SHAPE), Box((3, 5, 0), (12, 19, 9)), Box((0, 0, 0), (1, 1, 1))):
        np.testing.assert_array_equal(volume.read(box)[0], voxels()[box.slices])
    stored = writer.object_sizes(Box.of(SHAPE))
    assert len(stored) == 4
    assert {f"0/{key}": size for key, size in stored.items()}.items() <= files.sizes_below(uri).items()
    assert stored_bytes(uri) == sum(files.sizes_below(uri).values())
    assert describe(uri)["bytes_stored"] == stored_bytes(f"{uri}/0") > sum(size or 0 for size in stored.values())


@pytest.mark.parametrize("kind", ["absent", "empty", "half", "one bit", "no index"])
def test_damage_is_found(bucket: str, kind: str) -> None:
    uri = files.join(bucket, "v.zarr")
    written(uri, **WHOLE)
    place = files.join(uri, "0/c/0/1/1")
    data = files.read_bytes(place)
    flipped = bytearray(data)
    flipped[len(data) // 3] ^= 4
    damaged = {"empty": b"", "half": data[: len(data) // 2], "one bit": bytes(flipped), "no index": data[:-20]}
    if kind == "absent":
        files.remove(place)
    else:
        files.write_bytes(place, damaged[kind])
    volume = open_volume(uri)
    np.testing.assert_array_equal(volume.read(Box((0, 0, 0), (12, 16, 18)))[0], voxels()[:, :16])
    what = "is absent, but the array says" if kind == "absent" else "cannot be decoded"
    for box in (Box.of(SHAPE), Box((3, 17, 17), (5, 18, 18))):
        with pytest.raises(CorruptChunkError, match=f"chunk c/0/1/1 of {uri}/0 .*{what}"):
            volume.read(box)


def test_chunks_that_are_neighbours_come_together(
    flaky: FlakyProxy, moto: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index and one range, where zarr alone would ask for each of sixteen chunks."""
    uri = f"s3://{moto.new_bucket()}/v.zarr"
    values = voxels((32, 32, 32))
    create_array(uri, Layout(values.shape, (8, 8, 8), (32, 32, 32), U8), {}).write(Box.of(values.shape), values)
    volume, box = open_volume(uri), Box((3, 0, 9), (32, 32, 16))
    asked = []
    for gap in (shards.GAP_BYTES, 0):
        monkeypatch.setattr(shards, "GAP_BYTES", gap)
        flaky.seen.clear()
        np.testing.assert_array_equal(volume.read(box)[0], values[box.slices])
        asked.append([request.span for request in flaky.seen])
    near, exact = asked
    assert len(near) == 2
    assert len(set(near)) == 2
    assert 2 < len(exact) < 1 + 16
    # A body that is cut short, also where its header says so, is asked for again as ever.
    for trouble in TROUBLES:
        flaky.reset()
        flaky.rule = lambda request, trouble=trouble: trouble if request.number == 1 else None  # type: ignore[misc]
        np.testing.assert_array_equal(volume.read(box)[0], values[box.slices])
        assert len(flaky.troubled) == len(exact)


def test_ranges_are_joined() -> None:
    spans = [(50, 60), (0, 10), (10, 20), (25, 30), (52, 55), (90, 91)]
    assert shards.join(spans, 0, 100) == [(0, 20), (25, 30), (50, 60), (90, 91)]
    assert shards.join(spans, 5, 100) == [(0, 30), (50, 60), (90, 91)]
    assert shards.join(spans, 99, 60) == [(0, 60), (90, 91)]
    assert shards.join(spans, 99, 1) == sorted(spans)
    assert shards.join([], 99, 99) == []


def test_absent_chunks_are_counted_where_they_are_no_error(bucket: str) -> None:
    uri = files.join(bucket, "v.zarr")
    writer = written(uri, status="complete")
    files.remove(files.join(uri, "0/c/0/1/0"))
    volume = open_volume(uri)
    assert volume.absent_chunks(Box.of(SHAPE)) == 1
    assert volume.absent_chunks(Box((0, 0, 0), (12, 16, 18))) == 0
    assert (volume.read(Box.of(SHAPE))[0, :, 16:, :16] == 0).all()
    assert writer.object_sizes(Box.of(SHAPE))["c/0/1/0"] is None


def test_absent_chunks_are_asked_for_together(flaky: FlakyProxy, moto: Server) -> None:
    """The first answers are held back until sixteen were asked for: one after the other they would never come."""
    uri = f"s3://{moto.new_bucket()}/v.zarr"
    create_array(uri, Layout((12, 24, 16), (4, 8, 8), None, U8), {})
    volume = open_volume(uri)
    waiting: list[int] = []
    together = threading.Barrier(16)

    def first_sixteen(request: Request) -> None:
        if "/c/" in request.target:
            waiting.append(1)
            if len(waiting) <= 16:
                together.wait(30)

    flaky.slow = first_sixteen
    assert volume.absent_chunks(Box.of(volume.shape)) == 18


def test_a_lost_bucket_makes_no_hole(flaky: FlakyProxy, moto: Server) -> None:
    uri = f"s3://{moto.new_bucket()}/v.zarr"
    written(uri, status="complete")
    volume = open_volume(uri)
    flaky.rule = lambda _: Canned(404, "NoSuchBucket")
    with pytest.raises(StorageDeniedError, match="there is no bucket"):
        volume.read(Box.of(SHAPE))
    flaky.rule = lambda _: Canned(403, "AccessDenied")
    with pytest.raises(StorageDeniedError, match=r"access is denied \(403 AccessDenied\); stopped: grant s3:GetObject"):
        volume.read(Box.of(SHAPE))
    with pytest.raises(VolumeError, match="access is denied"):
        open_volume(uri)


def test_zarr_alone_reads_what_volseg_wrote(bucket: str, server: Server) -> None:
    written(files.join(bucket, "v.zarr"), **WHOLE)
    client, name = server.client(), bucket.removeprefix("s3://")
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=name, Prefix="v.zarr/0/")["Contents"]]
    held = {key[9:]: client.get_object(Bucket=name, Key=key)["Body"].read() for key in keys}
    store = MemoryStore({key: Buffer.from_bytes(data) for key, data in held.items()}, read_only=True)
    np.testing.assert_array_equal(np.asarray(zarr.open_array(store, mode="r")[...]), voxels())


# ---------------------------------------------------------------- one client for threads, none for a child


def test_threads_share_one_client(bucket: str) -> None:
    uri = files.join(bucket, "v.zarr")
    written(uri, **WHOLE)
    volume, first = open_volume(uri), s3.filesystem()
    boxes = [box for box in Box.of(SHAPE).tiles((4, 10, 9)) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(volume.read, boxes))
        assert set(pool.map(lambda _: id(s3.filesystem()), range(4))) == {id(first)}
    for box, part in zip(boxes, parts, strict=True):
        np.testing.assert_array_equal(part[0], voxels()[box.slices])


FORKED = """
import os, sys
from volseg.geometry import Box
from volseg.storage import files
from volseg.storage.volume import open_volume

uri, bucket = sys.argv[1:]
volume = open_volume(uri)
everything = Box.of(volume.shape)
before = volume.read(everything)
child = os.fork()
same = bool((volume.read(everything) == before).all())
names = len(files.list_names(bucket))
if not child:
    os._exit(0 if same and names == 1 else 1)
assert same
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_uses_s3_of_its_own(bucket: str) -> None:
    """In a process that has no other threads than those of reading: a fork of any others may hang on their locks."""
    uri = files.join(bucket, "v.zarr")
    written(uri, **WHOLE)
    # Python warns of forks with threads from 3.12 on.
    words = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, uri, bucket]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=LONGEST)
    assert done.returncode == 0, done.stderr


def test_a_changed_environment_is_another_client(moto: Server, rclone: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = moto.new_bucket()
    moto.use(monkeypatch)
    files.write_bytes(f"s3://{bucket}/a", b"here")
    rclone.use(monkeypatch)
    with pytest.raises(StorageDeniedError, match="there is no bucket"):
        files.read_bytes(f"s3://{bucket}/a")
    moto.use(monkeypatch)
    assert files.read_bytes(f"s3://{bucket}/a") == b"here"


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region_comes_from_either_variable(moto: Server, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changes: dict[str, str | None] = {"AWS_DEFAULT_REGION": None, name: "ap-south-1"}
    moto.use(monkeypatch, **changes)
    fs = s3.filesystem()
    fs.connect()
    assert fs.s3.meta.region_name == "ap-south-1"


# ---------------------------------------------------------------- requests: how many, how fast, how long

OPERATIONS: dict[str, Callable[[str], object]] = {
    "read": files.read_bytes,
    "size": files.size,
    "list": files.list_names,
    "write": lambda uri: files.write_bytes(uri, b"new"),
    "volume": lambda uri: open_volume(uri.rpartition("/")[0]).read(Box((0, 0, 0), (1, 1, 1))),
}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_sends_at_most_six_requests(flaky: FlakyProxy, moto: Server, name: str, trouble: Trouble) -> None:
    bucket = moto.new_bucket()
    uri = f"s3://{bucket}/v/zarr.json"
    flaky.rule = lambda _: trouble
    with pytest.raises(StorageUnavailableError, match=r"cannot be (read|written|listed): .*6 requests") as caught:
        OPERATIONS[name](uri)
    assert "\n" not in str(caught.value)
    # Of a read that failed in a test before, other chunks may still be under way.
    assert sum(request.bucket == bucket for request in flaky.seen) == ATTEMPTS == 6
    assert not isinstance(caught.value, JobError), "a block can be tried again"


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_that_passes_is_not_noticed(flaky: FlakyProxy, moto: Server, trouble: Trouble) -> None:
    uri = f"s3://{moto.new_bucket()}/v.zarr"
    flaky.rule = lambda request: trouble if request.number <= 2 else None
    written(uri, **WHOLE)
    np.testing.assert_array_equal(open_volume(uri).read(Box.of(SHAPE))[0], voxels())
    assert files.sizes_below(uri).keys() == {
        "zarr.json",
        "0/zarr.json",
        *(f"0/c/0/{y}/{x}" for y in (0, 1) for x in (0, 1)),
    }
    files.remove(uri)
    assert not files.exists(uri)


def test_a_large_file_survives_lost_answers(flaky: FlakyProxy, moto: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to the last request of an upload may be lost, too: the upload is gone then and the object there."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 1024**2)
    uri = f"s3://{moto.new_bucket()}/large"
    data = bytes(6 * 1024**2)
    flaky.rule = lambda request: "lost" if request.number == 1 else None
    files.write_bytes(uri, data)
    assert files.read_bytes(uri) == data


def test_every_request_waits_for_its_turn(flaky: FlakyProxy, moto: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []

    async def turn() -> None:
        turns.append(1)

    monkeypatch.setattr(rate, "turn", turn)
    flaky.rule = lambda request: "503" if request.number == 1 else None
    uri = f"s3://{moto.new_bucket()}/v.zarr"
    written(uri, **WHOLE)
    open_volume(uri).read(Box.of(SHAPE))
    assert len(turns) == len(flaky.seen) > 10


def test_the_rate_of_requests_is_limited() -> None:
    now = 100.0
    bucket = rate.TokenBucket(10, lambda: now)
    at_once = [bucket.delay() for _ in range(12)]
    assert at_once[:10] == pytest.approx([0] * 10, abs=1e-9), "what is saved up in a second goes at once"
    assert at_once[10:] == pytest.approx([0.1, 0.2])
    now += 60
    assert [bucket.delay() for _ in range(11)][-2:] == pytest.approx([0, 0.1], abs=1e-9), "no more is ever saved up"


def test_processes_share_the_limit_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(rate.VARIABLE, raising=False)
    assert rate.limit() is None
    monkeypatch.setenv(rate.VARIABLE, "90")
    assert rate.limit() == 90
    rate.share(3)
    try:
        assert rate.limit() == 30
    finally:
        rate.share(1)
    for wrong in ("fast", "0", "-1", "nan", "inf"):
        monkeypatch.setenv(rate.VARIABLE, wrong)
        with pytest.raises(InputError, match=f"VOLSEG_S3_RATE is '{wrong}'"):
            rate.limit()


# ---------------------------------------------------------------- the ledger


def test_a_ledger(bucket: str) -> None:
    mine = Ledger(files.join(bucket, "out.zarr"), "0123")
    assert mine.header() is None
    assert mine.create({"a": 1}) == mine.create({"a": 2}) == {"a": 1}
    assert mine.numerics({"n": 1}) == mine.numerics({"n": 2}) == {"n": 1}
    assert mine.take()
    assert not Ledger(files.join(bucket, "out.zarr"), "0123").take()
    receipts = {n: Receipt(n, {"0": "x"}, {"0/c/0/0/0": n}) for n in range(3)}
    for receipt in receipts.values():
        mine.add(receipt)
        mine.tick({}, force=True)
    found = Ledger(files.join(bucket, "out.zarr"), "0123").receipts()
    assert {receipt.index: receipt for receipt in found} == receipts
    mine.end({"status": "complete"})
    assert mine.report() == {"status": "complete"}
    assert Ledger(files.join(bucket, "out.zarr"), "0123").take()


def test_whose_attempt_was_replaced_stops(bucket: str) -> None:
    """What two drivers do to each other that start within milliseconds, on a server that ignores conditional puts."""
    mine = Ledger(files.join(bucket, "out.zarr"), "0123")
    assert mine.take()
    mine.tick({}, force=True)
    record = files.join(mine.path, "attempts", "00001.json")
    held = json.loads(files.read_bytes(record))
    files.write_bytes(record, json.dumps({**held, "pid": held["pid"] + 1}).encode())
    with pytest.raises(JobError, match="another process drives this job under the same number; this one stopped"):
        mine.tick({}, force=True)


def test_a_driver_bears_with_storage_until_it_counts_as_dead(
    flaky: FlakyProxy, moto: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = f"s3://{moto.new_bucket()}/out.zarr"
    mine = Ledger(output, "0123")
    assert mine.take()
    mine.add(Receipt(1, {}, {}))
    flaky.rule = lambda _: "503"
    mine.tick({})
    with pytest.raises(StorageUnavailableError):
        mine.tick({}, force=True)
    monkeypatch.setattr(ledger, "STALE_SECONDS", 0.0)
    with pytest.raises(StorageUnavailableError):
        mine.tick({})
    flaky.rule = lambda _: None
    mine.tick({})
    assert [receipt.index for receipt in Ledger(output, "0123").receipts()] == [1]
