"""What happens, told as a line for people that also says it in plain values for machines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from volseg.redaction import redact

Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error")
Fact = str | int | float | bool | None


class Line(str):
    """A line worth reading; `event` names its kind and `facts` are what it says, such as job, block and attempt.

    The text is empty where only machines care. Wherever text is passed on a line passes, too, and text that is no line
    is a note without facts. Credentials are taken out of text and facts.
    """

    event: str
    level: Level
    facts: Mapping[str, Fact]

    def __new__(cls, text: str, event: str = "note", level: Level = "info", **facts: Fact) -> Line:
        """Make a line of its text and what it says."""
        return cls._made(redact(text), event, level, _clean(facts))

    @classmethod
    def _made(cls, text: str, event: str, level: Level, facts: Mapping[str, Fact]) -> Line:
        line = super().__new__(cls, text)
        line.event, line.level, line.facts = event, level, facts
        return line

    @classmethod
    def of(cls, text: str) -> Line:
        """Return `text` as a line."""
        return text if isinstance(text, Line) else cls(text)

    def among(self, facts: Mapping[str, Fact]) -> Line:
        """Return the line with `facts` that hold for all lines around it, free of credentials; its own win."""
        return self._made(str(self), self.event, self.level, {**facts, **self.facts})

    def as_json(self, time: float) -> str:
        """Return one line of JSON; `time` is in seconds since 1970."""
        document: dict[str, Any] = {
            "time": datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": self.level,
            "event": self.event,
            **({"message": str(self)} if self else {}),
            **self.facts,
        }
        return json.dumps(document)

    def as_text(self) -> str:
        """Return the line for people; where it has no text, what it says."""
        return str(self) or " ".join([f"{self.event}:", *(f"{name}={fact}" for name, fact in self.facts.items())])


def _clean(facts: Mapping[str, Fact]) -> dict[str, Fact]:
    return {name: redact(fact) if isinstance(fact, str) else fact for name, fact in facts.items()}


def parse(text: str) -> tuple[str, Line] | None:
    """Return the time and the line that `Line.as_json` wrote; None where `text` is something else."""
    if not text.startswith('{"time":'):
        return None
    try:
        document = json.loads(text)
        time, level, event = document.pop("time"), document.pop("level"), document.pop("event")
    except (ValueError, KeyError):
        return None
    return str(time), Line(str(document.pop("message", "")), str(event), level, **document)


Note = Callable[[str], None]
"""Takes lines worth reading."""

Trace = Callable[[Line], None]
"""Takes everything that happens, also what only machines care for."""


def silent(_: object) -> None:
    """Take a line, or progress, and do nothing."""


def tagged(note: Note, **facts: Fact) -> Note:
    """Return what adds `facts` that all lines have in common."""
    common = _clean(facts)
    return lambda text: note(Line.of(text).among(common))


def teller(note: Note, trace: Trace) -> Note:
    """Return what hands every line to `trace`, and those for people to `note`."""

    def tell(text: str) -> None:
        line = Line.of(text)
        trace(line)
        if line:
            note(line)

    return tell
