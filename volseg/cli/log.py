"""How events are written on stderr: as text for people, or as one line of JSON each for machines.

`--log`, else VOLSEG_LOG, says which: `text`, `json`, or `auto`, which is JSON where a cluster's job runs and text
elsewhere. `--log-level`, else VOLSEG_LOG_LEVEL, says from which level on; at `debug` every block has a line.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TextIO

from volseg.errors import SpecError
from volseg.journal import LEVELS, Level, Line

MODE = "VOLSEG_LOG"
LEVEL = "VOLSEG_LOG_LEVEL"
MODES = ("auto", "text", "json")
# The first one is volseg's own, the other one Ray's for what `ray job submit` starts.
_IN_A_JOB = ("VOLSEG_SUBMISSION", "RAY_JOB_CONFIG_JSON_ENV_VAR")


@dataclass(frozen=True)
class Log:
    """Writes events of `level` and above to `stream`, which is stderr where none is given."""

    json: bool
    level: Level = "info"
    stream: TextIO | None = None

    def wants(self, line: Line) -> bool:
        """Tell whether a line is to be shown: enough of a level, and, to people, with a text unless they see all."""
        if LEVELS.index(line.level) < LEVELS.index(self.level):
            return False
        return self.json or bool(line) or self.level == "debug"

    def write(self, line: Line) -> None:
        """Write one event where it is wanted."""
        if self.wants(line):
            text = line.as_json(time.time()) if self.json else line.as_text()
            print(text, file=self.stream or sys.stderr, flush=True)


_current: ContextVar[Log | None] = ContextVar("log", default=None)


def current() -> Log:
    """Return the log of the command that runs; where none does, what the environment says."""
    return _current.get() or choose(None, None)


def log_of(words: Sequence[str]) -> Log:
    """Return the log that a command line asks for, as far as that can be told where it was refused."""
    given = {name: value for name, sign, value in (word.partition("=") for word in words) if sign}
    given |= {name: value for name, value in pairwise(words) if name in {"--log", "--log-level"}}
    try:
        return choose(given.get("--log"), given.get("--log-level"))
    except SpecError:
        return Log(json=False)


def choose(mode: str | None, level: str | None) -> Log:
    """Return the log that the options, else the environment, ask for; raises SpecError."""
    mode = _known("--log", MODE, mode, MODES)
    chosen: Level = _known("--log-level", LEVEL, level, ("info", *LEVELS))  # type: ignore[assignment]
    in_cluster = any(name in os.environ for name in _IN_A_JOB)
    return Log(mode == "json" or (mode == "auto" and in_cluster), chosen)


def _known(option: str, variable: str, given: str | None, choices: tuple[str, ...]) -> str:
    """Return what was given, in the environment else, the first choice else."""
    value = given or os.environ.get(variable) or choices[0]
    if value not in choices:
        name = option if given else variable
        words = ", ".join(dict.fromkeys(choices))
        raise SpecError(f"{name} {value!r} is not known; nothing was done: say one of {words}")
    return value


@contextlib.contextmanager
def writing(log: Log) -> Iterator[None]:
    """Make `log` that of the command that runs; what libraries print becomes its lines, none of it on stdout.

    As text it is theirs, but for credentials. Inside of another command its log stays.
    """
    if _current.get() is not None:
        yield
        return
    log = replace(log, stream=sys.stderr)
    foreign = Foreign(lambda text: log.write(Line(text, "output")), sys.stderr)
    with contextlib.ExitStack() as stack:
        stack.callback(_current.reset, _current.set(log))
        stack.enter_context(contextlib.redirect_stdout(foreign))
        if log.json:
            stack.enter_context(contextlib.redirect_stderr(foreign))
        stack.callback(foreign.flush_rest)
        yield


class Foreign(io.TextIOBase):
    """A stream for what is not volseg's: hands on every whole line."""

    def __init__(self, say: Callable[[str], None], behind: TextIO) -> None:
        self._say, self._behind = say, behind
        self._rest = ""

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the number of the file behind, for who writes there directly."""
        return self._behind.fileno()

    def write(self, text: str) -> int:
        """Take text and hand on the lines that are whole now."""
        *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        for line in lines:
            if line.strip():
                self._say(line.rstrip())
        return len(text)

    def flush_rest(self) -> None:
        """Hand on a last line that nobody ended."""
        if self._rest.strip():
            self.write("\n")
