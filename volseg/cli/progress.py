"""Progress on stderr: bars on a terminal, lines or events elsewhere, so that stdout stays free for the result."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from volseg.cli.log import current
from volseg.journal import Fact, Line

_PLAIN_SECONDS = 10.0


class ProgressLine:
    """One counted task: call `update` as often as you like; `extra` is a short text such as a rate."""

    def __init__(self, title: str, unit: str = "") -> None:
        self._title, self._unit = title, unit
        self._log = current()
        self._console = Console(stderr=True)
        self._rich: Progress | None = None
        self._task: TaskID | None = None
        self._started = self._printed = time.monotonic()
        self._last = ""
        self._before: int | None = None
        self._job: dict[str, Any] = {}

    def __enter__(self) -> ProgressLine:
        """Show the bar, where a person watches."""
        if self._console.is_terminal and not self._log.json:
            self._rich = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"), TextColumn("{task.fields[extra]}"), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), console=self._console, transient=False,
            )  # fmt: skip
            self._rich.start()
            self._task = self._rich.add_task(self._title, total=None, extra="", unit=self._unit)
        return self

    def update(self, done: int, total: int, extra: str = "", unit: str | None = None, **facts: Fact) -> None:
        """Show that `done` of `total` is reached; `unit` replaces the one given at the start.

        `facts` are for machines: an event with them is written every ten seconds, and one at the end.
        """
        self._unit = self._unit if unit is None else unit
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, completed=done, total=total, extra=extra, unit=self._unit)
            return
        # What an earlier run did took none of this one's time.
        self._before = done if self._before is None else self._before
        now = time.monotonic()
        ended = done >= total
        if now - self._printed < _PLAIN_SECONDS and not ended:
            return
        elapsed = now - self._started
        fresh = done - self._before
        left = elapsed / fresh * (total - done) if fresh and not ended else None
        line = ", ".join(filter(None, [f"{self._title}: {done}/{total} {self._unit}".rstrip(), extra]))
        if line != self._last:
            self._printed, self._last = now, line
            plan = f", about {clock(left)} left" if left is not None else ""
            told: dict[str, Any] = {
                **self._job, **facts, "task": self._title, "done": done, "total": total, "unit": self._unit,
                "elapsed_seconds": round(elapsed, 3), "seconds_left": None if left is None else round(left, 3),
            }  # fmt: skip
            self._log.write(Line(f"{line}, {clock(elapsed)}{plan}", "progress", **told))

    def note(self, text: str) -> None:
        """Write a line, or an event, worth keeping above the bar."""
        line = Line.of(text)
        if line.event == "job started":
            self._job = {name: line.facts.get(name) for name in ("job", "attempt", "batch") if name in line.facts}
        if self._rich is None:
            self._log.write(line)
        elif self._log.wants(line):
            self._rich.console.print(line.as_text(), highlight=False, markup=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands."""
        if self._rich is not None:
            self._rich.stop()


def clock(seconds: float) -> str:
    """Write a duration as 42 s, 3:05 min or 2:10 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def quantity(value: float, unit: str = "") -> str:
    """Write a large number with k, M, G or T."""
    for sign in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g} {sign}{unit}".rstrip()
        value /= 1000
    return f"{value:.3g} T{unit}"


def size(count: float) -> str:
    """Write a number of bytes in KiB, MiB, GiB or TiB."""
    for sign in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {sign}" if count < 100 else f"{count:.0f} {sign}"
        count /= 1024
    return f"{count:.3g} TiB"
