"""What a training reads: volumes that fit each other, regions that never leak, patches that can be made again."""

import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.support import store
from tests.train_support import SHAPE, scene
from volseg.errors import InputError, SpecError, VolumeError
from volseg.geometry import Box, Triple
from volseg.intensity import Scaling
from volseg.models.config import Axis, to_network
from volseg.spec import TrainSpec
from volseg.storage import ome
from volseg.storage.volume import Layout, create_array, open_volume
from volseg.training import data as data_module
from volseg.training.augment import Augmentation
from volseg.training.data import Data, open_data
from volseg.training.greys import measure_greys
from volseg.training.index import Asked, LabelIndex, build_index, count_slices
from volseg.training.prefetch import Prefetcher
from volseg.training.region import IGNORED, Region
from volseg.training.sampler import Sampler, slots_for
from volseg.training.split import cut_slabs, draw_slices, labelled, take_range, take_slices
from volseg.training.view import NetworkView, TileCache

PLANES = ((0, 1), (0, 2), (1, 2))
STILL = Augmentation(
    planes=PLANES, quarter_turns=PLANES, flips=(0, 1, 2), warp_probability=0.0, intensity_probability=0.0
)
BENT = dataclasses.replace(STILL, warp_probability=1.0)
PLAIN = Scaling(low=(0,), high=(1e6,), mean=(0,), std=(1,))
ASKED = Asked(None, 255, "training", "the labels")


def quiet(line: str) -> None:
    raise AssertionError(f"nothing was to be said: {line}")


def spec_of(folder: Path, *pairs: tuple[NDArray[Any], NDArray[Any]], **options: Any) -> TrainSpec:
    """Store pairs of image and labels and return a spec that names them."""
    names = []
    for i, (image, labels) in enumerate(pairs):
        number = sum(1 for _ in folder.glob("image*"))
        names.append(
            [store(folder / f"{n}{number}-{i}.zarr", v, None) for n, v in (("image", image), ("labels", labels))]
        )
    values = {"image": [n[0] for n in names], "labels": [n[1] for n in names], "out": str(folder / "out"), "dims": 3}
    return TrainSpec.read(values | options)


def opened(folder: Path, *pairs: tuple[NDArray[Any], NDArray[Any]], **options: Any) -> Data:
    """Open what was stored, with grey values as they are."""
    data = open_data(spec_of(folder, *pairs, **options), lambda _: None)
    train, val = (tuple(dataclasses.replace(r, scaling=PLAIN) for r in part) for part in (data.train, data.val))
    return dataclasses.replace(data, train=train, val=val)


def view_of(folder: Path, values: NDArray[Any], tile: Triple | None = None) -> NetworkView:
    view = NetworkView(open_volume(store(folder, values, None)), "z", TileCache(1 << 24))
    if tile is not None:
        view._tile = tile
    return view


def boxes_of(regions: Sequence[Region], volume: int = 0) -> list[str]:
    return [str(r.box) for r in regions if r.volume == volume]


# ---------------------------------------------------------------- reading


@settings(deadline=None)
@given(st.sampled_from("zyx"), st.integers(1, 4000), st.booleans(), st.data())
def test_a_view_reads_what_is_there_in_the_networks_order(
    axis: Axis, capacity: int, crop: bool, data: st.DataObject
) -> None:
    values = np.arange(2 * 7 * 9 * 11, dtype=np.int32).reshape(2, 7, 9, 11)

    class Fake:
        shape: Triple = (7, 9, 11)
        chunks: Triple = (3, 4, 5)
        dtype = values.dtype
        channels = 2

        def read(self, box: Box) -> NDArray[Any]:
            return values[(slice(None), *box.slices)]

    origin = (2, 1, 3) if crop else (0, 0, 0)
    view = NetworkView(Fake(), axis, TileCache(capacity), origin)
    view._tile = to_network((3, 4, 5), axis)  # the planned tile would hold the whole of so small a volume
    turned = np.moveaxis(values[(slice(None), *(slice(o, None) for o in origin))], 1 + "zyx".index(axis), 1)
    assert view.shape == to_network((7, 9, 11), axis)
    for _ in range(3):
        spans = [sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)))) for n in turned.shape[1:]]
        start, stop = (tuple(s[i] if i == 0 else max(s[1], s[0] + 1) for s in spans) for i in (0, 1))
        box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
        np.testing.assert_array_equal(view.read(box), turned[(slice(None), *box.slices)])
        place = view.locate(box)
        np.testing.assert_array_equal(
            np.moveaxis(values[(slice(None), *place.slices)], 1 + "zyx".index(axis), 1), view.read(box)
        )
    held = sum(tile.nbytes for tile in view._cache._tiles.values())
    assert held == view._cache._held
    assert held <= capacity or len(view._cache._tiles) == 1


def test_who_wants_a_tile_that_another_thread_reads_waits_for_it() -> None:
    cache = TileCache(1 << 20)
    begun, go = threading.Event(), threading.Event()

    def slowly() -> NDArray[Any]:
        begun.set()
        assert go.wait(60)
        return np.ones(3)

    def never() -> NDArray[Any]:
        raise AssertionError("read twice")

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(cache.get, "tile", slowly)
        assert begun.wait(60)
        others = [pool.submit(cache.get, "tile", never) for _ in range(2)]
        elsewhere = cache.get("another", lambda: np.zeros(2))
        assert not first.done(), "another tile does not wait"
        go.set()
        assert all(other.result() is first.result() for other in others)
    assert cache.get("tile", never).sum() == 3
    assert cache.get("another", never) is elsewhere


def test_a_tile_that_could_not_be_read_is_tried_again() -> None:
    cache = TileCache(1 << 20)

    def broken() -> NDArray[Any]:
        raise VolumeError("gone")

    with pytest.raises(VolumeError, match="gone"):
        cache.get("tile", broken)
    assert cache.get("tile", lambda: np.ones(3)).sum() == 3


def test_the_index_counts_every_labelled_voxel_once(tmp_path: Path) -> None:
    _, labels = scene(classes=4)
    labels[:, ::3] = 255
    box = Box((1, 5, 3), (11, 47, 33))
    view = view_of(tmp_path / "l", labels, (4, 16, 16))
    index = build_index(view, box, ASKED, Box((0, 5, 3), (11, 48, 40)))
    inside = labels[box.slices]
    np.testing.assert_array_equal(index.totals, np.bincount(inside[inside != 255]))
    for tile, counts in zip(index.tiles, index.counts, strict=True):
        part = labels[tile.slices]
        np.testing.assert_array_equal(counts, np.bincount(part[part != 255], minlength=len(counts)))
    for axis, counts in enumerate(count_slices(view, [box], 255)):
        known = np.zeros(SHAPE, bool)
        known[box.slices] = inside != 255
        np.testing.assert_array_equal(counts, known.sum(tuple(i for i in range(3) if i != axis)))


def test_how_much_a_place_tells_is_the_same_for_a_volume_in_one_box_and_in_two(tmp_path: Path) -> None:
    shape = (32, 32, 32)
    anywhere = np.random.default_rng(0).integers(0, 2, shape).astype(np.uint8)
    layers = np.broadcast_to((np.arange(32)[:, None] // 16).astype(np.uint8), shape).copy()
    indices = [LabelIndex((build_index(view_of(tmp_path / n, v), Box.of(shape), ASKED),))
               for n, v in (("anywhere", anywhere), ("layers", layers))]  # fmt: skip
    assert indices[0].place_tells((1, 2)) < 0.01
    assert indices[1].place_tells((1, 2)) == pytest.approx(1.0)
    assert indices[1].place_tells((0, 2)) == pytest.approx(0.0)
    for labels, whole in zip((anywhere, layers), indices, strict=True):
        two = opened(tmp_path, (labels, labels), train_roi=":,0:16,:+:,16:32,:").index
        assert two.place_tells((1, 2)) == pytest.approx(whole.place_tells((1, 2)))
        np.testing.assert_array_equal(two.totals, whole.totals)


def test_grey_values_of_a_class_are_measured_over_all_regions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (8, 64, 64)).astype(np.uint8)
    steady = (np.where(labels == 1, 3.0, -3.0) + rng.normal(0, 0.1, labels.shape) + 100).astype(np.float32)
    drifting = (steady + np.linspace(-1, 1, 64)).astype(np.float32)
    found = []
    for image in (steady, drifting):
        data = opened(tmp_path, (image, labels))
        found.append(measure_greys(data.train, data.index))
    both = opened(tmp_path, (steady, labels), (steady + 1, labels))
    found.append(measure_greys(both.train, both.index))
    between = [greys.between for greys in found if greys is not None]
    assert between[0] < 0.02
    assert between[1] == pytest.approx(0.56, rel=0.1), "the spread of four quarters of a slope of 2"
    assert between[2] == pytest.approx(0.5, rel=0.1), "two volumes, one brighter by 1"
    assert found[0] is not None
    assert found[0].within == pytest.approx(0.1, rel=0.1)


# ---------------------------------------------------------------- several volumes and boxes


def test_one_scaling_and_one_list_of_classes_for_all_volumes(tmp_path: Path) -> None:
    image, labels = scene()
    _, more = scene(classes=4, seed=1)
    data = opened(tmp_path, (image, labels), (image + 100, more), train_roi="0:6,:,:;0:12,:,:")
    assert data.names == ("background", "class 1", "class 2", "class 3")
    pooled = np.concatenate([image[:6].reshape(1, -1), (image + 100).reshape(1, -1)], axis=1)
    expected = Scaling.measure(pooled)
    assert data.scaling.mean[0] == pytest.approx(expected.mean[0], rel=0.01)
    assert data.scaling.std[0] == pytest.approx(expected.std[0], rel=0.01)
    assert [p.counts.shape[1] for p in data.index.parts] == [4, 4]
    np.testing.assert_array_equal(
        data.index.totals, np.bincount(labels[:6].ravel(), minlength=4) + np.bincount(more.ravel(), minlength=4)
    )
    assert [r.weight for r in data.train] == pytest.approx([1 / 3, 2 / 3]), "labelled voxels"


@pytest.mark.parametrize(("weights", "expected"), [(None, (0.25, 0.75)), ("1,1", (0.5, 0.5)), ("4,1", (0.8, 0.2))])
def test_patches_come_from_each_volume_by_its_weight(
    tmp_path: Path, weights: str | None, expected: tuple[float, float]
) -> None:
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[:, :8] = 1
    pairs = [(np.full((16, 16, 16), v, np.uint8), labels) for v in (10, 200)]
    data = opened(tmp_path, *pairs, volume_weights=weights, train_roi="0:4,:,:;0:8,:,:+12:16,:,:")
    assert sum(r.weight for r in data.train) == pytest.approx(1.0)
    sampler = Sampler(data, (4, 4, 4), (4, 4, 4), None, seed=0)
    drawn = [float(sampler.draw(step, 0)[0].mean()) for step in range(600)]
    assert np.mean(np.array(drawn) == 200) == pytest.approx(expected[1], abs=0.06)
    assert np.mean(np.array(drawn) == 10) == pytest.approx(expected[0], abs=0.06)
    names = {sampler.names(step, 1)[0].rsplit("image", 1)[1]: drawn[step] for step in range(40)}
    assert len(names) == len(set(names.values())) == 2, "the names tell the volume of a patch"


def test_labels_of_a_crop_lie_at_their_offset(tmp_path: Path) -> None:
    z, y, x = np.meshgrid(*(np.arange(n) for n in (20, 22, 24)), indexing="ij")
    image = (z * 10000 + y * 100 + x).astype(np.float32)
    labels = np.random.default_rng(0).integers(0, 2, (6, 8, 10)).astype(np.uint8)
    for axis in ("z", "y"):
        data = opened(tmp_path, (image, labels), offset="5,6,7", dims=2, axis=axis, train_roi="1:6,:,:")
        region = data.train[0]
        inside = np.moveaxis(image[6:11, 6:14, 7:17], "zyx".index(axis), 0)
        np.testing.assert_array_equal(region.read_image(region.box)[0], inside)
        np.testing.assert_array_equal(region.read_labels(region.box), np.moveaxis(labels[1:], "zyx".index(axis), 0))


def test_a_mask_says_what_counts_as_labelled(tmp_path: Path) -> None:
    image, labels = scene()
    mask = np.zeros(SHAPE, np.float32)
    mask[:, :10] = 0.5
    data = opened(tmp_path, (image, labels), mask=store(tmp_path / "mask", mask, None))
    np.testing.assert_array_equal(data.index.totals, np.bincount(labels[:, :10].ravel()))
    seen = data.train[0].read_labels(Box.of(SHAPE))
    np.testing.assert_array_equal(seen[:, :10], labels[:, :10])
    assert (seen[:, 10:] == IGNORED).all()
    wide = opened(tmp_path, (image, labels), mask=store(tmp_path / "mask2", mask, None), ignore=1000)
    np.testing.assert_array_equal(wide.index.totals, data.index.totals)


def test_a_volume_may_only_validate(tmp_path: Path) -> None:
    pair = scene()
    data = opened(tmp_path, pair, pair, train_roi=":,:,:;none", val_roi="none;0:4,:,:+6:8,:,:")
    assert boxes_of(data.train, 0) == ["0:12,0:48,0:40"]
    assert boxes_of(data.val, 1) == ["0:4,0:48,0:40", "6:8,0:48,0:40"]
    assert len(data.train) == 1
    assert len(data.val) == 2


IMAGE, LABELS = scene()
ROI: dict[str, Any] = {"train_roi": "0:8,:,:", "val_roi": "9:12,:,:"}
EMPTY = np.where(np.arange(12)[:, None, None] < 9, LABELS, 255).astype(np.uint8)

EVERY_FOURTH = np.where(np.arange(12)[:, None, None] % 4 == 0, LABELS, 255).astype(np.uint8)
COLOURS = np.stack([IMAGE] * 3)

REFUSED: list[tuple[str, list[tuple[Any, Any]], dict[str, Any], type[InputError], str]] = [
    ("shape", [(IMAGE, LABELS[1:])], {}, VolumeError, r"have shape \(11, 48, 40\), the image .*--offset"),
    ("offset", [(IMAGE, LABELS[1:])], {"offset": "2,0,0"}, VolumeError, r"reach to \(13, 48, 40\), beyond the image"),
    ("float labels", [(IMAGE, LABELS.astype(np.float32))], {}, VolumeError, "classes are whole numbers"),
    ("label beyond", [(IMAGE, LABELS * 4)], {"classes": "a,b"}, VolumeError, "label 4 in the training region"),
    ("objects", [(IMAGE, LABELS.astype(np.uint16) * 5000)], {}, VolumeError, "look like object numbers"),
    ("negative", [(IMAGE, -LABELS.astype(np.int16))], {}, VolumeError, "label -1"),
    ("unlabelled", [(IMAGE, np.full_like(LABELS, 255))], {}, VolumeError, "training region holds no labelled voxel"),
    ("unlabelled box", [(IMAGE, EMPTY)], {"train_roi": "0:8,:,:+9:12,:,:"}, VolumeError,
     "training region holds no labelled voxel: every label of .* in 9:12,0:48,0:40 is 255"),
    ("nothing to validate", [(IMAGE, EMPTY)], ROI, VolumeError, "validation region holds no labelled voxel"),
    ("overlap", [(IMAGE, LABELS)], ROI | {"val_roi": "7:9,:,:"}, SpecError, "share 7:8,0:48,0:40"),
    ("overlap of boxes", [(IMAGE, LABELS)], {"train_roi": "0:4,:,:+3:5,:,:"}, SpecError, "share 3:4,.*count twice"),
    ("overlap by offset", [(IMAGE, LABELS[2:]), (IMAGE, LABELS[:6])],
     {"offset": "2,0,0;0,0,0", "train_roi": "0:4,:,:;none", "val_roi": "none;0:3,:,:", "same": True}, SpecError,
     r"--train-roi 0:4,0:48,0:40 and --val-roi 0:3,0:48,0:40 share 0:1,0:48,0:40"),
    ("listed twice", [(IMAGE, LABELS), (IMAGE, LABELS)], {"folds": 2, "same": True}, SpecError, "is listed twice"),
    ("malformed region", [(IMAGE, LABELS)], {"train_roi": "0:8"}, SpecError, "needs one each for z, y, x"),
    ("outside", [(IMAGE, LABELS)], ROI | {"val_roi": "9:13,:,:"}, SpecError, "is not inside 0:12"),
    ("no region at all", [(IMAGE, LABELS)], {"train_roi": "none"}, SpecError, "--train-roi is none for every volume"),
    ("one class", [(IMAGE, LABELS * 0)], {"classes": "a"}, SpecError, "two are the least"),
    ("absent class", [(IMAGE, LABELS)], {"classes": "a,b,c"}, VolumeError, "class 'c' has no labelled voxel in the"),
    ("one slice", [(IMAGE, np.where(np.arange(12)[:, None, None] == 5, LABELS, 255).astype(np.uint8))],
     {"split": 0.5, "dims": 2}, SpecError, "--split 0.5: 1 slice holds labels"),
    ("fewer slices than folds", [(IMAGE, EVERY_FOURTH)],
     {"folds": 4, "dims": 2}, SpecError, "--folds 4: only 3 slice.*say --folds 3 or fewer"),
    ("channels", [(IMAGE, LABELS), (COLOURS, LABELS)], {}, VolumeError, r"1 channel\(s\), image .* 3: one"),
    ("only NaN", [(np.full(SHAPE, np.nan, np.float32), LABELS)], {}, VolumeError, "no finite value"),
]  # fmt: skip


@pytest.mark.parametrize(("pairs", "options", "kind", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_bad_input_is_refused(
    tmp_path: Path,
    pairs: list[tuple[NDArray[Any], NDArray[Any]]],
    options: dict[str, Any],
    kind: type[InputError],
    message: str,
) -> None:
    options = dict(options)
    same = options.pop("same", False)
    spec = spec_of(tmp_path, *pairs, **options)
    if same:
        spec = spec.model_copy(update={"image": (spec.image[0],) * len(spec.image)})

    def divide() -> None:
        open_data(spec, lambda _: None).folds(spec.folds or 2)

    with pytest.raises(kind, match=message) as caught:
        divide()
    text = str(caught.value)
    assert "\n" not in text
    assert any(part in text for part in ("nothing was trained", "nothing was read", "write it like"))


def physical(path: Path, values: NDArray[Any], size: float | None, **more: Any) -> str:
    """Write an OME-Zarr with cubic voxels of `size` and return its path."""
    axes = "zyx" if values.ndim == 3 else "czyx"
    unit = more.pop("unit", "micrometer")
    attributes = ome.group_attributes(
        axes, voxel_size=(size,) * 3 if size else None, unit=unit if size else None, name="test", **more
    )
    shape = (values.shape[-3], values.shape[-2], values.shape[-1])
    layout = Layout(shape, shape, None, values.dtype, None if values.ndim == 3 else len(values))
    create_array(str(path), layout, attributes).write(Box.of(shape), values)
    return str(path)


def test_voxel_sizes_must_agree_and_are_named(tmp_path: Path) -> None:
    def check(sizes: Sequence[float | None], labels: Sequence[float | None], unit: str | None = "micrometer") -> None:
        folder = tmp_path / str(sum(1 for _ in tmp_path.iterdir()))
        folder.mkdir()
        images = [physical(folder / f"i{i}", IMAGE, s, **({"unit": unit} if i else {})) for i, s in enumerate(sizes)]
        truths = [physical(folder / f"l{i}", LABELS, s, **({"unit": unit} if i else {})) for i, s in enumerate(labels)]
        open_data(TrainSpec.read({"image": images, "labels": truths, "out": "o", "dims": 3}), quiet)

    check([0.5, 0.504], [None, 0.5])
    check([0.5, 500.0], [0.5, 500.0], "nanometer")
    check([0.5, 2.0], [0.5, 2.0], None)
    with pytest.raises(
        VolumeError, match=r"i0 has voxels of 0.5 x 0.5 x 0.5 micrometer, .*i1 of 0.51 x .* 1 % at most"
    ):
        check([0.5, 0.51], [None, None])
    with pytest.raises(VolumeError, match=r"i1 has voxels of 0.5 .*l1 of 0.6"):
        check([0.5, 0.5], [None, 0.6])
    with pytest.raises(VolumeError, match=r"i1 of 0.5 x 0.5 x 0.5 nanometer"):
        check([0.5, 0.5], [None, None], "nanometer")


def test_class_names_come_from_the_labels_and_must_agree(tmp_path: Path) -> None:
    def labelled_as(name: str, *classes: str) -> str:
        return physical(tmp_path / name, LABELS, None, label=ome.label_attributes(classes or None))

    image = store(tmp_path / "image", IMAGE, None)
    plain, two, other = labelled_as("plain"), labelled_as("two", "air", "rock"), labelled_as("other", "air", "ore")
    three = labelled_as("three", "air", "rock", "ore")

    def names(*labels: str, **options: Any) -> tuple[tuple[str, ...], list[str]]:
        said: list[str] = []
        values = {"image": [image] * len(labels), "labels": list(labels), "out": "o", "dims": 3, **options}
        return open_data(TrainSpec.read(values), said.append).names, said

    assert names(plain, two) == (("air", "rock"), [])
    assert names(plain) == (("background", "class 1"), [])
    assert names(two, classes="a,b") == (("a", "b"), [])
    assert names(three) == (
        ("air", "rock", "ore"), ["class 'ore' has no labelled voxel in the training regions: it cannot be learnt"]
    )  # fmt: skip
    with pytest.raises(
        VolumeError, match=r"two have the classes air, rock, labels .*other air, ore: a number must mean"
    ):
        names(plain, two, other)


def test_a_class_that_only_validation_holds_is_told(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[10, :5] = 2
    said: list[str] = []
    open_data(spec_of(tmp_path, (IMAGE, labels), **ROI), said.append)
    assert said == [
        "class 'class 2' has no labelled voxel in the training regions: it cannot be learnt, and its score will be 0"
    ]


# ---------------------------------------------------------------- splits and folds

COUNTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12).map(np.array), min_size=1, max_size=4)


@settings(deadline=None)
@given(COUNTS, st.floats(0.01, 0.99), st.integers(0, 2**31 - 1))
def test_a_split_divides_the_labelled_slices(counts: list[NDArray[np.int64]], share: float, seed: int) -> None:
    places = labelled(counts)
    if len(places) < 2:
        with pytest.raises(SpecError, match="two are the least"):
            draw_slices(counts, share, seed)
        return
    train, val = draw_slices(counts, share, seed)
    assert not train & val
    assert train | val == set(places)
    assert abs(len(train) - share * len(places)) <= 1
    assert train
    assert val
    assert (train, val) == draw_slices(counts, share, seed)


@settings(deadline=None)
@given(COUNTS, st.integers(2, 6))
def test_slabs_cover_every_slice_once_each_with_labels(counts: list[NDArray[np.int64]], folds: int) -> None:
    if len(labelled(counts)) < folds:
        with pytest.raises(SpecError, match="--folds"):
            cut_slabs(counts, folds)
        return
    slabs = cut_slabs(counts, folds)
    assert len(slabs) == folds
    seen = [np.zeros(len(rows), int) for rows in counts]
    for slab in slabs:
        assert sum(int(rows[a:b].sum()) for rows, (a, b) in zip(counts, slab, strict=True)) > 0
        for rows, (a, b) in zip(seen, slab, strict=True):
            rows[a:b] += 1
    assert all((rows == 1).all() for rows in seen)
    order = [(volume, a) for slab in slabs for volume, (a, b) in enumerate(slab) if a < b]
    assert order == sorted(order), "slabs follow each other"


def test_slabs_are_balanced_and_cut_in_the_middle_of_what_is_unlabelled() -> None:
    even = [np.full(100, 5)]
    assert [slab[0] for slab in cut_slabs(even, 4)] == [(0, 25), (25, 50), (50, 75), (75, 100)]
    sparse = np.zeros(100, int)
    sparse[[10, 50, 90]] = 7
    assert [slab[0] for slab in cut_slabs([sparse], 3)] == [(0, 30), (30, 70), (70, 100)]
    heavy = np.array([1, 1, 1, 100])
    assert [slab[0] for slab in cut_slabs([heavy], 3)] == [(0, 2), (2, 3), (3, 4)]
    assert cut_slabs([np.ones(3, int), np.ones(3, int)], 2) == [[(0, 3), (0, 0)], [(3, 3), (0, 3)]]


BOXES = st.lists(
    st.tuples(*[st.tuples(st.integers(0, 6), st.integers(1, 5))] * 3).map(
        lambda s: Box((s[0][0], s[1][0], s[2][0]), (sum(s[0]), sum(s[1]), sum(s[2])))
    ),
    max_size=3,
)


def painted(boxes: Sequence[Box]) -> NDArray[np.int64]:
    seen = np.zeros((12, 12, 12), np.int64)
    for box in boxes:
        seen[box.slices] += 1
    return seen


@settings(deadline=None)
@given(BOXES, st.integers(0, 2), st.sets(st.integers(0, 11)), st.tuples(st.integers(0, 11), st.integers(0, 11)))
def test_parts_of_boxes_are_those_voxels(boxes: list[Box], axis: int, slices: set[int], span: tuple[int, int]) -> None:
    along = np.isin(np.arange(12), list(slices)).reshape([-1 if i == axis else 1 for i in range(3)])
    taken = take_slices(boxes, axis, slices)
    np.testing.assert_array_equal(painted(taken), painted(boxes) * along)
    low, high = sorted(span)
    inside, outside = (take_range(boxes, axis, low, high, inside=i) for i in (True, False))
    np.testing.assert_array_equal(painted(inside) + painted(outside), painted(boxes))
    within = ((np.arange(12) >= low) & (np.arange(12) < high)).reshape([-1 if i == axis else 1 for i in range(3)])
    np.testing.assert_array_equal(painted(inside), painted(boxes) * within)
    assert all(box.size for box in [*taken, *inside, *outside])
    for box in boxes:
        own = sorted(b.start[axis] for b in take_slices([box], axis, slices))
        assert all(b - a > 1 for a, b in pairwise(own)), "neighbours are one box"


def test_a_split_of_pictures_trains_on_a_share_of_the_labelled_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (20, 16, 16)).astype(np.uint8)
    labels[[3, 7]] = 255
    picture = rng.integers(0, 255, (3, 20, 16, 16)).astype(np.uint8)
    for axis in ("z", "y"):
        turn = "zyx".index(axis)
        stored = np.moveaxis(picture, 1, 1 + turn), np.moveaxis(labels, 0, turn)
        data = opened(tmp_path, stored, split=0.8, seed=1, dims=2, axis=axis)
        train, val = (
            {i for r in part for i in range(r.box.start[0], r.box.stop[0])} for part in (data.train, data.val)
        )
        assert len(train) == 14
        assert train | val == set(range(20)) - {3, 7}
        assert not train & val
        assert int(data.index.totals.sum()) == 14 * 256
        sampler = Sampler(data, (1, 8, 8), (1, 8, 8), None, seed=0)
        images, found = sampler.batch(0, 6)
        assert images.shape == (6, 3, 1, 8, 8)
        assert found.shape == (6, 1, 8, 8)
        again, other = (opened(tmp_path, stored, split=0.8, seed=s, dims=2, axis=axis) for s in (1, 2))
        assert boxes_of(again.train) == boxes_of(data.train)
        assert boxes_of(other.train) != boxes_of(data.train)


def test_a_split_for_a_3d_network_is_told_what_it_does(tmp_path: Path) -> None:
    said: list[str] = []
    data = open_data(spec_of(tmp_path, (IMAGE, LABELS), split=0.5, axis="x"), said.append)
    assert len(said) == 1
    assert "a 3D network sees each run of them alone" in said[0]
    assert sum(r.box.shape[2] for r in data.train) == sum(r.box.shape[2] for r in data.val) == 20


def test_folds_train_on_all_slabs_but_one(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, (12, 10, 30)).astype(np.uint8)
    labels[:, :5] = 255
    image = labels * 100
    options: dict[str, Any] = {"train_roi": "0:12,:,0:20", "dims": 2}
    whole = opened(tmp_path, (image, labels), **options)
    folds = whole.folds(4, quiet)
    assert [boxes_of(f.val) for f in folds] == [[f"{i}:{i + 3},0:10,0:20"] for i in (0, 3, 6, 9)]
    assert boxes_of(folds[1].train) == ["0:3,0:10,0:20", "6:12,0:10,0:20"]
    for fold in folds:
        assert fold.scaling == whole.scaling
        assert int(fold.index.totals.sum()) == 9 * 5 * 20
        assert sum(r.weight for r in fold.train) == pytest.approx(1.0)
    solid = opened(tmp_path, (image, labels), dims=3).folds(3, quiet)
    assert [boxes_of(f.val) for f in solid] == [[f"0:12,0:10,{i}:{i + 10}"] for i in (0, 10, 20)], "the longest axis"
    pair = opened(tmp_path, (image, labels), (image, labels), dims=2, volume_weights="1,3").folds(2, quiet)
    assert [(r.volume, str(r.box)) for r in pair[0].val] == [(0, "0:12,0:10,0:30")], "a whole volume"
    assert [(r.volume, r.weight) for r in pair[0].train] == [(1, 1.0)]


def test_what_a_fold_cannot_learn_is_told_and_parts_without_labels_are_dropped(tmp_path: Path) -> None:
    labels = np.full((8, 8, 8), 255, np.uint8)
    labels[:4, :4], labels[4:, 4:] = 1, 0
    labels[5, 5, 5] = 2
    data = opened(tmp_path, (labels, labels), train_roi=":,0:4,:+:,4:8,:", dims=2)
    said: list[str] = []
    first, second = data.folds(2, said.append)
    assert boxes_of(first.train) == boxes_of(second.val) == ["4:8,4:8,0:8"]
    assert boxes_of(second.train) == boxes_of(first.val) == ["0:4,0:4,0:8"]
    assert [line.split(" has no")[0] for line in said] == ["class 'class 1'", "class 'background'", "class 'class 2'"]


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("how", [STILL, BENT])
@pytest.mark.parametrize("answer", [(16, 16, 16), (8, 12, 12)])
def test_image_and_labels_change_their_shape_together(tmp_path: Path, how: Augmentation, answer: Triple) -> None:
    z, y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in (40, 44, 48)), indexing="ij")
    image = 2 * z + y + 0.5 * x
    data = opened(tmp_path, (image, image.astype(np.uint8)))
    sampler = Sampler(data, (16, 16, 16), answer, how, seed=3)
    seen = set()
    for step in range(40):
        values, labels = sampler.draw(step, 0)
        assert values.shape == (1, 16, 16, 16)
        assert labels.shape == answer
        m = [(16 - n) // 2 for n in answer]
        inner = values[0][m[0] : 16 - m[0], m[1] : 16 - m[1], m[2] : 16 - m[2]]
        known = labels != IGNORED
        assert known.float().mean() > 0.5
        # A label is the image rounded down at the nearest voxel: at most 1 + half a voxel's slope away.
        away = (inner - labels)[known]
        assert float(away.min()) > -2.0
        assert float(away.max()) < 3.0
        if how is STILL:
            assert float(away.min()) >= 0.0
            assert float(away.max()) < 1.0
            gradient = [int(torch.sign(values[0].diff(dim=i).mean())) for i in range(3)]
            sizes = [round(float(values[0].diff(dim=i).abs().mean()), 1) for i in range(3)]
            seen.add((*gradient, *sizes))
    if how is STILL:
        assert len(seen) > (15 if answer == (16, 16, 16) else 6), "flips and turns of three axes"


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(*[st.tuples(st.integers(0, 16), st.integers(3, 9))] * 3), min_size=1, max_size=3),
    st.sampled_from([((8, 8, 8), (8, 8, 8)), ((12, 12, 12), (4, 4, 4)), ((1, 16, 16), (1, 16, 16))]),
    st.booleans(),
    st.integers(0, 99),
)
def test_nothing_outside_the_regions_is_ever_seen(
    tmp_path_factory: pytest.TempPathFactory,
    spans: list[tuple[tuple[int, int], ...]],
    sides: tuple[Triple, Triple],
    bent: bool,
    seed: int,
) -> None:
    boxes: list[Box] = []
    for (z, d), (y, h), (x, w) in spans:
        box = Box((z, y, x), (z + d, y + h, x + w))
        if not any(box.intersect(other).size for other in boxes):
            boxes.append(box)
    image, labels = np.full((25, 25, 25), 1e5, np.float32), np.full((25, 25, 25), 7, np.uint8)
    for number, box in enumerate(boxes):
        image[box.slices], labels[box.slices] = number, number
    data = opened(
        tmp_path_factory.mktemp("leak"), (image, labels), train_roi="+".join(map(str, boxes)), classes=None,
        dims=2 if sides[0][0] == 1 else 3,
    )  # fmt: skip
    sampler = Sampler(data, *sides, BENT if bent else STILL, seed)
    for step in range(6):
        values, found = sampler.draw(step, 1)
        assert len(torch.unique((values * 1000).round())) == 1, "one region, continued outwards"
        number = round(float(values.max()))
        assert number < len(boxes)
        assert set(torch.unique(found).tolist()) <= {IGNORED, number}
        assert number in found


def test_rare_classes_are_drawn_often_and_every_patch_can_be_made_again(tmp_path: Path) -> None:
    labels = np.zeros((4, 128, 128), np.uint8)
    labels[2, 100:104, 20:24] = 1
    data = opened(tmp_path, (labels.astype(np.float32), labels))
    sides = (1, 16, 16)
    sampler = Sampler(data, sides, sides, STILL, seed=0)
    hits = sum(bool((sampler.draw(step, 0)[1] == 1).any()) for step in range(60))
    assert hits > 20
    again = Sampler(data, sides, sides, STILL, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(sampler.batch(5, 3), again.batch(5, 3), strict=True))
    assert not torch.equal(sampler.batch(5, 3)[0], sampler.batch(6, 3)[0])


def test_classes_are_drawn_by_the_root_of_their_size(tmp_path: Path) -> None:
    labels = np.zeros((1, 200, 200), np.uint8)
    labels[:, :90, :100] = 1
    labels[:, 100:109, 100:110] = 2
    data = opened(tmp_path, (labels, labels), dims=2)
    sampler = Sampler(data, (1, 8, 8), (1, 8, 8), None, seed=0)
    drawn = [sampler._pick(step, 1, np.random.default_rng(step))[2] for step in range(2000)]
    shares = np.bincount(drawn, minlength=3) / 2000
    sizes = np.bincount(labels.ravel()) / labels.size
    assert shares == pytest.approx(sizes / 2 + np.array([0, 10 / 11, 1 / 11]) / 2, abs=0.03)
    assert shares[2] > 0.03


def test_every_voxel_of_a_class_is_found_as_often(tmp_path: Path) -> None:
    labels = np.zeros((4, 8, 8), np.uint8)
    labels[1, 2, 3] = labels[3, 7, 7] = labels[0, 0, 0] = 1
    region = opened(tmp_path, (labels, labels)).train[0]
    rng = np.random.default_rng(0)
    tile = Box((0, 0, 0), (4, 8, 8))
    found = [region.find(tile, 1, rng) for _ in range(900)]
    assert {place: found.count(place) > 240 for place in found} == {(1, 2, 3): True, (3, 7, 7): True, (0, 0, 0): True}
    part = Box((1, 2, 2), (4, 8, 8))
    assert {region.find(part, 1, rng) for _ in range(50)} == {(1, 2, 3), (3, 7, 7)}


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 50))
def test_workers_share_the_patches_of_a_step(tmp_path_factory: pytest.TempPathFactory, size: int, world: int, step: int
) -> None:  # fmt: skip
    data = opened(tmp_path_factory.mktemp("ranks"), scene())
    sampler = Sampler(data, (1, 8, 8), (1, 8, 8), STILL, seed=0)
    whole = sampler.batch(step, size)
    for rank in range(world):
        images, labels = sampler.batch(step, size, rank, world)
        assert torch.equal(images, whole[0][rank::world])
        assert torch.equal(labels, whole[1][rank::world])


def test_a_volume_larger_than_the_cache_is_worked_through_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = (np.random.default_rng(0).random((64, 128, 128)) < 0.01).astype(np.uint8)
    assert slots_for(opened(tmp_path, (labels, labels)).train) is None
    monkeypatch.setattr(data_module, "_CACHE_BYTES", 300_000)
    monkeypatch.setattr("volseg.training.view._TILE_VOXELS", 16**3)
    data = opened(tmp_path, (labels, labels))
    slots = slots_for(data.train)
    assert slots is not None
    sampler = Sampler(data, (8, 8, 8), (8, 8, 8), None, seed=0)
    picks = [
        sampler._pick(step, 4, np.random.default_rng([step, number]))[1] for step in range(300) for number in range(4)
    ]

    def tiles(some: list[Box]) -> set[Triple]:
        return {box.start for box in some}

    assert len(tiles(picks[:40])) <= 2 * slots < len(tiles(picks)), "few at a time, many over all"


# ---------------------------------------------------------------- batches ahead


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_batches_come_in_order_whatever_the_number_of_threads(
    tmp_path: Path, threads: int, rank: int, world: int
) -> None:
    data = opened(tmp_path, scene())
    sampler = Sampler(data, (4, 16, 16), (4, 16, 16), dataclasses.replace(BENT, warp_probability=0.5), seed=0)
    patches = Prefetcher(sampler, 3, 5, rank, world, threads)
    for step in range(5, 25):
        images, labels = patches.next()
        expected = sampler.batch(step, 3, rank, world)
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])
    assert patches.waited > 0
    patches.close()


def test_what_fails_while_patches_are_made_is_raised_where_they_are_used(tmp_path: Path) -> None:
    image, labels = scene()
    values = image.astype(np.float32)
    values[:, 20] = np.inf
    data = opened(tmp_path, (values, labels))
    sides = (1, 48, 40)
    patches = Prefetcher(Sampler(data, sides, sides, None, 0), 2, 0, threads=2)
    with pytest.raises(VolumeError, match=r"image .*image0-0.zarr holds NaN or Inf in \d+:\d+,0:48,0:40"):
        patches.next()
    patches.close()


def test_huge_numbers_are_finite(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, (4, 8, 8)).astype(np.uint8)
    data = opened(tmp_path, (np.full((4, 8, 8), 3e38, np.float32), labels))
    assert data.train[0].read_image(Box.of((4, 8, 8))).max() == pytest.approx(1e6)
