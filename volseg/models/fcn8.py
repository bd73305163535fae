"""FCN-8s (Long, Shelhamer and Darrell 2015, arXiv 1411.4038) on a small encoder, in 2D and 3D."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from volseg.geometry.box import Triple
from volseg.models.network import LevelConfig
from volseg.models.program import INPUT, Builder, Program


class FCN8Config(LevelConfig):
    """Arguments of the FCN-8: five blocks of two convolutions with activation, max-pooling, and a norm after the pool.

    The coarsest features become class scores twice as fine; 1x1 scores of the fourth pool are added, raised again and
    added to those of the third, and raised by all that is left. Transposed convolutions reach twice their factor and,
    between scores, start out as linear interpolation, as in the paper. Sides are multiples of 32 for pools of 2.
    """

    pools_more: ClassVar[int] = 0
    # The last step up multiplies three of them: its kernel has 16 voxels a side as it is.
    largest_pool: ClassVar[int] = 2

    widths: tuple[int, ...] = Field((32, 64, 128, 256, 256), min_length=5, max_length=5)
    activation: Literal["relu", "leaky_relu", "silu"] = "leaky_relu"

    def make_program(self) -> Program:
        """Return the network; the weights lie below `encoder`, `up`, `score` and `head`."""
        build = Builder(self.dims, self.in_channels)
        x, features = INPUT, []
        for block, (width, factor) in enumerate(zip(self.widths, self.factors, strict=True)):
            for i in range(2):
                x = build.conv(f"encoder.{block}.{i}", x, width, 3, activation=self.activation)
            x = build.pool(f"encoder.{block}.pool", x, factor)
            x = build.normalise(f"encoder.{block}.norm", x, self.norm)
            features.append(x)
        for block in (3, 2):
            x = self._raise(build, f"up.{block}", x, self.factors[block + 1])
            score = build.conv(f"score.{block}", features[block], self.out_channels, 1)
            x = build.add(f"sum.{block}", x, score)
        a, b, c = (p * q * r for p, q, r in zip(*self.factors[:3], strict=True))
        return build.program(self._raise(build, "head", x, (a, b, c)))

    def _raise(self, build: Builder, name: str, x: str, factor: Triple) -> str:
        a, b, c = (2 * f - f % 2 for f in factor)
        scores = build.channels[x] == self.out_channels and x.startswith("sum")
        return build.up(name, x, self.out_channels, factor, (a, b, c), interpolating=scores)
