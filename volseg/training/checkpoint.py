"""Checkpoints of an unfinished training, beside the bundle it will become, in ``<bundle>.training/``.

Loading is restricted to tensors and plain values: a checkpoint never runs code.
"""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import dataclass
from typing import Any

import torch

from volseg.errors import SpecError
from volseg.spec import TrainSpec
from volseg.storage import files

# What may change between an attempt and the next; the rest determines what is learnt.
_FREE = frozenset({"max_minutes", "max_steps", "workers", "device", "resume", "overwrite", "learning_rate"})


@dataclass(frozen=True, slots=True)
class Workplace:
    """The folder that an unfinished training keeps its state in."""

    uri: str

    @classmethod
    def beside(cls, bundle: str) -> Workplace:
        """Return the workplace of the training that will write `bundle`."""
        return cls(files.absolute(bundle) + ".training")

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint by `state`, tensors and plain values, so that one of the two is always whole."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        files.write_bytes(files.join(self.uri, "checkpoint.pt"), buffer.getvalue())

    def load(self) -> dict[str, Any] | None:
        """Return the last checkpoint, None where there is none. Raises SpecError where it cannot be read."""
        place = files.join(self.uri, "checkpoint.pt")
        if not files.exists(place):
            return None
        try:
            state: dict[str, Any] = torch.load(
                io.BytesIO(files.read_bytes(place)), map_location="cpu", weights_only=True
            )
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
            raise SpecError(
                f"{place} is no checkpoint of volseg ({str(error).splitlines()[0]}); nothing was trained: remove the "
                "folder, or say --no-resume to start anew"
            ) from None
        return state

    def write_metrics(self, rows: list[dict[str, Any]]) -> bytes:
        """Replace metrics.jsonl by `rows`, one JSON object a line, and return its content."""
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        files.write_bytes(files.join(self.uri, "metrics.jsonl"), data)
        return data

    def remove(self) -> None:
        """Remove the folder."""
        files.remove(self.uri)


def check_same(spec: TrainSpec, stored: dict[str, Any]) -> None:
    """Raise SpecError where `spec` asks for another training than the one that `stored` (a dumped spec) began."""
    mine = spec.model_dump(mode="json")
    different = [
        f"{key}: {stored.get(key)!r} there, {value!r} now"
        for key, value in mine.items()
        if key not in _FREE and stored.get(key) != value
    ]
    if different:
        raise SpecError(
            f"an unfinished training for {spec.out} had other options ({'; '.join(different)}); nothing was trained: "
            "repeat its options to go on, say --no-resume to start anew, or choose another --out"
        )
