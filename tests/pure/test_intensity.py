"""Intensity scaling: statistics by hand, and what is refused."""

import numpy as np
import pytest

from volseg.intensity import Scaling


def test_statistics_are_those_of_the_clipped_values() -> None:
    samples = np.stack([np.arange(1001, dtype=np.uint16), np.arange(1001, dtype=np.uint16) * 2])
    scaling = Scaling.measure(samples)
    assert scaling.channels == 2
    assert scaling.low == (5.0, 10.0)
    assert scaling.high == (995.0, 1990.0)
    clipped = np.clip(np.arange(1001.0), 5, 995)
    assert scaling.mean == pytest.approx((clipped.mean(), 2 * clipped.mean()))
    assert scaling.std == pytest.approx((clipped.std(), 2 * clipped.std()))


def test_apply_clips_centres_and_scales_each_channel() -> None:
    scaling = Scaling(low=(0, 10), high=(100, 20), mean=(50, 15), std=(25, 5))
    raw = np.array([[-5, 0, 75, 300], [0, 10, 15, 99]], np.int16)
    scaled = scaling.apply(raw)
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled, [[-2, -2, 1, 2], [-1, -1, 0, 1]])
    np.testing.assert_array_equal(scaling.apply(raw.reshape(2, 2, 2, 1)), scaled.reshape(2, 2, 2, 1))


def test_values_that_are_no_numbers_are_left_out() -> None:
    samples = np.array([[1.0, np.nan, 3.0, np.inf, -np.inf]])
    scaling = Scaling.measure(samples, (0, 100))
    assert (scaling.low, scaling.high, scaling.mean) == ((1.0,), (3.0,), (2.0,))
    with pytest.raises(ValueError, match="no finite value"):
        Scaling.measure(np.array([[1.0], [np.nan]]))


def test_a_constant_channel_is_scaled_to_zero() -> None:
    scaling = Scaling.measure(np.full((1, 50), 7, np.uint8))
    np.testing.assert_array_equal(scaling.apply(np.full((1, 3), 7)), 0)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"low": ()}, "one entry each"),
        ({"low": (0, 0)}, "one entry each"),
        ({"mean": (float("nan"),)}, "finite"),
        ({"high": (float("inf"),)}, "finite"),
        ({"std": (0,)}, "std must be above 0"),
        ({"low": (2,)}, "no high below its low"),
    ],
)
def test_impossible_statistics_are_refused(values: dict[str, tuple[float, ...]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Scaling.model_validate({"low": (0,), "high": (1,), "mean": (0.5,), "std": (0.2,), **values})


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="one entry each"):
        Scaling(low=(), high=(), mean=(), std=())
