"""Options of a measurement of the user's own machine."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from volseg.geometry.box import Triple
from volseg.spec.base import Spec, parse_triple, positive


class BenchSpec(Spec):
    """Measure this machine, and tell what a volume of a given size would take."""

    sections: ClassVar[dict[str, str]] = {"model": "what is measured", "shape": "what it is told for"}

    model: str | None = Field(
        None, description="model bundle to measure [default: a 3D U-Net of 16-32-64-128 channels with random weights]"
    )
    patch: Triple | None = Field(None, description="network input z,y,x in voxels [default: the bundle's]")
    overlap: float = Field(0.5, ge=0.0, lt=1.0, description="overlap of neighbouring patches as a fraction, 0 <= F < 1")
    mirror: bool = Field(False, description="average over mirrored patches")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the network")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the network runs")
    memory: float | None = Field(None, gt=0.0, description="memory limit of a worker in GiB [default: as for segment]")
    seconds: float = Field(40.0, gt=0.0, le=3600.0, description="how long the measured part should take, about")
    shape: Triple = Field((2048, 2048, 2048), description="volume z,y,x in voxels that is to be segmented")
    workers: int | None = Field(None, ge=1, description="workers that will do it [default: those of this machine]")

    _triples = field_validator("patch", "shape", mode="before")(parse_triple)
    _sides = field_validator("patch", "shape")(positive)
