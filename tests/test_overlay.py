"""Overlay pictures: planes in the right place, size and colour, and nothing but the planes is read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from PIL import Image

from volseg.analysis import overlay as module
from volseg.analysis.canvas import nice_length
from volseg.analysis.overlay import overlay, plan_scale
from volseg.errors import InputError, VolumeError
from volseg.geometry import Box
from volseg.pictures.parts import BACKGROUND, GAP, LINE, MARGIN
from volseg.storage import ome
from volseg.storage.volume import Layout, Volume, create_array, open_volume

Voxel = tuple[float, float, float] | None


def store(path: Path, data: NDArray[Any], *, voxel_size: Voxel = None, names: tuple[str, ...] | None = None) -> str:
    channels = data.shape[0] if data.ndim == 4 else None
    z, y, x = data.shape[-3:]
    layout = Layout((z, y, x), (8, 16, 16), (16, 32, 32), data.dtype, channels)
    attributes = ome.group_attributes(
        layout.axes, voxel_size=voxel_size, unit="nanometer" if voxel_size else None, name="test",
        label=ome.label_attributes(names) if names else None,
    )  # fmt: skip
    create_array(str(path), layout, attributes).write(Box.of((z, y, x)), data)
    return str(path)


def volumes(shape: tuple[int, int, int]) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    image = np.random.default_rng(3).integers(0, 1000, shape).astype(np.uint16)
    labels = np.zeros(shape, np.uint8)
    labels[:, shape[1] // 2 :] = 1
    labels[:, :, : shape[2] // 4] = 2
    return image, labels


def picture(tmp_path: Path, image: str, labels: str, **options: Any) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    result = overlay(image, labels, str(tmp_path / "deep" / "out.png"), **options)
    with Image.open(result["picture"]) as opened:
        return np.asarray(opened.convert("RGB")), result


def test_planes_are_where_they_belong(tmp_path: Path) -> None:
    image, labels = volumes((12, 40, 60))
    paths = store(tmp_path / "i", image), store(tmp_path / "l", labels, names=("matrix", "pore", "crack"))
    drawn, result = picture(tmp_path, *paths, position=(3, 10, 20))
    scale = plan_scale((12, 40, 60), None)
    zoom = scale.pixels[2] // 60
    assert scale.pixels == (12 * zoom, 40 * zoom, 60 * zoom)
    low, high = result["window"]
    corners = {  # top left corner of each grey plane
        0: (MARGIN + LINE, MARGIN),
        1: (MARGIN + LINE + 40 * zoom + GAP + LINE, MARGIN),
        2: (MARGIN + LINE, MARGIN + 60 * zoom + GAP),
    }
    planes = {0: image[3], 1: image[:, 10], 2: image[:, :, 20].T}
    for axis, plane in planes.items():
        top, left = corners[axis]
        grey = np.round(255 * np.clip((plane.astype(float) - low) / (high - low), 0, 1))
        rows, columns = np.indices(plane.shape) * zoom + zoom // 2
        shown = drawn[top + rows, left + columns]
        keep = slice(None, -8) if axis == 0 else slice(None)  # the scale bar would cover the lowest rows
        np.testing.assert_allclose(shown[keep, :, 0], grey[keep], atol=1)
    right = 3 * MARGIN + (drawn.shape[1] - 3 * MARGIN) // 2 - MARGIN
    colours = ome.default_colours(3)
    grey = np.round(255 * np.clip((image[3].astype(float) - low) / (high - low), 0, 1))
    for y, x, label in ((5, 40, 0), (30, 40, 1), (5, 5, 2)):
        pixel = drawn[MARGIN + LINE + y * zoom + 2, right + x * zoom + 2].astype(float)
        expected = grey[y, x] if label == 0 else (grey[y, x] + np.array(colours[label][:3])) / 2
        np.testing.assert_allclose(pixel, np.broadcast_to(expected, 3), atol=2)


def test_shares_and_names(tmp_path: Path) -> None:
    image, labels = volumes((8, 20, 20))
    labels[4] = 255
    paths = store(tmp_path / "i", image), store(tmp_path / "l", labels, names=("matrix", "pore", "crack", "gold"))
    _, result = picture(tmp_path, *paths)
    values = np.concatenate([p.reshape(-1) for p in (labels[4], labels[:, 10], labels[:, :, 10])])
    expected = {i: float((values == i).mean()) for i in (0, 1, 2, 3, 255)}
    assert {c["id"]: c["fraction_of_planes"] for c in result["classes"]} == pytest.approx(expected)
    assert [c["name"] for c in result["classes"]] == ["matrix", "pore", "crack", "gold", "unlabelled"]
    assert result["position"] == [4, 10, 10]


def test_voxel_size_aspect() -> None:
    scale = plan_scale((17, 768, 768), (0.1, 0.022, 0.022))
    assert scale.pixels == (round(17 * 0.1 / 0.022), 768, 768)
    assert not scale.stretched
    assert plan_scale((112, 101, 71), (3, 3, 3)).pixels == (448, 404, 284)
    thin = plan_scale((4, 2000, 3000), None)
    assert thin.pixels[0] == 48
    assert thin.stretched[0] > 10
    assert abs(thin.pixels[2] / thin.pixels[1] - 1.5) < 0.01
    assert plan_scale((1, 300, 500), None).pixels[1:] == (300, 500)
    for shape in ((1, 1, 1), (1, 1, 900), (3000, 2, 2)):
        assert max(plan_scale(shape, None).pixels) <= 1000


@pytest.mark.parametrize("shape", [(1, 30, 40), (1, 1, 50), (1, 1, 1), (200, 3, 2), (5, 4, 3)])
def test_odd_shapes(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    image, labels = volumes(shape)
    drawn, _ = picture(tmp_path, store(tmp_path / "i", image), store(tmp_path / "l", labels))
    assert (drawn != BACKGROUND).any()


def test_only_planes_are_read_and_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, labels = volumes((20, 90, 130))
    paths = store(tmp_path / "i", image), store(tmp_path / "l", labels)
    monkeypatch.setattr(module, "PICTURE_PIXELS", 20)
    monkeypatch.setattr(module, "MIN_SIDE_PIXELS", 3)
    monkeypatch.setattr(module, "TILE", 16)
    original, boxes = Volume.read, []

    def read(self: Volume, box: Box) -> NDArray[Any]:
        boxes.append(box)
        return original(self, box)

    monkeypatch.setattr(Volume, "read", read)
    picture(tmp_path, *paths)
    assert all(min(box.shape) == 1 for box in boxes)
    assert max(box.size for box in boxes) <= 16 * 16
    scale = plan_scale((20, 90, 130), None)
    volume = open_volume(paths[0])
    for normal, whole in enumerate((image[7], image[:, 30], image[:, :, 101].T)):
        plane = module._plane(volume, normal, (7, 30, 101), scale)
        step = 90 // (2 * scale.pixels[1])
        assert step > 1
        assert plane.size < whole.size
        rows = whole[::step] if normal != 1 else whole[:: max(1, 20 // (2 * scale.pixels[0]))]
        columns = max(1, 20 // (2 * scale.pixels[0])) if normal == 2 else 130 // (2 * scale.pixels[2])
        np.testing.assert_array_equal(plane, rows[:, ::columns])


def test_nan_channels_and_constant_images(tmp_path: Path) -> None:
    _, labels = volumes((6, 20, 30))
    path = store(tmp_path / "l", labels)
    image = np.random.default_rng(1).normal(size=(2, 6, 20, 30)).astype(np.float32)
    image[0, 3, 2, 2], image[0, 3, 2, 3] = np.nan, np.inf
    _, result = picture(tmp_path, store(tmp_path / "a", image), path)
    planes = np.concatenate([p.reshape(-1) for p in (image[0, 3], image[0, :, 10], image[0, :, :, 15])])
    assert result["window"] == pytest.approx(np.percentile(planes[np.isfinite(planes)], (0.5, 99.5)))
    _, result = picture(tmp_path, store(tmp_path / "b", np.full((6, 20, 30), 7, np.uint8)), path)
    assert result["window"] == [6.5, 7.5]
    _, result = picture(tmp_path, store(tmp_path / "c", np.full((6, 20, 30), np.nan, np.float32)), path)
    assert result["window"] == [0.0, 1.0]


def test_scale_bar_needs_a_voxel_size(tmp_path: Path) -> None:
    image, labels = volumes((20, 60, 60))
    labels_path = store(tmp_path / "l", labels)
    plain, _ = picture(tmp_path, store(tmp_path / "a", image), labels_path)
    barred, _ = picture(tmp_path, store(tmp_path / "b", image, voxel_size=(4, 4, 4)), labels_path)
    changed = np.argwhere((plain != barred).any(axis=2))
    zoom = plan_scale((20, 60, 60), None).pixels[2] // 60
    bottom = MARGIN + LINE + 60 * zoom
    assert len(changed)
    assert (changed[:, 0] < bottom).all()
    assert (changed[:, 0] > bottom - 60).all()
    assert (changed[:, 1] < MARGIN + 60 * zoom).all()


def test_nice_length() -> None:
    assert [nice_length(v) for v in (1, 1.9, 2, 4.99, 5, 99, 0.03)] == pytest.approx([1, 1, 2, 2, 5, 50, 0.02])


def test_many_classes(tmp_path: Path) -> None:
    image, _ = volumes((8, 40, 60))
    labels = (np.arange(8 * 40 * 60) % 300).reshape(8, 40, 60).astype(np.uint16)
    _, result = picture(tmp_path, store(tmp_path / "i", image), store(tmp_path / "l", labels))
    assert len(result["classes"]) > 200


def test_refused(tmp_path: Path) -> None:
    image, labels = volumes((8, 20, 20))
    path, labels_path = store(tmp_path / "i", image), store(tmp_path / "l", labels)
    with pytest.raises(VolumeError, match="must be equal"):
        overlay(path, store(tmp_path / "s", labels[:7]), str(tmp_path / "o.png"))
    with pytest.raises(VolumeError, match="labels are one integer"):
        overlay(path, store(tmp_path / "f", labels.astype(np.float32)), str(tmp_path / "o.png"))
    with pytest.raises(InputError, match="position 8,0,0 is outside"):
        overlay(path, labels_path, str(tmp_path / "o.png"), position=(8, 0, 0))
    with pytest.raises(InputError, match="outside"):
        overlay(path, labels_path, str(tmp_path / "o.png"), position=(-1, 0, 0))
    assert not (tmp_path / "o.png").exists()


def test_unfinished_labels_can_be_looked_at(tmp_path: Path) -> None:
    image, _ = volumes((8, 20, 20))
    zarr.create_array(tmp_path / "l", shape=(8, 20, 20), chunks=(8, 8, 8), dtype="uint8")
    _, result = picture(tmp_path, store(tmp_path / "i", image), str(tmp_path / "l"))
    assert result["classes"] == [{"id": 0, "name": "background", "fraction_of_planes": 1.0}]
