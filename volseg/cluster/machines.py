"""What Ray says of the cluster's machines: places for workers, who is taken away, who is gone and why.

All that is not in Ray's public interface stands here, one function each.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray

from volseg.errors import JobError
from volseg.planning.memory import GIB

_ANSWER_SECONDS = 3.0
_ASKED_AT_ONCE = 32
# gcs.proto, NodeDeathInfo.Reason: ended as it was told to, drained before a preemption, drained because it was idle.
_LEFT_IN_ORDER = frozenset({1, 3, 4})


@dataclass(frozen=True)
class Machine:
    """One living machine; a place is room for one worker: a CPU or GPU, and the memory that it needs."""

    node_id: str
    places: int
    free: int
    deadline: float | None = None
    """When it is taken away, in seconds since 1970; infinite without a date, None where it stays."""


def look(kind: str, memory: int) -> list[Machine]:
    """Return the machines with a CPU or GPU (`kind`), for workers of `memory` bytes each. Raises JobError."""
    free, drains = _free_resources(), draining()
    return [
        Machine(
            node["NodeID"], _places(node["Resources"], kind, memory),
            _places(free.get(node["NodeID"], {}), kind, memory), drains.get(node["NodeID"]),
        )
        for node in alive_nodes() if node["Resources"].get(kind, 0) >= 1
    ]  # fmt: skip


def _places(resources: Mapping[str, float], kind: str, memory: int) -> int:
    places = int(resources.get(kind, 0))
    return min(places, int(resources.get("memory", 0) // memory)) if memory else places


def draining() -> dict[str, float]:
    """Return when machines are taken away that Ray has been told of, as in `Machine.deadline`. Raises JobError."""
    try:
        found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    except AttributeError as error:
        raise _changed("which machines are drained", error) from error
    return {node_id: at / 1000 if at else math.inf for node_id, at in found.items()}


def _free_resources() -> dict[str, dict[str, float]]:
    """Return what nobody uses of every machine; the sum over machines, which is public, says not where. JobError."""
    try:
        found: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    except AttributeError as error:
        raise _changed("what machines have free", error) from error
    return found


def grows() -> bool:
    """Tell whether an autoscaler adds machines when workers wait for one. Raises JobError."""
    try:
        from ray.autoscaler.v2.utils import is_autoscaler_v2

        return bool(is_autoscaler_v2(fetch_from_server=True))
    except (ImportError, AttributeError) as error:
        raise _changed("whether there is an autoscaler", error) from error


def _changed(what: str, error: Exception) -> JobError:
    return JobError(
        f"Ray {ray.__version__} does not tell {what} where volseg asks for it ({error}); the job stopped: use the "
        "version of Ray in constraints.txt, then run it again"
    )


def alive_nodes() -> list[dict[str, Any]]:
    """Return what Ray says of its living machines."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def left_in_order(node_ids: Collection[str]) -> set[str]:
    """Return those of some machines that are gone because they were told to go, by a signal or after a drain."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return {
        node["NodeID"] for node in nodes
        if node["NodeID"] in node_ids and not node["Alive"] and node.get("DeathReason") in _LEFT_IN_ORDER
    }  # fmt: skip


def silent_nodes(node_ids: Collection[str]) -> set[str]:
    """Return those of some machines of the cluster that do not work any more.

    Ray itself takes half a minute to call a machine dead that has vanished; until then its actors are only out of
    reach, as those are whose process died. So the machines are asked, all at once: many may have gone together.
    """
    alive = {node["NodeID"]: node for node in alive_nodes() if node["NodeID"] in node_ids}
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        answers = dict(zip(alive, pool.map(_answers, alive.values()), strict=True))
    return {node_id for node_id in node_ids if not answers.get(node_id, False)}


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def shortage(kind: str, memory: int = 0) -> str:
    """Say what workers that need a CPU or GPU (`kind`) and `memory` bytes each wait for, and what can be done."""
    machines = [machine for machine in look(kind, memory) if machine.deadline is None]
    total = sum(int(node["Resources"].get(kind, 0)) for node in alive_nodes())
    if not total:
        return f"the cluster has no machine with a {kind} now: they start when one joins, or Ctrl-C stops the job"
    if not any(machine.places for machine in machines):
        return (
            f"no machine of the cluster that stays has a {kind} and the {memory / GIB:.2f} GiB of memory that a worker "
            "needs: they start when one joins, or Ctrl-C stops the job"
        )
    if not any(machine.free for machine in machines):
        return (
            f"all {total} {kind}s of the cluster are taken, perhaps by workers that still load torch and the "
            "model; the others start when one is free or a machine joins"
        )
    return "they load torch and the model, which takes a while from slow storage"
