"""What a bundle is, told and drawn."""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from PIL import Image

from tests.support import Case, labels_of, make_bundle, segment, smooth, store
from volseg import api
from volseg.analysis.card import SliceChoice, describe_model, predictions_picture
from volseg.errors import BundleError, InputError, JobPartial, VolumeError
from volseg.models.bundle import load_networks, save_bundle
from volseg.pictures.parts import BACKGROUND, GAP, LINE, MARGIN
from volseg.pictures.predictions import WRONG, Sample, draw_predictions
from volseg.spec import SegmentSpec


def stored(path: Path) -> NDArray[Any]:
    array = zarr.open_array(str(path), mode="r")
    return np.asarray(array[...])


# ---------------------------------------------------------------- description


def test_a_bundle_is_described(tmp_path: Path) -> None:
    bundle = make_bundle(
        tmp_path / "b", dims=2, classes=3, patch=(16, 1, 32), axis="y", members=2, class_bias=(0.5, 0, -0.25)
    )
    (tmp_path / "b" / "predictions.png").write_bytes(b"picture")
    manifest, networks = load_networks(bundle)
    told = json.loads(json.dumps(describe_model(bundle)))
    assert told["bundle"] == bundle
    assert told["digest"] == manifest.digest
    assert (told["architecture"], told["dims"], told["axis"], told["members"]) == ("unet", 2, "y", 2)
    assert told["arguments"]["widths"] == [4, 8]
    assert told["parameters"] == sum(p.numel() for p in networks[0].parameters())
    assert told["receptive_field"][1] == 0, "one slice at a time"
    assert min(told["receptive_field"][::2]) >= 6
    assert (told["patch"], told["pooling"], told["margin"]) == ([16, 1, 32], [2, 1, 2], [0, 0, 0])
    assert [c["name"] for c in told["classes"]] == ["class 0", "class 1", "class 2"]
    assert (told["activation"], told["threshold"], told["class_bias"]) == ("softmax", None, [0.5, 0, -0.25])
    assert told["scaling"]["std"] == [50]
    assert (told["voxel_size"], told["unit"]) == ([0.5, 0.5, 0.5], "micrometer")
    sizes = {entry["name"]: entry["size"] for entry in told["files"]}
    assert sizes == {p.name: p.stat().st_size for p in (tmp_path / "b").iterdir()}
    digests = {entry["name"]: entry["sha256"] for entry in told["files"]}
    assert digests["model-1.safetensors"] == manifest.files["model-1.safetensors"].sha256
    assert digests["predictions.png"] is None


def test_describing_does_not_load_torch(tmp_path: Path) -> None:
    code = "import sys; from volseg.analysis.card import describe_model; describe_model(sys.argv[1]); "
    code += "print('torch' in sys.modules)"
    bundle = make_bundle(tmp_path / "b")
    done = subprocess.run([sys.executable, "-c", code, bundle], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_scores_are_those_of_the_training(tmp_path: Path) -> None:
    manifest, networks = load_networks(make_bundle(tmp_path / "a"))
    history = {"validation_dice": {"pore": 0.9}, "validation_hd95": 2.5, "spec": {"seed": 1}}
    save_bundle(str(tmp_path / "b"), networks, manifest.model_copy(update={"provenance": history}))
    told = describe_model(str(tmp_path / "b"))
    assert told["scores"] == {"validation_dice": {"pore": 0.9}, "validation_hd95": 2.5}
    assert told["provenance"] == history


def test_a_damaged_bundle_is_not_described(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", members=2)
    weights = tmp_path / "b" / "model-1.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"zzzz")
    with pytest.raises(BundleError, match=r"model-1.safetensors is not what was trained"):
        describe_model(bundle)


# ---------------------------------------------------------------- pictures

CLASSES = [("air", "#000000"), ("pore", "#00ff00"), ("metal", "#0000ff")]


def pixels(content: bytes) -> NDArray[np.int64]:
    return np.asarray(Image.open(BytesIO(content)).convert("RGB"), dtype=np.int64)


def test_the_picture_shows_image_truth_prediction_and_errors() -> None:
    image = np.full((10, 20), 50.0)
    image[:, 10:] = 100
    truth = np.zeros((10, 20), np.int64)
    truth[:5, :5], truth[5:, 15:] = 1, -1
    prediction = np.zeros((10, 20), np.int64)
    prediction[:5, :10] = 1
    content = draw_predictions([Sample(image, prediction, truth, "z = 3")], CLASSES)
    drawn = pixels(content)
    zoom = 16
    top = MARGIN + LINE

    def voxel(panel: int, y: int, x: int) -> tuple[int, ...]:
        left = MARGIN + panel * (20 * zoom + GAP)
        block = drawn[top + y * zoom : top + (y + 1) * zoom, left + x * zoom : left + (x + 1) * zoom].reshape(-1, 3)
        assert (block == block[0]).all(), "a voxel is a block of one colour"
        return tuple(int(v) for v in block[0])

    assert voxel(0, 0, 0) == (0, 0, 0)
    assert voxel(0, 9, 19) == (255, 255, 255)
    assert voxel(1, 0, 0) == (0, 128, 0), "truth: class 1"
    assert voxel(1, 0, 7) == (0, 0, 0), "truth: class 0 stays grey"
    assert voxel(1, 9, 12) == (255, 255, 255)
    assert voxel(1, 9, 19) == (128, 128, 128), "unlabelled is dark"
    assert voxel(2, 0, 7) == (0, 128, 0), "prediction: class 1"
    assert voxel(3, 0, 0) == (0, 0, 0), "right"
    assert voxel(3, 0, 7) == tuple(round(0.7 * v) for v in WRONG)
    assert voxel(3, 0, 15) == (255, 255, 255)
    assert voxel(3, 9, 19) == (76, 76, 76), "unlabelled is no error"
    assert draw_predictions([Sample(image, prediction, prediction, "z = 3")], CLASSES) != content


def test_without_truth_there_are_two_panels_a_row() -> None:
    samples = [Sample(np.eye(8), np.eye(8, dtype=np.int64)) for _ in range(3)]
    drawn = pixels(draw_predictions(samples, CLASSES))
    assert drawn.shape[1] == 2 * MARGIN + 2 * 8 * 16 + GAP
    assert drawn.shape[0] == 2 * MARGIN + 3 * (8 * 16 + LINE + GAP) + LINE
    assert tuple(drawn[0, 0]) == BACKGROUND


@pytest.mark.parametrize(
    ("shape", "pixel", "size"), [((8, 8), (2.0, 1.0), (256, 128)), ((900, 300), (1.0, 1.0), (320, 107))]
)
def test_panels_keep_the_shape_of_the_slice(
    shape: tuple[int, int], pixel: tuple[float, float], size: tuple[int, int]
) -> None:
    sample = Sample(np.zeros(shape), np.zeros(shape, np.int64))
    drawn = pixels(draw_predictions([sample], CLASSES, pixel))
    # A plane of one value is drawn in the middle grey.
    rows, columns = np.nonzero((drawn == 128).all(axis=2))
    assert np.unique(rows).size == size[0]
    assert np.unique(columns).size == 2 * size[1]


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An image, labels of three of its slices, and a bundle of a 2D network."""
    folder = tmp_path_factory.mktemp("slices")
    image = store(folder / "image.zarr", smooth((9, 24, 20)))
    labels = np.full((9, 24, 20), 255, np.uint8)
    labels[[1, 4, 5]] = np.random.default_rng(0).integers(0, 3, (3, 24, 20))
    labels[5, 2:] = 255
    store(folder / "labels.zarr", labels)
    return Case(image, make_bundle(folder / "bundle", dims=2, classes=3, patch=(1, 16, 16)), folder)


def picture(case: Case, out: Path, labels: str | None = "labels.zarr", **choice: Any) -> dict[str, Any]:
    place = str(case.folder / labels) if labels else None
    return predictions_picture(case.bundle, case.image, place, str(out), api.run_segment, SliceChoice(**choice))


def test_a_picture_of_a_bundle_shows_what_segment_answers(slices: Case, tmp_path: Path) -> None:
    segment(slices, tmp_path / "out.zarr")
    predicted, truth = labels_of(tmp_path / "out.zarr"), stored(slices.folder / "labels.zarr")
    told = picture(slices, tmp_path / "p.png")
    assert [entry["slice"] for entry in told["slices"]] == [1, 4], "slices with few labels are left out"
    for entry in told["slices"]:
        n = entry["slice"]
        assert entry["wrong"] == pytest.approx((predicted[n] != truth[n]).mean())
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    told = picture(slices, tmp_path / "p.png", slices=(5,))
    assert told["slices"][0]["wrong"] == pytest.approx((predicted[5, :2] != truth[5, :2]).mean())


def test_slices_can_be_named_and_need_no_labels(slices: Case, tmp_path: Path) -> None:
    told = picture(slices, tmp_path / "p.png", None, slices=(3, 0), axis="x")
    assert told["axis"] == "x"
    assert told["slices"] == [{"slice": 3, "wrong": None}, {"slice": 0, "wrong": None}]
    spread = picture(slices, tmp_path / "q.png", None, roi="2:8,:,:")
    assert [entry["slice"] for entry in spread["slices"]] == [3, 5, 7]


def test_what_cannot_be_drawn_is_said(slices: Case, tmp_path: Path) -> None:
    store(tmp_path / "other.zarr", np.zeros((3, 24, 20)))
    out = tmp_path / "p.png"
    with pytest.raises(InputError, match=r"slices 9 of .* z runs from 0 to 8; nothing was drawn"):
        picture(slices, out, slices=(2, 9))
    with pytest.raises(InputError, match=r"no labelled voxel in 6:9,0:24,0:20; nothing was drawn"):
        picture(slices, out, roi="6:9,:,:")
    with pytest.raises(VolumeError, match=r"shape \(9, 24, 20\), .* has \(3, 24, 20\)"):
        picture(slices, out, str(tmp_path / "other.zarr"))

    def partial(_: SegmentSpec) -> dict[str, Any]:
        return {"status": "incomplete"}

    with pytest.raises(JobPartial, match="could not be segmented; nothing was drawn"):
        predictions_picture(slices.bundle, slices.image, None, str(out), partial)
    assert not out.exists()
