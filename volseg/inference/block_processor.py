"""One block, from raw voxels to a receipt: read -> scale -> predict -> blend -> write -> check.

A worker calls `process` from two threads. Reading and writing of one block run beside the computing of another; only
one block computes at a time, because a second would need the memory of a second. What a block's patches say of other
blocks leaves as parcels, and what other blocks say of it comes as parcels; see `volseg.planning.task`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from volseg.errors import CorruptChunkError, JobInterrupted, NonFiniteError
from volseg.geometry import Box, Lattice, Patches, Triple
from volseg.inference.accumulator import Accumulator
from volseg.inference.attempt import Answer
from volseg.inference.choose import Loaded
from volseg.inference.predictor import Predictor
from volseg.inference.stopwatch import Waits
from volseg.inference.transfer import Transfer, Upload
from volseg.inference.turns import Turns
from volseg.models.allocator import release_freed_memory, status_bytes
from volseg.planning import Plan
from volseg.planning.seams import ITEMSIZE
from volseg.planning.task import Parcel, Task
from volseg.spec import SegmentSpec
from volseg.storage import files
from volseg.storage.cache import ChunkCache
from volseg.storage.digest import digest
from volseg.storage.ledger import Receipt
from volseg.storage.volume import ArrayWriter, Volume, open_volume

LABELS = "0"
PROBABILITIES = "probabilities/0"


@dataclass
class _Raw:
    """A block's input: `voxels` (c, z, y, x) of `reach`, all that its own patches and those `again` read."""

    own: list[Patches]
    again: list[Patches]
    reach: Box
    voxels: Upload
    stats: dict[str, float]


@dataclass
class _Computed:
    """What computing gave: labels and probabilities of the whole block, or none where it is parked, and parcels."""

    labels: NDArray[Any] | None
    probabilities: NDArray[np.uint8] | None
    parcels: dict[Parcel, NDArray[np.int32]]


class BlockProcessor:
    """Computes blocks of one planned job; every worker of a job holds one.

    `other` is another one of this process: where both need the same networks in the same way, they have them together.
    """

    def __init__(self, spec: SegmentSpec, plan: Plan, bundle_digest: str, other: BlockProcessor | None = None) -> None:
        self._spec, self._plan = spec, plan
        self._device = torch.device(plan.device)
        self._input: Volume = open_volume(spec.input)
        self._labels = ArrayWriter(files.join(spec.output, LABELS))
        self._probabilities = ArrayWriter(files.join(spec.output, PROBABILITIES)) if spec.probabilities else None
        # What was allowed for one input may not be for another.
        guarded = None if spec.precision == "fp32" else spec.input
        patches = tuple(view.patch for view in plan.views)
        self._model = (
            bundle_digest,
            spec.model,
            spec.mirror,
            plan.batch,
            spec.precision,
            plan.device,
            patches,
            guarded,
        )
        self._low: Sequence[float]
        self._predictor: Predictor
        self.numerics: dict[str, str]
        if other is not None and other._model == self._model:
            self._low, self._predictor, self.numerics = other._low, other._predictor.twin(), other.numerics
        else:
            loaded = Loaded(spec, plan, bundle_digest, self._input)
            self._low, self._predictor = loaded.manifest.scaling.low, loaded.predictor
            self.numerics = loaded.numerics
        self._cache = ChunkCache(self._input, plan.memory.cache)
        self._transfer = Transfer(self._device)
        self._waits = Waits()
        self._turns = Turns()
        self._kept: dict[Parcel, NDArray[np.int32]] = {}
        """What the block that was computed last gave to others, for the next one in this worker's hands."""
        # What lives now is what the plan counts as these two, and whatever else lives in this process. What an earlier
        # job freed must not count: what a worker may hold would grow from job to job.
        release_freed_memory(0)
        together = plan.workers if plan.one_process else 1
        to_come = plan.memory.total - plan.memory.baseline - plan.memory.network
        self._heap = (status_bytes("RssAnon") or 0) + together * to_come
        """Bytes of memory of its own that the process may have when a block begins."""

    def cancel(self) -> None:
        """Make every `process` under way raise JobInterrupted at its next patch."""
        self._turns.cancel()

    def announce(self, index: int) -> None:
        """Say that a task of this block comes next; without a word, tasks are computed in the order of their calls."""
        self._turns.announce(index)

    def process(self, task: Task, inbox: Sequence[NDArray[np.int32]] = ()) -> Answer:
        """Do what is asked for one block; `inbox` has the parcels of the task, in its order.

        Raises BlockError where this block cannot be done, JobError where no block can, JobInterrupted after `cancel`.
        """
        index, came = task.index, time.perf_counter()
        ticket = self._turns.enter(index)
        try:
            raw = self._read(task)
            with self._turns.turn(ticket):
                raw.stats["waiting_seconds"] = self._waits.begin(came)
                try:
                    done = self._compute(task, raw, dict(zip(task.inbox, inbox, strict=True)))
                finally:
                    self._waits.end()
        finally:
            self._turns.leave(ticket)
        for name, value in task.stats.items():
            raw.stats[name] = raw.stats.get(name, 0) + value
        if done.labels is None:
            return Answer(index, None, done.parcels, raw.stats)
        box = self._plan.grid.box(index)
        return Answer(index, self._write(index, box, done.labels, done.probabilities, raw.stats), done.parcels)

    def _read(self, task: Task) -> _Raw:
        started = time.perf_counter()
        index, owner = task.index, self._plan.ownership
        wanted = owner.wanted(index)
        own = owner.own(index) if task.own else []
        again = [patches for giver in task.again for patches in owner.shared(giver, index)]
        reach = owner.hull(own + again, index)
        stats: dict[str, float] = {}
        if task.own:
            stats["absent_chunks"] = self._input.absent_chunks(wanted, wanted, self._plan.region)
        floating = np.issubdtype(self._input.dtype, np.floating)
        if floating and task.own and self._spec.nan == "fill":
            # What is filled is counted by the block that wants it, whoever computes its patches.
            reach = reach.hull(wanted) if own or again else wanted
        shape = (self._plan.channels, *reach.shape)
        voxels = self._cache.read(reach) if reach.size else np.empty(shape, self._input.dtype)
        stats["read_bytes"] = self._cache.taken()
        if floating:
            core = wanted.relative_to(reach.start) if task.own else None
            sources = [owner.source(patches).relative_to(reach.start) for patches in own + again]
            stats["nonfinite"] = self._fill_nonfinite(index, voxels, sources, core)
        stats["read_seconds"] = time.perf_counter() - started
        return _Raw(own, again, reach, self._transfer.up(native(voxels)), stats)

    def _fill_nonfinite(self, index: int, voxels: NDArray[Any], sources: Sequence[Box], core: Box | None) -> int:
        """Return how many voxels of `core` are NaN or Inf, and fill them all; or refuse those in `sources`."""
        count = 0
        for channel, low in zip(voxels, self._low, strict=True):
            bad = ~np.isfinite(channel)
            if not bad.any():
                continue
            if self._spec.nan == "error":
                for source in sources:
                    self._refuse(index, bad[source.slices], source)
            elif core is not None:
                count += int(bad[core.slices].sum())
            channel[bad] = low
        return count

    def _refuse(self, index: int, bad: NDArray[np.bool_], source: Box) -> None:
        if bad.any():
            z, y, x = np.argwhere(bad)[0] + source.start
            raise NonFiniteError(
                f"block {index} reads {int(bad.sum())} voxels that are NaN or Inf, the first at offset "
                f"{z},{y},{x} of its input; a network would spread them: repair the input, or use --nan fill"
            )

    @torch.inference_mode()
    def _compute(self, task: Task, raw: _Raw, inbox: dict[Parcel, NDArray[np.int32]]) -> _Computed:
        started = time.perf_counter()
        before, seconds = self._predictor.forwards, self._predictor.seconds
        plan, index = self._plan, task.index
        owner, wanted = plan.ownership, plan.ownership.wanted(index)
        if self._device.type == "cpu":
            release_freed_memory(self._heap)
        box = owner.extent(index) if task.own else wanted
        sums = Accumulator(box, plan.lattices, self._spec.blend, self._predictor.sums, self._device)
        self._add_patches(raw, raw.own, sums)
        parcels: dict[Parcel, NDArray[np.int32]] = {}
        least = plan.seams.floor // ITEMSIZE
        if task.own:
            parcels = {(index, seam.block): sums.part(seam.box, least) for seam in owner.receivers(index)}
        hoped = {(giver, index): self._kept.get((giver, index)) for giver in task.hoped}
        if task.own:
            self._kept = dict(parcels)
        sums.narrow(wanted)
        labels: NDArray[Any] | None = None
        probabilities: NDArray[np.uint8] | None = None
        if task.finish and all(row is not None for row in hoped.values()):
            self._add_patches(raw, raw.again, sums)
            for (giver, _), row in (inbox | hoped).items():
                assert row is not None
                sums.merge(wanted if giver == index else owner.seam(giver, index), row)
            labels, probabilities = self._decide(index, sums)
        else:
            parcels[index, index] = sums.part(wanted, least)
        raw.stats["forwards"] = self._predictor.forwards - before
        raw.stats["forward_seconds"] = self._predictor.seconds - seconds
        raw.stats["compute_seconds"] = time.perf_counter() - started
        return _Computed(labels, probabilities, parcels)

    def _add_patches(self, raw: _Raw, groups: Sequence[Patches], sums: Accumulator) -> None:
        plan, voxels = self._plan, raw.voxels.get()
        for patches in groups:
            view = plan.views[patches.view]
            for indices in _alike(view.lattice, patches):
                # One after another: where patches leave the volume they are copies, and there may be many.
                taken = (take_patch(voxels, view.lattice.source(i), raw.reach) for i in indices)
                for index, probability in zip(indices, self._predictor.run(taken, view.axis), strict=True):
                    if self._turns.cancelled:
                        raise JobInterrupted("stopped")
                    kept = probability[(slice(None), *view.lattice.kept(index))]
                    sums.add(index, kept, patches.view)

    def _decide(self, index: int, sums: Accumulator) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
        plan, wanted = self._plan, sums.box
        labels = self._transfer.down(sums.labels(plan.threshold))
        if plan.classes > 256:
            labels = labels.astype(np.uint16)
        probabilities = self._transfer.down(sums.probabilities()) if self._probabilities else None
        box = plan.grid.box(index)
        return _embed(labels, wanted, box), None if probabilities is None else _embed(probabilities, wanted, box)

    def _write(
        self,
        index: int,
        box: Box,
        labels: NDArray[Any],
        probabilities: NDArray[np.uint8] | None,
        stats: dict[str, float],
    ) -> Receipt:
        started = time.perf_counter()
        digests: dict[str, str] = {}
        objects: dict[str, int] = {}
        for name, writer, data in ((LABELS, self._labels, labels), (PROBABILITIES, self._probabilities, probabilities)):
            if writer is None or data is None:
                continue
            digests[name] = digest(data)
            sizes = writer.write(box, data)
            if digest(writer.read(box)) != digests[name]:
                raise CorruptChunkError(
                    f"block {index} of {name} did not read back as it was written; it is tried again"
                )
            objects |= {f"{name}/{key}": size for key, size in sizes.items()}
        inside = labels[box.intersect(self._plan.region).relative_to(box.start).slices]
        stats |= {f"class_{c}": n for c, n in enumerate(_count(inside, self._plan.classes)) if n}
        stats["written_bytes"] = sum(objects.values())
        stats["write_seconds"] = time.perf_counter() - started
        return Receipt(index, digests, objects, stats)


def _alike(lattice: Lattice, patches: Patches) -> list[list[Triple]]:
    """Return patches, those of one shape together: a batch holds no others."""
    groups: dict[Triple, list[Triple]] = {}
    for index in patches:
        groups.setdefault(lattice.source(index).shape, []).append(index)
    return list(groups.values())


def take_patch(voxels: torch.Tensor, patch: Box, reach: Box) -> torch.Tensor:
    """Return the patch (c, z, y, x) as a view; where it leaves the volume, a copy with its edge repeated, in float32.

    `reach` holds all of the patch that lies in the volume, so that the block makes no difference.
    """
    inside = patch.intersect(reach)
    view = voxels[(slice(None), *inside.relative_to(reach.start).slices)]
    if inside == patch:
        return view
    # Not every release of torch can select from unsigned 16-bit voxels on a GPU, but all can convert them.
    view = view.to(torch.float32)
    for axis in range(3):
        if inside.shape[axis] < patch.shape[axis]:
            places = torch.arange(patch.start[axis], patch.stop[axis], device=voxels.device)
            places.clamp_(inside.start[axis], inside.stop[axis] - 1).sub_(inside.start[axis])
            view = view.index_select(axis + 1, places)
    return view


def native(voxels: NDArray[Any]) -> NDArray[Any]:
    """Return voxels in a dtype that torch knows: native byte order, no bool, no half-known wide unsigned integers."""
    kind = voxels.dtype
    if kind == np.bool_:
        return voxels.view(np.uint8)
    if kind in (np.dtype("uint32"), np.dtype("uint64"), np.dtype("int64"), np.dtype("float64")):
        return voxels.astype(np.float32)
    return np.ascontiguousarray(voxels, dtype=kind.newbyteorder("="))


def _embed(data: NDArray[Any], have: Box, want: Box) -> NDArray[Any]:
    """Place what was computed into the whole block; voxels outside the region are background."""
    if have == want:
        return data
    whole = np.zeros((*data.shape[:-3], *want.shape), data.dtype)
    whole[(..., *have.relative_to(want.start).slices)] = data
    return whole


def _count(labels: NDArray[Any], classes: int) -> list[int]:
    total = np.zeros(classes, np.int64)
    for section in labels:
        total += np.bincount(section.ravel(), minlength=classes)
    return [int(n) for n in total]
