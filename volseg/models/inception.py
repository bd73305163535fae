"""A U-Net of inception blocks (Szegedy et al. 2015, doi 10.1109/CVPR.2015.7298594), in 2D and 3D."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from volseg.models.network import LevelConfig
from volseg.models.program import INPUT, Builder, Program

_BRANCHES = 4


class InceptionUNetConfig(LevelConfig):
    """Arguments of the inception U-Net: max-pooling down, nearest neighbour up, skips concatenated.

    Every level is one block of four branches side by side: {1, 3, 3}, {1, 3}, {1} and {maximum of 3, 1}, the numbers
    being kernels of convolution, normalisation and activation. Each branch makes a quarter of the level's channels, so
    that a level is as wide as that of the plain U-Net with the same `widths`.
    """

    widths: tuple[int, ...] = Field((8, 16, 32, 64), min_length=1, max_length=8)
    activation: Literal["relu", "leaky_relu", "silu"] = "leaky_relu"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(w % _BRANCHES for w in self.widths):
            raise ValueError(f"every width must be a multiple of {_BRANCHES}: a block has so many branches")
        return self

    def normed_widths(self) -> tuple[int, ...]:
        """Return the channels of the branches."""
        return tuple(max(1, w // _BRANCHES) for w in self.widths)

    def make_program(self) -> Program:
        """Return the network; the weights lie below `encoder`, `decoder` and `head`."""
        build = Builder(self.dims, self.in_channels)
        x, skips = INPUT, []
        for level, width in enumerate(self.widths):
            if level:
                skips.append(x)
                x = build.pool(f"encoder.{level}.pool", x, self.factors[level - 1])
            x = self._block(build, f"encoder.{level}", x, width)
        for level in reversed(range(len(self.factors))):
            x = build.enlarge(f"up.{level}", x, self.factors[level])
            x = build.concat(f"decoder.{level}.joined", skips.pop(), x)
            x = self._block(build, f"decoder.{level}", x, self.widths[level])
        return build.program(build.conv("head", x, self.out_channels, 1))

    def _block(self, build: Builder, name: str, source: str, width: int) -> str:
        def chain(branch: str, x: str, *kernels: int) -> str:
            for i, kernel in enumerate(kernels):
                x = build.conv(
                    f"{name}.{branch}.{i}", x, width // _BRANCHES, kernel, norm=self.norm, activation=self.activation
                )
            return x

        # The pooled copy is as large as the input: it comes first, while the other branches are not there yet.
        pooled = chain("pooled", build.spread(f"{name}.spread", source, 3), 1)
        branches = (chain("deep", source, 1, 3, 3), chain("wide", source, 1, 3), chain("point", source, 1), pooled)
        return build.concat(f"{name}.branches", *branches)
