"""`model.json`, the description that makes a bundle complete: everything but the weights, readable without torch.

A bundle is a folder with `model.json` and `model.safetensors`. The manifest holds the digest of the weights, and its
own: whoever changes either is found out before anything is computed.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from volseg.errors import BundleError
from volseg.geometry.box import Triple
from volseg.intensity import Scaling
from volseg.models.config import Axis, UNetConfig, to_volume
from volseg.models.registry import make_config
from volseg.storage import files

FORMAT_VERSION = 1
MANIFEST_NAME = "model.json"
WEIGHTS_NAME = "model.safetensors"
MANIFEST_LIMIT = 1 << 20
WEIGHTS_LIMIT = 4 << 30
# Names, shapes and offsets of the tensors stand before the values.
_HEADER_LIMIT = 1 << 20

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class ClassInfo(BaseModel):
    """One class: the value in the label volume, its name, and its colour in pictures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int = Field(ge=0, lt=65535)
    name: str = Field(min_length=1, max_length=200)
    color: str = Field(pattern=r"^#[0-9a-fA-F]{6}$")


class FileInfo(BaseModel):
    """Identity of one file of the bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Digest
    size: int = Field(ge=1, le=WEIGHTS_LIMIT)


class BundleManifest(BaseModel):
    """All that is needed to run a trained network on a volume, apart from its weights.

    `patch` is (z, y, x) in voxels of the volume; for a 2D network its side along `axis` is 1. `threshold` is the
    probability above which class 1 wins, for one sigmoid channel only; elsewhere it is None. `provenance` says how the
    network came to be and determines nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    architecture: str = Field(min_length=1, max_length=100)
    arguments: dict[str, Any]
    classes: tuple[ClassInfo, ...] = Field(min_length=2, max_length=65535)
    activation: Literal["softmax", "sigmoid"]
    threshold: float | None = Field(None, gt=0.0, lt=1.0)
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
        return self

    @property
    def config(self) -> UNetConfig:
        """The checked arguments of the architecture; raises BundleError."""
        return make_config(self.architecture, self.arguments)

    @property
    def pooling(self) -> Triple:
        """Numbers that the sides of a patch (z, y, x) must be multiples of."""
        config = self.config
        return to_volume(config.pooling, self.axis) if config.dims == 2 else config.pooling

    def sealed(self, weights: FileInfo) -> BundleManifest:
        """Return the manifest with the identity of its weights and its own digest."""
        described = self.model_copy(update={"files": {WEIGHTS_NAME: weights}, "digest": None})
        return described.model_copy(update={"digest": described.compute_digest()})

    def compute_digest(self) -> str:
        """Return the sha256 of the manifest without its digest, in canonical JSON."""
        values = self.model_dump(mode="json", exclude={"digest"})
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(uri: str) -> BundleManifest:
    """Read and check the bundle at `uri` without loading the network.

    Raises BundleError where a file is missing, too large or damaged, a value is not allowed, the architecture is
    unknown, or the weights are not of the size that it needs.
    """
    manifest = _parse(uri, _read_limited(uri, MANIFEST_NAME, MANIFEST_LIMIT))
    _check_network(uri, manifest)
    weights = _read_limited(uri, WEIGHTS_NAME, manifest.files[WEIGHTS_NAME].size)
    _check_weights(uri, manifest, weights)
    return manifest


def bundle_digest(uri: str) -> str:
    """Return the digest that names the bundle at `uri`, weights included; raises BundleError like `read_manifest`."""
    digest = read_manifest(uri).digest
    assert digest is not None  # read_manifest refuses a manifest without one
    return digest


def read_checked(uri: str) -> tuple[BundleManifest, bytes]:
    """Return the manifest and the bytes of the weights, both checked; raises BundleError."""
    manifest = read_manifest(uri)
    weights = _read_limited(uri, WEIGHTS_NAME, manifest.files[WEIGHTS_NAME].size)
    _check_weights(uri, manifest, weights)
    return manifest, weights


def _read_limited(uri: str, name: str, limit: int) -> bytes:
    place = files.join(uri, name)
    size = files.size(place)
    if size is None:
        if not files.exists(uri):
            raise BundleError(f"no model bundle at {uri}: nothing is there; give the folder that `volseg train` wrote")
        raise BundleError(f"{uri} is no complete model bundle: {name} is missing; train again or copy the whole folder")
    if size > limit:
        raise BundleError(
            f"{place} has {size} bytes, more than the {limit} that are allowed for it; it was not read: "
            "the bundle is damaged or not volseg's"
        )
    return files.read_bytes(place)


def _parse(uri: str, data: bytes) -> BundleManifest:
    place = files.join(uri, MANIFEST_NAME)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{place} is not JSON ({error}); the bundle cannot be used: train again or copy it anew"
        ) from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{place}: format_version is {version!r}, this version of volseg reads {FORMAT_VERSION}; "
            "use the version that wrote the bundle"
        )
    try:
        manifest = BundleManifest.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors()[:5])
        raise BundleError(f"{place} is not allowed: {faults}; the bundle cannot be used") from None
    if manifest.digest != manifest.compute_digest():
        raise BundleError(
            f"{place} was changed after training: its digest is {str(manifest.digest)[:12]}, "
            f"its content gives {manifest.compute_digest()[:12]}; the bundle is not used: train again or copy it anew"
        )
    return manifest


def _check_network(uri: str, manifest: BundleManifest) -> None:
    config = manifest.config
    outputs = 1 if manifest.activation == "sigmoid" else len(manifest.classes)
    faults = []
    if config.out_channels != outputs:
        faults.append(f"the network has {config.out_channels} output channels, its classes need {outputs}")
    if config.in_channels != manifest.scaling.channels:
        faults.append(f"the network takes {config.in_channels} channels, the scaling has {manifest.scaling.channels}")
    if any(side % factor for side, factor in zip(manifest.patch, manifest.pooling, strict=True)):
        faults.append(f"patch {manifest.patch} is no multiple of the pooling factor {manifest.pooling}")
    if set(manifest.files) != {WEIGHTS_NAME}:
        faults.append(f"its files must be {WEIGHTS_NAME} alone, got {sorted(manifest.files)}")
    elif not 0 <= manifest.files[WEIGHTS_NAME].size - config.state_bytes <= _HEADER_LIMIT:
        faults.append(
            f"{WEIGHTS_NAME} has {manifest.files[WEIGHTS_NAME].size} bytes, the architecture needs {config.state_bytes}"
        )
    if faults:
        raise BundleError(f"{files.join(uri, MANIFEST_NAME)}: {'; '.join(faults)}; the bundle cannot be used")


def _check_weights(uri: str, manifest: BundleManifest, weights: bytes) -> None:
    info = manifest.files[WEIGHTS_NAME]
    found = hashlib.sha256(weights).hexdigest()
    if (len(weights), found) != (info.size, info.sha256):
        raise BundleError(
            f"{files.join(uri, WEIGHTS_NAME)} is not what was trained: {len(weights)} bytes with digest {found[:12]}, "
            f"expected {info.size} with {info.sha256[:12]}; the bundle is not used: train again or copy it anew"
        )
