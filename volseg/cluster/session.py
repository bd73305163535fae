"""A connection to Ray: the one that is there, a cluster's, or one started inside this process."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import ray

from volseg.cluster.machines import alive_nodes, grows
from volseg.cluster.reach import refuse_unseen
from volseg.errors import InputError, JobError
from volseg.execution.prepare import Cores
from volseg.planning.memory import GIB
from volseg.spec import SegmentSpec

_SHARE = 0.9  # of what Ray counts as a machine's memory, which leaves room for Ray itself already
_UNKNOWN_MACHINE = 4 * GIB  # what a worker may use of a machine that an autoscaler has yet to bring
_EMBEDDED_STORE = 128 << 20  # enough for receipts
_PROBE_SECONDS = 10.0


def _show_messages(shown: bool) -> None:
    # Ray prints pages on stdout about each process that dies; the driver says the same in a line of its own.
    if hasattr(ray._private.worker, "_worker_logs_enabled"):
        ray._private.worker._worker_logs_enabled = shown


def _probe(address: str) -> None:
    """Raise OSError where nothing listens at ``host:port``: Ray itself would try for minutes, without a word."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()


def store_here() -> int | None:
    """Return the bytes of the object store of a Ray that this process is connected to already; None without one."""
    return int(_smallest_store(alive_nodes())) if ray.is_initialized() else None


def _smallest_store(nodes: Sequence[Mapping[str, Any]]) -> int:
    """Return the bytes of all object stores together, were all as large as the smallest."""
    stores = [int(node["Resources"].get("object_store_memory", 0)) for node in nodes]
    return min(stores, default=0) * len(stores)


class RaySession:
    """Connects on entry and leaves on exit what it did not start; `store` are bytes for what lies between blocks."""

    def __init__(self, address: str | None, workers: int | None, store: int = 0) -> None:
        self._address = address
        self._workers = workers
        self._store = max(store, _EMBEDDED_STORE)
        self._owned = False

    def __enter__(self) -> RaySession:
        """Connect, or start Ray inside this process.

        Raises InputError when the cluster does not answer, JobError when Ray does not start here.
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
            try:
                ray.init(
                    address="local",
                    num_cpus=self._workers,
                    include_dashboard=False,
                    object_store_memory=self._store,
                    **quiet,
                )
            except Exception as error:
                # Ray raises nothing more special where its processes do not come up in time.
                reason = " ".join(str(error).split())[:200]
                raise JobError(
                    f"Ray could not be started on this machine ({reason}); nothing was done: the machine may be too "
                    "busy or short of memory: run it again later, or without Ray (--executor serial)"
                ) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect; an embedded Ray ends."""
        if self._owned:
            ray.shutdown()
            _show_messages(True)

    def cores(self, spec: SegmentSpec) -> Cores:
        """Return what the cluster offers: its smallest machine decides how much memory a worker may use.

        Raises InputError where GPUs were asked for and there are none, and where a machine of the cluster does not see
        a local path.
        """
        total = ray.cluster_resources()  # type: ignore[no-untyped-call]
        cpus, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
        device = "cuda" if (gpus and spec.device != "cpu") or spec.device == "cuda" else "cpu"
        kind = "GPU" if device == "cuda" else "CPU"
        nodes = [node for node in alive_nodes() if node["Resources"].get(kind, 0) >= 1]
        if not nodes:
            return _to_come(spec, device, kind)
        refuse_unseen(
            {"input": spec.input, "model": spec.model}, spec.output, [node["NodeID"] for node in nodes]
        )  # fmt: skip
        offers = [node["Resources"] for node in nodes]
        share, slots = min((offer.get("memory", 0) * _SHARE / offer[kind], int(offer[kind])) for offer in offers)
        workers = gpus if device == "cuda" else cpus
        return Cores(cpus, gpus, device, workers, int(share * slots), slots, _smallest_store(nodes))


def _to_come(spec: SegmentSpec, device: str, kind: str) -> Cores:
    """Return what to plan for where an autoscaler is to bring the first machine; raises InputError where none is."""
    if grows() and spec.device != "auto":
        return Cores(0, 0, device, spec.workers or 1, int(_UNKNOWN_MACHINE), 1)
    if spec.device == "cuda":
        raise InputError("device cuda was asked for, but the Ray cluster has no GPU: leave --device out, or say cpu")
    more = ", or say --device cuda or cpu, and its autoscaler brings one" if grows() else ", or wait"
    raise InputError(f"the Ray cluster has no free machine with a {kind}; nothing was done: add one{more}")
