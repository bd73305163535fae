"""The ledger: what is done. It lies beside the output and survives every process.

``<output>.volseg/<job_key>/``

- ``header.json``      what the job is (identity, block grid); created first and only once
- ``numerics.json``    the fingerprint of the device that computes; created once by the first worker
- ``attempts/00001.json``  one a driver, created only once each: who drives
- ``heartbeat.json``   rewritten every few seconds by the driver
- ``receipts/00001-000000.jsonl``  create-only segments, named by attempt and number
- ``report.json``      the result of the last finished attempt

A receipt is what makes a block done; the presence of a chunk proves nothing. A crash loses the receipts of a few
seconds, and computing those blocks again gives the same voxels, so a late or doubled writer does no harm. A receipt
that cannot be read is none. All but the heartbeat is on the disk when a call returns.

On S3 servers that ignore conditional puts two drivers that start within milliseconds may both believe that they drive.
Each looks with every heartbeat whether the attempt is still its own, and whose record was replaced stops; until then
they did the same work twice, with the same bits.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from volseg.errors import JobError, StorageUnavailableError, VolumeError
from volseg.geometry import BlockSet
from volseg.storage import files

Json = dict[str, Any]

FLUSH_SECONDS = 2.0
HEARTBEAT_SECONDS = 3.0
STALE_SECONDS = 45.0
"""A driver on another machine counts as dead when its heartbeat is older."""

MOST_TRACES = 200
"""Tracebacks that one attempt keeps: what fails ten thousand times says nothing new."""

_READERS = 8
"""Segments that are read at once: on S3 the answer to one takes as long as eight."""

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode

_DRIVEN_HERE: set[tuple[str, int]] = set()
"""Ledgers and attempts that this process drives now: a process that lives on may have left a job long ago."""


@dataclass(frozen=True)
class Receipt:
    """What one block wrote: digests of the decoded voxels by array, and the size in bytes of every object."""

    index: int
    digests: dict[str, str]
    objects: dict[str, int]
    stats: dict[str, float] = field(default_factory=dict)


def ledger_root(output: str) -> str:
    """Return the folder of all ledgers of an output."""
    return f"{output.rstrip('/')}.volseg"


class Ledger:
    """One job's ledger, for one driver at a time; readers need no permission.

    `clock` (seconds) says when something is due. What other processes compare is always the time of day.
    """

    def __init__(self, output: str, job_key: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = files.join(ledger_root(output), job_key)
        self._clock = clock
        self.attempt = 0
        self._segment = 0
        self._record: Json = {}
        self._waiting: list[Receipt] = []
        self._traces = 0
        self._flushed = self._beat = 0.0
        self._reached = clock()
        """When the storage last took something."""

    def header(self) -> Json | None:
        """Return the header, None where the job was never begun; raises VolumeError where it is damaged."""
        return self._fact("header.json")

    def create(self, header: Json) -> Json:
        """Write the header once; return what stands there afterwards, ours or an earlier one."""
        files.create_bytes(files.join(self.path, "header.json"), _dump(header))
        return self.header() or header

    def numerics(self, fingerprint: Json) -> Json:
        """Write the numerics fingerprint once; return what stands there, ours or an earlier one."""
        files.create_bytes(files.join(self.path, "numerics.json"), _dump(fingerprint))
        return self._fact("numerics.json") or fingerprint

    def recorded_numerics(self) -> Json | None:
        """Return what the first worker wrote, None before there was one."""
        return self._fact("numerics.json")

    def take(self) -> bool:
        """Become this job's driver; False when another process is, or took the same attempt first."""
        last = self._last_attempt()
        if last and self._alive(last) is not None:
            return False
        # Whoever else saw the same last attempt wants the same number, and only one gets it.
        record = {**_whoami(), "time": time.time()}
        if not files.create_bytes(files.join(self.path, "attempts", f"{last + 1:05d}.json"), _dump(record)):
            return False
        self.attempt, self._record = last + 1, record
        _DRIVEN_HERE.add((self.path, self.attempt))
        return True

    def driver(self) -> Json | None:
        """Return the record of the driver that is alive, None where there is none.

        On this machine the process is looked up; elsewhere the age of its heartbeat decides.
        """
        last = self._last_attempt()
        return self._alive(last) if last else None

    def _last_attempt(self) -> int:
        names = files.list_names(files.join(self.path, "attempts"))
        return max((int(name[:-5]) for name in names if name.endswith(".json") and name[0] != "."), default=0)

    def _alive(self, attempt: int) -> Json | None:
        record = self._read("attempts", f"{attempt:05d}.json")
        if record is None or self._read("ended", f"{attempt:05d}.json") is not None:
            return None
        beat = self._read("heartbeat.json")
        if beat is not None and beat.get("attempt") == attempt:
            record["time"] = beat["time"]
        me = _whoami()
        if all(record[name] == me[name] for name in me):
            alive = (self.path, attempt) in _DRIVEN_HERE
        elif (record["host"], record["boot"]) == (me["host"], me["boot"]):
            alive = _started(record["pid"]) == record["started"]
        else:
            alive = time.time() - record["time"] < STALE_SECONDS
        return record if alive else None

    def receipts(self) -> Iterator[Receipt]:
        """Yield one receipt a block: the newest, newest segments first.

        A few segments at a time are in memory, and a bit a block.
        """
        folder = files.join(self.path, "receipts")
        names = [name for name in files.list_names(folder) if name.endswith(".jsonl") and name[0] != "."]
        found = BlockSet()
        for content in _read_ahead(files.join(folder, name) for name in reversed(names)):
            for line in reversed(content.splitlines()):
                if (receipt := _receipt(line)) is not None and found.add(receipt.index):
                    yield receipt

    def add(self, receipt: Receipt) -> None:
        """Keep a receipt for the next flush."""
        self._waiting.append(receipt)

    def tick(self, progress: Mapping[str, Any], *, force: bool = False) -> None:
        """Flush receipts and heartbeat where they are due; the driver calls this at least once a second.

        What could not be written waits for the next call. Storage that gives no answer is borne with, unless `force`,
        until others take this driver for dead: then StorageUnavailableError. Raises JobError.
        """
        now = self._clock()
        try:
            self._flush(now, force=force)
            self._show_life(now, progress, force=force)
        except StorageUnavailableError:
            if force or now - self._reached >= STALE_SECONDS:
                raise

    def _flush(self, now: float, *, force: bool) -> None:
        if not self._waiting or not (force or now - self._flushed >= FLUSH_SECONDS):
            return
        # A number once: a write that failed may have arrived all the same.
        name = f"{self.attempt:05d}-{self._segment:06d}.jsonl"
        self._segment += 1
        lines = b"".join(_dump(vars(receipt)) + b"\n" for receipt in self._waiting)
        if not files.create_bytes(files.join(self.path, "receipts", name), lines):
            raise self._not_alone(f"receipts {name} are")
        self._waiting.clear()
        self._flushed = self._reached = now

    def _show_life(self, now: float, progress: Mapping[str, Any], *, force: bool) -> None:
        if not (force or now - self._beat >= HEARTBEAT_SECONDS):
            return
        if self.attempt and not files.is_local(self.path):
            self._check_mine()
        beat = {"time": time.time(), "attempt": self.attempt, **progress}
        files.write_bytes(files.join(self.path, "heartbeat.json"), _dump(beat), durable=False)
        self._beat = self._reached = now

    def _check_mine(self) -> None:
        name = f"{self.attempt:05d}.json"
        if (found := self._read("attempts", name)) is not None and found != self._record:
            raise self._not_alone(f"attempt {name} of another process is")

    def _not_alone(self, what: str) -> JobError:
        return JobError(
            f"{what} in {self.path} already, so another process drives this job under the same number; this one "
            "stopped: run the same command again"
        )

    def trace(self, index: int, message: str, details: str) -> None:
        """Keep the traceback of an error that no rule foresaw, up to `MOST_TRACES` of them."""
        self._traces += 1
        if self._traces > MOST_TRACES:
            return
        if self._traces == MOST_TRACES:
            details += f"\n\nThis is traceback {MOST_TRACES} of attempt {self.attempt}; later ones are not kept.\n"
        name = f"{self.attempt:05d}-{index}-{time.time_ns()}.txt"
        files.create_bytes(files.join(self.path, "failures", name), f"{message}\n\n{details}".encode())

    def end(self, report: Json | None) -> None:
        """Say that this driver stopped by itself, with its report where the job came to an end."""
        _DRIVEN_HERE.discard((self.path, self.attempt))
        if report is not None:
            files.write_bytes(files.join(self.path, "report.json"), _dump(report))
        files.write_bytes(files.join(self.path, "ended", f"{self.attempt:05d}.json"), _dump({"time": time.time()}))

    def report(self) -> Json | None:
        """Return the last report."""
        return self._read("report.json")

    def _fact(self, name: str) -> Json | None:
        """Return what was written once and for all; to take it as absent where it is damaged would contradict it."""
        content = self._read(name)
        if content is None and files.exists(files.join(self.path, name)):
            raise VolumeError(
                f"the ledger's {name} in {self.path} is damaged; nothing was done: restore it, or remove that folder "
                "and make the output anew with --overwrite"
            )
        return content

    def _read(self, *names: str) -> Json | None:
        """Return a document, None where there is none that can be read."""
        try:
            content = json.loads(files.read_bytes(files.join(self.path, *names)))
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) else None


def _receipt(line: bytes) -> Receipt | None:
    try:
        receipt = Receipt(**json.loads(line))
    except (ValueError, TypeError):
        return None
    index: Any = receipt.index
    return receipt if isinstance(index, int) and index >= 0 else None


def _read_ahead(uris: Iterable[str]) -> Iterator[bytes]:
    """Yield the files' contents in order, a few of them read at once."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[Future[bytes]] = deque()
        for uri in uris:
            waiting.append(pool.submit(files.read_bytes, uri))
            if len(waiting) == _READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _dump(content: Mapping[str, Any]) -> bytes:
    return _encode(content).encode()


@lru_cache(maxsize=1)
def _boot() -> str:
    """Name what makes process numbers comparable: this start of the machine, and the container's own numbering."""
    boot, numbering = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip()} {numbering.readlink()}" if boot.exists() and numbering.is_symlink() else ""


def _started(pid: int) -> float | None:
    """Return when a process started, so that a reused pid is not taken for it; None where there is none."""
    if Path("/proc/self/stat").exists():
        # In ticks since the machine's start, field 22: unlike a time of day, it stays when the clock is set.
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if state in {b"Z", b"X"} else float(fields[18])
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None


def _whoami() -> Json:
    pid = os.getpid()
    return {"host": platform.node(), "boot": _boot(), "pid": pid, "started": _started(pid)}
