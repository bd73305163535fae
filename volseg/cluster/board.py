"""What the driver of a training and its first worker tell each other, through an actor beside the driver."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from volseg.training.progress import TrainProgress

_SPEAK_SECONDS = 0.3


class Board:
    """What driver and first worker tell each other: progress and notes one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._progress: TrainProgress | None = None
        self._notes: list[str] = []
        self._stopped = False
        self._attempts = 0

    def begin(self) -> int:
        """Count an attempt of the first worker and return how many there were before."""
        self._attempts += 1
        return self._attempts - 1

    def tell(self, progress: TrainProgress | None, notes: list[str]) -> bool:
        """Take what is new; return whether to stop."""
        self._progress = progress or self._progress
        self._notes += notes
        return self._stopped

    def take(self) -> tuple[TrainProgress | None, list[str], int]:
        """Return what came since the last time, and the attempts so far."""
        new = self._progress, self._notes, self._attempts
        self._progress, self._notes = None, []
        return new

    def stop(self) -> None:
        """Ask the training to stop after its step."""
        self._stopped = True


class Messenger:
    """Speaks with the board from a thread of its own, so that no step waits for it."""

    def __init__(self, board: Any, before: int) -> None:
        self.stopped = False
        self.restarted = before > 0
        self._board = board
        self._lock = threading.Lock()
        self._progress: TrainProgress | None = None
        self._notes: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._speak, name="messenger", daemon=True)

    def report(self, progress: TrainProgress) -> None:
        """Take progress, to be told soon."""
        with self._lock:
            self._progress = progress

    def note(self, text: str) -> None:
        """Take a line, to be told soon."""
        with self._lock:
            self._notes.append(text)

    def start(self) -> None:
        """Begin to speak."""
        self._thread.start()

    def close(self) -> None:
        """Tell the rest and end."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _speak(self) -> None:
        over = False
        while not over:
            over = self._over.wait(_SPEAK_SECONDS)
            with self._lock:
                progress, notes = self._progress, self._notes
                self._progress, self._notes = None, []
            try:
                self.stopped = ray.get(self._board.tell.remote(progress, notes)) or self.stopped
            except RayError:
                # The driver is gone, and this worker will be in a moment.
                return


@contextmanager
def messenger(board: Any, *, active: bool) -> Iterator[Messenger]:
    """Lend a messenger; only that of the first worker is `active`."""
    mine = Messenger(board, ray.get(board.begin.remote()) if active else 0)
    if active:
        mine.start()
    try:
        yield mine
    finally:
        mine.close()
