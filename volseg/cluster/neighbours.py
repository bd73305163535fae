"""Jobs on one cluster that know of each other, so that one without a limit leaves the others their part.

Each driver keeps a line in the key-value store of the cluster's head: how many workers its job wants and has. Where
one lacks its equal share for some seconds and no place is free, those with more than theirs give workers away, each
when its blocks in hand are finished. Ray itself would serve whoever asked first, to the end of its job.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put

from volseg.execution import scaling

_NAMESPACE = b"volseg"
_SILENT_SECONDS = 20.0


@dataclass(frozen=True)
class Neighbour:
    """A job on the cluster; `name` sorts by when it came."""

    name: str
    wants: int
    has: int


class Neighbours:
    """The jobs whose workers need what this one's need: a CPU or a GPU (`kind`)."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._name = f"{kind}/{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._said = 0
        self._heard: dict[str, tuple[bytes, float]] = {}
        self._hungry_since: float | None = None
        self.others: list[Neighbour] = []
        """Other jobs, as of the last `share`."""

    def share(self, wants: int, has: int, places: int, free: int) -> int | None:
        """Tell the others what this job wants and has, and return what it may keep; None while nobody lacks anything.

        `places` is how many workers the cluster has room for, `free` how many more now.
        """
        now = time.monotonic()
        self._said += 1
        line = json.dumps({"wants": wants, "has": has, "said": self._said}).encode()
        _internal_kv_put(self._name, line, overwrite=True, namespace=_NAMESPACE)
        self.others = self._listen(now)
        mine = Neighbour(self._name, wants, has)
        everybody = sorted([*self.others, mine], key=lambda job: job.name)
        given = dict(zip(everybody, scaling.shares(places, [job.wants for job in everybody]), strict=True))
        if free or not any(job.has < given[job] for job in self.others):
            self._hungry_since = None
        elif self._hungry_since is None:
            self._hungry_since = now
        if self._hungry_since is None or now - self._hungry_since < scaling.HUNGER_SECONDS:
            return None
        return given[mine]

    def word(self) -> str:
        """Say how many others there are and what that means; empty where there is none."""
        if not self.others:
            return ""
        return (
            f"{len(self.others)} other job(s) of volseg work on this cluster, and one that lacks its equal part of the "
            f"{self._kind}s gets it as the others finish blocks"
        )

    def leave(self) -> None:
        """Take this job's line away."""
        _internal_kv_del(self._name, namespace=_NAMESPACE)

    def _listen(self, now: float) -> list[Neighbour]:
        """Return the other jobs whose line changes; a driver that was killed left one that stands still."""
        found = []
        for key in _internal_kv_list(f"{self._kind}/", namespace=_NAMESPACE):
            name = key.decode()
            line = None if name == self._name else _internal_kv_get(name, namespace=_NAMESPACE)
            if line is None:
                continue
            before = self._heard.get(name)
            if before is None or before[0] != line:
                self._heard[name] = before = line, now
            if now - before[1] >= _SILENT_SECONDS:
                _internal_kv_del(name, namespace=_NAMESPACE)
                continue
            content = json.loads(line)
            found.append(Neighbour(name, content["wants"], content["has"]))
        return found
