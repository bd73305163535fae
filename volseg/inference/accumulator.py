"""The fixed-point accumulator of one block: patches in any order, labels out, bit for bit the same."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from volseg.blend import ONE, Window, axis_weights
from volseg.geometry import Box, PatchLattice, Triple
from volseg.planning.memory import SLAB_VOXELS


class Accumulator:
    """Sums weighted probabilities of patches over one box, as int32 with 2^30 for 1.

    `sums` is the number of channels: one for two classes (the probability of class 1), else one a class.
    """

    def __init__(self, box: Box, lattice: PatchLattice, window: Window, sums: int, device: torch.device) -> None:
        self.box = box
        self._lattice, self._window, self._device = lattice, window, device
        self._sum = torch.zeros((sums, *box.shape), dtype=torch.int32, device=device)

    def add(self, index: Triple, probability: Tensor) -> None:
        """Add one patch: `probability` (sums, z, y, x), float32 in 0..1, of the lattice's patch `index`."""
        patch = self._lattice.box(index)
        common = patch.intersect(self.box)
        source, target = common.relative_to(patch.start).slices, common.relative_to(self.box.start).slices
        weight = self._weight(index, source)
        # The product is rounded before it is added: integer sums do not depend on their order.
        weighted = (probability[(slice(None), *source)] * weight).round_().to(torch.int32)
        self._sum[(slice(None), *target)] += weighted

    def _weight(self, index: Triple, source: tuple[slice, slice, slice]) -> Tensor:
        z, y, x = (
            torch.from_numpy(axis_weights(axis, i, self._window)[part].astype(np.float32)).to(self._device)
            for axis, i, part in zip(self._lattice.axes, index, source, strict=True)
        )
        return ((z * float(ONE))[:, None] * y)[:, :, None] * x

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
