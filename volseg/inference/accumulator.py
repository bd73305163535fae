"""The fixed-point accumulator of one block: patches and other blocks' sums in any order, labels out, the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volseg.blend import ONE, Window, axis_weights
from volseg.geometry import Box, Lattice, Triple
from volseg.planning.memory import SLAB_VOXELS


class Accumulator:
    """Sums weighted probabilities of patches over one box, as int32 with 2^30 for 1.

    `sums` is the number of channels: one for two classes (the probability of class 1), else one a class. `lattices` are
    those of the views whose mean is wanted; the weights of all together sum to one at every voxel.
    """

    def __init__(self, box: Box, lattices: Sequence[Lattice], window: Window, sums: int, device: torch.device) -> None:
        self.box = box
        self._lattices, self._device = lattices, device
        self._one = ONE / len(lattices)
        # Made before the first forward: small arrays that live on between its tensors would cut the heap up, and each
        # copy to a GPU would make it wait.
        self._lines = [[_lines(of, axis, box, window, device) for axis in range(3)] for of in lattices]
        self._sum = torch.zeros((sums, *box.shape), dtype=torch.int32, device=device)

    def add(self, index: Triple, probability: Tensor, view: int = 0) -> None:
        """Add one patch: `probability` (sums, z, y, x), float32 in 0..1, of the patch `index` of a view's lattice."""
        patch = self._lattices[view].box(index)
        common = patch.intersect(self.box)
        if common.size == 0:
            return
        source, target = common.relative_to(patch.start).slices, common.relative_to(self.box.start).slices
        z, y, x = (
            lines[i - first, part] for (first, lines), i, part in zip(self._lines[view], index, source, strict=True)
        )
        weight = ((z * self._one)[:, None] * y)[:, :, None] * x
        # The product is rounded before it is added: integer sums do not depend on their order.
        weighted = (probability[(slice(None), *source)] * weight).round_().to(torch.int32)
        self._sum[(slice(None), *target)] += weighted

    def part(self, box: Box, least: int = 0) -> NDArray[np.int32]:
        """Return a copy of the sums (sums, z, y, x) inside `box` as one row, filled up with zeros to `least` items."""
        part = self._sum[(slice(None), *box.relative_to(self.box.start).slices)]
        row = torch.zeros(max(part.numel(), least), dtype=torch.int32)
        row[: part.numel()].view(part.shape).copy_(part)
        return row.numpy()

    def merge(self, box: Box, row: NDArray[np.int32]) -> None:
        """Add sums that another accumulator's `part` returned for `box`."""
        shape = (len(self._sum), *box.shape)
        values = row[: prod(shape)].reshape(shape)
        target = self._sum[(slice(None), *box.relative_to(self.box.start).slices)]
        if self._device.type == "cpu":
            # What comes out of an object store cannot be written to, and torch would warn of it.
            array = target.numpy()
            array += values
        else:
            target += torch.from_numpy(values.copy()).to(self._device)

    def narrow(self, box: Box) -> None:
        """Drop everything outside of `box`."""
        self._sum = self._sum[(slice(None), *box.relative_to(self.box.start).slices)]
        self.box = box

    def labels(self, threshold: float) -> Tensor:
        """Return the winning class (z, y, x), uint8, or int32 above 256 classes; ties go to the lowest class.

        With two classes class 1 wins where its probability is above `threshold`.
        """
        sums, *shape = self._sum.shape
        labels = torch.empty(shape, dtype=torch.uint8 if sums <= 256 else torch.int32, device=self._device)
        if sums == 1:
            return torch.gt(self._sum[0], round(threshold * ONE), out=labels.view(torch.bool)).view(torch.uint8)
        for part in self._slabs():
            best, winner = self._sum[0, part].clone(), labels[part].zero_()
            for c in range(1, sums):
                higher = self._sum[c, part] > best
                winner.masked_fill_(higher, c)
                torch.maximum(best, self._sum[c, part], out=best)
        return labels

    def probabilities(self) -> Tensor:
        """Return every class' probability (c, z, y, x) as uint8, 255 for 1, rounded to nearest."""
        sums, *shape = self._sum.shape
        classes = 2 if sums == 1 else sums
        result = torch.empty((classes, *shape), dtype=torch.uint8, device=self._device)
        for part in self._slabs():
            for c in range(sums):
                scaled = self._sum[c, part].to(torch.int64).mul_(255).add_(ONE // 2).bitwise_right_shift_(30)
                result[c + (sums == 1), part] = scaled.clamp_(0, 255).to(torch.uint8)
        if sums == 1:
            torch.sub(255, result[1], out=result[0])
        return result

    def _slabs(self) -> list[slice]:
        depth, height, width = self.box.shape
        step = max(1, SLAB_VOXELS // max(1, height * width))
        return [slice(z, min(z + step, depth)) for z in range(0, depth, step)]


def _lines(of: Lattice, axis: int, box: Box, window: Window, device: torch.device) -> tuple[int, Tensor]:
    """Return the first patch that touches the box along an axis, and the weights (patches, side) from that one on."""
    line = of.axes[axis]
    indices = line.touching(box.start[axis], box.stop[axis])
    weights = np.stack([axis_weights(line, i, window) for i in indices]).astype(np.float32)
    return indices.start, torch.from_numpy(weights).to(device)
