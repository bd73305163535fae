"""Suggestions: what the network has never seen comes first, suggestions are spread, streaming changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from tests.support import store
from volseg.analysis import candidates as module
from volseg.analysis import counts
from volseg.analysis.candidates import Candidates, describe
from volseg.analysis.suggest import labelled_slices, suggest
from volseg.errors import InputError, VolumeError
from volseg.geometry import Box
from volseg.storage.volume import Volume, open_volume

SHAPE = (40, 24, 32)


def volumes(path: Path, chance: NDArray[Any], image: NDArray[Any]) -> tuple[Volume, Volume]:
    """Store an image and the probabilities of two classes, `chance` being that of class 1, and open both."""
    one = np.round(255 * chance).astype(np.uint8)
    array = zarr.create_array(str(path / "chances"), shape=(2, *one.shape), chunks=(1, 8, 16, 16), dtype="uint8")
    array[...] = np.stack([255 - one, one])
    return open_volume(str(path / "chances")), open_volume(store(path / "image", image, chunks=(8, 24, 16)))


def sure(seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a chance near 0 or 1 everywhere, with a little doubt, and grey noise about 100."""
    generator = np.random.default_rng(seed)
    chance = np.where(generator.random(SHAPE) < 0.3, 0.97, 0.03) + generator.uniform(-0.02, 0.02, SHAPE)
    return chance, generator.normal(100, 10, SHAPE)


def test_a_slab_that_the_network_never_saw_comes_first(tmp_path: Path) -> None:
    chance, image = sure()
    chance[25:31] = np.random.default_rng(1).uniform(0.3, 0.7, (6, *SHAPE[1:]))
    image[25:31] += 60
    found = suggest(*volumes(tmp_path, chance, image), n=3, labelled=[2, 20, 38])
    assert 25 <= found[0]["slice"] < 31
    assert found[0]["box"] == f"{found[0]['slice']}:{found[0]['slice'] + 1},0:24,0:32"
    assert found[0]["uncertainty"] > 0.9
    assert "unlike what is labelled" in found[0]["why"]
    assert "grey values" in found[0]["why"]
    assert [f["score"] for f in found] == sorted((f["score"] for f in found), reverse=True)


def test_uncertainty_alone_chooses_among_slices_of_one_kind(tmp_path: Path) -> None:
    """A tenth of unsure voxels is enough: the sure background of the slice does not hide them."""
    chance, image = sure()
    chance[17, :5, :16] = 0.5
    found = suggest(*volumes(tmp_path, chance, image), n=1)
    assert (found[0]["axis"], found[0]["slice"]) == ("z", 17)
    assert found[0]["uncertainty"] == pytest.approx(1.0, abs=0.01)


def test_suggestions_are_spread_and_keep_off_what_is_labelled(tmp_path: Path) -> None:
    found = suggest(*volumes(tmp_path, *sure()), n=3, labelled=[0, 13])
    slices = sorted([0, 13, *(f["slice"] for f in found)])
    # 40 slices, five of them labelled or suggested: evenly spread they would lie 8 apart.
    assert min(np.diff(slices)) >= 5
    assert all("far from" in f["why"] for f in found)


def test_nothing_is_suggested_twice_nor_what_is_labelled(tmp_path: Path) -> None:
    chance = np.zeros(SHAPE)
    chance[17] = 0.5
    opened = volumes(tmp_path, chance, np.full(SHAPE, 7))
    found = [f["slice"] for f in suggest(*opened, n=3)]
    assert found[0] == 17
    assert len(set(found)) == 3
    assert suggest(*opened, n=1, labelled=[17])[0]["slice"] != 17


def test_two_new_kinds_get_a_suggestion_each(tmp_path: Path) -> None:
    chance, image = sure()
    for start, grey in ((8, 60), (28, -60)):
        chance[start : start + 5] = np.random.default_rng(start).uniform(0.35, 0.65, (5, *SHAPE[1:]))
        image[start : start + 5] += grey
    found = suggest(*volumes(tmp_path, chance, image), n=2, labelled=[0, 20, 39])
    assert {f["slice"] // 20 for f in found} == {0, 1}
    assert all(8 <= f["slice"] % 20 < 13 for f in found)


def test_boxes_of_a_region_along_another_axis(tmp_path: Path) -> None:
    chance, image = sure()
    chance[16:24, 14:22, 8:16] = 0.5
    opened = volumes(tmp_path, chance, image)
    region = Box((0, 4, 0), SHAPE)
    found = suggest(*opened, n=1, box=(8, 8, 8), region=region)
    assert found[0]["box"] == "16:24,14:22,8:16"
    assert "slice" not in found[0]
    again = suggest(*opened, n=1, box=(8, 8, 8), region=region, labelled=[Box((17, 15, 9), (18, 16, 10))])
    assert again[0]["box"] != found[0]["box"]
    across = suggest(*opened, n=2, axis="x", labelled=[0])
    assert {f["axis"] for f in across} == {"x"}
    assert 8 <= across[0]["slice"] < 16
    assert across[0]["box"].startswith("0:40,0:24,")


@pytest.mark.parametrize(("box_voxels", "piece"), [(2**22, 2**20), (700, 300)])
def test_descriptions_equal_a_direct_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, box_voxels: int, piece: int
) -> None:
    monkeypatch.setattr(counts, "BOX_VOXELS", box_voxels)
    monkeypatch.setattr(module, "PIECE", piece)
    chance, image = sure()
    chance[5:20] = np.random.default_rng(4).random((15, *SHAPE[1:]))
    probabilities, opened = volumes(tmp_path, chance, image)
    chosen = Candidates.cut(Box((1, 0, 2), SHAPE), (9, 7, 10), 0)
    # What is left over lies on both sides alike: (39, 24, 30) less (36, 21, 30).
    assert (chosen.region, chosen.grid) == (Box((2, 1, 2), (38, 22, 32)), (4, 3, 3))
    found = describe(probabilities, opened, chosen)
    shares = np.round(255 * chance) / 255
    both = np.stack([1 - shares, shares])
    entropy = -(both * np.log2(np.maximum(both, 1e-12))).sum(axis=0)
    for number in range(chosen.count):
        inside = chosen.box(number).slices
        upper = np.sort(entropy[inside].reshape(-1))[-63:]
        assert found.uncertainty[number] == pytest.approx(upper.mean(), abs=1.5 / module.BINS)
        assert found.classes[number, 1] == pytest.approx((shares[inside] > 0.5).mean())
        grey = image.astype(np.uint8)[inside]
        assert found.greys[number].sum() == pytest.approx(1)
        assert (found.greys[number] * np.arange(16)).sum() == pytest.approx((grey.mean() - 74) / 52 * 16, abs=1.2)
        corner = entropy[inside][:3, :3, :4]
        assert found.places[number, 0] == pytest.approx(corner.mean(), abs=1e-5)


def test_progress_and_order_are_the_same_again(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    opened = volumes(tmp_path, *sure())
    first = suggest(*opened, n=4, progress=lambda done, total: calls.append((done, total)))
    assert first == suggest(*opened, n=4)
    assert calls[-1][0] == calls[-1][1] == len(calls)


def test_sure_of_everything_still_spreads(tmp_path: Path) -> None:
    found = suggest(*volumes(tmp_path, np.zeros(SHAPE), np.full(SHAPE, 7)), n=2, labelled=[0])
    assert found[0]["score"] == 0
    assert min(f["slice"] for f in found) >= 13


def test_labelled_slices_are_found(tmp_path: Path) -> None:
    labels = np.full(SHAPE, 255, np.uint8)
    labels[[3, 30], 5, 6] = 0
    opened = open_volume(store(tmp_path / "labels", labels, chunks=(7, 24, 10)))
    assert labelled_slices(opened) == [3, 30]
    assert labelled_slices(opened, "x") == [6]
    assert labelled_slices(opened, ignore=0) == list(range(40))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "0 suggestions are none"),
        ({"n": 39, "labelled": [3, 4]}, "39 suggestions .* has 38 slices without labels"),
        ({"box": (8, 30, 8)}, "boxes of 8x30x8 do not fit into region 0:40,0:24,0:32"),
    ],
)
def test_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        suggest(*volumes(tmp_path, *sure()), **options)


def test_too_many_boxes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CANDIDATES", 100)
    with pytest.raises(InputError, match="40x6x8 boxes to choose from, at most 100"):
        suggest(*volumes(tmp_path, *sure()), box=(1, 4, 4))


def test_volumes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    probabilities, image = volumes(tmp_path, *sure())
    other = open_volume(store(tmp_path / "other", np.zeros((40, 24, 31))))
    with pytest.raises(VolumeError, match=r"shape \(40, 24, 31\).*\(40, 24, 32\): they must be equal"):
        suggest(probabilities, other)
    with pytest.raises(VolumeError, match=r"no channels of uint8.*segment with --probabilities"):
        suggest(image, image)
