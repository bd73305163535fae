"""What a worker is asked to do with one block, and the names of what travels between blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from volseg.geometry import Ownership

Parcel = tuple[int, int]
"""Sums that one block gives another: their indices. With twice the same index, the core of a block that is parked."""


@dataclass(frozen=True)
class Task:
    """One call for one block.

    `own`: compute the patches that belong to it, and give the seams. `finish`: add everything up, write, and return a
    receipt; else keep the core, which is made of its own patches and nothing else. `inbox` are the parcels that come
    along; `hoped` the givers whose seams the worker should have itself by then, because it had them in hand before:
    where it has not, it keeps the core. `again` are givers whose patches that touch the block it computes itself,
    because their seams are gone. `stats` are figures of an earlier call.
    """

    index: int
    own: bool = True
    finish: bool = True
    inbox: tuple[Parcel, ...] = ()
    hoped: tuple[int, ...] = ()
    again: tuple[int, ...] = ()
    stats: Mapping[str, float] = field(default_factory=dict)


def parcels_of(task: Task, ownership: Ownership) -> tuple[Parcel, ...]:
    """Return the names of the parcels that a call may return, in their order."""
    seams = [(task.index, seam.block) for seam in ownership.receivers(task.index)] if task.own else []
    core = [] if task.finish and not task.hoped else [(task.index, task.index)]
    return (*seams, *core)
