"""Imports: what goes in comes out, memory does not grow with z, and bad input leaves nothing behind."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from volseg.errors import InputError, OutputExistsError, StorageFullError
from volseg.geometry import Box
from volseg.storage import volume as volume_module
from volseg.storage.describe import describe
from volseg.storage.importer import import_volume
from volseg.storage.layout import choose_layout
from volseg.storage.sources import natural_key
from volseg.storage.volume import open_volume

SHAPE = (11, 23, 31)


def voxels(shape: tuple[int, ...] = SHAPE, dtype: str = "uint16") -> NDArray[Any]:
    return np.random.default_rng(2).integers(0, 250, shape).astype(dtype)


def imported(source: Path, **options: Any) -> NDArray[Any]:
    target = source.parent / "out" / "v.zarr"
    import_volume(str(source), str(target), **options)
    assert [p.name for p in target.parent.iterdir()] == ["v.zarr"]
    volume = open_volume(str(target))
    assert volume.status == "complete"
    assert volume.all_written
    return volume.read(Box.of(volume.shape))


# ---------------------------------------------------------------- TIFF


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metadata": None},
        {"metadata": None, "compression": "zlib"},
        {"metadata": None, "compression": "lzw", "predictor": True},
        {"metadata": None, "byteorder": ">"},
        {"metadata": None, "byteorder": ">", "compression": "zlib"},
        {"metadata": None, "tile": (16, 16)},
        {"compression": "zlib"},
        {"bigtiff": True},
        {"imagej": True},
        {"ome": True},
        {"ome": True, "compression": "zlib"},
    ],
    ids=str,
)
def test_tiff_stack(tmp_path: Path, options: dict[str, Any]) -> None:
    data = voxels()
    tifffile.imwrite(tmp_path / "a.tif", data, **options)
    np.testing.assert_array_equal(imported(tmp_path / "a.tif", shards=(4, 64, 64), chunks=(4, 32, 32)), data[None])


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float32", "float64", "bool"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    data = voxels(dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", data, metadata=None)
    read = imported(tmp_path / "a.tif")
    assert read.dtype == data.dtype
    np.testing.assert_array_equal(read[0], data)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_hyperstack_with_channels(tmp_path: Path, compression: str | None) -> None:
    data = voxels((5, 2, 23, 31))
    if compression is None:
        tifffile.imwrite(tmp_path / "a.tif", data, imagej=True, metadata={"axes": "ZCYX"})
    else:
        tifffile.imwrite(tmp_path / "a.tif", data, ome=True, metadata={"axes": "ZCYX"}, compression=compression)
    np.testing.assert_array_equal(imported(tmp_path / "a.tif"), data.transpose(1, 0, 2, 3))


def test_channels_first_hyperstack(tmp_path: Path) -> None:
    data = voxels((2, 5, 23, 31))
    tifffile.imwrite(tmp_path / "a.tif", data, ome=True, metadata={"axes": "CZYX"}, compression="zlib")
    np.testing.assert_array_equal(imported(tmp_path / "a.tif"), data)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("options", [{"metadata": None}, {}, {"compression": "zlib", "metadata": None}])
def test_colours_become_channels(tmp_path: Path, planar: str, options: dict[str, Any]) -> None:
    data = voxels((5, 3, 23, 31), "uint8")
    stored = data if planar == "separate" else data.transpose(0, 2, 3, 1)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar, **options)
    np.testing.assert_array_equal(imported(tmp_path / "a.tif"), data.transpose(1, 0, 2, 3))


def test_transparency_is_dropped(tmp_path: Path) -> None:
    data = voxels((5, 23, 31, 4), "uint8")
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="rgb", extrasamples=["unassalpha"], metadata=None)
    np.testing.assert_array_equal(imported(tmp_path / "a.tif"), data[..., :3].transpose(3, 0, 1, 2))


def test_slices_written_one_by_one(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for plane in voxels():
            writer.write(plane, compression="zlib")
    np.testing.assert_array_equal(imported(tmp_path / "a.tif")[0], voxels())


def test_single_slice(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", voxels()[0])
    assert imported(tmp_path / "a.tif").shape == (1, 1, 23, 31)


# ---------------------------------------------------------------- folders and .npy


def test_folder_in_natural_order(tmp_path: Path) -> None:
    data = voxels((12, 9, 8), "uint8")
    (tmp_path / "s").mkdir()
    for k in range(12):
        tifffile.imwrite(tmp_path / "s" / f"Slice{k}.tif", data[k])
    (tmp_path / "s" / ".hidden").touch()
    (tmp_path / "s" / "notes.txt").touch()
    np.testing.assert_array_equal(imported(tmp_path / "s")[0], data)


def test_natural_key() -> None:
    names = ["b1", "a10", "a2", "A1", "a02b", "1", "10", "x", "a2-3", "a2-20"]
    assert sorted(names, key=natural_key) == ["1", "10", "A1", "a2", "a2-3", "a2-20", "a02b", "a10", "b1", "x"]


@pytest.mark.parametrize("kind", ["L", "I;16", "1", "RGB", "RGBA", "LA", "P", "RGB16"])
def test_png_slices(tmp_path: Path, kind: str) -> None:
    (tmp_path / "s").mkdir()
    shape = {"RGB": (9, 8, 3), "RGBA": (9, 8, 4), "LA": (9, 8, 2), "RGB16": (9, 8, 3)}.get(kind, (9, 8))
    data = voxels((3, *shape), "uint16" if "16" in kind else "bool" if kind == "1" else "uint8")
    for k in range(3):
        if kind == "RGB16":
            (tmp_path / "s" / f"{k}.png").write_bytes(imagecodecs.png_encode(data[k]))
        else:
            image = Image.fromarray(data[k] if kind != "P" else data[k] % 7)
            if kind == "P":
                image = image.convert("P")
                image.putpalette(list(range(30)))
            image.save(tmp_path / "s" / f"{k}.png")
    expected = data % 7 if kind == "P" else data
    planes = expected.reshape(3, 9, 8, -1).transpose(3, 0, 1, 2)
    read = imported(tmp_path / "s")
    assert read.dtype == data.dtype
    np.testing.assert_array_equal(read, planes[: {2: 1, 4: 3}.get(len(planes), len(planes))])


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path: Path, order: Any) -> None:
    data = np.asarray(voxels(dtype=">i4"), order=order)
    np.save(tmp_path / "a.npy", data)
    np.testing.assert_array_equal(imported(tmp_path / "a.npy", shards=(4, 32, 32), chunks=(4, 32, 32))[0], data)
    np.save(tmp_path / "c.npy", voxels((2, *SHAPE)))
    np.testing.assert_array_equal(imported(tmp_path / "c.npy", overwrite=True), voxels((2, *SHAPE)))


# ---------------------------------------------------------------- metadata, labels, layout


def test_metadata_and_summary(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", voxels())
    seen: list[tuple[int, int]] = []
    result = import_volume(
        str(tmp_path / "a.npy"), str(tmp_path / "v.zarr"), voxel_size=(0.1, 0.02, 0.02), unit="um",
        chunks=(4, 16, 16), progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    volume = open_volume(str(tmp_path / "v.zarr"))
    assert (volume.voxel_size, volume.unit, volume.is_labels) == ((0.1, 0.02, 0.02), "micrometer", False)
    assert (volume.chunks, volume.shards) == ((4, 16, 16), (12, 32, 32))
    assert volume.identity() == {"content": result["content"]}
    assert seen[-1] == (11, 11)
    assert (result["bytes_raw"], result["bytes_stored"] > 0, result["unit"]) == (11 * 23 * 31 * 2, True, "micrometer")


def test_content_digest_depends_on_voxels_not_on_storage_or_source(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", voxels())
    np.save(tmp_path / "b.npy", voxels() + np.uint16(1))
    tifffile.imwrite(tmp_path / "c.tif", voxels(), compression="zlib", byteorder=">")

    def content(source: str, **options: Any) -> str:
        result = import_volume(str(tmp_path / source), str(tmp_path / "v.zarr"), overwrite=True, **options)
        return str(result["content"])

    first = content("a.npy")
    assert first == content("a.npy", chunks=(2, 8, 8), shards=(2, 8, 8)) == content("c.tif")
    assert first != content("b.npy")


def test_labels(tmp_path: Path) -> None:
    data = voxels(dtype="uint8") % 3
    data[0, 0, 0] = 255
    tifffile.imwrite(tmp_path / "a.tif", data)
    names = ("matrix", "pore", "crack")
    np.testing.assert_array_equal(imported(tmp_path / "a.tif", labels=True, class_names=names)[0], data)
    target = tmp_path / "out/v.zarr"
    volume = open_volume(str(target))
    assert (volume.is_labels, volume.class_names) == (True, names)
    assert volume.attributes["volseg"]["label_values"] == [0, 1, 2, 255]
    np.save(tmp_path / "b.npy", data == 1)
    assert imported(tmp_path / "b.npy", labels=True, overwrite=True).dtype == np.uint8


def test_default_layout() -> None:
    assert choose_layout((512, 512, 512), 2) == ((64, 64, 64), (256, 256, 256))
    assert choose_layout((17, 768, 768), 2) == ((17, 128, 128), (17, 512, 512))
    assert choose_layout((1, 100, 2000), 1) == ((1, 100, 512), (1, 100, 2048))
    assert choose_layout((2000, 2048, 2048), 2) == ((32, 64, 64), (32, 256, 256))
    assert choose_layout((2000, 16384, 16384), 2)[0][0] == 8
    assert choose_layout((100, 100, 100), 1, None, (96, 128, 50)) == ((48, 64, 50), (96, 128, 50))
    assert choose_layout((100, 100, 100), 1, (32, 32, 32), None) == ((32, 32, 32), (128, 128, 128))


@pytest.mark.parametrize("kind", ["tiff", "mapped tiff", "npy", "slices"])
def test_peak_memory_does_not_grow_with_the_volume(tmp_path: Path, kind: str) -> None:
    def peak(depth: int) -> int:
        data = np.zeros((depth, 256, 256), np.uint8)
        path = tmp_path / f"{depth}{'.npy' if kind == 'npy' else '.tif' if 'tiff' in kind else ''}"
        if kind == "npy":
            np.save(path, data)
        elif kind == "slices":
            path.mkdir()
            for k in range(depth):
                Image.fromarray(data[k]).save(path / f"{k}.png")
        else:
            tifffile.imwrite(path, data, compression="zlib" if kind == "tiff" else None, metadata=None)
        del data
        tracemalloc.start()
        import_volume(str(path), str(tmp_path / "v.zarr"), chunks=(8, 64, 64), shards=(8, 256, 256), overwrite=True)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(8)
    small = peak(16)
    assert peak(96) < small + 1.5e6, "80 more slices are 5.2 MB"


# ---------------------------------------------------------------- bad input


def stack(path: Path, **options: Any) -> Path:
    tifffile.imwrite(path, voxels(), **options)
    return path


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def mixed_pages(path: Path) -> Path:
    with tifffile.TiffWriter(path) as writer:
        for height in (20, 20, 19):
            writer.write(np.zeros((height, 30), np.uint8), metadata=None, contiguous=False)
    return path


def several_images(path: Path) -> Path:
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(voxels())
        writer.write(voxels((4, 5, 6)))
    return path


def folder(path: Path, *slices: NDArray[Any], suffix: str = ".png") -> Path:
    path.mkdir()
    for k, data in enumerate(slices):
        if suffix == ".png":
            Image.fromarray(data).save(path / f"s{k}.png")
        else:
            tifffile.imwrite(path / f"s{k}.tif", data)
    return path


def damaged_png(path: Path) -> Path:
    folder(path, *voxels(dtype="uint8"))
    cut(path / "s3.png", 0.6)
    return path


def both_kinds(path: Path) -> Path:
    folder(path, *voxels(dtype="uint8"))
    tifffile.imwrite(path / "s3.tif", voxels()[0])
    return path


def stack_in_folder(path: Path) -> Path:
    folder(path, suffix=".tif")
    return stack(path / "a.tif").parent


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def saved(path: Path, data: Any) -> Path:
    np.save(path, data, allow_pickle=True)
    return path


ZEROS = np.zeros((8, 9), np.uint8)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda p: p / "nowhere.tif", {}, "nothing at .*nowhere.tif"),
        (lambda p: written(p / "a.tif", b"not a tiff at all"), {}, "a.tif is no TIFF"),
        (lambda p: written(p / "a.tif", b""), {}, "a.tif is no TIFF"),
        (lambda p: written(p / "a.jpg", b""), {}, "suffix '.jpg'"),
        (lambda p: cut(stack(p / "a.tif"), 0.6), {}, "a.tif is truncated"),
        (lambda p: cut(stack(p / "a.tif", metadata=None), 0.6), {}, "header of page 1"),
        (lambda p: cut(stack(p / "a.tif", imagej=True), 0.6), {}, "truncated"),
        (lambda p: cut(stack(p / "a.tif", metadata=None, compression="zlib"), 0.7), {}, "page [0-9]+ "),
        (lambda p: cut(stack(p / "a.tif", metadata=None, compression="lzw"), 0.9), {}, "page [0-9]+ "),
        (lambda p: mixed_pages(p / "a.tif"), {}, "page 2 is 19x30 uint8, page 0 is 20x30 uint8"),
        (lambda p: stack(p / "a.tif"), {"voxel_size": (1, 0, 1)}, "voxel size 1,0,1"),
        (lambda p: stack(p / "a.tif"), {"voxel_size": (1, 1, 1), "unit": "micrometre"}, "did you mean 'micrometer'"),
        (lambda p: stack(p / "a.tif"), {"unit": "nanometer"}, "without a voxel size"),
        (lambda p: stack(p / "a.tif"), {"chunks": (4, 4, 4), "shards": (6, 8, 8)}, "no multiple of chunks"),
        (lambda p: stack(p / "a.tif"), {"chunks": (0, 4, 4)}, "at least 1"),
        (lambda p: folder(p / "s"), {}, "holds no TIFF or PNG slices"),
        (lambda p: folder(p / "s", ZEROS, ZEROS, ZEROS[:4]), {}, "s2.png is 4x9 uint8, s0.png is 8x9 uint8"),
        (lambda p: folder(p / "s", ZEROS, ZEROS[:, :5], suffix=".tif"), {}, "s1.tif is 8x5 uint8, s0.tif is 8x9"),
        (lambda p: folder(p / "s", ZEROS, ZEROS.astype("u2")), {}, "s1.png is 8x9 uint16, s0.png is 8x9 uint8"),
        (lambda p: damaged_png(p / "s"), {}, "s3.png cannot be read"),
        (lambda p: both_kinds(p / "s"), {}, "holds both"),
        (lambda p: stack_in_folder(p / "s"), {}, "11 pages"),
        (lambda p: cut(saved(p / "a.npy", voxels()), 0.5), {}, "truncated"),
        (lambda p: saved(p / "a.npy", np.array([None, {}])), {}, "holds objects"),
        (lambda p: saved(p / "a.npy", voxels((2, 2, 2, 2, 2))), {}, "5 axes"),
        (lambda p: saved(p / "a.npy", voxels().astype("c8")), {}, "complex64"),
        (lambda p: saved(p / "a.npy", voxels(dtype="f4")), {"labels": True}, "holds float32, labels are one integer"),
        (lambda p: saved(p / "a.npy", voxels((3, *SHAPE))), {"labels": True}, "3 channels, labels are one integer"),
        (lambda p: saved(p / "a.npy", voxels(dtype="i2") - np.int16(1)), {"labels": True}, "slice 0 holds label -1"),
        (lambda p: saved(p / "a.npy", voxels()), {"labels": True, "class_names": ("a", "b")}, "2 class names"),
        (lambda p: several_images(p / "a.tif"), {}, "holds 2 images"),
    ],
)
def test_bad_input_is_one_clear_message_and_leaves_nothing(
    tmp_path: Path, make: Callable[[Path], Path], options: dict[str, Any], words: str
) -> None:
    source = make(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        import_volume(str(source), str(tmp_path / "out" / "v.zarr"), **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_two_stack_axes_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", voxels((2, *SHAPE)), imagej=True, metadata={"axes": "TZYX"})
    with pytest.raises(InputError, match="axes TZYX"):
        import_volume(str(tmp_path / "a.tif"), str(tmp_path / "v.zarr"))


def test_existing_output(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", voxels())
    np.save(tmp_path / "b.npy", voxels() + np.uint16(1))
    target = tmp_path / "v.zarr"
    import_volume(str(tmp_path / "a.npy"), str(target))
    with pytest.raises(OutputExistsError, match="--overwrite"):
        import_volume(str(tmp_path / "b.npy"), str(target))
    np.testing.assert_array_equal(open_volume(str(target)).read(Box.of(SHAPE))[0], voxels())
    import_volume(str(tmp_path / "b.npy"), str(target), overwrite=True)
    np.testing.assert_array_equal(open_volume(str(target)).read(Box.of(SHAPE))[0], voxels() + 1)
    (tmp_path / "precious").mkdir()
    with pytest.raises(OutputExistsError, match="is no Zarr"):
        import_volume(str(tmp_path / "b.npy"), str(tmp_path / "precious"), overwrite=True)


def test_failed_overwrite_keeps_the_old_volume(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", voxels())
    import_volume(str(tmp_path / "a.npy"), str(tmp_path / "v.zarr"))
    cut(stack(tmp_path / "b.tif", compression="zlib"), 0.7)
    with pytest.raises(InputError):
        import_volume(str(tmp_path / "b.tif"), str(tmp_path / "v.zarr"), overwrite=True)
    np.testing.assert_array_equal(open_volume(str(tmp_path / "v.zarr")).read(Box.of(SHAPE))[0], voxels())


def test_disk_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", voxels())

    def full(*_: object) -> None:
        raise StorageFullError("no space left")

    monkeypatch.setattr(volume_module.ArrayWriter, "write", full)
    with pytest.raises(StorageFullError):
        import_volume(str(tmp_path / "a.npy"), str(tmp_path / "out" / "v.zarr"))
    assert not list((tmp_path / "out").iterdir())


def test_import_to_a_remote_place_says_incomplete_until_it_is_whole(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", voxels())
    states: list[str | None] = []
    target = "memory://imports/v.zarr"
    import_volume(
        str(tmp_path / "a.npy"), target, chunks=(4, 32, 32), shards=(4, 32, 32),
        progress=lambda *_: states.append(open_volume(target).status),
    )  # fmt: skip
    assert states == ["incomplete"] * 3
    assert open_volume(target).status == "complete"


# ---------------------------------------------------------------- describe


def test_describe(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", voxels())
    target = tmp_path / "v.zarr"
    import_volume(str(tmp_path / "a.npy"), str(target), voxel_size=(2, 1, 1), unit="nanometer")
    info = describe(str(target))
    middle = voxels()[5]
    assert (info["shape"], info["dtype"], info["zarr_format"], info["ome_version"]) == (
        [11, 23, 31],
        "uint16",
        3,
        "0.5",
    )
    assert info["codecs"] == ["sharding_indexed", "bytes", "zstd", "crc32c"]
    assert (info["voxel_size"], info["unit"], info["size"]) == ([2.0, 1.0, 1.0], "nanometer", [22.0, 23.0, 31.0])
    assert (info["sample"]["min"], info["sample"]["max"]) == (int(middle.min()), int(middle.max()))
    assert (info["status"], info["labels"], info["bytes_raw"]) == ("complete", False, 11 * 23 * 31 * 2)
    stored = next((target / "0" / "c").rglob("0"))
    while stored.is_dir():
        stored = stored / "0"
    cut(stored, 0.5)
    assert "truncated or damaged" in describe(str(target))["sample"]["error"]


def test_describe_an_unfinished_output(tmp_path: Path) -> None:
    attributes = {"volseg": {"status": "incomplete", "all_chunks_written": True}}
    layout = volume_module.Layout(SHAPE, (8, 8, 8), None, np.dtype("uint8"))
    volume_module.create_array(str(tmp_path / "v"), layout, attributes)
    info = describe(str(tmp_path / "v"))
    assert (info["status"], info["sample"]["max"], info["shards"]) == ("incomplete", 0, None)
