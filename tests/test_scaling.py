"""How many workers a job has and how jobs share a cluster, from counts alone."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volseg.execution.scaling import MOST_AHEAD, RETURN_SECONDS, Crowd, change, keep_block, shares

few = st.integers(0, 40)
crowds = st.builds(
    Crowd, limit=st.integers(1, 60), left=few, ready=few, starting=few, asked=few, free=few,
    leaving=few, share=st.none() | few,
)  # fmt: skip


@given(crowds)
def test_never_above_the_limit_and_never_none_while_work_is_left(crowd: Crowd) -> None:
    have = crowd.ready + crowd.starting + crowd.asked
    then = have + change(crowd)
    assert then <= max(1, min(crowd.left, crowd.limit if crowd.share is None else crowd.share))
    # Those that leave were below the limit when they were there to stay.
    assert then + crowd.leaving <= max(crowd.limit, crowd.leaving, 1)
    assert then + crowd.leaving >= (1 if crowd.left else 0)
    if crowd.left == 0:
        assert then == 0


@given(crowds)
def test_a_change_is_followed_by_none(crowd: Crowd) -> None:
    """The counts after a change want no other: in particular nothing is let go that was just asked for."""
    step = change(crowd)
    if step >= 0:
        after = replace(crowd, asked=crowd.asked + step)
    else:
        gone = min(-step, crowd.asked)
        rest = min(-step - gone, crowd.starting)
        after = replace(
            crowd, asked=crowd.asked - gone, starting=crowd.starting - rest, ready=crowd.ready + step + gone + rest
        )
    assert change(after) == 0


@given(crowds)
def test_what_comes_makes_nothing_go(crowd: Crowd) -> None:
    """Places that become free, and workers that begin or get ready, let none go."""
    if change(crowd) < 0:
        return
    assert change(replace(crowd, free=crowd.free + 7)) >= 0
    if crowd.asked:
        assert change(replace(crowd, asked=crowd.asked - 1, starting=crowd.starting + 1)) >= 0
    if crowd.starting:
        assert change(replace(crowd, starting=crowd.starting - 1, ready=crowd.ready + 1)) >= 0


@given(crowds)
def test_free_places_are_taken_and_little_more_is_asked_for(crowd: Crowd) -> None:
    step = change(crowd)
    have = crowd.ready + crowd.starting + crowd.asked
    room = crowd.ready + crowd.starting + crowd.free
    assert have + max(0, step) >= min(crowd.target, room)
    if step > 0:
        assert have + step <= room + MOST_AHEAD
    assert crowd.here <= max(1, room)


@pytest.mark.parametrize(
    ("crowd", "step"),
    [
        (Crowd(limit=100, left=100), 4),  # a cluster of no machines yet: its autoscaler is shown some demand
        (Crowd(limit=100, left=100, free=16), 20),
        (Crowd(limit=100, left=100, ready=16), 16),  # as much again as is there
        (Crowd(limit=2, left=100, free=16), 2),
        (Crowd(limit=100, left=3, ready=5), -2),  # the last blocks: idle workers go
        (Crowd(limit=100, left=100, ready=4, asked=4, share=2), -6),
        (Crowd(limit=100, left=100, share=0), 1),
        (Crowd(limit=100, left=0, ready=1, asked=1), -2),
        (Crowd(limit=2, left=100, ready=1, leaving=1, free=5), 0),  # the limit holds while one leaves
        (Crowd(limit=1, left=100, leaving=1, free=5), 0),
        (Crowd(limit=9, left=100, leaving=1, free=5), 8),
    ],
)
def test_examples(crowd: Crowd, step: int) -> None:
    assert change(crowd) == step


@given(st.integers(0, 50), st.lists(st.integers(0, 30), max_size=8))
def test_shares_are_fair(places: int, wants: list[int]) -> None:
    given = shares(places, wants)
    assert sum(given) == min(places, sum(wants))
    assert all(0 <= part <= want for part, want in zip(given, wants, strict=True))
    unsatisfied = [part for part, want in zip(given, wants, strict=True) if part < want]
    # Nobody has more than one that lacks something, but for the odd one.
    assert all(part <= min(unsatisfied) + 1 for part in given if unsatisfied)
    # The odd ones go to those that came first.
    assert unsatisfied == sorted(unsatisfied, reverse=True)


@pytest.mark.parametrize(
    ("places", "wants", "given"),
    [(4, [100, 100], [2, 2]), (5, [100, 100], [3, 2]), (4, [1, 100], [1, 3]), (2, [9, 9, 9], [1, 1, 0]), (0, [3], [0])],
)
def test_shares_of_examples(places: int, wants: list[int], given: list[int]) -> None:
    assert shares(places, wants) == given


@pytest.mark.parametrize(
    ("elapsed", "remaining", "usual", "kept"),
    [
        (0, None, None, True),
        (1000, None, 10, True),
        (0, 30, None, True),
        (0, RETURN_SECONDS, None, False),
        (0, -5, 1, False),
        (0, 30, 600, False),
        (580, 30, 600, True),
        (0, 30, 10, True),
    ],
)
def test_a_block_stays_where_it_can_be_finished(
    elapsed: float, remaining: float | None, usual: float | None, kept: bool
) -> None:
    assert keep_block(elapsed, remaining, usual) is kept


@given(st.floats(0, 1e4), st.floats(-100, 1e4), st.none() | st.floats(0, 1e4))
def test_a_block_that_was_given_up_is_not_wanted_back(elapsed: float, remaining: float, usual: float | None) -> None:
    if not keep_block(elapsed, remaining, usual):
        assert not keep_block(elapsed + 1, remaining - 1.0001, usual)
