"""Options of the random changes that training patches go through."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from volseg.spec.base import Spec


class AugmentSpec(Spec):
    """How training patches are changed; what is left out is chosen from the data.

    Shapes change image and labels alike, grey values the image alone. Grey values are in units of the image's standard
    deviation, lengths in shares of a patch's side. A strength of 0 switches a change off.
    """

    sections: ClassVar[dict[str, str]] = {"flips": "changes of the training patches, one by one"}

    flips: bool = Field(True, description="mirror patches along every axis")
    turns: Literal["auto", "always", "never"] = Field(
        "auto", description="quarter turns; auto: unless a voxel's place tells its class, as in a body"
    )
    warp: float = Field(0.4, ge=0.0, le=1.0, description="share of patches that are rotated, zoomed, shifted and bent")
    angle: float = Field(20.0, ge=0.0, le=180.0, description="largest rotation in degrees")
    zoom: float = Field(0.25, ge=0.0, le=1.0, description="largest change of size: 0.25 is 1/1.25 to 1.25")
    shift: float = Field(0.0, ge=0.0, le=0.5, description="largest shift beyond the place that was drawn")
    elastic: float = Field(0.02, ge=0.0, le=0.2, description="largest bending")
    grey: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="share of patches whose contrast and brightness change, and that get rings or drift; gamma, "
        "shading and noise come half as often, blur a quarter",
    )
    contrast: float | None = Field(
        None, ge=0.0, le=2.0, description="largest change of contrast [default: as the data]"
    )
    brightness: float | None = Field(None, ge=0.0, le=5.0, description="largest offset [default: as the data]")
    gamma: float | None = Field(None, ge=0.0, le=2.0, description="largest change of gamma [default: as the data]")
    noise: float | None = Field(None, ge=0.0, le=5.0, description="largest noise [default: as the data]")
    shading: float | None = Field(
        None, ge=0.0, le=5.0, description="largest smooth change of brightness over a patch [default: as the data]"
    )
    blur: float = Field(1.0, ge=0.0, le=10.0, description="largest blur, sigma in voxels")
    rings: float = Field(0.0, ge=0.0, le=5.0, description="largest ring artefact: arcs around a far or near centre")
    drift: float = Field(0.0, ge=0.0, le=5.0, description="largest drift of brightness along z, or from slice to slice")
