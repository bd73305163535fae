"""Learning rates over a training, by hand and within their bounds; and when a training stops early."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volseg.training.schedule import EarlyStopping, make_schedule, progress_of

NAMES = ("cosine", "restarts", "poly", "one_cycle", "plateau", "constant")


def rates(name: str, peak: float = 1.0, warm_up: float = 0.03, cycles: int = 1, count: int = 1000) -> list[float]:
    schedule = make_schedule(name, peak, warm_up=warm_up, cycles=cycles)
    return [schedule.rate(i / count) for i in range(count + 1)]


@given(st.sampled_from(NAMES), st.floats(1e-6, 1.0), st.floats(0.0, 0.9), st.integers(1, 9), st.floats(0.0, 1.0))
def test_no_learning_rate_leaves_its_bounds(name: str, peak: float, warm_up: float, cycles: int, done: float) -> None:
    schedule = make_schedule(name, peak, warm_up=warm_up, cycles=cycles)
    assert 0.0 <= schedule.rate(done) <= peak * (1 + 1e-9)
    assert 0 <= schedule.cycle(done) < schedule.cycles == (cycles if name == "restarts" else 1)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "one_cycle"])
def test_it_rises_first(name: str) -> None:
    values = rates(name, warm_up=0.1)
    assert 0 < values[0] < 0.1
    assert values[:101] == sorted(values[:101])
    assert values[100] == pytest.approx(1.0)
    assert rates(name, warm_up=0.0)[0] == pytest.approx(1.0)


def test_cosine_falls_to_nearly_nothing() -> None:
    values = rates("cosine")
    assert values[30:] == sorted(values[30:], reverse=True)
    assert values[515] == pytest.approx(0.5, abs=0.01)
    assert values[-1] == pytest.approx(0.002)


def test_poly_by_hand() -> None:
    values = rates("poly", peak=2.0, warm_up=0.0)
    assert values[500] == pytest.approx(2 * 0.5**0.9)
    assert values[-1] == 0.0


def test_one_cycle_rises_for_three_tenths() -> None:
    values = rates("one_cycle", warm_up=0.2)
    assert values[0] == pytest.approx(1 / 25)
    assert values[:301] == sorted(values[:301])
    assert values[300:] == sorted(values[300:], reverse=True)
    assert values[300] == pytest.approx(1.0)
    assert values[-1] < 0.01


def test_restarts_have_cycles_of_equal_length_after_the_rise() -> None:
    schedule = make_schedule("restarts", 1.0, warm_up=0.1, cycles=3)
    values = [schedule.rate(i / 1000) for i in range(1001)]
    assert max(values[399], values[699]) < 0.01
    assert min(values[401], values[701]) > 0.99
    assert values[1000] == pytest.approx(0.002)
    assert values[550] == pytest.approx(0.5, abs=0.01)
    assert [schedule.cycle(p) for p in (0.0, 0.1, 0.39, 0.41, 0.71, 1.0)] == [0, 0, 0, 1, 2, 2]


def test_every_cycle_ends_once() -> None:
    schedule = make_schedule("restarts", 1.0, warm_up=0.05, cycles=4)
    steps = [i / 77 for i in range(78)]
    ends = [after for before, after in pairwise(steps) if schedule.cycle_ends(before, after)]
    assert len(ends) == 4
    assert ends[-1] == 1.0
    assert all(schedule.rate(before) < 0.02 for before, after in pairwise(steps) if after in ends)


def test_a_plateau_lowers_the_learning_rate() -> None:
    schedule = make_schedule("plateau", 1e-3, warm_up=0.0, cycles=1)
    merits = [0.5, 0.6, 0.6, 0.59, 0.6, 0.5, 0.55]
    found = []
    for merit in merits:
        schedule.after_validation(merit)
        found.append(schedule.rate(0.5))
    assert found == pytest.approx([1e-3] * 6 + [1e-4])
    again = make_schedule("plateau", 1e-3, warm_up=0.0, cycles=1)
    again.load_state_dict(schedule.state_dict())
    for _ in range(4):
        again.after_validation(0.0)
    assert again.rate(0.5) == pytest.approx(1e-4)
    again.after_validation(0.0)
    assert again.rate(0.5) == pytest.approx(1e-5)
    for _ in range(20):
        again.after_validation(0.0)
    assert again.rate(0.9) == pytest.approx(1e-5), "the floor"


def test_a_plateau_never_raises_the_learning_rate_to_its_floor() -> None:
    schedule = make_schedule("plateau", 1e-6, warm_up=0.0, cycles=1)
    for _ in range(20):
        schedule.after_validation(0.0)
    assert schedule.rate(0.5) == pytest.approx(1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "plateau"])
def test_validations_change_no_other_schedule(name: str) -> None:
    schedule = make_schedule(name, 1.0, warm_up=0.03, cycles=3)
    before = [schedule.rate(i / 20) for i in range(21)]
    for _ in range(20):
        schedule.after_validation(0.0)
    assert [schedule.rate(i / 20) for i in range(21)] == before
    assert schedule.state_dict() == {}


def test_it_stops_after_validations_without_improvement() -> None:
    stopping = EarlyStopping(3)
    assert [stopping.after_validation(m) for m in (0.1, 0.2, 0.2, 0.1)] == [False] * 4
    again = EarlyStopping(3)
    again.load_state_dict(stopping.state_dict())
    assert [again.after_validation(m) for m in (0.2, 0.3)] == [True, False], "better after all"
    assert not again.stopped
    endless = EarlyStopping(None)
    assert not any(endless.after_validation(0.0) for _ in range(100))


def test_progress_goes_by_steps_or_time() -> None:
    assert progress_of(10, 100, 1.0, None) == 0.1
    assert progress_of(10, 100, 30.0, 60.0) == 0.5
    assert progress_of(10, 100, 70.0, 60.0) == 1.0
    assert progress_of(0, 100, 0.0, 0.0) == 1.0
