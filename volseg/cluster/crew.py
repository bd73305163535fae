"""Actors that stay from one job to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray


@dataclass(frozen=True)
class Member:
    """An actor with nothing in hand on the machine `node`.

    `starting` is the call that begins an earlier job, None where it has returned.
    """

    kind: str
    actor: Any
    starting: Any
    node: str


class Crew:
    """Idle actors, on a GPU or a CPU (`kind`); jobs that run one after the other take them and give them back."""

    def __init__(self) -> None:
        self._idle: list[Member] = []

    def take(self, kind: str) -> Member | None:
        """Return an idle actor, one that is ready before one that still starts; None where there is none."""
        fitting = sorted((m for m in self._idle if m.kind == kind), key=lambda member: member.starting is not None)
        if not fitting:
            return None
        self._idle.remove(fitting[0])
        return fitting[0]

    def keep(self, member: Member) -> None:
        """Take an actor that has nothing in hand."""
        self._idle.append(member)

    def dismiss(self) -> None:
        """End all actors."""
        for member in self._idle:
            ray.kill(member.actor)
        self._idle.clear()
