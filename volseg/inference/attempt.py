"""One attempt at one block: a receipt, or a failure as plain values that cross processes."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from volseg.errors import BlockError, JobError, JobInterrupted
from volseg.storage.files import storage_error
from volseg.storage.ledger import Receipt

Kind = Literal["retryable", "hopeless", "job"]


@dataclass(frozen=True)
class Failure:
    """An error of one block as plain values, so that it crosses processes.

    retryable: another attempt may succeed; hopeless: the same data fails again; job: every block would meet it.
    """

    index: int
    kind: Kind
    message: str
    details: str = ""


def attempt(process: Callable[[int], Receipt], index: int) -> Receipt | Failure:
    """Run one block and return its receipt, or why there is none: the one place where errors of blocks are caught.

    JobInterrupted passes through.
    """
    try:
        return process(index)
    except JobInterrupted:
        raise
    except BlockError as error:
        return Failure(index, "retryable" if error.retryable else "hopeless", str(error))
    except JobError as error:
        return Failure(index, "job", str(error))
    except Exception as error:  # noqa: BLE001
        # Whatever a library raises for this block must not end the worker; it is recorded with its traceback.
        details = traceback.format_exc(limit=20)
        general = storage_error(error, "the output") if isinstance(error, OSError) else None
        if general is not None:
            return Failure(index, "job", str(general), details)
        return Failure(index, "retryable", f"{type(error).__name__}: {error}", details)
