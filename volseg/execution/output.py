"""The output and its ledger: whether it may be written, how it is begun, and when it is complete."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from volseg.errors import OutputExistsError, VerifyError
from volseg.execution.prepare import Prepared
from volseg.geometry import BlockSet, Box
from volseg.journal import Note
from volseg.storage import files, nodes, ome
from volseg.storage.ledger import Ledger, Receipt, ledger_root
from volseg.storage.volume import Layout, create_array, set_status

_POLL_SECONDS = 0.5
_STAT_THREADS, _STAT_GROUP = 8, 512


def marks_of(output: str) -> dict[str, Any] | None:
    """Return what volseg wrote into the output's attributes, None where there is no output of volseg."""
    node = nodes.read_node(output) if files.exists(output) else None
    marks = node.attributes.get("volseg") if node else None
    return marks if isinstance(marks, dict) and "job_key" in marks else None


def clear_for(job: Prepared, note: Note) -> None:
    """Make sure that the output is free or this job's own; with `overwrite`, remove another job's.

    Raises OutputExistsError, with the difference to what lies there.
    """
    output = job.spec.output
    if not files.exists(output):
        return
    marks = marks_of(output)
    if marks is None:
        # A driver that died while it made the output left a folder without metadata, but with this job's header.
        if nodes.read_node(output) is None and Ledger(output, job.job_key).header() is not None:
            return
        # An --overwrite that was killed half way left the old job's ledger, which goes last.
        if job.spec.overwrite and nodes.read_node(output) is None and files.exists(ledger_root(output)):
            files.remove(output)
            files.remove(ledger_root(output))
            return
        raise OutputExistsError(
            f"output {output} exists and volseg did not write it; nothing was done: choose another place, or move it "
            "away"
        )
    other_key = str(marks["job_key"])
    other = Ledger(output, other_key)
    header = other.header()
    if header is not None and other_key == job.job_key:
        return
    if not job.spec.overwrite:
        if header is None:
            raise OutputExistsError(
                f"output {output} exists, but its ledger {other.path} is gone, so nothing in it can be trusted; "
                "nothing was done: bring the ledger back, choose another place, or make it anew with --overwrite"
            )
        raise OutputExistsError(
            f"output {output} holds another job's result ({_difference(header['identity'], job.identity)}); nothing "
            "was done: choose another place, or replace it with --overwrite"
        )
    wait_for_driver(other, note)
    files.remove(output)
    files.remove(ledger_root(output))


def wait_for_driver(ledger: Ledger, note: Note) -> None:
    """Wait until no other process drives a job."""
    told = False
    while (driver := ledger.driver()) is not None:
        if not told:
            note(f"process {driver['pid']} on {driver['host']} works on this output; waiting until it ends")
            told = True
        time.sleep(_POLL_SECONDS)


def begin(job: Prepared, ledger: Ledger, created: float) -> dict[str, Any]:
    """Write the ledger's header where there is none and return the one that stands."""
    plan = job.plan
    return ledger.create({
        "job_key": job.job_key, "identity": job.identity, "block": plan.block, "chunks": plan.chunks,
        "shards": plan.shards, "shape": plan.shape, "region": str(plan.region), "created": created,
        "input": job.spec.input, "model": job.spec.model,
    })  # fmt: skip


def create_output(job: Prepared) -> None:
    """Create the output's arrays, marked incomplete, where they are not there yet."""
    spec, plan, manifest = job.spec, job.plan, job.manifest
    # The last of what is written below: while it is missing, a driver died on the way here.
    if files.exists(files.join(spec.output, "zarr.json")):
        _check_mine(job)
        return
    marks = {
        "status": "incomplete", "job_key": job.job_key, "region": str(plan.region),
        "all_chunks_written": plan.region == Box.of(plan.shape), "model": job.bundle_digest,
    }  # fmt: skip
    voxel_size, unit = job.volume.voxel_size, job.volume.unit
    if spec.probabilities:
        layout = Layout(plan.shape, plan.chunks, plan.shards, np.dtype("uint8"), channels=plan.classes)
        attributes = ome.group_attributes(
            layout.axes, voxel_size=voxel_size, unit=unit, name="probabilities", volseg=marks
        )
        create_array(files.join(spec.output, "probabilities"), layout, attributes)
    layout = Layout(plan.shape, plan.chunks, plan.shards, np.dtype("uint8" if plan.classes <= 256 else "uint16"))
    label = ome.label_attributes(
        [c.name for c in manifest.classes],
        [(*(int(c.color[i : i + 2], 16) for i in (1, 3, 5)), 255 if c.id else 0) for c in manifest.classes],
    )
    attributes = ome.group_attributes(
        layout.axes, voxel_size=voxel_size, unit=unit, name="labels", label=label, volseg=marks
    )
    create_array(spec.output, layout, attributes)


def _check_mine(job: Prepared) -> None:
    """Raise OutputExistsError where another job made the output since `clear_for` looked."""
    marks = marks_of(job.spec.output)
    if marks is None or marks["job_key"] != job.job_key:
        raise OutputExistsError(
            f"another job began to write {job.spec.output} at the same time; this one stopped: choose another place, "
            "or wait for the other one and replace it with --overwrite"
        )


def finish(job: Prepared, receipts: Iterable[Receipt]) -> None:
    """Check that every block has a receipt and every object its size; then, and only then, say complete.

    `receipts` has one a block and may be a stream. Raises VerifyError, and OutputExistsError where another job took the
    place.
    """
    _check_mine(job)
    found, lost = BlockSet(), BlockSet()
    for receipt, sound in inspected(job.spec.output, receipts):
        (found if sound else lost).add(receipt.index)
    without = len(job.plan.grid) - len(found) - len(lost)
    if without:
        raise VerifyError(
            f"{without} block(s) have no receipt in {ledger_root(job.spec.output)}; the output stays incomplete: run "
            "the same command again"
        )
    if lost:
        raise VerifyError(
            f"{len(lost)} block(s) have a receipt but their objects are gone or changed, the first is block "
            f"{next(iter(lost))}; the output stays incomplete: run the same command again"
        )
    for group in ("probabilities",) * job.spec.probabilities + ("",):
        set_status(files.join(job.spec.output, group).rstrip("/"), {"volseg": {"status": "complete"}})


def reopen(job: Prepared) -> None:
    """Mark the output incomplete again before blocks of it are written."""
    for group in ("", *("probabilities",) * job.spec.probabilities):
        set_status(files.join(job.spec.output, group).rstrip("/"), {"volseg": {"status": "incomplete"}})


def inspected(output: str, receipts: Iterable[Receipt]) -> Iterator[tuple[Receipt, bool]]:
    """Yield every receipt, in order, and whether all its objects are there with the sizes that it says.

    Memory does not grow with the number of receipts; on S3 it does with that of the objects, by about 200 bytes each,
    because one listing tells a thousand sizes.
    """
    if not files.is_local(output):
        found: dict[str, int] | None = None
        for receipt in receipts:
            found = files.sizes_below(output) if found is None else found
            yield receipt, all(found.get(key) == size for key, size in receipt.objects.items())
        return

    def sound(receipt: Receipt) -> bool:
        return all(files.size(files.join(output, key)) == size for key, size in receipt.objects.items())

    waiting = iter(receipts)
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        while group := list(islice(waiting, _STAT_GROUP)):
            yield from zip(group, pool.map(sound, group), strict=True)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    parts = [
        f"{name}: {_brief(old.get(name))} there, {_brief(new.get(name))} asked for"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    return "; ".join(parts)


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
