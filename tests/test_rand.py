"""The Rand score: by hand for a split and a merge, against scikit-image, and blind to the width of membranes."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.metrics import adapted_rand_error

from tests.test_evaluate import store
from volseg.analysis import rand_score
from volseg.analysis.evaluate import evaluate
from volseg.analysis.rand_score import RandScore, slice_score


def cells(*walls: int, columns: int = 21) -> NDArray[np.bool_]:
    """Return a slice of ten rows that is cell but for the columns `walls`."""
    mask = np.ones((10, columns), bool)
    mask[:, list(walls)] = False
    return mask


def found(true: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> RandScore:
    score = slice_score(true, predicted)
    assert score is not None
    return score


def test_the_truth_is_perfect() -> None:
    assert found(cells(7, 14), cells(7, 14)) == RandScore(1.0, 1.0, 1.0)


def test_merge_by_hand() -> None:
    """Two cells of 100 pixels become one: half of its 200^2 ordered pairs are right, and no pair is lost."""
    score = found(cells(10), cells())
    assert (score.split, score.merge) == (1.0, 0.5)
    assert score.score == pytest.approx(2 / 3)


def test_split_by_hand() -> None:
    """One cell of 210 pixels becomes two of 100 and a line of ten cells of one pixel."""
    score = found(cells(), cells(10))
    together = 100**2 + 100**2 + 10
    assert score.split == pytest.approx(together / 210**2)
    assert score.merge == 1.0


def test_width_of_membranes_does_not_count() -> None:
    thick = cells(*range(8, 13))
    assert found(cells(10), thick) == RandScore(1.0, 1.0, 1.0)
    assert found(thick, cells(10)) == RandScore(1.0, 1.0, 1.0)


def test_a_gap_of_one_pixel_joins_two_cells() -> None:
    gap = cells(10)
    gap[4, 10] = True
    assert found(cells(10), gap).merge == 0.5


def test_cells_that_touch_at_a_corner_are_two() -> None:
    true = np.zeros((4, 4), bool)
    true[:2, :2] = true[2:, 2:] = True
    assert found(true, np.ones((4, 4), bool)).merge == 0.5
    # The two also stay two in the prediction, and part what is one cell in truth.
    assert found(np.ones((4, 4), bool), true).split < 0.6


def test_everything_membrane_is_all_splits() -> None:
    score = found(cells(10), np.zeros((10, 21), bool))
    assert score.split == pytest.approx(200 / (2 * 100**2))
    assert score.merge == 1.0


def test_no_cell_no_score() -> None:
    assert slice_score(np.zeros((4, 4), bool), np.ones((4, 4), bool)) is None


def test_equals_scikit_image_where_no_line_crosses_a_cell() -> None:
    """Its table without lines; it leaves out pairs of a pixel with itself, and calls by precision what is our split."""
    true = np.repeat([1, 1, 0, 2, 2, 2, 0, 3, 3, 3, 3], 9)[None].repeat(20, axis=0)
    predicted = np.repeat([1, 1, 0, 2, 2, 2, 2, 2, 2, 2, 2], 9)[None].repeat(20, axis=0)
    score = found(true > 0, predicted > 0)
    error, precision, recall = adapted_rand_error(true, predicted)  # type: ignore[no-untyped-call]
    assert score.score == pytest.approx(1 - error, abs=1e-3)
    assert (score.split, score.merge) == pytest.approx((precision, recall), abs=1e-3)


@pytest.mark.parametrize("read_voxels", [2**25, 1])
def test_evaluate_averages_slices_and_leaves_out_what_has_no_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_voxels: int
) -> None:
    monkeypatch.setattr(rand_score, "READ_VOXELS", read_voxels)
    membrane = 2
    truth = np.stack([np.where(cells(10), 1, membrane)] * 3).astype(np.uint8)
    prediction = truth.copy()
    prediction[1] = 0
    truth[2] = 255
    truth[0, :, :10] = 255
    prediction[0, :, 5] = membrane
    paths = store(tmp_path / "p", prediction, chunks=(2, 8, 8), shards=None), store(tmp_path / "t", truth)
    result = evaluate(*paths, rand_class=membrane)["rand"]
    assert result["slices"] == [1.0, pytest.approx(2 / 3), None]
    assert result["score"] == pytest.approx(5 / 6)
    assert (result["split"], result["merge"]) == (1.0, 0.75)
    assert evaluate(*paths, rand_class=membrane, roi="2:,:,:", ignore=None)["rand"]["score"] is not None
