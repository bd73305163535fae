"""One block, from raw voxels to a receipt: read -> scale -> predict -> blend -> write -> check.

A worker calls `process` from two threads. Reading and writing of one block run beside the computing of another; only
one block computes at a time, because a second would need the memory of a second.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from volseg.errors import BundleError, CorruptChunkError, JobInterrupted, NonFiniteError
from volseg.geometry import Box
from volseg.inference.accumulator import Accumulator
from volseg.inference.predictor import Predictor
from volseg.models.allocator import release_freed_memory
from volseg.models.bundle import load_network
from volseg.planning import Plan
from volseg.spec import SegmentSpec
from volseg.storage import files
from volseg.storage.digest import digest
from volseg.storage.ledger import Receipt
from volseg.storage.volume import ArrayWriter, Volume, open_volume

LABELS = "0"
PROBABILITIES = "probabilities/0"


@dataclass
class _Raw:
    """A block's input: `voxels` (c, z, y, x) of `reach`; `patches` that have to be computed for `wanted`."""

    wanted: Box
    reach: Box
    voxels: NDArray[np.generic]
    stats: dict[str, float]


class BlockProcessor:
    """Computes blocks of one planned job; every process of a job holds one."""

    def __init__(self, spec: SegmentSpec, plan: Plan, bundle_digest: str) -> None:
        self._spec, self._plan = spec, plan
        self._device = torch.device(plan.device)
        self._input: Volume = open_volume(spec.input)
        self._labels = ArrayWriter(files.join(spec.output, LABELS))
        self._probabilities = ArrayWriter(files.join(spec.output, PROBABILITIES)) if spec.probabilities else None
        manifest, network = load_network(spec.model)
        if manifest.digest != bundle_digest:
            raise BundleError(
                f"the bundle {spec.model} changed while the job ran; the job stopped: run the same command again"
            )
        self._low = manifest.scaling.low
        self._predictor = Predictor(
            manifest, network, plan.patch, axis=plan.axis, batch=plan.batch, precision=spec.precision,
            device=self._device,
        )  # fmt: skip
        self._computing = threading.Lock()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Make every `process` under way raise JobInterrupted at its next patch."""
        self._cancelled.set()

    def process(self, index: int) -> Receipt:
        """Segment block `index` and return its receipt.

        Raises BlockError where this block cannot be done, JobError where no block can, JobInterrupted after `cancel`.
        """
        box = self._plan.grid.box(index)
        raw = self._read(index, box)
        with self._computing:
            labels, probabilities = self._compute(box, raw)
        return self._write(index, box, labels, probabilities, raw.stats)

    def _read(self, index: int, box: Box) -> _Raw:
        started = time.perf_counter()
        wanted = box.intersect(self._plan.region)
        reach = self._plan.lattice.reach(wanted)
        voxels = self._input.read(reach)
        stats: dict[str, float] = {"absent_chunks": self._input.absent_chunks(wanted, wanted, self._plan.region)}
        if np.issubdtype(voxels.dtype, np.floating):
            stats["nonfinite"] = self._fill_nonfinite(index, voxels, wanted.relative_to(reach.start))
        stats["read_seconds"] = time.perf_counter() - started
        return _Raw(wanted, reach, voxels, stats)

    def _fill_nonfinite(self, index: int, voxels: NDArray[Any], core: Box) -> int:
        count = 0
        for channel, low in zip(voxels, self._low, strict=True):
            bad = ~np.isfinite(channel)
            if not bad.any():
                continue
            if self._spec.nan == "error":
                z, y, x = np.argwhere(bad)[0]
                raise NonFiniteError(
                    f"block {index} reads {int(bad.sum())} voxels that are NaN or Inf, the first at offset "
                    f"{z},{y},{x} of its input; a network would spread them: repair the input, or use --nan fill"
                )
            count += int(bad[core.slices].sum())
            channel[bad] = low
        return count

    @torch.inference_mode()
    def _compute(self, box: Box, raw: _Raw) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
        started = time.perf_counter()
        before, seconds = self._predictor.forwards, self._predictor.seconds
        plan = self._plan
        if self._device.type == "cpu":
            release_freed_memory()
        voxels = torch.from_numpy(_native(raw.voxels)).to(self._device)
        accumulator = Accumulator(raw.wanted, plan.lattice, self._spec.blend, self._predictor.sums, self._device)
        indices = list(plan.lattice.touching(raw.wanted))
        views = [_patch_view(voxels, plan.lattice.box(i), raw.reach) for i in indices]
        for patch_index, probability in zip(indices, self._predictor.run(views), strict=True):
            if self._cancelled.is_set():
                raise JobInterrupted("stopped")
            accumulator.add(patch_index, probability)
        labels = accumulator.labels(plan.threshold).cpu().numpy()
        if plan.classes > 256:
            labels = labels.astype(np.uint16)
        probabilities = accumulator.probabilities().cpu().numpy() if self._probabilities else None
        raw.stats["forwards"] = self._predictor.forwards - before
        raw.stats["forward_seconds"] = self._predictor.seconds - seconds
        raw.stats["compute_seconds"] = time.perf_counter() - started
        return _embed(labels, raw.wanted, box), None if probabilities is None else _embed(
            probabilities, raw.wanted, box
        )

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
        stats["write_seconds"] = time.perf_counter() - started
        return Receipt(index, digests, objects, stats)


def _patch_view(voxels: torch.Tensor, patch: Box, reach: Box) -> torch.Tensor:
    """Return the patch (c, z, y, x) as a view; where it leaves the volume, a copy with the last voxel repeated."""
    inside = patch.intersect(reach)
    view = voxels[(slice(None), *inside.relative_to(reach.start).slices)]
    if inside == patch:
        return view
    for axis, (have, want) in enumerate(zip(inside.shape, patch.shape, strict=True), start=1):
        if have < want:
            index = torch.arange(want, device=voxels.device).clamp_(max=have - 1)
            view = view.index_select(axis, index)
    return view


def _native(voxels: NDArray[Any]) -> NDArray[Any]:
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
