"""Peak memory of one forward, by replaying the order in which `unet.UNet` makes and frees its tensors."""

from __future__ import annotations

from math import prod

from volseg.geometry.box import Triple
from volseg.models.config import UNetConfig


def peak_bytes(config: UNetConfig, patch: Triple, batch: int, itemsize: int) -> int:
    """Return the bytes behind `UNetConfig.activation_bytes`; `patch` in network coordinates."""
    return _Replay(config, patch, batch, itemsize).run()


class _Replay:
    """Sizes of the live tensors, followed through the forward; the peak is what counts."""

    def __init__(self, config: UNetConfig, patch: Triple, batch: int, itemsize: int) -> None:
        self.config = config
        self.itemsize = itemsize
        shrink = [prod(prod(pool) for pool in config.factors[:i]) for i in range(len(config.widths))]
        self.voxels = [batch * prod(patch) // s for s in shrink]
        self.live = 0
        self.peak = 0

    def run(self) -> int:
        config = self.config
        skips: list[int] = []
        # The caller's input is not counted, so the first block consumes nothing.
        x = self._block(0, 0, config.in_channels)
        for level in range(1, len(config.widths)):
            skips.append(x)
            pooled = self._new(config.widths[level - 1], level)
            x = self._block(level, pooled, config.widths[level - 1])
        for level in reversed(range(len(config.factors))):
            cin = config.widths[level] if config.up == "transpose" else config.widths[level + 1]
            raised = self._new(cin, level)
            self._free(x)
            joined = self._new(cin + config.widths[level], level)
            self._free(raised, skips.pop())
            x = self._block(level, joined, cin + config.widths[level])
        self._new(config.out_channels, 0)
        return self.peak

    def _block(self, level: int, source: int, cin: int) -> int:
        config, cout = self.config, self.config.widths[level]
        projected = config.residual and cin != cout
        early = cin >= cout
        x, kept = source, 0
        if projected and early:
            kept = self._new(cout, level)
        for i in range(config.convs_per_level):
            y = self._new(cout, level)
            if i or not config.residual or (projected and early):
                self._free(x)
            else:
                kept = x
            x = y
            if config.norm in {"instance", "group"} or config.activation == "silu":
                y = self._new(cout, level)
                self._free(x)
                x = y
        if config.residual:
            if projected and not early:
                y = self._new(cout, level)
                self._free(y)
            self._free(kept)
        return x

    def _new(self, channels: int, level: int) -> int:
        size = channels * self.voxels[level] * self.itemsize
        self.live += size
        self.peak = max(self.peak, self.live)
        return size

    def _free(self, *sizes: int) -> None:
        self.live -= sum(sizes)
