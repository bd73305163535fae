"""A connection to Ray: the one that is there, a cluster's, or one started inside this process."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from types import TracebackType
from typing import Any

import ray

from volseg.errors import InputError
from volseg.execution.prepare import Cores
from volseg.spec import SegmentSpec

_SHARE = 0.9  # of what Ray counts as a machine's memory, which leaves room for Ray itself already
_EMBEDDED_STORE = 128 << 20  # only receipts travel
_PROBE_SECONDS = 10.0
_ANSWER_SECONDS = 3.0


def node_answers(node_id: str) -> bool:
    """Tell whether a machine of the cluster still works.

    Ray itself takes half a minute to call a machine dead that has vanished; until then its actors are only out of
    reach, as those are whose process died. So the machine is asked.
    """
    for node in _alive_nodes():
        if node["NodeID"] == node_id:
            try:
                socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _ANSWER_SECONDS).close()
            except OSError:
                return False
            return True
    return False


def _alive_nodes() -> list[dict[str, Any]]:
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def _show_messages(shown: bool) -> None:
    # Ray prints pages on stdout about each process that dies; the driver says the same in a line of its own.
    if hasattr(ray._private.worker, "_worker_logs_enabled"):
        ray._private.worker._worker_logs_enabled = shown


def _probe(address: str) -> None:
    """Raise OSError where nothing listens at ``host:port``: Ray itself would try for minutes, without a word."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()


class RaySession:
    """Connects on entry and leaves on exit what it did not start."""

    def __init__(self, address: str | None, workers: int | None) -> None:
        self._address = address
        self._workers = workers
        self._owned = False

    def __enter__(self) -> RaySession:
        """Connect, or start Ray inside this process.

        Raises InputError when the cluster does not answer.
        """
        if ray.is_initialized():
            return self
        handler = signal.getsignal(signal.SIGTERM)
        try:
            self._connect()
        finally:
            # Ray puts its own handler in place, which ends the process with no word on how to go on.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
        self._owned = True
        _show_messages(False)
        return self

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        if self._address:
            try:
                _probe(self._address)
                ray.init(address=self._address, **quiet)
            except (OSError, ValueError, RuntimeError, OverflowError) as error:
                reason = " ".join(str(error).split())[:200]
                raise InputError(
                    f"no Ray cluster answers at {self._address!r} ({reason}); nothing was done: check the address, or "
                    "leave it out to run on this machine"
                ) from error
        else:
            ray.init(
                address="local",
                num_cpus=self._workers,
                include_dashboard=False,
                object_store_memory=_EMBEDDED_STORE,
                **quiet,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect; an embedded Ray ends."""
        if self._owned:
            ray.shutdown()
            _show_messages(True)

    def cores(self, spec: SegmentSpec) -> Cores:
        """Return what the cluster offers: its smallest machine decides how much memory a worker may use.

        Raises InputError where GPUs were asked for and there are none.
        """
        total = ray.cluster_resources()  # type: ignore[no-untyped-call]
        cpus, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
        if spec.device == "cuda" and gpus == 0:
            raise InputError(
                "device cuda was asked for, but the Ray cluster has no GPU: leave --device out, or say cpu"
            )
        device = "cuda" if gpus and spec.device != "cpu" else "cpu"
        kind = "GPU" if device == "cuda" else "CPU"
        nodes = [n["Resources"] for n in _alive_nodes() if n["Resources"].get(kind, 0) >= 1]
        if not nodes:
            raise InputError(f"the Ray cluster has no free machine with a {kind}; nothing was done: add one, or wait")
        share, slots = min((n.get("memory", 0) * _SHARE / n[kind], int(n[kind])) for n in nodes)
        workers = gpus if device == "cuda" else cpus
        return Cores(cpus, gpus, device, workers, int(share * slots), slots)
