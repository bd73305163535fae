"""The U-Net in 2D and 3D: Ronneberger et al. 2015, Cicek et al. 2016; residual blocks after He et al. 2016."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from volseg.models.network import LevelConfig
from volseg.models.program import INPUT, Builder, Program


class UNetConfig(LevelConfig):
    """Arguments of the U-Net: an encoder and a decoder with a skip connection at every level.

    - `padded`: whether convolutions are padded. Without, as in the original (doi 10.1007/978-3-319-24574-4_28), every
      one loses a voxel at each end and the skips are cut down to what is left: 572 voxels become 388.
    - `up`: `transpose` is a transposed convolution to the finer level's channels, of kernel `up_kernel` along the
      axes that were pooled (the pooling factor itself where None); `nearest` repeats voxels.
    - `dropout_at`: `blocks` ends every level's convolutions with a dropout, `inputs` has one after each pool and after
      each concatenation.
    - `stem`: the finest level has a single convolution on the way down and none on the way up: its answer is the sum of
      what a transposed convolution makes of the next coarser level and what a 1x1 convolution makes of the skip. Most
      of a U-Net's work lies at the finest level; this takes a fraction of it, and thin structures still meet full
      resolution. A single level stays as it is.
    - `deep_supervision`: number of further heads on the next coarser decoder levels, for training only (Lee et al.
      2015, in the manner of Isensee et al. 2021).
    """

    convs_per_level: int = Field(2, ge=1, le=8)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    dropout_at: Literal["blocks", "inputs"] = "blocks"
    up: Literal["transpose", "nearest"] = "transpose"
    up_kernel: int | None = Field(None, ge=1, le=16)
    residual: bool = False
    padded: bool = True
    stem: bool = False
    deep_supervision: int = Field(0, ge=0, le=6)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.up_kernel is not None:
            largest = max((f for pool in self.factors for f in pool), default=1)
            if self.up != "transpose" or self.up_kernel < largest:
                raise ValueError(
                    f"up_kernel belongs to up transpose and is at least the largest pooling factor {largest}"
                )
        if self.deep_supervision > max(0, len(self.widths) - 2):
            raise ValueError(
                f"{len(self.widths)} widths leave {max(0, len(self.widths) - 2)} coarser decoder levels for "
                f"deep_supervision, got {self.deep_supervision}"
            )
        if self.deep_supervision and not self.padded:
            raise ValueError("deep_supervision needs padded convolutions: coarser answers must cover the same voxels")
        return self

    def for_inference(self) -> Self:
        """Return the arguments without the heads that only training uses."""
        return self.model_copy(update={"deep_supervision": 0})

    def make_program(self) -> Program:
        """Return the network; the weights lie below `encoder`, `up`, `decoder`, `head` and `supervision`."""
        build = Builder(self.dims, self.in_channels)
        x, skips = INPUT, []
        stem = self.stem and len(self.widths) > 1
        for level, width in enumerate(self.widths):
            if level:
                skips.append(x)
                x = build.pool(f"encoder.{level}.pool", x, self.factors[level - 1])
                x = self._drop(build, f"encoder.{level}.input", x, "inputs")
            x = self._block(build, f"encoder.{level}", x, width, 1 if stem and not level else self.convs_per_level)
        coarser: list[str] = []
        for level in reversed(range(1 if stem else 0, len(self.factors))):
            x = self._raise(build, level, x)
            x = build.concat(f"decoder.{level}.joined", skips.pop(), x)
            x = self._drop(build, f"decoder.{level}.input", x, "inputs")
            x = self._block(build, f"decoder.{level}", x, self.widths[level], self.convs_per_level)
            if 1 <= level <= self.deep_supervision:
                coarser.insert(0, build.conv(f"supervision.{level}", x, self.out_channels, 1))
        if stem:
            fine = build.conv("skip", skips.pop(), self.out_channels, 1)
            coarse = build.up("head", x, self.out_channels, self.factors[0], self.factors[0])
            return build.program(build.add("sum", coarse, fine, "none"), *coarser)
        return build.program(build.conv("head", x, self.out_channels, 1), *coarser)

    def _raise(self, build: Builder, level: int, x: str) -> str:
        factor = self.factors[level]
        if self.up == "nearest":
            return build.enlarge(f"up.{level}", x, factor)
        side = self.up_kernel
        a, b, c = ((f if side is None or f == 1 else side) for f in factor)
        return build.up(f"up.{level}", x, self.widths[level], factor, (a, b, c))

    def _block(self, build: Builder, name: str, source: str, width: int, convs: int) -> str:
        cin = build.channels[source]
        # Of the block's input and its shortcut, the one with fewer channels is what stays in memory meanwhile.
        early = cin >= width
        shortcut = source
        if self.residual and cin != width and early:
            shortcut = build.conv(f"{name}.shortcut", source, width, 1)
        x = source
        for i in range(convs):
            last = self.residual and i == convs - 1
            act = "none" if last else self.activation
            x = build.conv(f"{name}.{i}", x, width, 3, norm=self.norm, activation=act, padded=self.padded)
        if self.residual:
            if cin != width and not early:
                shortcut = build.conv(f"{name}.shortcut", source, width, 1)
            x = build.add(f"{name}.sum", x, shortcut, self.activation)
        return self._drop(build, f"{name}.output", x, "blocks")

    def _drop(self, build: Builder, name: str, x: str, place: str) -> str:
        return build.drop(name, x, self.dropout) if self.dropout_at == place else x
