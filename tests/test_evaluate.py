"""Scores: equal to a direct count, whatever the storage; what must not be scored is refused."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from volseg.analysis import counts, rand_score, surface
from volseg.analysis.evaluate import evaluate
from volseg.errors import CorruptChunkError, InputError, SpecError, VolumeError
from volseg.geometry import Box
from volseg.storage import ome
from volseg.storage.volume import Layout, create_array

SHAPE = (9, 20, 31)


def store(
    path: Path,
    data: NDArray[Any],
    *,
    names: Sequence[str] | None = None,
    voxel_size: tuple[float, float, float] | None = None,
    unit: str | None = None,
    chunks: tuple[int, int, int] = (4, 8, 8),
    shards: tuple[int, int, int] | None = (4, 16, 16),
    **marks: Any,
) -> str:
    z, y, x = data.shape
    attributes = ome.group_attributes(
        "zyx", voxel_size=voxel_size, unit=unit, name="labels", label=ome.label_attributes(names),
        volseg={"status": "complete", "all_chunks_written": True} | marks,
    )  # fmt: skip
    create_array(str(path), Layout((z, y, x), chunks, shards, data.dtype), attributes).write(Box.of((z, y, x)), data)
    return str(path)


def labels(seed: int, classes: int = 4, dtype: str = "uint8") -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, classes, SHAPE).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", "uint64"])
@pytest.mark.parametrize("box_voxels", [2**22, 100])
def test_equals_a_direct_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, box_voxels: int) -> None:
    monkeypatch.setattr(counts, "BOX_VOXELS", box_voxels)
    truth, prediction = labels(1, dtype=dtype), labels(2, 5, dtype)
    truth[3:5, :, 7:20] = 255
    calls: list[tuple[int, int]] = []
    result = evaluate(
        store(tmp_path / "p", prediction, chunks=(3, 5, 7), shards=None),
        store(tmp_path / "t", truth),
        roi="1:8,2:,:29",
        slab_axis="z",
        progress=lambda done, total: calls.append((done, total)),
    )
    part = (slice(1, 8), slice(2, None), slice(29))
    t, p = truth[part], prediction[part]
    keep = t != 255
    expected = np.array([[((t == i) & (p == j) & keep).sum() for j in range(5)] for i in range(5)])
    assert result["confusion"] == expected.tolist()
    assert (result["voxels"], result["ignored"]) == (int(keep.sum()), int((~keep).sum()))
    assert [c["id"] for c in result["classes"]] == [0, 1, 2, 3, 4]
    for i, found in enumerate(result["classes"][:4]):
        both, true, predicted = expected[i, i], expected[i].sum(), expected[:, i].sum()
        assert found["dice"] == found["f1"] == pytest.approx(2 * both / (true + predicted))
        assert found["iou"] == pytest.approx(both / (true + predicted - both))
        assert (found["precision"], found["recall"]) == (pytest.approx(both / predicted), pytest.approx(both / true))
        assert (found["truth_voxels"], found["predicted_voxels"]) == (true, predicted)
        slabs = [((t[z] == i) & (p[z] == i) & keep[z]).sum() for z in range(7)]
        sizes = [((t[z] == i) & keep[z]).sum() + ((p[z] == i) & keep[z]).sum() for z in range(7)]
        assert found["slab_dice"] == pytest.approx([2 * a / b for a, b in zip(slabs, sizes, strict=True)])
    only_predicted = result["classes"][4]
    assert (only_predicted["dice"], only_predicted["recall"], only_predicted["precision"]) == (0.0, None, 0.0)
    assert result["mean_foreground_dice"] == pytest.approx(np.mean([c["dice"] for c in result["classes"][1:]]))
    assert result["accuracy"] == pytest.approx((t == p)[keep].mean())
    assert result["balanced_accuracy"] == pytest.approx(np.mean([expected[i, i] / expected[i].sum() for i in range(4)]))
    assert (result["slabs"]["axis"], result["slabs"]["edges"]) == ("z", [1, 2, 3, 4, 5, 6, 7, 8])
    assert calls[-1][0] == calls[-1][1] == len(calls)


def test_perfect_and_absent_classes(tmp_path: Path) -> None:
    data = labels(1, 3)
    path = store(tmp_path / "a", data, names=("matrix", "pore", "crack", "gold"))
    result = evaluate(path, path)
    gold = result["classes"][3]
    assert gold == {
        "id": 3, "name": "gold", "dice": None, "f1": None, "iou": None, "precision": None, "recall": None,
        "truth_voxels": 0, "predicted_voxels": 0, "dice_interval": None, "slab_dice": [None] * 10,
    }  # fmt: skip
    assert result["mean_foreground_dice"] == 1.0
    assert result["accuracy"] == result["balanced_accuracy"] == 1.0
    assert result["classes"][1]["dice_interval"] == result["mean_foreground_dice_interval"] == (1.0, 1.0)
    assert [c["name"] for c in result["classes"]] == ["matrix", "pore", "crack", "gold"]


def test_class_only_in_the_truth_scores_zero(tmp_path: Path) -> None:
    truth = np.zeros(SHAPE, np.uint8)
    truth[0] = 1
    result = evaluate(store(tmp_path / "p", np.zeros(SHAPE, np.uint8)), store(tmp_path / "t", truth))
    assert (result["classes"][1]["dice"], result["mean_foreground_dice"]) == (0.0, 0.0)
    assert result["classes"][1]["name"] == "class 1"


def test_only_background_has_no_mean(tmp_path: Path) -> None:
    path = store(tmp_path / "a", np.zeros(SHAPE, np.uint8))
    assert evaluate(path, path)["mean_foreground_dice"] is None


def test_names_of_either_volume_and_gaps(tmp_path: Path) -> None:
    data = labels(1, 2) * np.uint8(200)
    result = evaluate(store(tmp_path / "p", data, names=("air", "wood")), store(tmp_path / "t", data))
    assert [(c["id"], c["name"]) for c in result["classes"]] == [(0, "air"), (1, "wood"), (200, "class 200")]
    assert np.array(result["confusion"]).shape == (3, 3)


def test_ignore_can_be_another_value_or_none(tmp_path: Path) -> None:
    data = labels(1, 3)
    path = store(tmp_path / "a", data)
    assert evaluate(path, path, ignore=2)["ignored"] == int((data == 2).sum())
    data[0] = 255
    path = store(tmp_path / "b", data)
    assert evaluate(path, path, ignore=None)["classes"][-1]["id"] == 255


def test_absent_chunks_are_counted_where_they_are_no_error(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "p", shape=SHAPE, chunks=(9, 20, 16), dtype="uint8")
    result = evaluate(str(tmp_path / "p"), store(tmp_path / "t", labels(1)))
    assert result["absent_chunks"] == 2
    assert result["classes"][0]["predicted_voxels"] == result["voxels"]


@pytest.mark.parametrize(
    ("truth", "prediction", "options", "error", "words"),
    [
        (labels(1), labels(1)[:8], {}, VolumeError, r"shape \(8, 20, 31\).*\(9, 20, 31\): they must be equal"),
        (labels(1, dtype="float32"), labels(1), {}, VolumeError, "holds float32, labels are one integer"),
        (labels(1, dtype="int16") - np.int16(1), labels(1), {}, VolumeError, "holds label -1"),
        (labels(1, 5000, "uint16"), labels(1), {}, VolumeError, "not of numbered objects"),
        (np.full(SHAPE, 255, np.uint8), labels(1), {}, InputError, "no voxel of .* is labelled .all 5580 are 255."),
        (labels(1), labels(1), {"roi": "0:10,:,:"}, SpecError, "not inside 0:9"),
        (labels(1), labels(1), {"slab_axis": "c"}, InputError, "slab axis 'c' is none of z, y, x"),
        (labels(1), labels(1), {"rand_class": -1}, InputError, "class -1 of the membranes is not in 0 to 1023"),
        (labels(1), labels(1), {"surface": -0.5}, InputError, "tolerance of -0.5 is no length"),
    ],
)
def test_refused(
    tmp_path: Path,
    truth: NDArray[Any],
    prediction: NDArray[Any],
    options: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    paths = store(tmp_path / "p", prediction), store(tmp_path / "t", truth)
    with pytest.raises(error, match=words):
        evaluate(*paths, **options)


def test_unfinished_prediction_is_refused(tmp_path: Path) -> None:
    truth = store(tmp_path / "t", labels(1))
    with pytest.raises(VolumeError, match=r"incomplete.*again until it is complete"):
        evaluate(store(tmp_path / "p", labels(1), status="incomplete"), truth)


def test_prediction_of_a_region_is_scored_inside_it_only(tmp_path: Path) -> None:
    truth = store(tmp_path / "t", labels(1))
    prediction = store(tmp_path / "p", labels(1), region="2:5,0:20,0:31")
    with pytest.raises(VolumeError, match="--roi 2:5,0:20,0:31"):
        evaluate(prediction, truth)
    assert evaluate(prediction, truth, roi="3:5,:,:")["mean_foreground_dice"] == 1.0


def test_damaged_chunk_is_no_score(tmp_path: Path) -> None:
    path = store(tmp_path / "t", labels(1))
    chunk = tmp_path / "t/0/c/1/0/1"
    chunk.write_bytes(chunk.read_bytes()[:-40])
    with pytest.raises(CorruptChunkError, match="c/1/0/1"):
        evaluate(path, path)


def test_surfaces_and_cells_come_with_their_measures(tmp_path: Path) -> None:
    truth, prediction = labels(1, 3), labels(2, 3)
    paths = (
        store(tmp_path / "p", prediction, voxel_size=(0.05, 0.004, 0.004), unit="micrometer"),
        store(tmp_path / "t", truth, voxel_size=(50, 4, 4), unit="nanometer", names=("a", "b", "c", "d")),
    )
    calls: list[tuple[int, int]] = []
    result = evaluate(*paths, surface=True, rand_class=1, progress=lambda done, total: calls.append((done, total)))
    assert result["surface"] == {"voxel_size": (50, 4, 4), "unit": "nanometer", "tolerance": 4}
    assert result["classes"][1]["surface"]["mean"] > 0
    assert result["classes"][3]["surface"] == {"mean": None, "hausdorff_95": None, "dice": None}
    assert result["rand"]["class"] == 1
    assert len(result["rand"]["slices"]) == SHAPE[0]
    assert [done for done, _ in calls] == list(range(1, calls[-1][1] + 1))
    assert evaluate(*paths, surface=50)["surface"]["tolerance"] == 50
    plain = evaluate(*paths)
    assert "surface" not in plain["classes"][1]
    assert not {"surface", "rand"} & set(plain)


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(tmp_path / "a", labels(1, 3))
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(InputError, match=r"needs? the package skimage.*volseg\[metrics\]"):
        evaluate(path, path, rand_class=1)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(InputError, match=r"surface distances need the package scipy.*volseg\[metrics\]"):
        evaluate(path, path, surface=True)
    assert evaluate(path, path)["accuracy"] == 1.0


def test_what_would_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(tmp_path / "a", labels(1, 3))
    monkeypatch.setattr(surface, "MAX_FACES", 1000)
    with pytest.raises(InputError, match=r"more than 1000 voxel faces.*region of at most \d+ voxels with --roi"):
        evaluate(path, path, surface=True)
    monkeypatch.setattr(rand_score, "MAX_SLICE", 100)
    with pytest.raises(InputError, match=r"20 x 31 pixels are too large.*such as :,0:10,0:10"):
        evaluate(path, path, rand_class=1)
    assert evaluate(path, path, rand_class=1, roi=":,0:10,0:10")["rand"]["score"] == 1.0
