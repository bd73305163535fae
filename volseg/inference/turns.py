"""Whose turn it is: threads of one worker compute their blocks one at a time, in the order in which they were told."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from volseg.errors import JobInterrupted


class Ticket:
    """A place in the queue."""


class Turns:
    """A queue of blocks; a second one that computes would need the memory of a second one."""

    def __init__(self) -> None:
        self._queue: deque[Ticket] = deque()
        self._announced: dict[int, Ticket] = {}
        self._changed = threading.Condition()
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Tell whether all must stop."""
        return self._cancelled

    def announce(self, index: int) -> None:
        """Put a block at the end of the queue before its thread comes."""
        with self._changed:
            self._announced[index] = ticket = Ticket()
            self._queue.append(ticket)

    def enter(self, index: int) -> Ticket:
        """Return the place of a block that was announced, or one at the end of the queue."""
        with self._changed:
            ticket = self._announced.pop(index, None)
            if ticket is None:
                ticket = Ticket()
                self._queue.append(ticket)
            return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give a place up, whether or not it had its turn."""
        with self._changed:
            if ticket in self._queue:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def cancel(self) -> None:
        """Make all who wait stop with JobInterrupted."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    @contextmanager
    def turn(self, ticket: Ticket) -> Iterator[None]:
        """Wait until a place is the first of the queue, and keep the others waiting inside."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or self._queue[0] is ticket)
        if self._cancelled:
            raise JobInterrupted("stopped")
        try:
            yield
        finally:
            self.leave(ticket)
