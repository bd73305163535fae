"""Checkpoints of an unfinished training, beside the bundle it will become, in ``<bundle>.training/``.

Each lies in a folder of its own, ``checkpoints/<step>-<id>/``: ``state.pt`` and then, written last, ``manifest.json``
with its size and digest, so that a half-written one is never taken for whole. The last two are kept, because the newest
can be damaged. Loading is restricted to tensors and plain values: a checkpoint never runs code.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from volseg.errors import SpecError
from volseg.journal import Note
from volseg.storage import files

State = dict[str, Any]

_KEPT = 2
_STATE, _MANIFEST = "state.pt", "manifest.json"


@dataclass(frozen=True, slots=True)
class Workplace:
    """The folder that an unfinished training keeps its state in."""

    uri: str

    @classmethod
    def beside(cls, bundle: str) -> Workplace:
        """Return the workplace of the training that will write `bundle`."""
        return cls(files.absolute(bundle) + ".training")

    def part(self, name: str) -> Workplace:
        """Return a workplace inside this one, such as that of a fold."""
        return Workplace(files.join(self.uri, name))

    def checkpoints(self) -> list[str]:
        """Return the names of all checkpoints, whole or not, oldest first."""
        names = files.list_names(self._place())
        return sorted(n for n in names if n.partition("-")[0].isdigit())

    def save(self, state: State) -> str:
        """Write a checkpoint of `state`, tensors and plain values with a ``step``, and return its name.

        Raises StorageFullError and StorageDeniedError.
        """
        return self.write(pack(state), state["step"])

    def write(self, data: bytes, step: int) -> str:
        """Write what `pack` returned."""
        name = f"{step:09d}-{uuid.uuid4().hex[:8]}"
        manifest = {"step": step, "files": {_STATE: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}}
        files.write_bytes(self._place(name, _STATE), data)
        files.write_bytes(self._place(name, _MANIFEST), json.dumps(manifest, indent=2).encode())
        return name

    def newest_valid(self, note: Note) -> tuple[str, State] | None:
        """Return name and state of the newest checkpoint that verifies, None where there is none.

        `note` takes a line about each damaged one that is passed over. Raises SpecError where all are damaged.
        """
        faults = []
        for name in reversed(self.checkpoints()):
            found = self._read(name)
            if not isinstance(found, str):
                return name, found
            faults.append(f"checkpoint {self._place(name)} is not used: {found}")
            note(faults[-1])
        whole = [fault for fault in faults if not fault.endswith(_UNFINISHED)]
        if whole:
            raise SpecError(
                f"{whole[0]}, and no other one verifies; nothing was trained: say --no-resume to start anew"
            )
        return None

    def keep(self, names: list[str]) -> None:
        """Remove all checkpoints but those called `names`."""
        for name in self.checkpoints():
            if name not in names:
                files.remove(self._place(name))

    def write_metrics(self, rows: list[dict[str, Any]]) -> bytes:
        """Replace metrics.jsonl by `rows`, one JSON object a line, and return its content."""
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        files.write_bytes(files.join(self.uri, "metrics.jsonl"), data)
        return data

    def remove(self) -> None:
        """Remove the folder."""
        files.remove(self.uri)

    def _place(self, *parts: str) -> str:
        return files.join(self.uri, "checkpoints", *parts)

    def _read(self, name: str) -> State | str:
        """Return the state of a checkpoint, or what is wrong with it."""
        try:
            manifest = json.loads(files.read_bytes(self._place(name, _MANIFEST)))
            wanted = manifest["files"][_STATE]
        except FileNotFoundError:
            return _UNFINISHED
        except (ValueError, KeyError, TypeError):
            return "its manifest is damaged"
        try:
            data = files.read_bytes(self._place(name, _STATE))
        except FileNotFoundError:
            return f"{_STATE} is missing"
        if len(data) != wanted.get("size") or hashlib.sha256(data).hexdigest() != wanted.get("sha256"):
            return f"{_STATE} is not what its manifest says"
        try:
            return unpack(data)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
            return f"{_STATE} is no checkpoint of volseg ({str(error).splitlines()[0]})"


_UNFINISHED = "it was never finished"


def pack(state: State) -> bytes:
    """Return the bytes of `state`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def unpack(data: bytes) -> State:
    """Return the state that `pack` made bytes of, its tensors on the CPU."""
    state: State = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one at a time, and keeps the last two.

    What goes wrong there is raised by the next `save` or by `flush`.
    """

    def __init__(self, workplace: Workplace, resumed: str | None = None) -> None:
        """Write into `workplace`; the checkpoint `resumed`, which verified, counts as one of the two."""
        self._workplace = workplace
        self._kept = [resumed] if resumed else []
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: State) -> None:
        """Take `state` as it is now; wait for the one before, if that is still being written."""
        data = pack(state)
        self.flush()
        self._pending = self._pool.submit(self._write, data, int(state["step"]))

    def flush(self) -> None:
        """Wait until everything is written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.flush()
        finally:
            self._pool.shutdown()

    def _write(self, data: bytes, step: int) -> None:
        self._kept = [*self._kept, self._workplace.write(data, step)][-_KEPT:]
        self._workplace.keep(self._kept)
