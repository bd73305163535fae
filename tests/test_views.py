"""Unpadded networks, several axes, mirror images, ensembles: the right numbers, and bits that no layout changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

from tests.support import Case, labels_of, long, make_bundle, probabilities_of, segment, smooth, store
from volseg import api
from volseg.errors import InputError, OutputExistsError, PlanError
from volseg.geometry import Box, Triple
from volseg.models.bundle import load_networks

OVERLAP = 0.25
SHAPE = (11, 14, 9)
Bits = tuple[NDArray[Any], NDArray[np.uint8]]


@dataclass(frozen=True)
class Way:
    """A bundle, how it is used, and the same said plainly for the reference: slice axis and patch of every view."""

    network: dict[str, Any]
    options: dict[str, Any]
    views: Sequence[tuple[int | None, Triple]]
    mirror: bool = False


THREE_AXES = [(0, (1, 8, 6)), (1, (8, 1, 6)), (2, (8, 6, 1))]
# Two levels of two unpadded convolutions each lose 8 voxels on every side.
UNPADDED_2D = [(0, (1, 24, 22)), (1, (24, 1, 22)), (2, (24, 22, 1))]
WAYS = {
    "unpadded 3D": Way({"padded": False, "patch": (22, 20, 24)}, {}, [(None, (22, 20, 24))]),
    "unpadded 2D": Way({"padded": False, "dims": 2, "patch": (1, 24, 22)}, {}, UNPADDED_2D[:1]),
    "two axes": Way({"dims": 2, "patch": (1, 8, 6)}, {"axis": "z,x"}, [THREE_AXES[0], THREE_AXES[2]]),
    "three axes": Way({"dims": 2, "classes": 2, "patch": (1, 8, 6)}, {"axis": "z,y,x"}, THREE_AXES),
    "mirror 3D": Way({"patch": (8, 6, 8)}, {"mirror": True}, [(None, (8, 6, 8))], mirror=True),
    "mirror 2D": Way({"dims": 2, "patch": (1, 8, 6)}, {"mirror": True}, THREE_AXES[:1], mirror=True),
    "ensemble": Way({"members": 3, "patch": (8, 6, 8)}, {}, [(None, (8, 6, 8))]),
    "class bias": Way({"class_bias": (0.5, -1.0, 0.75), "patch": (8, 6, 8)}, {}, [(None, (8, 6, 8))]),
    "everything": Way(
        {"padded": False, "dims": 2, "members": 2, "class_bias": (0.5, -0.5, 0.0), "patch": (1, 24, 22)},
        {"axis": "z,x", "mirror": True},
        [UNPADDED_2D[0], UNPADDED_2D[2]],
        mirror=True,
    ),
}


def bits(case: Case, output: Path, **options: Any) -> Bits:
    report = segment(case, output, **{"overlap": OVERLAP, "probabilities": True, **options})
    assert report["status"] == "complete"
    return labels_of(output), probabilities_of(output)


def assert_same(a: Bits, b: Bits) -> None:
    for first, second in zip(a, b, strict=True):
        np.testing.assert_array_equal(first, second)


# ---------------------------------------------------------------- an independent reference


def mean_answer(case: Case, way: Way, patch: torch.Tensor) -> NDArray[np.float64]:
    """Average the class probabilities of one scaled patch over members and mirror images."""
    manifest, networks = load_networks(case.bundle)
    spatial = range(2, patch.ndim)
    flips = [[a for a, turned in zip(spatial, t, strict=True) if turned] for t in product((0, 1), repeat=len(spatial))]
    found = []
    for network, flip in product(networks, flips if way.mirror else [[]]):
        with torch.inference_mode():
            logits = torch.flip(network(torch.flip(patch, flip)), flip)[0].double()
        if manifest.class_bias is not None:
            logits = logits + torch.tensor(manifest.class_bias).view(-1, *[1] * (logits.ndim - 1))
        found.append(torch.softmax(logits, 0) if len(logits) > 1 else torch.sigmoid(torch.cat([-logits, logits])))
    mean: NDArray[np.float64] = torch.stack(found).mean(dim=0).numpy()
    return mean


def blended(case: Case, way: Way) -> NDArray[np.float64]:
    """Blend class probabilities (c, z, y, x) in float64 over the whole volume, view by view."""
    scaling = load_networks(case.bundle)[0].scaling
    raw = np.asarray(zarr.open_array(case.image, mode="r")[...], np.float64)
    scaled = (np.clip(raw, scaling.low[0], scaling.high[0]) - scaling.mean[0]) / scaling.std[0]
    views = []
    for flat, patch in way.views:
        # What the network answers tells its margin.
        sample = torch.zeros((1, 1, *(s for i, s in enumerate(patch) if i != flat)))
        sides = list(mean_answer(case, way, sample).shape[1:])
        if flat is not None:
            sides.insert(flat, 1)
        margin = [(p - a) // 2 for p, a in zip(patch, sides, strict=True)]
        padding = [(m, m + max(0, a - s)) for m, a, s in zip(margin, sides, raw.shape, strict=True)]
        padded = np.pad(scaled, padding, mode="edge")
        weight = np.ones(sides)
        for axis, side in enumerate(sides):
            line = np.maximum(np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / (side / 8)) ** 2), 1e-3)
            weight *= np.expand_dims(line, [a for a in range(3) if a != axis])
        total: Any = 0
        norm = np.zeros([s + a for s, a in zip(raw.shape, sides, strict=True)])
        origins = []
        for size, side in zip(raw.shape, sides, strict=True):
            last = max(0, size - side)
            origins.append(sorted({*range(0, last, max(1, round(side * (1 - OVERLAP)))), last}))
        for corner in product(*origins):
            x = padded[tuple(slice(o, o + p) for o, p in zip(corner, patch, strict=True))].astype(np.float32)
            squeezed = torch.from_numpy(x if flat is None else x.squeeze(flat))[None, None]
            chance = mean_answer(case, way, squeezed)
            if flat is not None:
                chance = np.expand_dims(chance, flat + 1)
            part = tuple(slice(o, o + a) for o, a in zip(corner, sides, strict=True))
            if isinstance(total, int):
                total = np.zeros((len(chance), *norm.shape))
            total[:, *part] += chance * weight
            norm[part] += weight
        inside = tuple(slice(n) for n in raw.shape)
        views.append(total[:, *inside] / norm[inside])
    result: NDArray[np.float64] = np.mean(views, axis=0)
    return result


def assert_close(found: Bits, expected: NDArray[np.float64]) -> None:
    labels, probabilities = found
    assert np.abs(probabilities - expected * 255).max() < 1
    second, first = np.sort(expected, axis=0)[-2:]
    # fp32 forwards of another memory layout differ in the last bits: only near-ties may fall the other way.
    clear = first - second > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(labels[clear], expected.argmax(axis=0)[clear])


@pytest.fixture(scope="module", params=WAYS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Way, Bits]:
    """Each way on one block that holds the whole volume."""
    folder, way = tmp_path_factory.mktemp("way"), WAYS[request.param]
    image = store(folder / "image.zarr", smooth(SHAPE, seed=3))
    case = Case(image, make_bundle(folder / "bundle", **way.network), folder)
    return case, way, bits(case, folder / "whole.zarr", block="11,14,9", **way.options)


Whole = tuple[Case, Way, Bits]


def test_the_answer_is_that_of_a_plain_loop(whole: Whole) -> None:
    case, way, found = whole
    assert len(np.unique(found[0])) > 1
    assert_close(found, blended(case, way))


@pytest.mark.parametrize("block", [long("6,8,5"), "11,5,9"])
def test_blocks_change_nothing(whole: Whole, tmp_path: Path, block: str) -> None:
    case, way, found = whole
    assert_same(bits(case, tmp_path / "out.zarr", block=block, **way.options), found)


@pytest.mark.parametrize("whole", ["unpadded 3D", "three axes", "mirror 2D"], indirect=True)
def test_places_in_a_batch_change_nothing(whole: Whole, tmp_path: Path) -> None:
    case, way, _ = whole
    first = bits(case, tmp_path / "a.zarr", block="11,14,9", batch=3, **way.options)
    assert_same(bits(case, tmp_path / "b.zarr", block="6,7,9", batch=3, **way.options), first)


@pytest.mark.parametrize("roi", ["3:10,5:13,2:7"])
def test_a_region_equals_the_crop(whole: Whole, tmp_path: Path, roi: str) -> None:
    case, way, found = whole
    labels, probabilities = bits(case, tmp_path / "out.zarr", roi=roi, block="6,8,5", **way.options)
    region = Box.parse(roi, SHAPE).slices
    np.testing.assert_array_equal(labels[region], found[0][region])
    np.testing.assert_array_equal(probabilities[:, *region], found[1][:, *region])
    labels[region] = 0
    assert not labels.any()


@pytest.mark.parametrize("whole", ["unpadded 2D", "three axes", "mirror 3D", "ensemble"], indirect=True)
def test_the_report_counts_what_the_plan_says(whole: Whole, tmp_path: Path) -> None:
    case, way, _ = whole
    options = {"model": case.bundle, "block": "6,8,5", "executor": "serial", **way.options}
    plan = api.plan(case.image, str(tmp_path / "out.zarr"), **options)
    report = api.segment(case.image, str(tmp_path / "out.zarr"), **options)
    manifest, networks = load_networks(case.bundle)
    assert (plan["members"], plan["mirrors"]) == (len(networks), 2**manifest.config.dims if way.mirror else 1)
    assert [tuple(view["patch"]) for view in plan["views"]] == [patch for _, patch in way.views]
    assert report["patches"] == plan["patches"]
    assert report["forwards"] == plan["forwards"]
    computed = sum(view["computed"] for view in plan["views"])
    assert report["forwards"] == computed * len(networks) * plan["mirrors"]


# ---------------------------------------------------------------- thin and small volumes

THIN: list[Triple] = [(1, 1, 1), (1, 13, 9), (14, 1, 11), (9, 14, 1), (2, 3, 5)]


@pytest.mark.parametrize("shape", THIN, ids=str)
@pytest.mark.parametrize(
    "way",
    [
        Way({"padded": False, "patch": (22, 20, 24)}, {"patch": "22,20,24"}, [(None, (22, 20, 24))]),
        Way(
            {"padded": False, "dims": 2, "classes": 2, "patch": (1, 24, 22)},
            {"axis": "z,y,x", "patch": "1,24,22"},
            UNPADDED_2D,
        ),
    ],
    ids=["3D", "three axes"],
)
def test_thin_volumes(tmp_path: Path, shape: Triple, way: Way) -> None:
    image = store(tmp_path / "image.zarr", smooth(shape, seed=sum(shape)))
    case = Case(image, make_bundle(tmp_path / "bundle", **way.network), tmp_path)
    found = bits(case, tmp_path / "a.zarr", **way.options)
    assert np.abs(found[1] - blended(case, way) * 255).max() < 1
    assert_same(bits(case, tmp_path / "b.zarr", block="3,9,5", **way.options), found)


def test_a_bundle_s_patch_is_fitted_to_each_axis(tmp_path: Path) -> None:
    """Smaller volumes need smaller patches, allowed ones, and others along each axis."""
    image = store(tmp_path / "image.zarr", smooth((6, 35, 11), seed=9))
    case = Case(image, make_bundle(tmp_path / "bundle", dims=2, padded=False, patch=(1, 48, 44)), tmp_path)
    # 6 voxels need 22, 11 need 28; the 35 are more than the patch answers for.
    views = [(0, (1, 48, 28)), (1, (22, 1, 28)), (2, (22, 44, 1))]
    plan = api.plan(image, str(tmp_path / "a.zarr"), model=case.bundle, axis="z,y,x", executor="serial")
    assert [tuple(view["patch"]) for view in plan["views"]] == [patch for _, patch in views]
    found = bits(case, tmp_path / "a.zarr", axis="z,y,x")
    assert_close(found, blended(case, Way({}, {}, views)))
    assert_same(bits(case, tmp_path / "b.zarr", axis="z,y,x", block="3,18,11"), found)


def test_raw_voxels_of_any_kind_are_continued_at_the_border(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", padded=False, patch=(24, 24, 24))
    values, found = smooth((9, 7, 12), seed=4), []
    for kind in ("uint8", "uint16", "int16", "float32"):
        case = Case(store(tmp_path / f"{kind}.zarr", np.round(values), kind), bundle, tmp_path)
        found.append(bits(case, tmp_path / f"{kind}-out.zarr"))
    for other in found[1:]:
        assert_same(other, found[0])


# ---------------------------------------------------------------- identity


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("flat")
    image = store(folder / "image.zarr", smooth((8, 18, 14), seed=5))
    return Case(image, make_bundle(folder / "bundle", dims=2, classes=2, patch=(1, 16, 12)), folder)


def test_the_order_of_axes_makes_no_other_job(flat: Case, tmp_path: Path) -> None:
    first = segment(flat, tmp_path / "out.zarr", axis="z,y,x")
    again = segment(flat, tmp_path / "out.zarr", axis="x,z,y")
    assert again["job_key"] == first["job_key"]
    assert again["blocks"]["computed"] == 0


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"axis": "z,y"}, r'axis: z there, \["z", "y"\] asked for'),
        ({"mirror": True}, "mirror: false there, true asked for"),
        ({"axis": "y"}, "axis: z there, y asked for"),
    ],
)
def test_what_is_averaged_names_the_job(flat: Case, tmp_path: Path, options: dict[str, Any], difference: str) -> None:
    segment(flat, tmp_path / "out.zarr")
    with pytest.raises(OutputExistsError, match=difference):
        segment(flat, tmp_path / "out.zarr", **options)


def test_the_axis_of_the_bundle_is_the_axis_by_default(flat: Case, tmp_path: Path) -> None:
    first = segment(flat, tmp_path / "out.zarr")
    assert segment(flat, tmp_path / "out.zarr", axis="z")["job_key"] == first["job_key"]


# ---------------------------------------------------------------- refusals


def test_a_3d_network_has_no_axes(tmp_path: Path) -> None:
    image = store(tmp_path / "image.zarr", smooth((8, 8, 8)))
    case = Case(image, make_bundle(tmp_path / "bundle"), tmp_path)
    with pytest.raises(InputError, match="axis z,y was given, but the model is 3D and has no slice axis: leave it out"):
        segment(case, tmp_path / "out.zarr", axis="z,y")


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (
            {"padded": False, "patch": (24, 24, 24)},
            {"patch": "24,25,24"},
            r"patch side 25 on axis y is none that this unpadded network takes \(18, 20, 22, .* use 24 or 26$",
        ),
        (
            {"padded": False, "patch": (24, 24, 24)},
            {"patch": "24,24,16"},
            "patch side 16 on axis x is none that this unpadded network takes .* use 18$",
        ),
        (
            {"dims": 2, "patch": (1, 16, 16)},
            {"patch": "1,16,15", "axis": "z,y"},
            "patch side 15 on axis x is no multiple of the network's pooling factor 2; .* use 14 or 16$",
        ),
    ],
)
def test_a_patch_that_the_network_cannot_take(
    tmp_path: Path, network: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    image = store(tmp_path / "image.zarr", smooth((8, 8, 8)))
    case = Case(image, make_bundle(tmp_path / "bundle", **network), tmp_path)
    with pytest.raises(PlanError, match=message):
        segment(case, tmp_path / "out.zarr", **options)
    assert not (tmp_path / "out.zarr").exists()
