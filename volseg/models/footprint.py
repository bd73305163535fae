"""Peak memory of one forward, by replaying the order in which `unet.UNet` makes and frees its tensors.

The replay runs on a model of glibc's heap (best fit, neighbours merge), because with freed memory kept for reuse, as
the workers run, it is the heap's extent that the process holds: up to two fifths more than the live tensors.
"""

from __future__ import annotations

from bisect import insort
from math import prod

from volseg.geometry.box import Triple
from volseg.models.config import UNetConfig


def peak_bytes(config: UNetConfig, patch: Triple, batch: int, itemsize: int) -> int:
    """Return the bytes behind `UNetConfig.activation_bytes`; `patch` in network coordinates."""
    replay = _Replay(config, patch, batch, itemsize)
    # The first forward leaves the heap cut up; from the second on it is in its steady state.
    for _ in range(3):
        replay.run()
    return replay.heap.extent


class Heap:
    """A heap that grows at its end only, places each block in the smallest gap that holds it, and merges gaps."""

    def __init__(self) -> None:
        self.extent = 0
        self._gaps: list[tuple[int, int]] = []
        self._sizes: dict[int, int] = {}

    def new(self, size: int) -> int:
        """Place a block of `size` bytes and return its address."""
        fitting = [(stop - start, start) for start, stop in self._gaps if stop - start >= size]
        if fitting:
            length, address = min(fitting)
            self._gaps.remove((address, address + length))
            if length > size:
                insort(self._gaps, (address + size, address + length))
        else:
            # A gap at the very end is what glibc calls the top: the block starts in it and the heap grows by the rest.
            address = self.extent
            if self._gaps and self._gaps[-1][1] == self.extent:
                address = self._gaps.pop()[0]
            self.extent = address + size
        self._sizes[address] = size
        return address

    def free(self, address: int) -> None:
        """Give the block at `address` back."""
        start, stop = address, address + self._sizes.pop(address)
        for gap in list(self._gaps):
            if gap[1] == start or gap[0] == stop:
                self._gaps.remove(gap)
                start, stop = min(start, gap[0]), max(stop, gap[1])
        insort(self._gaps, (start, stop))


class _Replay:
    """The forward of `unet.UNet`, tensor by tensor."""

    def __init__(self, config: UNetConfig, patch: Triple, batch: int, itemsize: int) -> None:
        self.config = config
        self.itemsize = itemsize
        shrink = [prod(prod(pool) for pool in config.factors[:i]) for i in range(len(config.widths))]
        self.voxels = [batch * prod(patch) // s for s in shrink]
        self.heap = Heap()

    def run(self) -> None:
        """Follow one forward, the release of the answer included."""
        config = self.config
        skips: list[int] = []
        # The caller's input is not counted; an empty block stands for it.
        x = self._block(0, self._new(0, 0), config.in_channels)
        for level in range(1, len(config.widths)):
            skips.append(x)
            pooled = self._new(config.widths[level - 1], level)
            # torch computes the places of the maxima, as int64, whether they are asked for or not.
            self._free(self.heap.new(8 * config.widths[level - 1] * self.voxels[level]))
            x = self._block(level, pooled, config.widths[level - 1])
        for level in reversed(range(len(config.factors))):
            cin = config.widths[level] if config.up == "transpose" else config.widths[level + 1]
            raised = self._new(cin, level)
            self._free(x)
            joined = self._new(cin + config.widths[level], level)
            self._free(skips.pop(), raised)
            x = self._block(level, joined, cin + config.widths[level])
        logits = self._new(config.out_channels, 0)
        self._free(x)
        self._free(logits)

    def _block(self, level: int, source: int, cin: int) -> int:
        config, cout = self.config, self.config.widths[level]
        early = cin >= cout
        projected = config.residual and cin != cout
        x, kept = source, None
        if projected and early:
            kept = self._new(cout, level)
        elif config.residual:
            kept = x
        for i in range(config.convs_per_level):
            y = self._convolve(level, cin if i == 0 else cout)
            if x != kept:
                self._free(x)
            x = self._normalise(level, y)
        if projected and not early:
            self._free(self._new(cout, level))
        if kept is not None:
            self._free(kept)
        return x

    def _convolve(self, level: int, cin: int) -> int:
        y = self._new(self.config.widths[level], level)
        # oneDNN reorders the kernel into a copy of its own.
        kernel = cin * self.config.widths[level] * 3**self.config.dims
        self._free(self.heap.new(kernel * self.itemsize))
        return y

    def _normalise(self, level: int, x: int) -> int:
        width = self.config.widths[level]
        if self.config.norm in {"instance", "group"}:
            # Instance normalisation of a channels-last tensor goes through a contiguous copy.
            copy = self._new(width, level) if self.config.norm == "instance" else None
            y = self._new(width, level)
            self._free(x)
            if copy is not None:
                self._free(copy)
            x = y
        return x

    def _new(self, channels: int, level: int) -> int:
        return self.heap.new(max(1, channels * self.voxels[level] * self.itemsize))

    def _free(self, *addresses: int) -> None:
        for address in addresses:
            self.heap.free(address)
