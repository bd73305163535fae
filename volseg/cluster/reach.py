"""Do the cluster's machines see the same files as the driver? Asked of each of them before work."""

from __future__ import annotations

import hashlib
import os
import platform
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from volseg.errors import InputError
from volseg.storage import files

_PATIENCE_SECONDS = 60.0
_METADATA = frozenset({"zarr.json", ".zarray", ".zattrs", ".zgroup", "model.json"})
_MOST_BYTES = 16 << 20


def refuse_unseen(inputs: Mapping[str, str], output: str, node_ids: Sequence[str]) -> None:
    """Raise InputError where a local path is not the same for the driver and the machines `node_ids`.

    What is read must look alike everywhere. Where the output lies, a file is left for a moment that all must see.
    A machine that does not answer in a minute is not waited for, and one that joins later finds out by itself.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [node_id for node_id in node_ids if node_id != here]
    local = {name: place for name, place in inputs.items() if files.is_local(place)}
    if not others or not (local or files.is_local(output)):
        return
    with _marker(output) as marker:
        wanted = {str(files.local_path(place)): fingerprint(files.local_path(place)) for place in local.values()}
        if marker is not None:
            wanted[str(marker)] = fingerprint(marker)
        blind = _ask(wanted, others)
    if not blind:
        return
    machine, path = next(iter(blind.items()))
    name = next((n for n, place in local.items() if str(files.local_path(place)) == path), "output")
    place = local.get(name, output)
    more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
    raise InputError(
        f"{name} {place} is a local path, and the cluster's machine {machine}{more} does not see there what "
        f"{platform.node()} sees; nothing was done: put it on a file system that all machines share, or in an object "
        "store (s3://...)"
    )


def fingerprint(path: Path) -> str:
    """Name what lies at a path, by its metadata files: empty where there is nothing, the same on every machine."""
    if path.is_file():
        return f"file of {path.stat().st_size} bytes"
    if not path.is_dir():
        return ""
    total = hashlib.sha256()
    for name in sorted(_METADATA):
        inner = path / name
        if inner.is_file() and inner.stat().st_size <= _MOST_BYTES:
            total.update(name.encode() + b"\0" + inner.read_bytes())
    return f"folder {total.hexdigest()}"


def unseen(wanted: Mapping[str, str]) -> tuple[str, str | None]:
    """Return this machine's name, and the first path that is not here what it should be."""
    return platform.node(), next((path for path, mark in wanted.items() if fingerprint(Path(path)) != mark), None)


def _ask(wanted: Mapping[str, str], node_ids: Sequence[str]) -> dict[str, str]:
    """Return a path that is not seen by machine."""
    task: Any = ray.remote(unseen)
    refs = {
        task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(wanted): node_id
        for node_id in node_ids
    }
    ready, late = ray.wait(list(refs), num_returns=len(refs), timeout=_PATIENCE_SECONDS)
    for ref in late:
        ray.cancel(ref, force=True)
    blind: dict[str, str] = {}
    for ref in ready:
        try:
            machine, path = ray.get(ref)
        except RayError:
            # Gone while it was asked: then it works on nothing either.
            continue
        if path is not None:
            blind[f"{machine} ({refs[ref][:8]})"] = path
    return blind


@contextmanager
def _marker(output: str) -> Iterator[Path | None]:
    """Leave a file in the folder that the output will lie in, as far as that exists; None where that cannot be."""
    if not files.is_local(output):
        yield None
        return
    folder = next(parent for parent in files.local_path(output).parents if parent.is_dir())
    marker = folder / f".volseg-{uuid.uuid4().hex}"
    if not os.access(folder, os.W_OK):
        # That it cannot be written is said by whoever wants to write.
        yield None
        return
    marker.write_text("seen")
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)
