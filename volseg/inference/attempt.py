"""One attempt at one block: an answer, or a failure as plain values that cross processes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from volseg.errors import BlockError, JobError, JobInterrupted
from volseg.planning.task import Parcel
from volseg.redaction import redact
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


@dataclass(frozen=True)
class Answer:
    """What became of a task: the block's receipt, or none where it is parked, and sums for other blocks.

    `parcels` are those sums by name, in the order of the receivers, a parked block's core last. `stats` are figures
    that a parked block takes along.
    """

    index: int
    receipt: Receipt | None
    parcels: Mapping[Parcel, NDArray[np.int32]] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)


def attempt(process: Callable[[], Answer], index: int) -> Answer | Failure:
    """Run one task of a block and return what became of it: the one place where errors of blocks are caught.

    JobInterrupted passes through.
    """
    try:
        return process()
    except JobInterrupted:
        raise
    except BlockError as error:
        return Failure(index, "retryable" if error.retryable else "hopeless", str(error))
    except JobError as error:
        return Failure(index, "job", str(error))
    except Exception as error:  # noqa: BLE001
        # Whatever a library raises for this block must not end the worker; it is recorded with its traceback.
        details = redact(traceback.format_exc(limit=20))
        general = storage_error(error, "the output") if isinstance(error, OSError) else None
        if general is not None:
            return Failure(index, "job", str(general), details)
        return Failure(index, "retryable", redact(f"{type(error).__name__}: {error}"), details)
