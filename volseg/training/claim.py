"""Which training a spec asks for, and whether its bundle may be written; known without torch."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from volseg.errors import OutputExistsError, SpecError
from volseg.models.manifest import MANIFEST_NAME, read_description
from volseg.spec import TrainSpec
from volseg.storage import files
from volseg.storage.volume import open_volume

_PLACES = frozenset({"image", "labels", "mask", "init", "out"})
# Who does the work, and how: nothing of it decides what is learnt.
_WORK = frozenset({
    "accumulate", "device", "threads", "workers", "address", "attempts", "resume", "overwrite", "webhook",
})  # fmt: skip
# What may change between an attempt and the next, besides; the rest determines what is learnt.
_FREE = _WORK | {"max_minutes", "max_steps", "learning_rate"}


def training_key(spec: TrainSpec) -> str:
    """Return the name of a training, 32 hexadecimal digits: what is learnt from which data, not where it is written.

    Raises what opening the volumes and the bundle that it starts from raises.
    """
    values = spec.model_dump(mode="json")
    identity = {name: value for name, value in values.items() if name not in _WORK | _PLACES}
    for name in ("image", "labels", "mask"):
        identity[name] = [open_volume(uri).identity() for uri in getattr(spec, name) or ()]
    identity["init"] = read_description(spec.init).digest if spec.init is not None else None
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def inputs_of(spec: TrainSpec) -> dict[str, str]:
    """Return what a training reads by the name of its option, numbered where there are several."""
    lists = {name: getattr(spec, name) or () for name in ("image", "labels", "mask")}
    lists["init"] = () if spec.init is None else (spec.init,)
    return {
        name if len(uris) == 1 else f"{name} {number}": uri
        for name, uris in lists.items()
        for number, uri in enumerate(uris, 1)
    }


def check_out(spec: TrainSpec) -> None:
    """Raise OutputExistsError where the bundle's place is taken."""
    if not files.exists(spec.out):
        return
    if not files.exists(files.join(spec.out, MANIFEST_NAME)):
        raise OutputExistsError(
            f"{spec.out} exists and is no model bundle, so it will not be replaced; nothing was trained: choose "
            "another --out"
        )
    if not spec.overwrite:
        raise OutputExistsError(
            f"{spec.out} exists; nothing was trained: choose another --out, or say --overwrite to replace the bundle"
        )


def check_same(spec: TrainSpec, stored: dict[str, Any]) -> None:
    """Raise SpecError where `spec` asks for another training than the one that `stored` (a dumped spec) began."""
    mine = spec.model_dump(mode="json")
    different = [
        f"{key}: {stored.get(key)!r} there, {value!r} now"
        for key, value in mine.items()
        if key not in _FREE and _placed(key, stored.get(key)) != _placed(key, value)
    ]
    if different:
        raise SpecError(
            f"an unfinished training for {spec.out} had other options ({'; '.join(different)}); nothing was trained: "
            "repeat its options to go on, say --no-resume to start anew, or choose another --out"
        )


def _placed(key: str, value: Any) -> Any:
    """Return `value` with places absolute: the same volume may be named from another folder."""
    if key not in _PLACES or value is None:
        return value
    return files.absolute(value) if isinstance(value, str) else [files.absolute(uri) for uri in value]
