"""OME metadata: what is written passes the 0.5 schema, what others write (0.4, 0.5) is understood."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from volseg.errors import InputError
from volseg.geometry import Box
from volseg.storage import ome
from volseg.storage.volume import Layout, create_array, open_volume

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ome_zarr_models.v05 import Image, ImageLabel


def make(path: Path, *, channels: int | None = None, **described: Any) -> str:
    layout = Layout((4, 5, 6), (4, 4, 4), (4, 8, 8), np.dtype("uint8"), channels)
    options = {"voxel_size": (0.1, 0.02, 0.02), "unit": "micrometer", "name": "test"} | described
    create_array(str(path), layout, ome.group_attributes(layout.axes, **options))
    return str(path)


@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("unit", ["micrometer", None])
def test_image_passes_the_schema(tmp_path: Path, channels: int | None, unit: str | None) -> None:
    make(tmp_path / "v", channels=channels, unit=unit)
    image = Image.from_zarr(zarr.open_group(tmp_path / "v", mode="r", use_consolidated=False))
    (scale,) = image.attributes.ome.multiscales
    assert [(a.name, a.unit) for a in scale.axes if a.type == "space"] == [(a, unit) for a in "zyx"]
    step = scale.datasets[0].coordinateTransformations[0].model_dump()
    assert step["scale"][-3:] == [0.1, 0.02, 0.02]


@pytest.mark.parametrize("names", [None, ("matrix", "pore", "crack")])
def test_labels_pass_the_schema_and_read_back(tmp_path: Path, names: tuple[str, ...] | None) -> None:
    make(tmp_path / "v", label=ome.label_attributes(names))
    image = ImageLabel.from_zarr(zarr.open_group(tmp_path / "v", mode="r", use_consolidated=False))
    assert image.attributes.ome.image_label is not None
    volume = open_volume(str(tmp_path / "v"))
    assert (volume.is_labels, volume.class_names) == (True, names)
    assert [volume.colours[i] for i in sorted(volume.colours)] == (ome.default_colours(3) if names else [])


def test_voxel_size_reads_back(tmp_path: Path) -> None:
    volume = open_volume(make(tmp_path / "a"))
    assert (volume.voxel_size, volume.unit, volume.is_labels) == ((0.1, 0.02, 0.02), "micrometer", False)
    volume = open_volume(make(tmp_path / "b", voxel_size=None, unit=None))
    assert (volume.voxel_size, volume.unit) == (None, None), "unknown is not one"


def multiscales(scale: list[float], units: list[str | None], **more: Any) -> dict[str, Any]:
    axes = [{"name": a, "type": "space"} | ({"unit": u} if u else {}) for a, u in zip("zyx", units, strict=True)]
    steps = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": [5, 5, 5]}]
    return {"multiscales": [{"axes": axes, "datasets": [{"path": "s0", "coordinateTransformations": steps}], **more}]}


@pytest.mark.parametrize(
    ("attributes", "voxel_size", "unit"),
    [
        (multiscales([4.0, 2.0, 1.0], ["micrometer"] * 3), (4, 2, 1), "micrometer"),
        (multiscales([1.0, 500.0, 500.0], ["micrometer", "nanometer", "nanometer"]), (1000, 500, 500), "nanometer"),
        (multiscales([1.0, 1.0, 1.0], ["nanometer"] * 3), (1, 1, 1), "nanometer"),
        (multiscales([1.0, 1.0, 1.0], [None] * 3), None, None),
        (multiscales([2.0, 1.0, 1.0], [None] * 3), (2, 1, 1), None),
        (multiscales([2.0, 1.0, 1.0], ["pixels"] * 3), None, None),
        (multiscales([2.0, -1.0, 1.0], ["nanometer"] * 3), None, None),
        (
            multiscales(
                [2.0, 1.0, 1.0],
                ["meter"] * 3,
                coordinateTransformations=[{"type": "scale", "scale": [3.0, 3.0, 3.0]}],
            ),
            (6, 3, 3),
            "meter",
        ),
        ({"ome": {"version": "0.5"} | multiscales([4.0, 2.0, 1.0], ["angstrom"] * 3)}, (4, 2, 1), "angstrom"),
    ],
)
def test_reads_what_others_write(
    attributes: dict[str, Any], voxel_size: tuple[float, ...] | None, unit: str | None
) -> None:
    found = ome.read_multiscale(attributes)
    assert found is not None
    assert (found.path, found.axes, found.unit) == ("s0", tuple("zyx"), unit)
    assert found.voxel_size == (None if voxel_size is None else pytest.approx(voxel_size))


@pytest.mark.parametrize(
    "attributes", [{}, {"ome": {}}, {"multiscales": []}, {"multiscales": [{}]}, {"multiscales": [{"datasets": []}]}]
)
def test_no_image_in_the_metadata(attributes: dict[str, Any]) -> None:
    assert ome.read_multiscale(attributes) is None


def test_gaps_in_class_names_are_filled() -> None:
    entry = {"properties": [{"label-value": 2, "name": "pore"}, {"label-value": "x"}], "colors": []}
    assert ome.read_labels({"ome": {"image-label": entry}}) == (("background", "class 1", "pore"), {}, True)


def test_units() -> None:
    assert ome.check_voxel_size((1, 2, 3), "um") == ((1.0, 2.0, 3.0), "micrometer")
    assert ome.check_voxel_size((1, 2, 3), "Nanometer") == ((1.0, 2.0, 3.0), "nanometer")
    assert ome.check_voxel_size(None, None) == (None, None)
    for voxel_size, unit, words in (
        ((1, 2, 3), "micrometre", "did you mean 'micrometer'"),
        ((1, 2, 3), "pixel", "no OME-Zarr length unit"),
        ((1, 2), None, "three positive lengths"),
        ((1, 2, float("nan")), None, "three positive lengths"),
        (None, "meter", "without a voxel size"),
    ):
        with pytest.raises(InputError, match=words):
            ome.check_voxel_size(voxel_size, unit)


def test_colours_are_distinct() -> None:
    colours = ome.default_colours(40)
    assert colours[0] == (0, 0, 0, 0)
    assert len(set(colours)) == 40
    assert ome.default_colours(3) == colours[:3]
    rgb = np.array([c[:3] for c in colours[1:21]], float)
    distances = np.abs(rgb[:, None] - rgb[None]).sum(axis=2) + 1e6 * np.eye(20)
    assert distances.min() > 24


def test_labels_read_with_channels(tmp_path: Path) -> None:
    volume = open_volume(make(tmp_path / "v", channels=2))
    assert volume.read(Box.of(volume.shape)).shape == (2, 4, 5, 6)
