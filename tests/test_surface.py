"""Surface distances: equal to what geometry says of shifted boxes, and to a search over all pairs of faces."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.test_evaluate import store
from volseg.analysis import counts, surface
from volseg.analysis.evaluate import evaluate
from volseg.errors import VolumeError

SIZES = (50.0, 4.0, 3.0)


def box(z: slice, y: slice, x: slice) -> NDArray[np.uint8]:
    volume = np.zeros((12, 20, 24), np.uint8)
    volume[z, y, x] = 1
    return volume


def score(tmp_path: Path, truth: NDArray[Any], prediction: NDArray[Any], tolerance: float = 3.0, **options: Any) -> Any:
    paths = [
        store(tmp_path / name, data, voxel_size=SIZES, unit="nanometer", **options)
        for name, data in (("p", prediction), ("t", truth))
    ]
    return evaluate(*paths, surface=tolerance)["classes"]


def test_boxes_shifted_along_x(tmp_path: Path) -> None:
    truth = box(slice(2, 8), slice(3, 13), slice(4, 14))
    prediction = box(slice(2, 8), slice(3, 13), slice(6, 16))
    found = score(tmp_path, truth, prediction)[1]["surface"]
    # Each box has 2 faces of 6 x 10 voxels across x, 2 of 6 x 10 across y, 2 of 10 x 10 across z.
    across_x, across_y, across_z = 50.0 * 4 * 60, 50.0 * 3 * 60, 4.0 * 3 * 100
    area = 2 * (across_x + across_y + across_z)
    # The outer end of each box is 2 voxels from the other's end. So is the inner end, but for its first and last row of
    # y, which are half a voxel of y and half a voxel of x from a side: 2.5 nm.
    ends = across_x * 6.0 + across_x * (0.8 * 6.0 + 0.2 * 2.5)
    # Two columns of the sides reach beyond the other box. Those across z are 2 and 1 voxels from its sides; those
    # across y are nearer to its end, half a voxel of y off and 1.5 and 0.5 voxels of x.
    sides = 2 * (across_z * (6.0 + 3.0) + across_y * (np.hypot(2.0, 4.5) + 2.5)) / 10
    one_way = ends + sides
    assert found["mean"] == pytest.approx(one_way / area)
    assert found["hausdorff_95"] == 6.0
    within = 2 * (across_y + across_z) * 9 / 10 + 0.2 * across_x
    assert found["dice"] == pytest.approx(within / area)


def test_equal_surfaces_have_no_distance(tmp_path: Path) -> None:
    truth = box(slice(2, 8), slice(3, 13), slice(4, 14))
    found = score(tmp_path, truth, truth)
    assert found[1]["surface"] == {"mean": 0.0, "hausdorff_95": 0.0, "dice": 1.0}
    assert found[0]["surface"] == {"mean": None, "hausdorff_95": None, "dice": None}


def test_half_spaces_lie_their_shift_apart(tmp_path: Path) -> None:
    """No surface at the border of the region: two half-spaces have one plane each, wherever the volume ends."""
    truth = box(slice(0, 4), slice(None), slice(None))
    prediction = box(slice(0, 7), slice(None), slice(None))
    found = score(tmp_path, truth, prediction, tolerance=149.9)[1]["surface"]
    assert found == {"mean": 150.0, "hausdorff_95": 150.0, "dice": 0.0}
    assert score(tmp_path / "again", truth, prediction, tolerance=150.0)[1]["surface"]["dice"] == 1.0


def test_what_has_no_label_has_no_surface(tmp_path: Path) -> None:
    truth = box(slice(0, 4), slice(None), slice(None))
    prediction = truth.copy()
    prediction[8:11] = 1
    truth[8:11] = 255
    assert score(tmp_path, truth, prediction)[1]["surface"] == {"mean": 0.0, "hausdorff_95": 0.0, "dice": 1.0}


def test_surface_in_one_volume_only(tmp_path: Path) -> None:
    truth, empty = box(slice(2, 8), slice(3, 13), slice(4, 14)), np.zeros((12, 20, 24), np.uint8)
    assert score(tmp_path, truth, empty)[1]["surface"] == {"mean": None, "hausdorff_95": None, "dice": 0.0}


def faces_of(mask: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the centres and the areas of the faces between a mask and the rest, one by one."""
    centres, areas = [], []
    for place in product(*(range(n) for n in mask.shape)):
        for axis in range(3):
            other = list(place)
            other[axis] += 1
            if other[axis] < mask.shape[axis] and mask[place] != mask[tuple(other)]:
                centre = np.array(place, float)
                centre[axis] += 0.5
                centres.append(centre * SIZES)
                areas.append(np.prod(SIZES) / SIZES[axis])
    return np.array(centres), np.array(areas)


@pytest.mark.parametrize("box_voxels", [2**22, 64])
def test_equals_a_search_over_all_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, box_voxels: int) -> None:
    monkeypatch.setattr(counts, "BOX_VOXELS", box_voxels)
    monkeypatch.setattr(surface, "PART", 37)
    generator = np.random.default_rng(3)
    truth, prediction = (generator.choice(3, p=(0.9, 0.05, 0.05), size=(7, 9, 11)).astype(np.uint8) for _ in range(2))
    found = score(tmp_path, truth, prediction, tolerance=6.0, chunks=(2, 3, 4), shards=None)
    for label in (1, 2):
        (a, area_a), (b, area_b) = (faces_of(volume == label) for volume in (truth, prediction))
        apart = np.linalg.norm(a[:, None] - b[None], axis=2)
        to_b, to_a = apart.min(axis=1), apart.min(axis=0)
        area = area_a.sum() + area_b.sum()
        expected = found[label]["surface"]
        assert expected["mean"] == pytest.approx((to_b @ area_a + to_a @ area_b) / area)
        assert expected["dice"] == pytest.approx((area_a[to_b <= 6.0].sum() + area_b[to_a <= 6.0].sum()) / area)
        worst = []
        for distances, areas in ((to_b, area_a), (to_a, area_b)):
            reached = [d for d in np.unique(distances) if areas[distances <= d].sum() >= 0.95 * areas.sum()]
            worst.append(reached[0])
        assert expected["hausdorff_95"] == pytest.approx(max(worst))


def test_voxel_sizes_must_agree(tmp_path: Path) -> None:
    data = box(slice(2, 8), slice(3, 13), slice(4, 14))
    truth = store(tmp_path / "t", data, voxel_size=(50, 4, 4), unit="nanometer")
    other = store(tmp_path / "p", data, voxel_size=(50, 4, 4), unit="micrometer")
    with pytest.raises(VolumeError, match=r"voxels of 50 x 4 x 4 nanometer, .* of 50 x 4 x 4 micrometer"):
        evaluate(other, truth, surface=True)
    bare = store(tmp_path / "b", data)
    assert evaluate(bare, truth, surface=True)["surface"]["unit"] == "nanometer"
    assert evaluate(bare, bare, surface=True)["surface"] == {"voxel_size": (1, 1, 1), "unit": "voxel", "tolerance": 1}
