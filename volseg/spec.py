"""What the user asks for: one pydantic model behind the command line, the Python call and the YAML file.

Every option carries its meaning, its unit and its limits; `volseg segment --help` prints them from here.
"""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from volseg.errors import SpecError, nearest
from volseg.geometry.box import Triple


class Spec(BaseModel):
    """Base of all specs: unknown keys are refused with the nearest right name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def read(cls, values: dict[str, Any]) -> Self:
        """Check `values` and return the spec; raises SpecError with one line for every fault."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SpecError(
                "; ".join(_explain(cls, e["loc"], e["type"], e["msg"], e["input"]) for e in error.errors())
                + "; nothing was done"
            ) from None


def _explain(cls: type[BaseModel], loc: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    name = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        return f"unknown option {name!r}{nearest(name, cls.model_fields)}"
    if kind == "missing":
        return f"option {name!r} is missing"
    return f"option {name!r}: {value!r} is not allowed: {message.removeprefix('Value error, ')}"


def parse_triple(value: object) -> object:
    """Turn ``"1,256,256"`` or ``"64"`` (three equal sides) into (z, y, x); other values pass through to pydantic."""
    rule = "write three whole numbers z,y,x such as 64,64,64, or one for all three"
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value, value)
    if isinstance(value, str):
        parts = value.replace(" ", "").strip("()[]").split(",")
        if not all(re.fullmatch(r"\d+", p) for p in parts) or len(parts) not in {1, 3}:
            raise ValueError(rule)
        numbers = [int(p) for p in parts]
        return tuple(numbers * 3 if len(numbers) == 1 else numbers)
    if isinstance(value, list | tuple) and len(value) != 3:
        raise ValueError(rule)
    return value


def parse_floats(text: str | None, option: str) -> tuple[float, float, float] | None:
    """Turn ``"0.1,0.022,0.022"`` or ``"3"`` (three equal) into (z, y, x); raises SpecError."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in {1, 3}:
        raise SpecError(f"{option} {text!r}: write three numbers z,y,x such as 0.1,0.022,0.022, or one for all three")
    z, y, x = numbers * 3 if len(numbers) == 1 else numbers
    return z, y, x


def _positive(value: Triple | None) -> Triple | None:
    if value is not None and min(value) < 1:
        raise ValueError("every side must be at least 1 voxel")
    return value


class SegmentSpec(Spec):
    """Segment a volume: what goes in, what comes out, the sliding window, and who does the work."""

    input: str = Field(description="image volume: a Zarr array or an OME-Zarr, a path or a URI")
    output: str = Field(description="where the OME-Zarr label volume is written")
    model: str = Field(description="model bundle: the folder that `volseg train` wrote")
    patch: Triple | None = Field(None, description="network input z,y,x in voxels [default: the bundle's]")
    overlap: float = Field(0.5, ge=0.0, lt=1.0, description="overlap of neighbouring patches as a fraction, 0 <= F < 1")
    blend: Literal["gaussian", "constant"] = Field("gaussian", description="weights that patches are blended with")
    axis: Literal["z", "y", "x"] | None = Field(
        None, description="axis along which a 2D network goes slice by slice [default: the bundle's]"
    )
    roi: str | None = Field(None, description="region to segment, z,y,x ranges such as 0:14,:,: [default: everything]")
    threshold: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="probability above which class 1 wins, two classes only [default: the bundle's]",
    )
    probabilities: bool = Field(False, description="write uint8 probabilities of every class, too")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the network")
    nan: Literal["error", "fill"] = Field(
        "error", description="NaN or Inf in the input: stop the block, or fill with the low end and count"
    )
    block: Triple | None = Field(None, description="unit of scheduled work z,y,x in voxels [default: planned]")
    chunks: Triple | None = Field(None, description="chunk shape of the output z,y,x [default: derived from the block]")
    shards: Triple | None = Field(None, description="shard shape of the output z,y,x [default: the block]")
    executor: Literal["auto", "serial", "ray"] = Field(
        "auto", description="serial: in this process; ray: actors; auto: ray for more than one worker"
    )
    workers: int | None = Field(None, ge=1, description="number of workers [default: one a GPU, else one a CPU core]")
    address: str | None = Field(None, description="address of a Ray cluster [default: Ray started inside this process]")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the network runs")
    batch: int | None = Field(None, ge=1, le=1024, description="patches a forward [default: 1 on CPUs, 4 on GPUs]")
    memory: float | None = Field(
        None, gt=0.0, description="memory limit of a worker in GiB [default: a share of what is free, at most 8]"
    )
    allow_device: str | None = Field(
        None, description="fingerprint of another device that may finish an interrupted job [default: none]"
    )
    attempts: int = Field(3, ge=1, le=100, description="how often a block is tried before it is set aside")
    overwrite: bool = Field(False, description="replace an existing output that volseg wrote with another spec")

    _triples = field_validator("patch", "block", "chunks", "shards", mode="before")(parse_triple)
    _sides = field_validator("patch", "block", "chunks", "shards")(_positive)


class TrainSpec(Spec):
    """Train a network on labelled regions of one volume and write a bundle."""

    image: str = Field(description="image volume: a Zarr array or an OME-Zarr, a path or a URI")
    labels: str = Field(description="label volume of the same shape; 255 means unlabelled")
    out: str = Field(description="folder of the bundle that is written")
    dims: Literal[2, 3] = Field(3, description="2: slice by slice, 3: volumetric")
    axis: Literal["z", "y", "x"] = Field("z", description="axis that a 2D network goes along")
    train_roi: str = Field(":,:,:", description="region to train on, z,y,x ranges such as 0:14,:,:")
    val_roi: str | None = Field(None, description="region to validate on, apart from --train-roi [default: none]")
    classes: tuple[str, ...] | None = Field(
        None,
        description="class names from 0 on, comma-separated [default: those of the labels, else class 0, class 1 ...]",
    )
    ignore: int = Field(255, ge=0, description="label value that means unlabelled")
    patch: Triple | None = Field(None, description="patch z,y,x in voxels [default: planned]")
    batch: int | None = Field(None, ge=1, le=1024, description="patches a step [default: planned]")
    widths: tuple[int, ...] | None = Field(None, description="channels a level, e.g. 16,32,64,128 [default: planned]")
    pools: tuple[Triple, ...] | None = Field(
        None, description="pooling factors z,y,x between the levels, e.g. '1,2,2;2,2,2' [default: planned]"
    )
    convs: int = Field(2, ge=1, le=8, description="convolutions a level")
    activation: Literal["relu", "leaky_relu", "silu"] = Field("relu", description="activation function")
    up: Literal["transpose", "nearest"] = Field("transpose", description="upsampling: learnt or nearest neighbour")
    norm: Literal["batch", "instance", "group", "none"] = Field("batch", description="normalisation layers")
    residual: bool = Field(False, description="residual connections around the convolutions of a level")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout probability at each level")
    learning_rate: float = Field(2e-3, gt=0.0, le=1.0, description="peak learning rate of AdamW")
    weight_decay: float = Field(1e-2, ge=0.0, le=1.0, description="weight decay of AdamW")
    augment: bool = Field(True, description="change the training patches at random: shape, grey values, noise")
    turns: Literal["auto", "always", "never"] = Field(
        "auto", description="quarter turns of patches; auto: unless a voxel's place tells its class, as in a body"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="arithmetic of the training steps; auto: bf16 where the processor has it"
    )
    max_steps: int = Field(10_000, ge=1, description="optimiser steps at most")
    max_minutes: float | None = Field(None, gt=0.0, description="wall-clock limit in minutes, validation included")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything random")
    resume: bool = Field(True, description="continue an interrupted training in the same folder")
    overwrite: bool = Field(False, description="replace a finished bundle in the same folder")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the network is trained")
    workers: int | None = Field(None, ge=1, description="CPU threads [default: all cores]")

    @field_validator("patch", mode="before")
    @classmethod
    def _patch_text(cls, value: object) -> object:
        return parse_triple(value)

    @field_validator("pools", mode="before")
    @classmethod
    def _pools_text(cls, value: object) -> object:
        return tuple(parse_triple(part) for part in value.split(";")) if isinstance(value, str) else value

    @field_validator("dims", mode="before")
    @classmethod
    def _dims_text(cls, value: object) -> object:
        # A choice between numbers does not take the command line's text by itself.
        return int(value) if isinstance(value, str) and value in {"2", "3"} else value

    @field_validator("widths", "classes", mode="before")
    @classmethod
    def _list_text(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            return (value,)
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    _sides = field_validator("patch")(_positive)
