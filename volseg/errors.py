"""One tree of errors, grouped by what the handler does with them.

===================  =========================================================  =========
class                what the handler does                                      exit code
===================  =========================================================  =========
`InputError`         tells the user what to change; nothing was started         2
`BlockError`         counts a strike against the block, retries, sets it aside  (3)
`JobPartial`         reports the blocks that were set aside                     3
`JobError`           stops the job at once: every block would meet the same     4
`JobInterrupted`     says how to go on                                          130
===================  =========================================================  =========

Every message states the value, the rule, the consequence and the remedy. Credentials are taken out of it.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from volseg.redaction import redact


class VolsegError(Exception):
    """Base of all errors that volseg raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 4

    def __init__(self, *words: object) -> None:
        """Keep the message, without what nobody may read."""
        super().__init__(*(redact(word) if isinstance(word, str) else word for word in words))


class InputError(VolsegError):
    """What the user asked for or handed in is wrong; no work was done."""

    exit_code = 2


class SpecError(InputError):
    """A spec, an option or a region is malformed or contradicts itself."""


class VolumeError(InputError):
    """A path is no readable volume, or not the volume that the task needs."""


class BundleError(InputError):
    """A model bundle is missing, damaged, or beyond its limits."""


class PlanError(InputError):
    """The plan cannot fit or cannot be right; refused before any work."""


class PlaceError(InputError):
    """A place to read from or to write to cannot be used; found out before any work."""


class OutputExistsError(InputError):
    """The output holds something else than this job's result."""


class BlockError(VolsegError):
    """One block failed by itself; `retryable` is False where the same data must fail again."""

    retryable = True


class CorruptChunkError(BlockError):
    """A stored chunk is truncated, damaged, or absent where the array says that all were written."""


class NonFiniteError(BlockError):
    """NaN or Inf in the input or in the network's answer."""

    retryable = False


class StorageUnavailableError(BlockError):
    """Storage gave no usable answer to any of several requests: it is overloaded or cannot be reached."""


class JobError(VolsegError):
    """Something that concerns every block alike: the job stops at once and can be resumed."""


class StorageFullError(JobError):
    """No space left where the output or the ledger lies."""


class StorageDeniedError(JobError):
    """Permission was lost or never given where something is read or written."""


class WorkersLostError(JobError):
    """No worker can be started or kept alive."""


class JobPartial(VolsegError):
    """The job ended with blocks set aside; the output stays `incomplete`. `report` says which."""

    exit_code = 3

    def __init__(self, message: str, report: dict[str, Any] | None = None) -> None:
        """Keep the job's report beside the message."""
        super().__init__(message)
        self.report = report or {}

    @property
    def failed_blocks(self) -> list[dict[str, Any]]:
        """Return the blocks that were set aside: each one's number (`block`), place (`box`) and `error`."""
        return list(self.report.get("failed_blocks", ()))


class VerifyError(VolsegError):
    """A stored result does not match its receipts."""


class JobInterrupted(VolsegError):
    """The user stopped the job; what has a receipt is kept."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as ``" (did you mean 'overlap'?)"`` for a misspelt `name`, or an empty string."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
