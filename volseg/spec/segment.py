"""Options of a segmentation."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from volseg.geometry.box import Triple
from volseg.spec.base import Spec, parse_list, parse_triple, positive

Axes = tuple[Literal["z", "y", "x"], ...]


class SegmentSpec(Spec):
    """Segment a volume: what goes in, what comes out, the sliding window, and who does the work."""

    sections: ClassVar[dict[str, str]] = {
        "input": "what",
        "patch": "sliding window",
        "probabilities": "output",
        "executor": "who does the work",
    }

    input: str = Field(description="image volume: a Zarr array or an OME-Zarr, a path or a URI")
    output: str = Field(description="where the OME-Zarr label volume is written")
    model: str = Field(description="model bundle: the folder that `volseg train` wrote")
    patch: Triple | None = Field(None, description="network input z,y,x in voxels [default: the bundle's]")
    overlap: float | None = Field(
        None, ge=0.0, lt=1.0, description="overlap of neighbouring patches as a fraction, 0 <= F < 1 [default: 0.5]"
    )
    blend: Literal["gaussian", "constant", "exact"] = Field(
        "gaussian",
        description="weights that patches are blended with; exact: no overlap, tiles with all that they depend on, "
        "equal to one forward over the whole volume",
    )
    tile: Triple | None = Field(
        None, description="blend exact: voxels z,y,x that one forward answers for [default: planned from memory]"
    )
    axis: Axes | None = Field(
        None,
        min_length=1,
        max_length=3,
        description="axis along which a 2D network goes slice by slice; several, such as z,y,x, are averaged (2.5D) "
        "[default: the bundle's]",
    )
    mirror: bool = Field(
        False, description="average over mirrored patches: 4 forwards instead of 1 in 2D, 8 in 3D; slower, often better"
    )
    roi: str | None = Field(None, description="region to segment, z,y,x ranges such as 0:14,:,: [default: everything]")
    threshold: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="probability above which class 1 wins, two classes only [default: the bundle's]",
    )
    probabilities: bool = Field(False, description="write uint8 probabilities of every class, too")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "fp32",
        description="arithmetic of the network; reduced ones (fp16 on GPUs only) are compared with fp32 on patches of "
        "the input first and refused where labels differ; auto: reduced where that is allowed and faster",
    )
    nan: Literal["error", "fill"] = Field(
        "error", description="NaN or Inf in the input: stop the block, or fill with the low end and count"
    )
    block: Triple | None = Field(None, description="unit of scheduled work z,y,x in voxels [default: planned]")
    chunks: Triple | None = Field(None, description="chunk shape of the output z,y,x [default: derived from the block]")
    shards: Triple | None = Field(None, description="shard shape of the output z,y,x [default: the block]")
    executor: Literal["auto", "serial", "threads", "ray"] = Field(
        "auto",
        description="serial: one worker in this process; threads: one a CPU core in this process; ray: actors; auto: "
        "threads up to 8 workers on CPUs, ray beyond, for several GPUs and on a cluster",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="most workers [default: one a GPU, else one a CPU core; on a cluster what it has or gets]",
    )
    address: str | None = Field(None, description="address of a Ray cluster [default: Ray started inside this process]")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the network runs")
    batch: int | None = Field(None, ge=1, le=1024, description="patches a forward [default: 1 on CPUs, 4 on GPUs]")
    memory: float | None = Field(
        None, gt=0.0, description="memory limit of a worker in GiB [default: a share of what is free, at most 8]"
    )
    allow_device: str | None = Field(
        None, description="fingerprint of another device that may finish an interrupted job [default: none]"
    )
    seams: Literal["auto", "on", "off"] = Field(
        "auto",
        description="blocks share the patches at their borders, so that each is computed once (on), or compute them "
        "again (off); auto: what is sooner done",
    )
    seam_memory: float | None = Field(
        None,
        gt=0.0,
        description="GiB that sums may take while they wait for other blocks, on all machines together [default: a "
        "share of Ray's object stores, or of --memory]",
    )
    attempts: int = Field(3, ge=1, le=100, description="how often a block is tried before it is set aside")
    overwrite: bool = Field(False, description="replace an existing output that volseg wrote with another spec")
    webhook: str | None = Field(
        None, description="URL that gets a signed message from the driver at the end; its operator must allow it"
    )

    @property
    def in_process(self) -> bool:
        """Tell whether an executor is asked for that works in the process that runs the job, without Ray."""
        return self.executor in {"serial", "threads"}

    _axes = field_validator("axis", mode="before")(parse_list())
    _triples = field_validator("patch", "tile", "block", "chunks", "shards", mode="before")(parse_triple)
    _sides = field_validator("patch", "tile", "block", "chunks", "shards")(positive)

    @field_validator("seams", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        # YAML takes a bare on or off for a truth value.
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("axis")
    @classmethod
    def _axes_differ(cls, value: Axes | None) -> Axes | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("every axis at most once")
        return value

    @model_validator(mode="after")
    def _window_fits_blend(self) -> Self:
        if self.blend != "exact" and self.tile is not None:
            raise ValueError(
                f"tile {','.join(map(str, self.tile))} belongs to blend exact, and blend is {self.blend}: say "
                "--blend exact, or leave the tile out"
            )
        given = [
            f"{name} {value}" for name, value in (("patch", self.patch), ("overlap", self.overlap)) if value is not None
        ]
        if self.blend == "exact" and given:
            raise ValueError(
                f"{' and '.join(given)} was given, but blend exact has no patches that overlap: leave it out, and use "
                "--tile for what one forward answers for"
            )
        return self
