"""Wait until the machines of a cluster that just started have joined it: ``python -m volseg.cluster.gather ADDRESS N``.

For batch systems, where the cluster is made together with its job: a job counts the workers when it begins.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from volseg.cluster.session import RaySession
from volseg.errors import InputError, JobError, VolsegError

_PATIENCE_SECONDS = 300.0
_POLL_SECONDS = 0.5
_NOTE_SECONDS = 30.0


def gather(
    address: str, wanted: int, *, patience: float = _PATIENCE_SECONDS, alive: Callable[[], bool] = lambda: True
) -> int:
    """Return how many machines that can work are there: `wanted`, or fewer after `patience` seconds.

    `alive` tells whether the head has not ended. Raises JobError where it has, or where nobody came.
    """
    until = time.monotonic() + patience
    with _connected(address, until, alive):
        told, before = time.monotonic(), -1
        while (count := _count()) < wanted and time.monotonic() < until:
            _check(alive)
            if count != before or time.monotonic() - told > _NOTE_SECONDS:
                _say(f"{count} of {wanted} machines have joined")
                told, before = time.monotonic(), count
            time.sleep(_POLL_SECONDS)
    if not count:
        raise JobError(
            f"no machine joined the cluster at {address} within {patience:.0f} s; nothing was done: see what Ray said "
            "above, and whether the machines reach each other"
        )
    return count


@contextmanager
def _connected(address: str, until: float, alive: Callable[[], bool]) -> Iterator[None]:
    """Connect to a cluster whose head may still be starting."""
    while True:
        session = RaySession(address, None)
        try:
            session.__enter__()
            break
        except InputError:
            _check(alive)
            if time.monotonic() > until:
                raise
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        session.__exit__(None, None, None)


def _check(alive: Callable[[], bool]) -> None:
    if not alive():
        raise JobError("the head of the cluster ended before its workers joined; see what Ray said above")


def _count() -> int:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return sum(node["Alive"] and any(node["Resources"].get(kind, 0) >= 1 for kind in ("CPU", "GPU")) for node in nodes)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _say(line: str) -> None:
    sys.stderr.write(f"volseg: {line}\n")
    sys.stderr.flush()


def main(words: Sequence[str] | None = None) -> int:
    """Wait, and return the exit code."""
    parser = argparse.ArgumentParser(description="wait for the machines of a cluster")
    parser.add_argument("address")
    parser.add_argument("wanted", type=int)
    parser.add_argument("--head", type=int, help="process that ends with the head")
    parser.add_argument("--patience", type=float, default=_PATIENCE_SECONDS, help="seconds")
    arguments = parser.parse_args(words)
    head: int | None = arguments.head
    try:
        count = gather(
            arguments.address, arguments.wanted, patience=arguments.patience,
            alive=lambda: head is None or _is_there(head),
        )  # fmt: skip
    except VolsegError as error:
        _say(str(error))
        return error.exit_code
    if count < arguments.wanted:
        _say(f"only {count} of {arguments.wanted} machines have joined; they begin without the others")
    return 0


if __name__ == "__main__":
    sys.exit(main())
