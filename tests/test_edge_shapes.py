"""Volumes that are thin, small, odd, foreign: all work, and every output is valid OME-Zarr 0.5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from ome_zarr_models.v05 import Image
from ome_zarr_models.v05.image_label import ImageLabel

from tests.support import Case, labels_of, make_bundle, probabilities_of, segment, smooth, store
from volseg import api
from volseg.geometry import Triple
from volseg.intensity import Scaling
from volseg.storage.importer import import_volume
from volseg.storage.volume import open_volume


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "3d": make_bundle(folder / "3d", patch=(16, 8, 12)),
        "2d": make_bundle(folder / "2d", dims=2, classes=2, patch=(1, 16, 12)),
        "colour": make_bundle(folder / "colour", channels=3, patch=(8, 8, 8)),
    }


def checked(case: Case, output: Path, **options: Any) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Segment; the output is whole, valid OME-Zarr, verified, and covers the input."""
    report = segment(case, output, probabilities=True, **options)
    assert report["status"] == "complete"
    volume = open_volume(case.image)
    for folder, kind, axes in ((output, ImageLabel, "zyx"), (output / "probabilities", Image, "czyx")):
        group = kind.from_zarr(zarr.open_group(str(folder), mode="r"))
        (scale,) = group.ome_attributes.multiscales
        assert [axis.name for axis in scale.axes] == list(axes)
        assert [dataset.path for dataset in scale.datasets] == ["0"]
    assert api.verify(str(output), deep=True)["status"] == "verified"
    labels, probabilities = labels_of(output), probabilities_of(output)
    assert labels.shape == probabilities.shape[1:] == volume.shape
    won = np.take_along_axis(probabilities, labels[None].astype(int), axis=0)[0]
    assert (won.astype(int) >= probabilities.max(axis=0) - 1).all()
    assert sum(c["voxels"] for c in report["classes"]) == labels.size
    # Every chunk is stored, the empty ones, too: a missing one can be told from background.
    for array in ("0", "probabilities/0"):
        stored = zarr.open_array(f"{output}/{array}", mode="r")
        assert stored.nchunks_initialized == stored.nchunks
    return labels, probabilities


SHAPES: list[Triple] = [
    (1, 1, 1), (1, 30, 30), (30, 1, 30), (30, 30, 1), (1, 1, 40), (40, 1, 1), (2, 3, 5), (15, 7, 11), (16, 8, 12),
    (17, 9, 13), (19, 25, 29), (7, 50, 3),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("model", ["3d", "2d"])
def test_shapes(bundles: dict[str, str], tmp_path: Path, shape: Triple, model: str) -> None:
    case = Case(store(tmp_path / "image.zarr", smooth(shape, seed=sum(shape))), bundles[model], tmp_path)
    found = checked(case, tmp_path / "a.zarr", overlap=0.5)
    again = checked(case, tmp_path / "b.zarr", overlap=0.5, block="13,9,17")
    for first, second in zip(found, again, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("model", ["3d", "2d"])
def test_smaller_than_the_patch_is_replicated_on_the_high_side(
    bundles: dict[str, str], tmp_path: Path, model: str
) -> None:
    """Equal to the low corner of a volume that was padded by hand, of the same patch."""
    patch = "16,8,12" if model == "3d" else "1,16,12"
    sides: Triple = (11, 5, 7) if model == "3d" else (3, 9, 5)
    small = smooth(sides, seed=8)
    target = [int(n) for n in patch.split(",")]
    whole = np.pad(small, [(0, max(0, t - s)) for t, s in zip(target, sides, strict=True)], mode="edge")
    a = Case(store(tmp_path / "small.zarr", small), bundles[model], tmp_path)
    b = Case(store(tmp_path / "whole.zarr", whole), bundles[model], tmp_path)
    low = tuple(slice(n) for n in sides)
    for first, second in zip(
        checked(a, tmp_path / "a.zarr", patch=patch), checked(b, tmp_path / "b.zarr", patch=patch), strict=True
    ):
        np.testing.assert_array_equal(first, second[..., low[0], low[1], low[2]])


def test_patch_of_the_bundle_shrinks_to_a_small_volume(bundles: dict[str, str], tmp_path: Path) -> None:
    """The patch is clipped to the volume, rounded up to the pooling factor: what lies beyond would only cost time."""
    case = Case(store(tmp_path / "small.zarr", smooth((7, 5, 30), seed=8)), bundles["3d"], tmp_path)
    planned = api.plan(case.image, str(tmp_path / "out.zarr"), model=case.bundle, executor="serial")
    assert planned["patch"] == (8, 6, 12)
    found = checked(case, tmp_path / "a.zarr")
    for first, second in zip(found, checked(case, tmp_path / "b.zarr", patch="8,6,12"), strict=True):
        np.testing.assert_array_equal(first, second)


# ---------------------------------------------------------------- dtypes: the same values give the same bits


@pytest.fixture(scope="module")
def plain(bundles: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> NDArray[Any]:
    folder = tmp_path_factory.mktemp("plain")
    case = Case(store(folder / "image.zarr", VALUES), bundles["3d"], folder)
    return checked(case, folder / "out.zarr")[1]


VALUES = smooth((13, 7, 11), seed=6, high=120).astype("uint8")


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "uint16", "uint32", "int32", "int64", "uint64", "float16", "float32", "float64"]
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_dtypes(bundles: dict[str, str], plain: NDArray[Any], tmp_path: Path, dtype: str, order: str) -> None:
    """Also where patches leave the volume on every axis."""
    path = store(tmp_path / "image.zarr", VALUES, order + np.dtype(dtype).str[1:])
    assert open_volume(path).dtype == np.dtype(dtype)
    found = checked(Case(path, bundles["3d"], tmp_path), tmp_path / "out.zarr")[1]
    np.testing.assert_array_equal(found, plain)


def test_bool(bundles: dict[str, str], tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", scaling=Scaling(low=(0,), high=(1,), mean=(0.5,), std=(0.3,)))
    mask = smooth((14, 9, 21), seed=6) > 120
    first, second = (
        checked(Case(store(tmp_path / f"{t}.zarr", mask, t), bundle, tmp_path), tmp_path / f"{t}-out.zarr")[1]
        for t in ("bool", "uint8")
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nan_fill(bundles: dict[str, str], tmp_path: Path, dtype: str) -> None:
    image = VALUES.astype(dtype)
    image[-1, -1, -1] = np.inf
    image[3, 2, 1] = np.nan
    case = Case(store(tmp_path / "image.zarr", image, dtype), bundles["3d"], tmp_path)
    report = segment(case, tmp_path / "out.zarr", nan="fill")
    assert report["nonfinite_filled"] == 2
    image[~np.isfinite(image)] = 0
    other = Case(store(tmp_path / "zero.zarr", image, dtype), bundles["3d"], tmp_path)
    segment(other, tmp_path / "zero-out.zarr")
    np.testing.assert_array_equal(labels_of(tmp_path / "out.zarr"), labels_of(tmp_path / "zero-out.zarr"))


# ---------------------------------------------------------------- where it lies


@pytest.mark.parametrize(
    "options",
    [
        {"zarr_format": 2},
        {"zarr_format": 2, "chunks": (5, 9, 4), "order": "F"},
        {"zarr_format": 2, "compressors": None},
        {"zarr_format": 3, "compressors": None},
        {"zarr_format": 3, "chunks": (7, 3, 7), "shards": (14, 9, 7)},
        {"zarr_format": 3, "chunks": (14, 9, 21), "dimension_names": ("z", "y", "x")},
    ],
    ids=str,
)
def test_storage_of_the_input(
    bundles: dict[str, str], plain: NDArray[Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    case = Case(store(tmp_path / "image.zarr", VALUES, **options), bundles["3d"], tmp_path)
    np.testing.assert_array_equal(checked(case, tmp_path / "out.zarr")[1], plain)


def test_one_channel_and_none_are_the_same(bundles: dict[str, str], plain: NDArray[Any], tmp_path: Path) -> None:
    case = Case(store(tmp_path / "image.zarr", VALUES[None]), bundles["3d"], tmp_path)
    np.testing.assert_array_equal(checked(case, tmp_path / "out.zarr")[1], plain)


def test_channels(bundles: dict[str, str], tmp_path: Path) -> None:
    image = np.stack([smooth((9, 18, 11), seed=s) for s in range(3)])
    found = []
    for name, options in (
        ("first", {"chunks": (1, 8, 8, 8)}),
        ("all", {"chunks": (3, 9, 9, 11)}),
        ("v2", {"chunks": (2, 5, 18, 8), "zarr_format": 2}),
    ):
        case = Case(store(tmp_path / f"{name}.zarr", image, **options), bundles["colour"], tmp_path)
        found.append(checked(case, tmp_path / f"{name}-out.zarr", block="9,8,8" if name == "v2" else None)[1])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    swapped = Case(store(tmp_path / "swapped.zarr", image[[1, 0, 2]]), bundles["colour"], tmp_path)
    assert (checked(swapped, tmp_path / "swapped-out.zarr")[1] != found[0]).any()


def test_imported_volume_keeps_its_voxel_size(bundles: dict[str, str], plain: NDArray[Any], tmp_path: Path) -> None:
    np.save(tmp_path / "stack.npy", VALUES)
    import_volume(
        str(tmp_path / "stack.npy"), str(tmp_path / "image.zarr"), voxel_size=(0.1, 0.022, 0.03), unit="micrometer"
    )
    case = Case(str(tmp_path / "image.zarr"), bundles["3d"], tmp_path)
    np.testing.assert_array_equal(checked(case, tmp_path / "out.zarr")[1], plain)
    for name, scale in (("out.zarr", [0.1, 0.022, 0.03]), ("out.zarr/probabilities", [1.0, 0.1, 0.022, 0.03])):
        (described,) = json.loads((tmp_path / name / "zarr.json").read_text())["attributes"]["ome"]["multiscales"]
        assert described["datasets"][0]["coordinateTransformations"] == [{"type": "scale", "scale": scale}]
        assert {a["unit"] for a in described["axes"] if a["name"] != "c"} == {"micrometer"}
    label = json.loads((tmp_path / "out.zarr" / "zarr.json").read_text())["attributes"]["ome"]["image-label"]
    assert [p["name"] for p in label["properties"]] == ["class 0", "class 1", "class 2"]


def test_labels_are_a_volume_again(bundles: dict[str, str], tmp_path: Path) -> None:
    """The output is an input: of info, and of a job of its own."""
    case = Case(store(tmp_path / "image.zarr", VALUES), bundles["3d"], tmp_path)
    checked(case, tmp_path / "out.zarr")
    volume = open_volume(str(tmp_path / "out.zarr"))
    assert volume.is_labels
    assert volume.all_written
    assert volume.class_names == ("class 0", "class 1", "class 2")
    checked(Case(str(tmp_path / "out.zarr"), bundles["3d"], tmp_path), tmp_path / "again.zarr")
