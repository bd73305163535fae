"""VGG features (Simonyan and Zisserman 2015, arXiv 1409.1556) with a per-voxel classifier on all of their stages."""

from __future__ import annotations

from pydantic import Field

from volseg.models.network import LevelConfig
from volseg.models.program import INPUT, Builder, Program


class VGGClassifierConfig(LevelConfig):
    """Arguments of the VGG classifier: two sub-networks, `features` and `classifier`, apart in the weights' names.

    The features are VGG's: stages of `convs_per_level` 3x3 convolutions, max-pooling between them. The classifier sees
    the hypercolumn of a voxel, the features of all stages above it (Hariharan et al. 2015, arXiv 1411.5752): 1x1
    convolutions to `hidden` channels, activation, the same again, dropout, head. As there, the first one is computed
    for each stage at its own resolution and summed up while enlarging, which is the same and far cheaper than first
    putting all stages together.
    """

    widths: tuple[int, ...] = Field((16, 32, 64, 128), min_length=2, max_length=8)
    convs_per_level: int = Field(2, ge=1, le=8)
    hidden: int = Field(64, ge=1, le=4096)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)

    def make_program(self) -> Program:
        """Return the network."""
        build = Builder(self.dims, self.in_channels)
        x, stages = INPUT, []
        for level, width in enumerate(self.widths):
            if level:
                x = build.pool(f"features.{level}.pool", x, self.factors[level - 1])
            for i in range(self.convs_per_level):
                x = build.conv(f"features.{level}.{i}", x, width, 3, norm=self.norm, activation=self.activation)
            stages.append(x)
        total = build.conv(f"classifier.stages.{len(stages) - 1}", x, self.hidden, 1)
        for level in reversed(range(len(self.factors))):
            total = build.enlarge(f"classifier.enlarged.{level}", total, self.factors[level])
            own = build.conv(f"classifier.stages.{level}", stages[level], self.hidden, 1)
            total = build.add(f"classifier.sum.{level}", own, total, "none" if level else self.activation)
        x = build.conv("classifier.hidden", total, self.hidden, 1, activation=self.activation)
        x = build.drop("classifier.dropped", x, self.dropout)
        return build.program(build.conv("classifier.head", x, self.out_channels, 1))
