"""A set of block numbers: equal to Python's set, and small."""

import sys
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volseg.geometry import BlockSet

NUMBERS = st.integers(0, 300) | st.integers(0, 10**12)


@given(st.lists(st.tuples(st.booleans(), NUMBERS)))
def test_it_is_a_set(steps: list[tuple[bool, int]]) -> None:
    mine, model = BlockSet(), set[int]()
    for adds, number in steps:
        if adds:
            assert mine.add(number) == (number not in model)
            model.add(number)
        else:
            mine.discard(number)
            model.discard(number)
        assert (number in mine) == (number in model)
        assert len(mine) == len(model)
    assert list(mine) == sorted(model)
    assert list(mine.missing(310)) == [n for n in range(310) if n not in model]


def test_no_number_is_negative() -> None:
    with pytest.raises(ValueError, match="no number below 0, got -1"):
        BlockSet([-1])
    assert -1 not in BlockSet([0, 32767])


def test_what_is_missing_is_asked_as_it_is_then() -> None:
    mine = BlockSet([0])
    missing = mine.missing(5)
    assert next(missing) == 1
    mine.add(2)
    assert list(missing) == [3, 4]


def test_many_blocks_take_little_room() -> None:
    mine = BlockSet(range(200_000))
    assert len(mine) == 200_000
    assert sum(sys.getsizeof(page) for page in mine._pages.values()) < 30_000
    assert list(islice(mine.missing(200_003), 3)) == [200_000, 200_001, 200_002]
