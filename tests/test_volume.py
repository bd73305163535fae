"""Volumes: every way of storing one reads the same, and every way of damaging one is an error that names the chunk."""

import errno
import json
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from volseg.errors import BlockError, CorruptChunkError, StorageDeniedError, StorageFullError, VolumeError
from volseg.geometry import Box
from volseg.storage import arrays, ome
from volseg.storage.volume import ArrayWriter, Layout, Volume, create_array, open_volume, set_status

SHAPE = (20, 33, 17)
U8 = np.dtype("uint8")


def voxels(shape: tuple[int, ...] = SHAPE, dtype: str = "uint8") -> NDArray[Any]:
    return np.random.default_rng(1).integers(1, 250, shape).astype(dtype)


def whole(volume: Volume) -> NDArray[Any]:
    return volume.read(Box.of(volume.shape))


def written(path: Path, *, status: str = "complete", shards: tuple[int, int, int] | None = (16, 16, 16)) -> ArrayWriter:
    marks = {"status": status, "all_chunks_written": True}
    attributes = ome.group_attributes("zyx", voxel_size=(2, 1, 1), unit="micrometer", name="test", volseg=marks)
    writer = create_array(str(path), Layout(SHAPE, (8, 8, 8), shards, U8), attributes)
    writer.write(Box.of(SHAPE), voxels())
    return writer


# ---------------------------------------------------------------- reading what others wrote


@pytest.mark.parametrize("codec", [None, numcodecs.Zstd(3), numcodecs.Blosc("lz4"), numcodecs.GZip(1)])
@pytest.mark.parametrize("dtype", ["uint8", ">u2", "float32", "bool"])
def test_reads_zarr_v2(tmp_path: Path, codec: Any, dtype: str) -> None:
    data = voxels(dtype=dtype)
    array = zarr.create_array(
        tmp_path / "a", shape=SHAPE, chunks=(7, 16, 16), dtype=data.dtype, zarr_format=2, compressors=codec
    )
    array[:] = data
    volume = open_volume(str(tmp_path / "a"))
    assert (volume.shape, volume.chunks, volume.shards, volume.channels) == (SHAPE, (7, 16, 16), None, None)
    assert volume.dtype.isnative
    box = Box((3, 5, 0), (20, 33, 9))
    part = volume.read(box)
    np.testing.assert_array_equal(part[0], data[box.slices])
    assert part.flags.c_contiguous
    assert part.dtype == volume.dtype


def test_reads_v3_with_and_without_shards_and_fortran_order(tmp_path: Path) -> None:
    data = voxels(dtype="uint16")
    for name, shards in (("plain", None), ("sharded", (16, 32, 16))):
        array = zarr.create_array(tmp_path / name, shape=SHAPE, chunks=(8, 8, 8), shards=shards, dtype="uint16")
        array[:] = data
        volume = open_volume(str(tmp_path / name))
        assert volume.shards == shards
        np.testing.assert_array_equal(whole(volume)[0], data)
    array = zarr.create_array(tmp_path / "f", shape=SHAPE, chunks=SHAPE, dtype="uint16", zarr_format=2, order="F")
    array[:] = data
    read = whole(open_volume(str(tmp_path / "f")))
    np.testing.assert_array_equal(read[0], data)
    assert read.flags.c_contiguous


@pytest.mark.parametrize(
    ("axes", "shape", "channels"),
    [("czyx", (3, 6, 7, 8), 3), ("zyxc", (6, 7, 8, 2), 2), ("tczyx", (1, 2, 6, 7, 8), 2), ("tzyx", (1, 6, 7, 8), None)],
)
def test_channel_axis_from_ome(tmp_path: Path, axes: str, shape: tuple[int, ...], channels: int | None) -> None:
    data = voxels(shape)
    group = zarr.create_group(tmp_path / "g", zarr_format=2)
    group.create_array("s0", shape=shape, chunks=tuple(min(4, s) for s in shape), dtype="uint8")[:] = data
    kinds = {"c": "channel", "t": "time"}
    group.attrs["multiscales"] = [
        {
            "version": "0.4",
            "axes": [{"name": a, "type": kinds.get(a, "space"), "unit": "nanometer"} for a in axes],
            "datasets": [{"path": "s0", "coordinateTransformations": [{"type": "scale", "scale": [2.0] * len(shape)}]}],
        }
    ]
    volume = open_volume(str(tmp_path / "g"))
    assert (volume.shape, volume.channels, volume.voxel_size, volume.unit) == (
        (6, 7, 8), channels, (2.0, 2.0, 2.0), "nanometer",
    )  # fmt: skip
    order = [axes.index(a) for a in "tczyx" if a in axes]
    np.testing.assert_array_equal(whole(volume), data.transpose(order).reshape(channels or 1, 6, 7, 8))
    direct = open_volume(str(tmp_path / "g" / "s0"))
    assert (direct.channels, direct.voxel_size) == (channels, (2.0, 2.0, 2.0))


def test_four_axes_without_names_are_channels_first(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a", shape=(2, 4, 5, 6), chunks=(1, 4, 4, 4), dtype="uint8")
    volume = open_volume(str(tmp_path / "a"))
    assert (volume.channels, volume.shape) == (2, (4, 5, 6))
    assert whole(volume).shape == (2, 4, 5, 6)


def test_group_with_one_array(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "g").create_array("data", shape=SHAPE, chunks=(8, 8, 8), dtype="uint8")
    assert open_volume(str(tmp_path / "g")).array_uri.endswith("/g/data")


def test_fsspec_uri() -> None:
    writer = create_array("memory://volumes/a", Layout(SHAPE, (8, 8, 8), (16, 16, 16), U8), {})
    sizes = writer.write(Box.of(SHAPE), voxels())
    np.testing.assert_array_equal(whole(open_volume("memory://volumes/a"))[0], voxels())
    assert writer.object_sizes(Box.of(SHAPE)) == sizes


# ---------------------------------------------------------------- what is no volume


def make_pair(path: Path) -> None:
    group = zarr.create_group(path)
    for name in ("left", "right"):
        group.create_array(name, shape=SHAPE, chunks=(8, 8, 8), dtype="uint8")


def edit(path: Path, **values: Any) -> None:
    zarr.create_array(path, shape=SHAPE, chunks=(8, 8, 8), dtype="uint8")
    document = path / "zarr.json"
    document.write_text(json.dumps(json.loads(document.read_text()) | values))


def grid(*sides: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(sides)}}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "nothing at .* check the path"),
        (lambda p: p.mkdir(), "not a Zarr .* 'volseg import'"),
        (lambda p: p.write_bytes(b"II*"), "not a Zarr"),
        (make_pair, "2 arrays .* left, right"),
        (zarr.create_group, "no array"),
        (lambda p: zarr.create_array(p, shape=(5, 5), chunks=(5, 5), dtype="u1"), "2 axes, shape .5, 5."),
        (lambda p: zarr.create_array(p, shape=SHAPE, chunks=SHAPE, dtype="c8"), "complex64: only bool"),
        (lambda p: edit(p, shape=[2**40, 2**40, 4]), "sides must be"),
        (lambda p: edit(p, shape=[4, 0, 4]), "sides must be"),
        (lambda p: edit(p, chunk_grid=grid(2048, 2048, 1024)), "4.0 GiB decoded"),
        (lambda p: edit(p, chunk_grid={"name": "rectilinear"}), "chunk grid 'rectilinear'"),
        (lambda p: edit(p, codecs=[{"name": "bytes"}, {"name": "brotli-of-tomorrow"}]), "codec that is not installed"),
        (lambda p: edit(p, node_type="table"), "node_type 'table'"),
        (lambda p: (p.mkdir(), (p / "zarr.json").write_text("{")), "zarr.json is damaged"),
    ],
)
def test_refused_with_one_clear_message(tmp_path: Path, make: Callable[[Path], Any], words: str) -> None:
    make(tmp_path / "v")
    with pytest.raises(VolumeError, match=words) as caught:
        open_volume(str(tmp_path / "v"))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_time_series_is_refused(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a", shape=(3, 4, 4, 4), chunks=(1, 4, 4, 4), dtype="u1", dimension_names=list("tzyx"))
    with pytest.raises(VolumeError, match="t of size 3"):
        open_volume(str(tmp_path / "a"))


# ---------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("zarrs", [True, False])
@pytest.mark.parametrize("shards", [(16, 16, 16), None])
@pytest.mark.parametrize("damage", [truncate, flip, lambda p: p.write_bytes(b"")])
def test_damaged_chunk_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    shards: tuple[int, int, int] | None,
    zarrs: bool,
) -> None:
    if not zarrs:
        monkeypatch.setattr(arrays, "ZARRS", arrays.PLAIN)
    written(tmp_path / "v", shards=shards)
    damage(tmp_path / "v/0/c/1/0/1")
    volume = open_volume(str(tmp_path / "v"))
    with pytest.raises(CorruptChunkError, match=r"chunk c/1/0/1 of .*v/0 .* truncated or damaged; restore it"):
        whole(volume)
    np.testing.assert_array_equal(volume.read(Box((0, 0, 0), (8, 8, 8)))[0], voxels()[:8, :8, :8])


def test_truncated_chunk_of_v2_without_checksum(tmp_path: Path) -> None:
    array = zarr.create_array(
        tmp_path / "a", shape=SHAPE, chunks=(8, 8, 8), dtype="u1", zarr_format=2, compressors=None
    )
    array[:] = voxels()
    truncate(tmp_path / "a" / "1.2.0")
    with pytest.raises(CorruptChunkError, match=r"chunk 1\.2\.0 .*256 bytes"):
        whole(open_volume(str(tmp_path / "a")))


def test_absent_chunk_is_an_error_where_all_were_written(tmp_path: Path) -> None:
    written(tmp_path / "v")
    (tmp_path / "v/0/c/0/2/1").unlink()
    volume = open_volume(str(tmp_path / "v"))
    assert volume.all_written
    with pytest.raises(CorruptChunkError, match=r"chunk c/0/2/1 .* is absent"):
        whole(volume)
    volume.read(Box((0, 0, 0), (20, 32, 17)))


def test_absent_chunks_are_fill_values_and_counted_once_elsewhere(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a", shape=(8, 32, 32), chunks=(8, 8, 8), dtype="u1", fill_value=7)
    array[:, 8:16, 8:16] = 1
    volume = open_volume(str(tmp_path / "a"))
    assert not volume.all_written
    assert (whole(volume) == 7).sum() == 8 * (32 * 32 - 64)
    assert volume.absent_chunks(Box.of(volume.shape)) == 15
    region = Box((0, 4, 0), (8, 32, 32))
    blocks = [Box((0, y, x), (8, y + 14, x + 16)) for y in (4, 18) for x in (0, 16)]
    halos = [Box((0, max(b.start[1] - 6, 0), 0), (8, min(b.stop[1] + 6, 32), 32)) for b in blocks]
    counts = [volume.absent_chunks(h, b, region) for h, b in zip(halos, blocks, strict=True)]
    assert sum(counts) == 15
    assert sum(volume.absent_chunks(h) for h in halos) > 15


def test_unreadable_chunk_stops_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "v")
    volume = open_volume(str(tmp_path / "v"))

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(arrays.StoredArray, "_read", refuse)
    with pytest.raises(StorageDeniedError, match="permission to read chunk c/0/0/0"):
        whole(volume)


def test_a_failure_that_does_not_repeat_is_retryable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "v")
    volume = open_volume(str(tmp_path / "v"))
    original, calls = arrays.StoredArray._read, []

    def once(self: arrays.StoredArray, box: Box, dtype: np.dtype[Any]) -> NDArray[Any]:
        calls.append(box)
        if len(calls) == 1:
            raise RuntimeError("busy")
        return original(self, box, dtype)

    monkeypatch.setattr(arrays.StoredArray, "_read", once)
    with pytest.raises(BlockError, match=r"busy.*can be tried again") as caught:
        whole(volume)
    assert caught.value.retryable


def test_box_outside(tmp_path: Path) -> None:
    written(tmp_path / "v")
    with pytest.raises(ValueError, match="not inside"):
        open_volume(str(tmp_path / "v")).read(Box((0, 0, 0), (21, 33, 17)))


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("shards", [(16, 16, 16), None])
def test_written_by_blocks_reads_back(
    tmp_path: Path, channels: int | None, shards: tuple[int, int, int] | None
) -> None:
    data = voxels((channels or 1, *SHAPE), "uint16")
    data[:, :16, :16, :16] = 0
    create_array(str(tmp_path / "v"), Layout(SHAPE, (8, 8, 8), shards, np.dtype("uint16"), channels), {})
    sizes: dict[str, int] = {}
    for box in Box.of(SHAPE).tiles((16, 32, 16)):
        writer = ArrayWriter(str(tmp_path / "v/0"))
        sizes |= writer.write(box, data[(slice(None), *box.slices)])
    volume = open_volume(str(tmp_path / "v"))
    np.testing.assert_array_equal(whole(volume), data)
    stored = {
        str(p.relative_to(tmp_path / "v/0")): p.stat().st_size for p in (tmp_path / "v/0/c").rglob("*") if p.is_file()
    }
    assert sizes == stored == writer.object_sizes(Box.of(SHAPE))
    assert volume.absent_chunks(Box.of(SHAPE)) == 0, "chunks that hold only fill values are written, too"
    plain = np.asarray(zarr.open_array(tmp_path / "v/0", mode="r")[:])
    np.testing.assert_array_equal(plain.reshape(data.shape), data)


def test_one_object_holds_all_channels_of_a_shard(tmp_path: Path) -> None:
    writer = create_array(str(tmp_path / "v"), Layout((8, 8, 8), (8, 8, 8), (8, 8, 8), U8, 5), {})
    assert list(writer.write(Box.of((8, 8, 8)), voxels((5, 8, 8, 8)))) == ["c/0/0/0/0"]


@pytest.mark.parametrize(
    "box", [Box((0, 0, 0), (8, 16, 16)), Box((8, 0, 0), (20, 33, 17)), Box((0, 0, 0), (32, 48, 32))]
)
def test_unaligned_write_names_the_race(tmp_path: Path, box: Box) -> None:
    writer = written(tmp_path / "v")
    with pytest.raises(ValueError, match="another writer of the same shard would overwrite"):
        writer.write(box, np.zeros(box.shape, np.uint8))


def test_wrong_data_are_refused(tmp_path: Path) -> None:
    writer = written(tmp_path / "v")
    box = Box((0, 0, 0), (16, 16, 16))
    with pytest.raises(ValueError, match="do not fill"):
        writer.write(box, np.zeros((16, 16, 15), np.uint8))
    with pytest.raises(ValueError, match="data are uint16"):
        writer.write(box, np.zeros(box.shape, np.uint16))


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_shard_at_the_edge_can_be_replaced(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    writer = written(tmp_path / "v")
    damage(tmp_path / "v/0/c/1/2/1")
    box = Box((16, 32, 16), SHAPE)
    writer.write(box, voxels()[box.slices])
    np.testing.assert_array_equal(whole(writer.volume)[0], voxels())


def test_the_same_voxels_give_the_same_bytes(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a"), written(tmp_path / "b")
    keys = a.object_sizes(Box.of(SHAPE))
    assert keys == b.object_sizes(Box.of(SHAPE))
    assert all((tmp_path / "a/0" / k).read_bytes() == (tmp_path / "b/0" / k).read_bytes() for k in keys)


@pytest.mark.parametrize(("code", "expected"), [(errno.ENOSPC, StorageFullError), (errno.EACCES, StorageDeniedError)])
def test_storage_failures_stop_the_job_and_leave_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception]
) -> None:
    writer = written(tmp_path / "v")
    before = sorted(p.name for p in (tmp_path / "v/0/c/0/0").iterdir())

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(expected):
        writer.write(Box.of(SHAPE), voxels())
    assert sorted(p.name for p in (tmp_path / "v/0/c/0/0").iterdir()) == before


def test_layout_is_checked() -> None:
    with pytest.raises(VolumeError, match="no multiple of chunks"):
        Layout(SHAPE, (8, 8, 8), (16, 12, 16), U8)
    with pytest.raises(VolumeError, match="at least 1"):
        Layout((0, 4, 4), (8, 8, 8), None, U8)
    with pytest.raises(VolumeError, match="at most 2 GiB"):
        Layout((4096,) * 3, (2048,) * 3, None, U8)


# ---------------------------------------------------------------- identity, status, threads


def test_status_and_all_written(tmp_path: Path) -> None:
    written(tmp_path / "v", status="incomplete")
    assert not open_volume(str(tmp_path / "v")).all_written
    set_status(str(tmp_path / "v"), {"volseg": {"status": "complete"}, "note": 1})
    volume = open_volume(str(tmp_path / "v"))
    assert volume.all_written
    assert (volume.status, volume.attributes["note"], volume.voxel_size) == ("complete", 1, (2.0, 1.0, 1.0))


def test_identity_follows_the_content_digest_else_the_place(tmp_path: Path) -> None:
    written(tmp_path / "a")
    written(tmp_path / "b")
    first, second = (open_volume(str(tmp_path / n)).identity() for n in "ab")
    assert first != second
    for name in "ab":
        set_status(str(tmp_path / name), {"volseg": {"content": "sha256:1"}})
    assert open_volume(str(tmp_path / "a")).identity() == {"content": "sha256:1"}
    assert open_volume(str(tmp_path / "a")).identity() == open_volume(str(tmp_path / "b")).identity()


def test_many_threads_open_and_read(tmp_path: Path) -> None:
    written(tmp_path / "v")
    shared = open_volume(str(tmp_path / "v"))
    before = zarr.config.get("codec_pipeline.path")

    def work(i: int) -> bool:
        box = Box((i % 12, i % 20, i % 9), SHAPE)
        own = open_volume(str(tmp_path / "v"))
        return bool((own.read(box)[0] == voxels()[box.slices]).all() and (shared.read(box) == own.read(box)).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))
    assert zarr.config.get("codec_pipeline.path") == before, "the user's zarr configuration is left alone"


def test_pickles_by_uri(tmp_path: Path) -> None:
    written(tmp_path / "v")
    np.testing.assert_array_equal(whole(pickle.loads(pickle.dumps(open_volume(str(tmp_path / "v")))))[0], voxels())
