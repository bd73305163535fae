"""Threads of one worker compute one at a time, in the order in which they were told."""

from __future__ import annotations

import threading

import pytest

from volseg.errors import JobInterrupted
from volseg.inference.turns import Turns

LONG = 60.0


def test_turns_follow_the_announcements_whoever_comes_first() -> None:
    turns, order = Turns(), list[int]()
    came = threading.Event()
    for index in (3, 7):
        turns.announce(index)

    def second() -> None:
        ticket = turns.enter(7)
        came.set()
        with turns.turn(ticket):
            order.append(7)

    thread = threading.Thread(target=second)
    thread.start()
    assert came.wait(LONG)
    with turns.turn(turns.enter(3)):
        order.append(3)
    thread.join(LONG)
    assert order == [3, 7]


def test_one_that_fails_before_its_turn_gives_it_up() -> None:
    turns = Turns()
    turns.announce(1)
    turns.announce(2)
    turns.leave(turns.enter(1))
    with turns.turn(turns.enter(2)):
        pass


def test_the_same_block_twice_has_two_places() -> None:
    turns = Turns()
    first, second = turns.enter(5), turns.enter(5)
    with turns.turn(first):
        turns.leave(first)
    with turns.turn(second):
        pass


def test_cancelling_ends_all_who_wait() -> None:
    turns = Turns()
    turns.announce(1)
    ticket = turns.enter(2)
    turns.cancel()
    assert turns.cancelled
    with pytest.raises(JobInterrupted), turns.turn(ticket):
        pass
