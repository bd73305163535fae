"""The bits of a result depend on input, model and window, and on nothing else; and they are the right ones."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

from tests.support import Case, labels_of, long, make_bundle, probabilities_of, segment, smooth, store
from volseg.errors import PlanError
from volseg.execution import segment as segment_module
from volseg.execution.front import InOrder
from volseg.geometry import Box, Triple
from volseg.models.bundle import load_networks, save_bundle

WINDOW: dict[str, Any] = {"overlap": 0.25, "probabilities": True}
Bits = tuple[NDArray[Any], NDArray[np.uint8]]


def bits(case: Case, output: Path, **options: Any) -> Bits:
    report = segment(case, output, **{**WINDOW, **options})
    assert report["status"] == "complete"
    assert report["blocks"]["computed"] == report["blocks"]["total"]
    return labels_of(output), probabilities_of(output)


def assert_same(a: Bits, b: Bits) -> None:
    for first, second in zip(a, b, strict=True):
        assert first.dtype == second.dtype
        np.testing.assert_array_equal(first, second)


@pytest.fixture(scope="module")
def reference(case: Case) -> Bits:
    """One block, no Ray."""
    found = bits(case, case.folder / "whole.zarr", block="48,48,60")
    # Comparisons mean nothing where one class wins everywhere.
    assert set(np.unique(found[0])) == {0, 1, 2}
    return found


# ---------------------------------------------------------------- layout invariance


@pytest.mark.parametrize(
    "options",
    [
        long({"block": "12,24,36"}),
        {"block": "16,16,16"},
        long({"block": "40,7,50"}),
        long({"block": "24,24,24", "chunks": "12,8,6"}),
        long({"block": "24,32,16", "shards": "12,16,16"}),
        {"block": "24,32,16", "shards": "24,16,8", "chunks": "8,4,8"},
    ],
    ids=str,
)
def test_blocks_chunks_and_shards(case: Case, reference: Bits, tmp_path: Path, options: dict[str, str]) -> None:
    found = bits(case, tmp_path / "out.zarr", **options)
    assert_same(found, reference)
    array = zarr.open_array(f"{tmp_path}/out.zarr/0", mode="r")
    side = [int(n) for n in options["block"].split(",")]
    assert array.shards is not None
    assert all(b % s == 0 for b, s in zip(side, array.shards, strict=True))
    if "shards" in options:
        assert list(array.shards) == [int(n) for n in options["shards"].split(",")]
    if "chunks" in options:
        assert list(array.chunks) == [int(n) for n in options["chunks"].split(",")]


@pytest.mark.ray
@pytest.mark.parametrize(("workers", "block"), [long(1, "12,24,36"), (2, "16,16,16"), long(3, "24,32,16")])
@pytest.mark.usefixtures("one_ray")
def test_ray_workers(case: Case, reference: Bits, tmp_path: Path, workers: int, block: str) -> None:
    assert_same(bits(case, tmp_path / "out.zarr", executor="ray", workers=workers, block=block), reference)


@pytest.mark.ray
@pytest.mark.usefixtures("one_ray")
def test_ray_workers_flat(flat_case: Case, tmp_path: Path) -> None:
    alone = bits(flat_case, tmp_path / "a.zarr")
    assert set(np.unique(alone[0])) == {0, 1}
    assert_same(bits(flat_case, tmp_path / "b.zarr", executor="ray", workers=2, block="5,13,22"), alone)


def test_order_of_blocks(case: Case, reference: Bits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def backwards(pending: Iterable[int]) -> InOrder:
        asked.extend(reversed(list(pending)))
        return InOrder(asked)

    monkeypatch.setattr(segment_module, "InOrder", backwards)
    assert_same(bits(case, tmp_path / "out.zarr", block="16,16,24", seams="off"), reference)
    assert asked == sorted(asked, reverse=True)
    assert len(asked) > 2


def test_place_in_the_batch(case: Case, tmp_path: Path) -> None:
    """With batches of 3, other blocks put the same patch at another place beside other patches."""
    whole = bits(case, tmp_path / "a.zarr", block="48,48,60", batch=3)
    assert_same(bits(case, tmp_path / "b.zarr", block="16,24,20", batch=3), whole)


@pytest.mark.parametrize(
    "network", [{"norm": "instance"}, long({"norm": "group", "widths": (8, 16)}), long({"residual": True})]
)
def test_networks(case: Case, tmp_path: Path, network: dict[str, Any]) -> None:
    other = Case(case.image, make_bundle(tmp_path / "bundle", classes=4, **network), tmp_path)
    whole = bits(other, tmp_path / "a.zarr", block="48,48,60")
    assert len(np.unique(whole[0])) > 2
    assert_same(bits(other, tmp_path / "b.zarr", block="20,24,32"), whole)


@pytest.mark.parametrize("roi", ["7:33,5:40,11:38", "20:21,:,49:50", ":,13:14,:"])
@pytest.mark.parametrize("block", ["48,48,60", "16,24,20"])
def test_region_equals_the_crop(case: Case, reference: Bits, tmp_path: Path, roi: str, block: str) -> None:
    labels, probabilities = bits(case, tmp_path / "out.zarr", roi=roi, block=block)
    region = Box.parse(roi, (40, 45, 50)).slices
    np.testing.assert_array_equal(labels[region], reference[0][region])
    np.testing.assert_array_equal(probabilities[:, *region], reference[1][:, *region])
    outside = np.ones(labels.shape, bool)
    outside[region] = False
    assert not labels[outside].any()
    assert not probabilities[:, outside].any()


def test_labels_agree_with_probabilities(reference: Bits) -> None:
    labels, probabilities = reference
    total = probabilities.sum(axis=0, dtype=int)
    assert abs(total - 255).max() <= 1
    # Rounding to uint8 can make a tie, never another winner.
    won = np.take_along_axis(probabilities, labels[None].astype(int), axis=0)[0]
    np.testing.assert_array_equal(won, probabilities.max(axis=0))


# ---------------------------------------------------------------- against an independent reference


def origins(size: int, patch: int, overlap: float) -> list[int]:
    stride = max(1, round(patch * (1 - overlap)))
    last = max(0, size - patch)
    return sorted({*range(0, last, stride), last})


def blended(case: Case, patch: Triple, overlap: float, blend: str, flat: int | None) -> NDArray[np.float64]:
    """Blend class probabilities (c, z, y, x) in float64, over a 3D sum of weights; flat: slice axis of a 2D network."""
    manifest, (network,) = load_networks(case.bundle)
    raw = np.asarray(zarr.open_array(case.image, mode="r")[...], np.float64)
    scaling = manifest.scaling
    scaled = (np.clip(raw, scaling.low[0], scaling.high[0]) - scaling.mean[0]) / scaling.std[0]
    padded = np.pad(scaled, [(0, max(0, p - s)) for p, s in zip(patch, raw.shape, strict=True)], mode="edge")
    weight = np.ones(patch)
    for axis, side in enumerate(patch):
        line = np.ones(side)
        if blend == "gaussian":
            line = np.maximum(np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / (side / 8)) ** 2), 1e-3)
        weight *= np.expand_dims(line, [a for a in range(3) if a != axis])
    classes = len(manifest.classes)
    total, norm = np.zeros((classes, *padded.shape)), np.zeros(padded.shape)
    for corner in product(*(origins(s, p, overlap) for s, p in zip(raw.shape, patch, strict=True))):
        part = tuple(slice(o, o + p) for o, p in zip(corner, patch, strict=True))
        x = torch.from_numpy(padded[part].astype(np.float32))[None, None]
        with torch.inference_mode():
            logits = network(x) if flat is None else network(x.squeeze(flat + 2)).unsqueeze(flat + 2)
        values = logits[0].double()
        chance = torch.softmax(values, 0) if classes > 2 else torch.sigmoid(torch.cat([-values, values]))
        total[:, *part] += chance.numpy() * weight
        norm[part] += weight
    result: NDArray[np.float64] = (total / norm)[:, *(slice(n) for n in raw.shape)]
    return result


def assert_close(found: Bits, expected: NDArray[np.float64]) -> None:
    labels, probabilities = found
    assert np.abs(probabilities - expected * 255).max() < 1
    winner = expected.argmax(axis=0)
    second, first = np.sort(expected, axis=0)[-2:]
    # fp32 forwards of another memory layout differ in the last bits: only near-ties may fall the other way.
    clear = first - second > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(labels[clear], winner[clear])


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, long(0.9)])
def test_blending_is_right(tmp_path: Path, blend: str, overlap: float) -> None:
    image = store(tmp_path / "image.zarr", smooth((15, 21, 13), seed=3))
    case = Case(image, make_bundle(tmp_path / "bundle"), tmp_path)
    found = bits(case, tmp_path / "a.zarr", overlap=overlap, blend=blend, patch="12,16,8", block="15,24,16")
    assert_close(found, blended(case, (12, 16, 8), overlap, blend, None))
    assert_same(bits(case, tmp_path / "b.zarr", overlap=overlap, blend=blend, patch="12,16,8", block="16,11,10"), found)


@pytest.mark.parametrize(("axis", "patch"), [("z", (1, 16, 12)), ("y", (16, 1, 12)), ("x", (16, 12, 1))])
def test_slice_axes(flat_case: Case, tmp_path: Path, axis: str, patch: Triple) -> None:
    text = ",".join(map(str, patch))
    found = bits(flat_case, tmp_path / "a.zarr", axis=axis, patch=text, overlap=0.5)
    assert_close(found, blended(flat_case, patch, 0.5, "gaussian", "zyx".index(axis)))
    assert_same(bits(flat_case, tmp_path / "b.zarr", axis=axis, patch=text, overlap=0.5, block="7,13,11"), found)


def test_slice_axis_of_the_bundle(flat_case: Case, tmp_path: Path) -> None:
    """A bundle trained along y keeps its axis, and its patch turns with another one."""
    bundle = make_bundle(tmp_path / "bundle", dims=2, classes=2, patch=(12, 1, 16), axis="y")
    case = Case(flat_case.image, bundle, tmp_path)
    own = bits(case, tmp_path / "own.zarr")
    assert_close(own, blended(case, (12, 1, 16), 0.25, "gaussian", 1))
    assert_same(bits(case, tmp_path / "named.zarr", axis="y", patch="12,1,16"), own)
    assert_close(bits(case, tmp_path / "turned.zarr", axis="z"), blended(case, (1, 12, 16), 0.25, "gaussian", 0))


def test_threshold_decides_between_two(flat_case: Case, tmp_path: Path) -> None:
    _, probabilities = bits(flat_case, tmp_path / "a.zarr")
    for threshold in (round(float(q), 3) for q in np.quantile(probabilities[1] / 255, (0.2, 0.7))):
        labels, same = bits(flat_case, tmp_path / f"{threshold}.zarr", threshold=threshold)
        np.testing.assert_array_equal(same, probabilities)
        chance = probabilities[1] / 255
        clear = abs(chance - threshold) > 0.003
        np.testing.assert_array_equal(labels[clear], (chance > threshold)[clear])
        assert 0.2 < labels.mean() < 0.9


def test_threshold_needs_two_classes(case: Case, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"threshold 0.4 was given, but the model has 3 classes"):
        segment(case, tmp_path / "out.zarr", threshold=0.4)
    assert not list(tmp_path.iterdir())


def test_ties_go_to_the_lowest_class(case: Case, tmp_path: Path) -> None:
    """A network whose classes 1 and 2 always agree never answers 2."""
    bundle = make_bundle(tmp_path / "bundle")
    manifest, (network,) = load_networks(bundle)
    state = network.state_dict()
    for name in ("head.conv.weight", "head.conv.bias"):
        state[name][2] = state[name][1]
    save_bundle(bundle, [network], manifest, overwrite=True)
    labels, probabilities = bits(Case(case.image, bundle, tmp_path), tmp_path / "out.zarr")
    np.testing.assert_array_equal(probabilities[1], probabilities[2])
    assert set(np.unique(labels)) == {0, 1}


def test_more_than_256_classes(tmp_path: Path) -> None:
    image = store(tmp_path / "image.zarr", smooth((8, 9, 10), seed=4))
    case = Case(image, make_bundle(tmp_path / "bundle", classes=300, patch=(8, 8, 8)), tmp_path)
    whole = bits(case, tmp_path / "a.zarr")
    assert whole[0].dtype == np.uint16
    assert whole[0].max() > 255
    assert whole[1].shape == (300, 8, 9, 10)
    assert_same(bits(case, tmp_path / "b.zarr", block="8,4,5"), whole)
