"""Scores by hand, the best threshold, and the class bias: it finds what helps and leaves alone what does not."""

import numpy as np
import pytest
from numpy.typing import NDArray

from volseg.training import metrics
from volseg.training.metrics import ClassCounts, ProbabilityCounts, tune_class_bias


def test_dice_and_accuracy_by_hand_and_absent_classes() -> None:
    counts = ClassCounts(4)
    counts.add(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0]))
    scores = counts.scores()
    assert scores.dice[:3] == pytest.approx((2 / 4, 4 / 5, 0.0))
    assert scores.dice[3] is None
    assert scores.mean_foreground == pytest.approx(0.4)
    assert scores.sizes == (2, 2, 1, 0)
    assert scores.merit == pytest.approx(0.8 * 2**0.5 / (2**0.5 + 1))
    assert scores.accuracy == pytest.approx(3 / 5)
    assert ClassCounts(2).scores().accuracy is None


def test_the_best_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 5000)
    probability = np.clip(0.35 * truth + rng.uniform(0, 0.5, 5000), 0, 1).astype(np.float32)
    counts = ProbabilityCounts()
    counts.add(truth[:2000], probability[:2000])
    counts.add(truth[2000:], probability[2000:])
    scores = counts.scores()

    def dice(threshold: float) -> float:
        won = probability >= threshold
        return float(2 * (won & (truth == 1)).sum() / (won.sum() + truth.sum()))

    assert scores.threshold is not None
    assert scores.dice[1] == pytest.approx(dice(scores.threshold))
    assert scores.dice[1] == pytest.approx(max(dice(i / 256) for i in range(52, 205)))
    assert scores.accuracy == pytest.approx(((probability >= scores.threshold) == truth).mean())
    assert counts.scores(0.25).dice[1] == pytest.approx(dice(0.25))
    empty = ProbabilityCounts().scores()
    assert empty.mean_foreground is None
    assert empty.accuracy is None


# ---------------------------------------------------------------- class bias

CHANCES = np.array([0.7, 0.2, 0.07, 0.03])


def answers(count: int = 40_000, seed: int = 0, sharp: float = 3.0) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return truth (n,) and the logits (n, classes) of a network that is mostly right."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(4, count, p=CHANCES)
    logits = rng.normal(size=(count, 4)).astype(np.float32) + np.log(CHANCES).astype(np.float32) * 0.5
    logits[np.arange(count), truth] += sharp
    return truth, logits


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    result: NDArray[np.float32] = powers / powers.sum(1, keepdims=True)
    return result


def merit(truth: NDArray[np.int64], logits: NDArray[np.float32]) -> float:
    counts = ClassCounts(logits.shape[1])
    counts.add(truth, logits.argmax(1))
    return counts.scores().merit


def test_a_bias_that_was_put_in_is_found() -> None:
    truth, logits = answers()
    shift = np.array([0.0, 1.0, -1.5, 0.5], np.float32)
    bias = tune_class_bias(truth, softmax(logits + shift))
    assert bias[0] == 0.0
    assert np.asarray(bias) == pytest.approx(-shift, abs=0.7)
    found = merit(truth, logits + shift + np.asarray(bias, np.float32))
    assert found > merit(truth, logits + shift) + 0.05
    assert found > merit(truth, logits) - 0.005
    assert tune_class_bias(truth, softmax(logits + shift)) == bias


def test_nothing_is_changed_where_nothing_helps() -> None:
    truth, logits = answers(sharp=9.0)
    nothing = (0.0,) * 4
    assert tune_class_bias(truth, softmax(logits)) == nothing
    assert tune_class_bias(truth[:0], softmax(logits[:0])) == nothing
    assert tune_class_bias(truth[:30], softmax(np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32))) == (
        nothing
    ), "chance"


def test_a_bias_that_helps_in_some_places_only_is_not_kept() -> None:
    truth, logits = answers()
    run = len(truth) // 20
    for place in range(20):
        logits[place * run : (place + 1) * run, 2] += 2.0 if place % 2 else -2.0
    assert tune_class_bias(truth, softmax(logits)) == (0.0,) * 4


def test_the_merit_of_every_bias_is_that_of_trying_it() -> None:
    truth, values = answers(2000)
    logits = np.ascontiguousarray(values.T)
    bias = np.array([0.0, 0.4, -0.7, 0.0], np.float32)
    for cls in range(4):
        merits = metrics._merits(logits, truth, bias, cls, np.bincount(truth, minlength=4))
        for i in (0, 17, 30, 44, 60):
            tried = bias.copy()
            tried[cls] = metrics._BIASES[i]
            assert merits[i] == pytest.approx(merit(truth, values + tried), abs=2e-3)


def test_many_voxels_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, logits = answers()
    shifted = softmax(logits + np.array([0.0, 1.0, -1.5, 0.5], np.float32))
    sizes = []
    monkeypatch.setattr(metrics, "_MOST_VALUES", 10_000)
    inner = metrics._ascend

    def spy(logits: NDArray[np.float32], truth: NDArray[np.int64]) -> NDArray[np.float32]:
        sizes.append(logits.size)
        return inner(logits, truth)

    monkeypatch.setattr(metrics, "_ascend", spy)
    assert tune_class_bias(truth, shifted)[2] > 0.5
    assert max(sizes) <= 10_000
