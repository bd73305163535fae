"""What `model.json` says: everything that is needed to run a bundle's networks, apart from their weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from volseg.geometry.box import Triple
from volseg.intensity import Scaling
from volseg.models.config import Axis, NetworkConfig, to_network, to_volume
from volseg.models.registry import make_config

WEIGHTS_NAME = "model.safetensors"
# Of all members together.
WEIGHTS_LIMIT = 4 << 30

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class ClassInfo(BaseModel):
    """One class: the value in the label volume, its name, and its colour in pictures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int = Field(ge=0, lt=65535)
    name: str = Field(min_length=1, max_length=200)
    color: str = Field(pattern=r"^#[0-9a-fA-F]{6}$")


class FileInfo(BaseModel):
    """Identity of one file of weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Digest
    size: int = Field(ge=1, le=WEIGHTS_LIMIT)


@dataclass(frozen=True, slots=True)
class InputSides:
    """What a network asks of its input along each axis (z, y, x) of the volume, in voxels.

    A side n is allowed where n >= `smallest` and (n - `phase`) is a multiple of `pooling`; the answer is smaller than
    the input by `margin` at each end.
    """

    pooling: Triple
    phase: Triple
    smallest: Triple
    margin: Triple

    def allow(self, sides: Triple) -> bool:
        """Tell whether an input of `sides` (z, y, x) can be answered."""
        rules = zip(sides, self.pooling, self.phase, self.smallest, strict=True)
        return all(side >= least and (side - phase) % pooling == 0 for side, pooling, phase, least in rules)


class BundleManifest(BaseModel):
    """All that is needed to run a trained network, or several as one, on a volume, apart from the weights.

    `patch` is the network's input (z, y, x) in voxels of the volume; for a 2D network its side along `axis` is 1.
    `threshold` is the probability above which class 1 wins, for one sigmoid channel only; elsewhere it is None.
    `class_bias` is added to the logits before a softmax, one entry a class. The members of an ensemble share all of
    this; their probabilities are averaged. `provenance` says how the networks came to be and determines nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[2] = 2
    architecture: str = Field(min_length=1, max_length=100)
    arguments: dict[str, Any]
    classes: tuple[ClassInfo, ...] = Field(min_length=2, max_length=65535)
    activation: Literal["softmax", "sigmoid"]
    threshold: float | None = Field(None, gt=0.0, lt=1.0)
    class_bias: tuple[float, ...] | None = None
    scaling: Scaling
    voxel_size: tuple[float, float, float] | None = None
    unit: str | None = Field(None, max_length=100)
    patch: Triple
    axis: Axis = "z"
    overlap: float = Field(0.5, ge=0.0, lt=1.0)
    provenance: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, FileInfo] = Field(default_factory=dict)
    digest: Digest | None = None

    @model_validator(mode="after")
    def _check(self) -> BundleManifest:
        if [c.id for c in self.classes] != list(range(len(self.classes))):
            raise ValueError("class ids must be 0, 1, 2, ... in this order")
        if min(self.patch) < 1:
            raise ValueError(f"every side of the patch must be at least 1 voxel, got {self.patch}")
        if self.voxel_size is not None and not all(math.isfinite(v) and v > 0 for v in self.voxel_size):
            raise ValueError(f"voxel sizes must be finite and above 0, got {self.voxel_size}")
        if self.activation == "sigmoid" and len(self.classes) != 2:
            raise ValueError(f"one sigmoid channel separates two classes, not {len(self.classes)}")
        if (self.threshold is not None) != (self.activation == "sigmoid"):
            raise ValueError("a threshold belongs to the sigmoid activation, and only to it")
        if self.class_bias is not None:
            self._check_bias(self.class_bias)
        return self

    def _check_bias(self, bias: tuple[float, ...]) -> None:
        if self.activation == "sigmoid":
            raise ValueError("a class_bias belongs to the softmax activation; a sigmoid has its threshold")
        if len(bias) != len(self.classes):
            raise ValueError(f"class_bias has {len(bias)} entries, its {len(self.classes)} classes need one each")
        if not all(math.isfinite(value) for value in bias):
            raise ValueError(f"every class_bias must be a finite number, got {bias}")

    @property
    def config(self) -> NetworkConfig:
        """The checked arguments of the architecture; raises BundleError."""
        return make_config(self.architecture, self.arguments)

    @property
    def members(self) -> int:
        """Number of networks, which is that of the files of weights."""
        return max(1, len(self.files))

    @property
    def pooling(self) -> Triple:
        """Steps (z, y, x) between allowed input sides; see `InputSides`."""
        return self.sides().pooling

    @property
    def phase(self) -> Triple:
        """What is left of allowed input sides (z, y, x) after division by the pooling; see `InputSides`."""
        return self.sides().phase

    @property
    def smallest(self) -> Triple:
        """Smallest allowed input sides (z, y, x); see `InputSides`."""
        return self.sides().smallest

    @property
    def margin(self) -> Triple:
        """Voxels (z, y, x) by which the answer is smaller than the input at each end."""
        return self.sides().margin

    def sides(self, axis: Axis | None = None) -> InputSides:
        """Return what the networks ask of their input; a 2D network that goes along `axis` instead of its own."""
        config = self.config
        along = axis or self.axis
        rules = (config.pooling, config.phase, config.smallest, config.margin)
        return InputSides(*(to_volume(rule, along) if config.dims == 2 else rule for rule in rules))

    def patch_along(self, axis: Axis) -> Triple:
        """Return the patch (z, y, x) of a 2D network that goes along `axis`; that of a 3D network stays."""
        return to_volume(to_network(self.patch, self.axis), axis) if self.config.dims == 2 else self.patch

    def sealed(self, weights: Mapping[str, FileInfo]) -> BundleManifest:
        """Return the manifest with the identity of its files of weights and its own digest."""
        described = self.model_copy(update={"files": dict(weights), "digest": None})
        return described.model_copy(update={"digest": described.compute_digest()})

    def compute_digest(self) -> str:
        """Return the digest that `model.json` must state."""
        return digest_of(self.model_dump(mode="json"))


def weights_names(members: int) -> tuple[str, ...]:
    """Return the names of the files that hold the weights of so many networks."""
    return (WEIGHTS_NAME,) if members == 1 else tuple(f"model-{i}.safetensors" for i in range(members))


def digest_of(values: Mapping[str, Any]) -> str:
    """Return the digest of the `values` of a `model.json`, its own left out: sha256 of their canonical JSON.

    Of what the file says, not of what this version reads in it: keys that came later would change older digests.
    """
    described = {key: value for key, value in values.items() if key != "digest"}
    text = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
